"""Ours: attention of one micro-batch on the host beside another's device work, one belt for all.

Every expert is loaded once a step and runs over as many rows as possible: over the whole batch, or,
where attention on the host is what takes long, over each of ``waves`` groups of micro-batches, so
that one group's attention overlaps another group's experts. Late micro-batches are drafted while
early ones are in attention. The belt never stops: whatever is free at the end of the step is filled
for the next one while tokens are verified and drafted.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from specmoeoff.pipeline.schedules.belt import Belt, Split, split
from specmoeoff.pipeline.schedules.writer import PlanWriter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from specmoeoff.pipeline.plan import Held, Plan
    from specmoeoff.pipeline.schedules.shape import StepShape

SPARE_SLOTS = 2
"""Slots beyond a layer's: one that arrives while another is in use."""


def build(shape: StepShape, held: tuple[Held, ...] = ()) -> Plan:
    """Return the plan of a step that finds ``held`` in the ring."""
    writer = PlanWriter("specmoeoff", shape)
    waves = _waves(len(shape.micro_batches), shape.waves)
    belt = Belt(writer, _split(shape), held)
    last_layer = shape.config.num_layers - 1
    attended = [{m: _attention(writer, 0, m, [writer.embed(m)]) for m in batch} for batch in waves]
    for layer in range(shape.config.num_layers):
        for w, batch in enumerate(waves):
            routed = [writer.post_attention(layer, m, attended[w][m]) for m in batch]
            done = routed
            for experts in _groups(belt, shape, layer):
                for e in experts:
                    if e in belt.streamed(layer):
                        belt.load(layer, e)
                is_last_wave = w == len(waves) - 1
                done = [belt.run(layer, experts, batch, [*routed, *done], is_last_wave)]
            for m in batch:
                if layer < last_layer:
                    attended[w][m] = _attention(writer, layer + 1, m, done)
                else:
                    writer.head(m, done)
    return writer.finish(belt.held, belt.run_on())


def _split(shape: StepShape) -> Split:
    """Choose the ring: a layer and a little more; two layers if waves hold one while it is used.

    It must not depend on the micro-batches: what stays, stays from step to step.
    """
    if shape.ring_slots is not None:
        return split(shape, 0.0, shape.ring_slots)
    return split(shape, 1.0, SPARE_SLOTS) if shape.waves == 1 else split(shape, 2.0)


def _attention(writer: PlanWriter, layer: int, m: int, after: list[int]) -> int:
    return writer.attend_on_host(layer, m, writer.pre_attention(layer, m, after))


def _waves(num_batches: int, waves: int) -> list[tuple[int, ...]]:
    """Divide the micro-batches into at most ``waves`` runs of about equal length."""
    waves = min(waves, num_batches)
    bounds = [num_batches * w // waves for w in range(waves + 1)]
    return [tuple(range(a, b)) for a, b in itertools.pairwise(bounds)]


def _groups(belt: Belt, shape: StepShape, layer: int) -> Iterator[tuple[int, ...]]:
    """Cut a layer's experts after each streamed one, so that no op waits for two loads."""
    group: list[int] = []
    streamed = set(belt.streamed(layer))
    for expert in range(shape.num_experts):
        group.append(expert)
        if expert in streamed:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)
