"""FlexGen's zig-zag: all micro-batches through a layer before the next, in lock-step with the link.

While one micro-batch computes, the next one's hidden states and keys and values come in, the last
one's go out, and a share of the next layer's weights is loaded; then everything waits for
everything. Attention is on the device, over keys and values shipped there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specmoeoff.pipeline.schedules.belt import Belt, split
from specmoeoff.pipeline.schedules.writer import PlanWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.pipeline.plan import Held, Plan
    from specmoeoff.pipeline.schedules.shape import StepShape


def build(shape: StepShape, held: tuple[Held, ...] = ()) -> Plan:
    """Return the plan of a step that finds its first layers' experts, ``held``, in the ring."""
    writer = PlanWriter("flexgen", shape)
    belt = Belt(writer, split(shape, 2.0), held)
    num_batches = len(shape.micro_batches)
    # What each micro-batch's next computation waits for.
    ready = [[writer.embed(m)] for m in range(num_batches)]
    turns = [(layer, m) for layer in range(shape.config.num_layers) for m in range(num_batches)]
    past = writer.bring_kv(*turns[0], buffer=0)
    gate: Sequence[int] = ()
    for turn, (layer, m) in enumerate(turns):
        # Everything written in this turn starts when all of the turn before has ended.
        begin = writer.num_ops
        _load(belt, layer, belt.streamed(layer), gate)
        pre = writer.pre_attention(layer, m, [*ready[m], *gate])
        attended = writer.attend_with_kv(layer, m, pre, past)
        if turn and num_batches > 1:
            _park(writer, ready, turns[turn - 1][1], gate)
        if turn + 1 < len(turns):
            past = writer.bring_kv(*turns[turn + 1], buffer=(turn + 1) % 2, after=gate)
            _fetch(writer, ready, turns[turn + 1][1], gate)
        if layer + 1 < shape.config.num_layers:
            share = belt.streamed(layer + 1)
            first, last = (len(share) * n // num_batches for n in (m, m + 1))
            # Where the ring has less than two layers, the rest is loaded when it is wanted.
            _load(belt, layer + 1, share[first : min(last, first + belt.room)], gate)
        routed = writer.post_attention(layer, m, attended)
        ends = m == num_batches - 1
        done = belt.run(layer, range(shape.num_experts), (m,), [routed], release=ends)
        ready[m] = [done]
        gate = tuple(range(begin, writer.num_ops))
    for m in range(num_batches):
        _fetch(writer, ready, m, gate)
        writer.head(m, ready[m])
    return writer.finish(belt.held, belt.run_on())


def _load(belt: Belt, layer: int, experts: Sequence[int], gate: Sequence[int]) -> None:
    for expert in experts:
        belt.load(layer, expert, gate)


def _park(writer: PlanWriter, ready: list[list[int]], m: int, gate: Sequence[int]) -> None:
    """Send a micro-batch's hidden states to the host after its turn."""
    out = writer.hidden_out(m, [*ready[m], *gate])
    if out is not None:
        ready[m] = [out]


def _fetch(writer: PlanWriter, ready: list[list[int]], m: int, gate: Sequence[int]) -> None:
    """Bring a parked micro-batch's hidden states back for its next turn."""
    if writer.is_kind(ready[m][0], "hidden_out"):
        arrived = writer.hidden_in(m, [*ready[m], *gate])
        assert arrived is not None
        ready[m] = [arrived]
