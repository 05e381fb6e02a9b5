"""Chooses what our own schedule leaves open, by simulating every choice on a cost table.

How many waves run the experts, and how many slots the ring has, depend on what is slow: with fast
attention one wave and a short ring leave most slots to experts that stay; where attention on the
host takes as long as the link, two waves overlap it with the experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from specmoeoff.errors import InvalidInputError
from specmoeoff.pipeline.schedules import build_plan
from specmoeoff.pipeline.simulator import simulate_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from specmoeoff.pipeline.costs import Costs
    from specmoeoff.pipeline.plan import Plan
    from specmoeoff.pipeline.schedules.shape import StepShape

STEPS = 3
"""Steps simulated; the first one starts with an empty ring and does not count."""


def steps_of(schedule: str, shape: StepShape, num_steps: int = STEPS) -> list[Plan]:
    """Return plans of steps that follow one another, the first with nothing in the ring."""
    plans: list[Plan] = []
    for _ in range(num_steps):
        plans.append(build_plan(schedule, shape, plans[-1].held_at_end if plans else ()))
    return plans


def steady_step_s(schedule: str, shape: StepShape, costs: Costs) -> float:
    """Return the seconds of a step among others, simulated."""
    return simulate_steps(steps_of(schedule, shape), costs)[-1].step_s


def tuned(shape: StepShape, costs: Costs) -> StepShape:
    """Return the shape with the waves and the ring that make our schedule's step shortest."""
    return min(_choices(shape), key=lambda choice: steady_step_s("specmoeoff", choice, costs))


def _choices(shape: StepShape) -> Iterator[StepShape]:
    """Yield the shapes to try that can run at all, one wave with the schedule's own ring first."""
    rings = sorted({2, 3, 4, 6, shape.num_experts, 2 * shape.num_experts} & _up_to(shape.num_slots))
    for waves in (1, 2) if len(shape.micro_batches) > 1 else (1,):
        for ring in (None, *rings):
            choice = replace(shape, waves=waves, ring_slots=ring)
            try:
                build_plan("specmoeoff", choice)
            except InvalidInputError:
                # Two waves hold a layer's experts at once, which a short ring cannot.
                continue
            yield choice


def _up_to(most: int) -> set[int]:
    return set(range(1, most + 1))
