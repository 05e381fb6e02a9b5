"""MoE-Lightning's CGOPipe: attention on the host, launched ahead; weights in pages between.

Each micro-batch runs its own experts, so a layer's weights are in two halves of the ring: one in
use, one being filled page by page. A page follows each hidden state on the link, so neither waits
long for the other. While a micro-batch is in the feed-forward, the next one is in attention and the
one after that before it, across layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specmoeoff.pipeline.schedules.belt import Belt, split
from specmoeoff.pipeline.schedules.writer import PlanWriter

if TYPE_CHECKING:
    from specmoeoff.pipeline.plan import Held, Plan
    from specmoeoff.pipeline.schedules.shape import StepShape

AHEAD = 2
"""Micro-batches whose attention is under way when one enters its feed-forward."""


def build(shape: StepShape, held: tuple[Held, ...] = ()) -> Plan:
    """Return the plan of a step that finds its first layers' experts, ``held``, in the ring."""
    writer = PlanWriter("moe_lightning", shape)
    belt = Belt(writer, split(shape, 2.0), held)
    num_batches = len(shape.micro_batches)
    turns = [(layer, m) for layer in range(shape.config.num_layers) for m in range(num_batches)]
    done = {(0, m): writer.embed(m) for m in range(num_batches)}
    attended: dict[tuple[int, int], int] = {}
    for at in turns[: min(AHEAD, num_batches)]:
        attended[at] = _attend(writer, at, done[at])
    for turn, (layer, m) in enumerate(turns):
        if (layer, m) not in attended:
            attended[layer, m] = _attend(writer, (layer, m), done[layer, m])
        arrived = attended.pop((layer, m))
        if m == 0:
            for e in belt.streamed(layer):
                belt.load(layer, e)
        if layer + 1 < shape.config.num_layers:
            page = belt.streamed(layer + 1)
            first, last = (len(page) * n // num_batches for n in (m, m + 1))
            for e in page[first : min(last, first + belt.room)]:
                belt.load(layer + 1, e, [arrived])
        routed = writer.post_attention(layer, m, arrived)
        ends = m == num_batches - 1
        ran = belt.run(layer, range(shape.num_experts), (m,), [routed], release=ends)
        done[layer + 1, m] = ran
        if turn + AHEAD < len(turns) and (ahead := turns[turn + AHEAD]) in done:
            attended[ahead] = _attend(writer, ahead, done[ahead])
    for m in range(num_batches):
        writer.head(m, [done[shape.config.num_layers, m]])
    return writer.finish(belt.held, belt.run_on())


def _attend(writer: PlanWriter, at: tuple[int, int], after: int) -> int:
    layer, m = at
    return writer.attend_on_host(layer, m, writer.pre_attention(layer, m, [after]))
