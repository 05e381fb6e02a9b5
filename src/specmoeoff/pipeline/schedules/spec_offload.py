"""SpecOffload's two half-batches: the target verifies one while the draft proposes for the other.

Attention of the target is on the host, its feed-forward streamed; the draft has the device to
itself in between. Each half is a pass of its own, so the weights are streamed once for each. A step
verifies all its drafts, so the first half is drafted before its turn and not beside the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specmoeoff.pipeline.schedules.belt import Belt, split
from specmoeoff.pipeline.schedules.writer import PlanWriter

if TYPE_CHECKING:
    from specmoeoff.pipeline.plan import Held, Plan
    from specmoeoff.pipeline.schedules.shape import StepShape


def build(shape: StepShape, held: tuple[Held, ...] = ()) -> Plan:
    """Return the plan of a step that finds its first layers' experts, ``held``, in the ring."""
    writer = PlanWriter("spec_offload", shape)
    belt = Belt(writer, split(shape, 2.0), held)
    batch = tuple(range(len(shape.micro_batches)))
    middle = (len(batch) + 1) // 2
    halves = [half for half in (batch[:middle], batch[middle:]) if half]
    ended: list[int] = []
    for turn, half in enumerate(halves):
        begin = ended
        done = [writer.embed(m, begin) for m in half]
        for layer in range(shape.config.num_layers):
            attended = [
                writer.attend_on_host(layer, m, writer.pre_attention(layer, m, done)) for m in half
            ]
            if shape.draft is not None and layer == turn == 0:
                for m in batch[middle:]:
                    writer.draft(m)
            routed = [
                writer.post_attention(layer, m, at) for m, at in zip(half, attended, strict=True)
            ]
            for e in belt.streamed(layer):
                belt.load(layer, e)
            done = [belt.run(layer, range(shape.num_experts), half, routed, release=True)]
        ended = [writer.head(m, done) for m in half]
    return writer.finish(belt.held, belt.run_on())
