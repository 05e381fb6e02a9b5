"""The schedules: rules that build a step's plan out of the same ops, ours and five rivals'.

All give the same tokens; they differ in what overlaps, what is moved how often, and what waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from specmoeoff.errors import InvalidInputError
from specmoeoff.pipeline.plan import Held, Plan
from specmoeoff.pipeline.schedules import (
    flexgen,
    moe_gen,
    moe_lightning,
    spec_offload,
    specmoeoff,
    zero_inference,
)
from specmoeoff.pipeline.schedules.shape import StepShape

Builder = Callable[[StepShape, tuple[Held, ...]], Plan]

SCHEDULES: Mapping[str, Builder] = {
    "specmoeoff": specmoeoff.build,
    "zero_inference": zero_inference.build,
    "flexgen": flexgen.build,
    "moe_lightning": moe_lightning.build,
    "moe_gen": moe_gen.build,
    "spec_offload": spec_offload.build,
}


def build_plan(schedule: str, shape: StepShape, held: tuple[Held, ...] = ()) -> Plan:
    """Return a step's plan.

    Args:
        schedule: A name of ``SCHEDULES``.
        shape: The step.
        held: What the plan of the step before, of the same schedule and slots, left in the ring.

    Raises:
        InvalidInputError: There is no such schedule, or it needs more expert slots at once.
    """
    if schedule not in SCHEDULES:
        raise InvalidInputError(
            f"schedule {schedule!r} is unknown; use one of {', '.join(SCHEDULES)}"
        )
    return SCHEDULES[schedule](shape, held)
