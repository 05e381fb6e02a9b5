"""Opens a model for planned passes, on this machine or on a device that is simulated.

``cpu``: one memory; the budget is split as for the engine, and what the KV cache leaves is slots.
``sim``: a device with a memory of its own, as large as is said, behind links and processors of a
set speed. Weights lie in host memory if they fit there, else they come from disk through it.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from specmoeoff import kernels
from specmoeoff.engine.memory_plan import PAGE_TOKENS, activation_bytes, make_plan
from specmoeoff.engine.model_files import ModelFiles
from specmoeoff.engine.planned_forward import Machine, PlannedForward
from specmoeoff.engine.weights import Loader, load_dense
from specmoeoff.offload.kv_cache import KvCache, page_bytes
from specmoeoff.offload.planned_experts import PlannedExperts, slot_bytes
from specmoeoff.offload.reader import Reader
from specmoeoff.offload.tiers import Tier
from specmoeoff.pipeline.executor import Executor, SerialExecutor
from specmoeoff.pipeline.overlapped import OverlappedExecutor
from specmoeoff.pipeline.schedules.shape import (
    CPU,
    DEVICE,
    DEVICE_AND_DISK,
    MicroBatch,
    Placement,
    StepShape,
)

if TYPE_CHECKING:
    from specmoeoff.config import EngineConfig
    from specmoeoff.pipeline.costs import Costs

DeviceKind = Literal["cpu", "sim"]
KV_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}
HOST_SLOTS = 4
"""Experts on their way from disk to the device; one arrives while another leaves."""


@dataclass(frozen=True)
class PlannedConfig:
    """What is asked of planned passes, besides the engine's configuration."""

    schedule: str = "specmoeoff"
    device: DeviceKind = "cpu"
    num_micro_batches: int = 2
    num_seqs: int = 8
    """Sequences of the largest batch."""
    max_len: int = 128
    """Tokens of the longest sequence."""
    max_tokens: int = 64
    """Tokens of the largest pass."""
    device_memory: int = 0
    """Bytes of the simulated device."""
    costs: Costs | None = None
    """Speeds that the simulated device and its links are held to."""
    overlapped: bool = True
    """Whether lanes run side by side."""

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache."""
        return self.num_seqs * -(-self.max_len // PAGE_TOKENS)


@dataclass(frozen=True)
class Planned:
    """A model that is open for planned passes."""

    forward: PlannedForward
    reader: Reader
    tiers: tuple[Tier, ...]

    def close(self) -> None:
        """End the lanes and the reader."""
        self.forward.close()
        self.reader.close()


def open_planned(config: EngineConfig, wanted: PlannedConfig) -> Planned:
    """Open a model, split the memory, load what stays.

    Raises:
        CheckpointError: The model cannot be used.
        DoesNotFitError: A tier is too small; nothing was read.
    """
    files = ModelFiles.open(config.model)
    kernels.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    tiers, num_slots, placement = _split(config, wanted, files)
    model = files.model.config
    reader = Reader()
    experts = PlannedExperts(files.expert_layouts(), num_slots, reader)
    if placement is DEVICE:
        experts.keep_all_on_host()
    elif placement is DEVICE_AND_DISK:
        experts.stage_on_host(HOST_SLOTS)
    executor: Executor = OverlappedExecutor() if wanted.overlapped else SerialExecutor()
    machine = Machine(
        wanted.schedule,
        placement,
        executor,
        wanted.num_micro_batches,
        host_slots=HOST_SLOTS,
        costs=wanted.costs,
    )
    forward = PlannedForward(
        files.model,
        load_dense(files.model, Loader(files.checkpoint)),
        experts,
        KvCache(
            model.num_layers,
            model.num_kv_heads,
            model.head_dim,
            wanted.num_pages,
            config.kv_dtype,
            PAGE_TOKENS,
        ),
        machine,
        tiers[-1] if placement.has_link else None,
    )
    return Planned(forward, reader, tiers)


def decoding_shape(config: EngineConfig, wanted: PlannedConfig) -> StepShape:
    """Return the shape of a decoding step from file headers alone, at its longest.

    Raises:
        CheckpointError: The model cannot be used.
        DoesNotFitError: A tier is too small.
    """
    files = ModelFiles.open(config.model)
    _, num_slots, placement = _split(config, wanted, files)
    count = min(wanted.num_micro_batches, wanted.num_seqs)
    bounds = [wanted.num_seqs * m // count for m in range(count + 1)]
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    return StepShape(
        files.model.config,
        tuple(MicroBatch(size, size, size * wanted.max_len, size) for size in sizes),
        placement,
        num_slots,
        slot_bytes(files.expert_layouts()),
        kv_item_bytes=KV_ITEM_BYTES[config.kv_dtype],
        host_slots=HOST_SLOTS,
    )


def _split(
    config: EngineConfig, wanted: PlannedConfig, files: ModelFiles
) -> tuple[tuple[Tier, ...], int, Placement]:
    """Return the tiers, the slots where experts are used, and how experts get there."""
    model = files.model.config
    kv_bytes = wanted.num_pages * page_bytes(
        model.num_layers, model.num_kv_heads, model.head_dim, config.kv_dtype, PAGE_TOKENS
    )
    if wanted.device == "cpu":
        return _split_cpu(config, files, kv_bytes)
    return _split_sim(config, wanted, files, kv_bytes)


def _split_cpu(
    config: EngineConfig, files: ModelFiles, kv_bytes: int
) -> tuple[tuple[Tier, ...], int, Placement]:
    plan = make_plan(config, files, None)
    slot = plan.policy.expert_slot_bytes
    memory = Tier("main", plan.policy.memory)
    *parts, (_, _elastic) = plan.policy.reservations
    for name, num_bytes in parts:
        memory.reserve(name, num_bytes)
    memory.reserve("KV cache", kv_bytes)
    num_slots = _slots(files, memory, slot)
    memory.reserve("expert slots", num_slots * slot)
    return (memory,), num_slots, CPU


def _split_sim(
    config: EngineConfig, wanted: PlannedConfig, files: ModelFiles, kv_bytes: int
) -> tuple[tuple[Tier, ...], int, Placement]:
    slot = slot_bytes(files.expert_layouts())
    device = Tier("device", wanted.device_memory)
    device.reserve("dense weights", files.dense_bytes(Loader(files.checkpoint)))
    device.reserve("activations", activation_bytes(files.model.config, wanted.max_tokens))
    num_slots = _slots(files, device, slot)
    device.reserve("expert slots", num_slots * slot)
    total = files.model.config.num_layers * files.model.num_ffn_experts * slot
    host = Tier("host", config.memory or total + kv_bytes)
    host.reserve("KV cache", kv_bytes)
    placement = DEVICE if host.free >= total else DEVICE_AND_DISK
    if placement is DEVICE:
        host.reserve("experts", total)
    else:
        host.reserve("experts on their way", HOST_SLOTS * slot)
    return (host, device), num_slots, placement


def _slots(files: ModelFiles, tier: Tier, slot: int) -> int:
    """Return how many slots a tier has room for; at least one, which is refused if it has none."""
    total = files.model.config.num_layers * files.model.num_ffn_experts
    return max(1, min(tier.free // slot, total))
