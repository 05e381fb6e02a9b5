"""Random plans that keep every promise: any lanes, any waits, buffers handed from op to op."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from specmoeoff.config import ModelConfig, RopeConfig
from specmoeoff.pipeline.plan import LANES, Buffer, Op, Plan
from specmoeoff.pipeline.schedules.shape import (
    CPU,
    DEVICE,
    DEVICE_AND_DISK,
    Draft,
    MicroBatch,
    StepShape,
)

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn


@st.composite
def plans(draw: DrawFn, max_ops: int = 24) -> Plan:
    """Draw a plan in which every buffer is released in the end."""
    buffers = {f"b{i}": Buffer("pool", 8) for i in range(draw(st.integers(0, 3)))}
    users: dict[str, list[int]] = {}
    released: dict[str, int] = {}
    ops: list[Op] = []
    for number in range(draw(st.integers(1, max_ops))):
        waits = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        chosen: dict[str, list[str]] = {"acquires": [], "uses": [], "releases": []}
        for name in buffers:
            if not draw(st.booleans()):
                continue
            if name not in users:
                chosen["acquires"].append(name)
                users[name] = [number]
                waits |= {released[name]} if name in released else set()
            elif draw(st.booleans()):
                chosen["uses"].append(name)
                waits.add(users[name][0])
                users[name].append(number)
            else:
                chosen["releases"].append(name)
                waits |= set(users.pop(name))
                released[name] = number
        ops.append(
            Op(
                draw(st.sampled_from(["load", "attend", "experts"])),
                draw(st.sampled_from(LANES)),
                num_bytes=draw(st.integers(0, 9)),
                waits=tuple(sorted(waits)),
                **{field: tuple(names) for field, names in chosen.items()},
            )
        )
    if users:
        waits = {user for each in users.values() for user in each}
        ops.append(Op("head", "device", waits=tuple(sorted(waits)), releases=tuple(users)))
    return Plan("random", tuple(ops), buffers, {"pool": 8 * len(buffers)})


def tiny_shape_config(num_layers: int = 3, num_experts: int = 4) -> ModelConfig:
    """Return shapes of a little mixture of experts, two experts a token."""
    return ModelConfig(
        model_type="mixtral",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        rope=RopeConfig(),
        num_experts=num_experts,
        num_experts_per_tok=min(2, num_experts),
    )


@st.composite
def shapes(draw: DrawFn) -> StepShape:
    """Draw a step that every schedule can run: at least a layer's experts fit."""
    num_layers, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    batches = []
    for _ in range(draw(st.integers(1, 8))):
        num_seqs = draw(st.integers(1, 4))
        num_tokens = num_seqs * draw(st.integers(1, 3))
        batches.append(MicroBatch(num_tokens, num_seqs, num_tokens + 20, num_seqs))
    return StepShape(
        tiny_shape_config(num_layers, num_experts),
        tuple(batches),
        draw(st.sampled_from([CPU, DEVICE, DEVICE_AND_DISK])),
        num_slots=draw(st.integers(num_experts, num_layers * num_experts + 2)),
        expert_bytes=2304,
        waves=draw(st.integers(1, 3)),
        host_slots=draw(st.integers(1, 3)),
        extra_slots=draw(st.sampled_from([0, 0, 1, 2, 5])),
        draft=draw(st.sampled_from([None, Draft(3, 500, 250)])),
    )
