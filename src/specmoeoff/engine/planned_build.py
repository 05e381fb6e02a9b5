"""Opens a model for planned passes, on this machine or on a device that is simulated.

``cpu``: one memory. ``sim``: a device with a memory of its own, as large as is said, behind links
and processors of a set speed. ``cuda``: a GPU through torch, which is imported for it and for
nothing else. With a device, weights lie in host memory if they fit there, else they come from disk
through it.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specmoeoff import kernels
from specmoeoff.engine.dtype import choose_dtype
from specmoeoff.engine.memory_plan import PAGE_TOKENS
from specmoeoff.engine.model_files import ModelFiles
from specmoeoff.engine.planned_forward import NO_WEIGHTS, Machine, PlannedForward
from specmoeoff.engine.planned_memory import MemorySplit, PlannedConfig, split_memory
from specmoeoff.engine.step_shape import HOST_SLOTS, step_shape
from specmoeoff.engine.torch_build import open_torch, with_device_memory
from specmoeoff.engine.weights import Loader, ModelWeights, load_dense
from specmoeoff.models.registry import build_model
from specmoeoff.offload.elastic import ElasticMemory
from specmoeoff.offload.kv_cache import KvCache
from specmoeoff.offload.planned_experts import PlannedExperts, slot_bytes
from specmoeoff.offload.reader import Reader
from specmoeoff.pipeline.executor import Executor, SerialExecutor
from specmoeoff.pipeline.overlapped import OverlappedExecutor
from specmoeoff.pipeline.schedules.shape import (
    CPU,
    DEVICE,
    DEVICE_AND_DISK,
    MicroBatch,
    StepShape,
)

if TYPE_CHECKING:
    from specmoeoff.config import Dtype, EngineConfig
    from specmoeoff.kernels import Activations
    from specmoeoff.offload.tiers import Tier, TierUse
    from specmoeoff.pipeline.schedules.shape import Draft

UNLIMITED = 1 << 60
"""Host memory where nothing is loaded and nothing was said."""


@dataclass(frozen=True)
class Planned:
    """A model that is open for planned passes."""

    forward: PlannedForward
    reader: Reader
    tiers: tuple[Tier, ...]
    experts: PlannedExperts
    elastic: ElasticMemory | None = None
    """Lets experts have what the KV cache does not need, where the two share a tier."""

    def uses(self, resident_bytes: int) -> dict[str, TierUse]:
        """Return what each tier held, of a process that held so many bytes at its peak.

        What a device in the process's own memory held is counted, and the host's peak is the rest.
        """
        host, *devices = self.tiers
        says = self.forward.compute.peak_bytes()
        uses = [device.use(device.peak if says is None else says) for device in devices]
        if says is None:
            resident_bytes -= sum(use.peak for use in uses)
        names = (tier.name for tier in self.tiers)
        return dict(zip(names, (host.use(resident_bytes), *uses), strict=True))

    def close(self) -> None:
        """End the reader and the lanes, within two seconds: a lane may be waiting for a read."""
        self.reader.close()
        self.forward.close()


def open_planned(config: EngineConfig, wanted: PlannedConfig) -> Planned:
    """Open a model, split the memory, load what stays.

    Raises:
        CheckpointError: The model cannot be used.
        DoesNotFitError: A tier is too small; nothing was read.
        InvalidInputError: The schedule is unknown or needs more expert slots at once, or the device
            needs torch or a GPU, and there is none.
    """
    files = ModelFiles.open(config.model)
    wanted = with_device_memory(wanted)
    kernels.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    split = split_memory(config, wanted, files)
    weights = load_dense(files.model, Loader(files.checkpoint))
    dtype = planned_dtype(config, wanted, files)
    return load_planned(config, wanted, files, split, weights, dtype)


def load_planned(
    config: EngineConfig,
    wanted: PlannedConfig,
    files: ModelFiles,
    split: MemorySplit,
    weights: ModelWeights,
    activations: Activations = "float32",
    draft: Draft | None = None,
) -> Planned:
    """Load the experts that stay and get the lanes ready.

    Args:
        config: Its ``kv_dtype`` is the cache's.
        wanted: The schedule and what runs it.
        files: The model.
        split: The memory.
        weights: The model's dense weights.
        activations: What products round their activations to.
        draft: What a drafter weighs, for prices of its ops.

    Raises:
        StreamError: A weight could not be read.
    """
    model = files.model.config
    target = build_model(model, activations)
    compute, slots = None, None
    if wanted.device == "cuda":
        layouts = files.expert_layouts()
        compute, slots = open_torch(target, weights, layouts, split.num_slots, wanted)
        # They are on the device now, and attention on the host needs none.
        weights = ModelWeights({}, [])
    reader = Reader()
    kv = KvCache(
        model.num_layers,
        model.num_kv_heads,
        model.head_dim,
        split.num_pages,
        config.kv_dtype,
        PAGE_TOKENS,
    )
    slot, num_slots = slot_bytes(files.expert_layouts()), split.num_slots
    traded = kv.max_pages * kv.page_bytes if split.placement is CPU else 0
    most = min(num_slots + traded // slot, files.total_experts)
    experts = PlannedExperts(files.expert_layouts(), num_slots, reader, slots, most)
    elastic = None
    if traded:
        elastic = ElasticMemory(traded + num_slots * slot, experts, [kv], num_slots)
    try:
        if split.placement is DEVICE:
            experts.keep_all_on_host()
        elif split.placement is DEVICE_AND_DISK:
            experts.stage_on_host(HOST_SLOTS)
        if compute is not None:
            compute.pin(experts.host_memory, experts.slot_bytes)
    except BaseException:
        reader.close()
        raise
    executor: Executor = OverlappedExecutor() if wanted.overlapped else SerialExecutor()
    machine = Machine(
        wanted.schedule,
        split.placement,
        executor,
        wanted.num_micro_batches,
        host_slots=HOST_SLOTS,
        costs=wanted.costs,
        draft=draft or NO_WEIGHTS,
    )
    forward = PlannedForward(
        target,
        weights,
        experts,
        kv,
        machine,
        split.tiers[-1] if split.placement.has_link else None,
        compute,
    )
    return Planned(forward, reader, split.tiers, experts, elastic)


def planned_dtype(config: EngineConfig, wanted: PlannedConfig, files: ModelFiles) -> Dtype:
    """Return what the target's activations are rounded to; a GPU's products are not timed."""
    return choose_dtype(config.dtype, files, on_gpu=wanted.device == "cuda")


def decoding_shape(config: EngineConfig, wanted: PlannedConfig) -> StepShape:
    """Return the shape of a decoding step from file headers alone, at its longest.

    Raises:
        CheckpointError: The model cannot be used.
        DoesNotFitError: A tier is too small.
        InvalidInputError: The schedule is unknown or needs more expert slots at once.
    """
    files = ModelFiles.open(config.model)
    split = split_memory(config, wanted, files, host_memory=UNLIMITED)
    count = min(wanted.num_micro_batches, wanted.num_seqs)
    bounds = [wanted.num_seqs * m // count for m in range(count + 1)]
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    longest = wanted.max_len or split.num_pages * PAGE_TOKENS // wanted.num_seqs
    paged = -(-longest // PAGE_TOKENS) * PAGE_TOKENS
    batches = (MicroBatch(size, size, size * longest, size, size * paged) for size in sizes)
    return step_shape(config, files, split, batches)
