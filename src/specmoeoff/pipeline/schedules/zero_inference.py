"""ZeRO-Inference: a layer's weights at a time, keys, values and attention on the device.

What fits beside the weights there is a small batch, so each micro-batch goes through all layers by
itself, and every one streams the whole model. The next layer is loaded while this one computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specmoeoff.pipeline.schedules.belt import Belt, split
from specmoeoff.pipeline.schedules.writer import PlanWriter

if TYPE_CHECKING:
    from specmoeoff.pipeline.plan import Held, Plan
    from specmoeoff.pipeline.schedules.shape import StepShape


def build(shape: StepShape, held: tuple[Held, ...] = ()) -> Plan:
    """Return the plan of a step; nothing is kept from one step to the next."""
    writer = PlanWriter("zero_inference", shape)
    belt = Belt(writer, split(shape, 2.0), held)
    previous: list[int] = []
    for m in range(len(shape.micro_batches)):
        done = [writer.embed(m, previous)]
        for layer in range(shape.config.num_layers):
            pre = writer.pre_attention(layer, m, done)
            routed = writer.post_attention(layer, m, writer.attend_on_device(layer, m, pre))
            for e in belt.streamed(layer):
                belt.load(layer, e)
            done = [belt.run(layer, range(shape.num_experts), (m,), [routed], release=True)]
        previous = [writer.head(m, done)]
    return writer.finish(belt.held, belt.holding())
