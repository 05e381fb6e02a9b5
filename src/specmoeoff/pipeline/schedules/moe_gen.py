"""MoE-Gen's module-based batching: attention in small micro-batches, experts over the whole batch.

Each module is done for the whole batch before the next begins. A share of attention runs on the
host, the rest on the device over shipped keys and values. The next expert is loaded while this one
runs, so what the link can do during attention ends where that buffer is full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specmoeoff.pipeline.schedules.belt import Belt, split
from specmoeoff.pipeline.schedules.writer import PlanWriter

if TYPE_CHECKING:
    from specmoeoff.pipeline.plan import Held, Plan
    from specmoeoff.pipeline.schedules.shape import StepShape

HOST_SHARE = 0.6
"""Share of the micro-batches whose attention runs on the host."""
EXPERT_SLOTS = 2
"""The expert in use and the next one."""


def build(shape: StepShape, held: tuple[Held, ...] = ()) -> Plan:
    """Return the plan of a step; nothing is kept from one step to the next."""
    writer = PlanWriter("moe_gen", shape)
    belt = Belt(writer, split(shape, 0.0, EXPERT_SLOTS), held)
    batch = tuple(range(len(shape.micro_batches)))
    num_on_host = max(1, round(HOST_SHARE * len(batch)))
    done = [writer.embed(m) for m in batch]
    for layer in range(shape.config.num_layers):
        attended = [_attend(writer, layer, m, done, m < num_on_host) for m in batch]
        routed = [writer.post_attention(layer, m, attended[m]) for m in batch]
        streamed = belt.streamed(layer)
        done = routed
        for e in range(shape.num_experts):
            if e in streamed:
                belt.load(layer, e)
            done = [belt.run(layer, [e], batch, [*routed, *done], release=True)]
    for m in batch:
        writer.head(m, done)
    return writer.finish(belt.held, belt.holding())


def _attend(writer: PlanWriter, layer: int, m: int, after: list[int], on_host: bool) -> int:
    past = None if on_host else writer.bring_kv(layer, m, buffer=m % 2)
    pre = writer.pre_attention(layer, m, after)
    if on_host:
        return writer.attend_on_host(layer, m, pre)
    return writer.attend_with_kv(layer, m, pre, past)
