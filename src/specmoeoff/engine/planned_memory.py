"""Splits the memory of planned passes by tier before any weight is read.

Slots and KV cache have a share each; in one tier, experts borrow what the cache does not hold.
With a device, weights that stay, experts in use and what a schedule ships there have to fit in its
memory; the process, the KV cache and the experts behind the link in the host's. Drafts run on the
host's kernels, which are the simulated device's too: there they count as the device's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from specmoeoff.engine.memory_plan import (
    ACTIVATION_SHARE,
    DISTRIBUTIONS,
    LOGIT_ROWS,
    MIN_KV_TOKENS,
    PAGE_TOKENS,
    STEP_TOKENS,
    activation_bytes,
    default_memory,
    draft_page_bytes,
    kv_page_bytes,
    longest_sequence,
    make_plan,
    step_parts,
    weight_parts,
)
from specmoeoff.engine.step_shape import HOST_SLOTS, step_shape
from specmoeoff.engine.torch_build import workspace_bytes
from specmoeoff.offload.planned_experts import slot_bytes
from specmoeoff.offload.tiers import Tier
from specmoeoff.pipeline.schedules import build_plan
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
    from specmoeoff.engine.draft_kv import SharedDraft
    from specmoeoff.engine.model_files import ModelFiles
    from specmoeoff.pipeline.costs import Costs

DeviceKind = Literal["cpu", "sim", "cuda"]
KEEPS_KV_ON_DEVICE = ("zero_inference",)
"""Schedules whose attention finds its past on the device."""
KV_SHARE = 0.25
"""Share of what is free that the KV cache may take from experts."""


@dataclass(frozen=True)
class PlannedConfig:
    """What is asked of planned passes, besides the engine's configuration."""

    schedule: str = "specmoeoff"
    device: DeviceKind = "cpu"
    num_micro_batches: int = 2
    num_seqs: int = 8
    """Sequences of the largest batch."""
    max_len: int | None = 128
    """Tokens of the longest sequence; None takes as many as ``KV_SHARE`` has room for."""
    max_tokens: int | None = 64
    """Tokens of the largest pass; None takes as many as activations have room for."""
    device_memory: int = 0
    """Bytes of the device; 0 takes what is free on a GPU."""
    torch_device: str = "cuda"
    """What torch calls the device of ``cuda``; its "cpu" runs the same code without a GPU."""
    costs: Costs | None = None
    """Speeds that the simulated device and its links are held to."""
    overlapped: bool = True
    """Whether lanes run side by side."""


@dataclass(frozen=True)
class MemorySplit:
    """Who has how much, and how experts get to where they are used."""

    tiers: tuple[Tier, ...]
    """The last one is where the experts are used."""
    placement: Placement
    num_slots: int
    num_pages: int
    """Of the KV cache, and of a draft's."""
    max_tokens: int
    """Of the largest pass."""
    distribution_bytes: int = 0
    """What the distributions that drafts were drawn from may take until they are verified."""
    draft_page_bytes: int = 0
    """Of a page of the draft's own KV cache, if it has one."""


def split_memory(
    config: EngineConfig,
    wanted: PlannedConfig,
    files: ModelFiles,
    draft: ModelFiles | None = None,
    host_memory: int | None = None,
    shared: SharedDraft | None = None,
) -> MemorySplit:
    """Return the split for a configuration, from file headers alone.

    Args:
        config: Its ``memory`` is this process's, less the simulated device's.
        wanted: The device, the batch and the schedule.
        files: The target.
        draft: The draft model.
        host_memory: The host's memory where ``config`` does not say.
        shared: What the draft shares with the target, once that is known.

    Raises:
        DoesNotFitError: A tier is too small.
        InvalidInputError: The schedule is unknown or needs more expert slots at once.
    """
    if wanted.device == "cpu":
        split = _split_cpu(config, wanted, files, draft, shared)
    else:
        split = _split_device(config, wanted, files, draft, host_memory, shared)
    for count in range(1, min(wanted.num_micro_batches, wanted.num_seqs) + 1):
        # A schedule that needs more slots says so now.
        build_plan(wanted.schedule, _largest(config, wanted, files, split, count))
    return split


def keeps_kv_on_host(wanted: PlannedConfig) -> bool:
    """Whether the host's KV cache has every key and value, for a draft to read."""
    return wanted.device != "cuda" or wanted.schedule not in KEEPS_KV_ON_DEVICE


def _split_cpu(
    config: EngineConfig,
    wanted: PlannedConfig,
    files: ModelFiles,
    draft: ModelFiles | None,
    shared: SharedDraft | None,
) -> MemorySplit:
    plan = make_plan(config, files, draft, shared)
    memory = Tier("main", plan.policy.memory)
    *parts, (_, _elastic) = plan.policy.reservations
    for name, num_bytes in parts:
        memory.reserve(name, num_bytes)
    page = plan.page_bytes + plan.draft_page_bytes
    pages = _pages(config, wanted, files, _room(files, memory.free), page)
    memory.reserve("KV cache", pages * page)
    num_slots = _reserve_slots(files, memory)
    tokens = plan.policy.max_num_batched_tokens
    drafts = (plan.distribution_bytes, plan.draft_page_bytes)
    return MemorySplit((memory,), CPU, num_slots, pages, tokens, *drafts)


def _split_device(
    config: EngineConfig,
    wanted: PlannedConfig,
    files: ModelFiles,
    draft: ModelFiles | None,
    host_memory: int | None,
    shared: SharedDraft | None,
) -> MemorySplit:
    model = files.model.config
    device = Tier("device", wanted.device_memory)
    is_gpu = wanted.device == "cuda"
    # What is loaded once is on the device, the process itself is not.
    (_, runtime), (name, dense), *draft_weights = weight_parts(config, files, draft, shared)
    device.reserve(name, dense)
    tokens = wanted.max_tokens or config.max_num_batched_tokens or _step_tokens(wanted, files)
    page = kv_page_bytes(model, config.kv_dtype)
    # A simulated device's memory is this machine's too.
    free = default_memory() - (0 if is_gpu else wanted.device_memory)
    host = Tier("host", config.memory or host_memory or max(free, 0))
    host.reserve("runtime", runtime)
    # What was computed on the device or is computed for it: less than all that a step holds.
    # A GPU's logits come to the host too.
    beside = activation_bytes(model, tokens, logit_rows=LOGIT_ROWS if is_gpu else 0)
    host.reserve("activations", beside)
    drafts, draft_page = host if is_gpu else device, draft_page_bytes(config, draft, shared)
    _, *drafting = step_parts(config, model, draft, tokens)
    for name, num_bytes in (*draft_weights, *drafting):
        drafts.reserve(name, num_bytes)
    activations = activation_bytes(model, tokens)
    device.reserve("activations", activations)
    if is_gpu:
        device.reserve("workspace", workspace_bytes(wanted))
    staged = _staged_kv(config, wanted, files, tokens)
    # Neither side may be given more pages than the other has room for.
    host_page = page + (draft_page if is_gpu else 0)
    device_page = staged + (0 if keeps_kv_on_host(wanted) else page) + (0 if is_gpu else draft_page)
    room = _host_room(config, files, host.free, host_page)
    pages = _pages(config, wanted, files, room, host_page)
    if device_page:
        room = _room(files, device.free)
        pages = min(pages, _pages(config, wanted, files, room, device_page))
    host.reserve("KV cache", pages * page)
    if draft_page:
        drafts.reserve("KV cache of the draft", pages * draft_page)
    device.reserve("activations", activations + pages * staged)
    if not keeps_kv_on_host(wanted):
        device.reserve("KV cache", pages * page)
    num_slots = _reserve_slots(files, device)
    total = _experts_bytes(files)
    placement = DEVICE if host.free >= total else DEVICE_AND_DISK
    if placement is DEVICE:
        host.reserve("experts", total)
    else:
        host.reserve("experts on their way", HOST_SLOTS * slot_bytes(files.expert_layouts()))
    distributions = dict(drafting).get(DISTRIBUTIONS, 0)
    return MemorySplit(
        (host, device), placement, num_slots, pages, tokens, distributions, draft_page
    )


def _pages(
    config: EngineConfig, wanted: PlannedConfig, files: ModelFiles, room: int, page: int
) -> int:
    """Return the pages of the KV cache: as asked for, or those that there is room for."""
    if wanted.max_len is not None:
        return wanted.num_seqs * -(-wanted.max_len // PAGE_TOKENS)
    longest = longest_sequence(config, files.model.config)
    most = wanted.num_seqs * (-(-longest // PAGE_TOKENS) + 1)
    return max(_least_pages(config, files), min(most, room // page))


def _least_pages(config: EngineConfig, files: ModelFiles) -> int:
    """Return the pages that a KV cache has at least."""
    longest = longest_sequence(config, files.model.config)
    return -(-min(MIN_KV_TOKENS, longest) // PAGE_TOKENS)


def _room(files: ModelFiles, free: int) -> int:
    """Return what the KV cache may take beside slots: its share, or what all experts leave."""
    return max(int(KV_SHARE * free), free - _experts_bytes(files))


def _host_room(config: EngineConfig, files: ModelFiles, free: int, page: int) -> int:
    """Return what the KV cache may take of a device's host: what experts leave, if they fit."""
    # From disk they would take far longer, in every step.
    beside = free - _experts_bytes(files)
    fits = beside >= _least_pages(config, files) * page
    return beside if fits else int(KV_SHARE * free)


def _experts_bytes(files: ModelFiles) -> int:
    """Return the bytes of all experts in slots."""
    return files.total_experts * slot_bytes(files.expert_layouts())


def _step_tokens(wanted: PlannedConfig, files: ModelFiles) -> int:
    """Return the largest token budget of a step whose activations are within their share."""
    room = ACTIVATION_SHARE * wanted.device_memory
    model = files.model.config
    fitting = (n for n in STEP_TOKENS if activation_bytes(model, n) <= room)
    return next(fitting, STEP_TOKENS[-1])


def _reserve_slots(files: ModelFiles, tier: Tier) -> int:
    """Give the rest to expert slots; at least one, which is refused if it does not fit."""
    slot = slot_bytes(files.expert_layouts())
    num_slots = max(1, min(tier.free // slot, files.total_experts))
    tier.reserve("expert slots", num_slots * slot)
    return num_slots


def _staged_kv(config: EngineConfig, wanted: PlannedConfig, files: ModelFiles, tokens: int) -> int:
    """Return the most bytes that a schedule has on the device at once, for a page of KV."""
    split = MemorySplit((), DEVICE, files.total_experts, num_pages=1, max_tokens=tokens)
    counts = range(1, min(wanted.num_micro_batches, wanted.num_seqs) + 1)
    plans = (
        build_plan(wanted.schedule, _largest(config, wanted, files, split, count))
        for count in counts
    )
    return max(sum(b.num_bytes for b in p.buffers.values() if b.pool == "kv") for p in plans)


def _largest(
    config: EngineConfig, wanted: PlannedConfig, files: ModelFiles, split: MemorySplit, count: int
) -> StepShape:
    """Return a step of so many micro-batches, any of which may have the whole KV cache."""
    batch = MicroBatch(
        num_tokens=max(1, split.max_tokens // count),
        num_seqs=max(1, wanted.num_seqs // count),
        kv_tokens=split.num_pages * PAGE_TOKENS,
        num_outputs=max(1, wanted.num_seqs // count),
    )
    return step_shape(config, files, split, [batch] * count)
