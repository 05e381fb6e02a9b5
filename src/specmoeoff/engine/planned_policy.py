"""What an engine asks of planned passes, and the policy that follows from their memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from specmoeoff.config import Policy
from specmoeoff.engine.draft_worth import Streaming, can_pay
from specmoeoff.engine.memory_plan import (
    PAGE_TOKENS,
    MemoryPlan,
    kv_page_bytes,
    longest_sequence,
)
from specmoeoff.engine.planned_build import planned_dtype
from specmoeoff.engine.planned_memory import MemorySplit, PlannedConfig, split_memory
from specmoeoff.engine.torch_build import with_device_memory
from specmoeoff.errors import DoesNotFitError, InvalidInputError
from specmoeoff.offload.planned_experts import slot_bytes
from specmoeoff.pipeline.schedules import SCHEDULES

if TYPE_CHECKING:
    from specmoeoff.config import Dtype, EngineConfig
    from specmoeoff.engine.model_files import ModelFiles


def planned_config(config: EngineConfig) -> PlannedConfig:
    """Return what an engine's configuration asks of planned passes.

    Raises:
        InvalidInputError: There is no such schedule, or it does not run on the device.
    """
    if config.schedule not in ("auto", "reactive", *SCHEDULES):
        raise InvalidInputError(
            f"schedule {config.schedule!r} is unknown; use one of auto, reactive, "
            f"{', '.join(SCHEDULES)}"
        )
    if config.schedule == "reactive":
        raise InvalidInputError(
            "schedule 'reactive' runs on device 'cpu' only; use 'auto' or one of "
            f"{', '.join(SCHEDULES)}"
        )
    return PlannedConfig(
        schedule="specmoeoff" if config.schedule == "auto" else config.schedule,
        device="cpu" if config.device == "auto" else config.device,
        num_micro_batches=config.num_micro_batches,
        num_seqs=config.max_num_seqs,
        max_len=None,
        max_tokens=None,
        device_memory=config.device_memory or 0,
    )


def split_models(
    config: EngineConfig, wanted: PlannedConfig, files: ModelFiles, draft: ModelFiles | None
) -> tuple[MemorySplit, ModelFiles | None, str]:
    """Split the memory, and leave out a draft that may be left out and could not pay.

    A plan streams every expert that does not stay, however many tokens there are, so all that a
    draft costs on the link is the slots that it takes.

    Returns:
        The split, the draft to load, and why the one that was asked for is not.

    Raises:
        DoesNotFitError: A tier is too small, without a draft where that may be left out.
        InvalidInputError: The schedule needs more expert slots at once.
    """
    if draft is None or config.speculative is None or not config.speculative.adaptive:
        return split_memory(config, wanted, files, draft), draft, ""
    without = split_memory(replace(config, speculative=None), wanted, files)
    try:
        split = split_memory(config, wanted, files, draft)
    except (DoesNotFitError, InvalidInputError):
        return without, None, "the memory has no room for it"
    experts = files.model.num_ffn_experts
    streaming = Streaming(experts, experts, files.total_experts, without.num_slots, split.num_slots)
    if can_pay(streaming, config.max_num_seqs, config.speculative.num_speculative_tokens):
        return split, draft, ""
    taken = without.num_slots - split.num_slots
    return without, None, f"the {taken} expert slots that it would take are worth more"


def plan_passes(
    config: EngineConfig, files: ModelFiles, draft: ModelFiles | None
) -> tuple[MemorySplit, MemoryPlan]:
    """Return an engine's split and plan from file headers alone.

    Whether a draft reads the target's KV cache is known once both are loaded; here it does not.

    Raises:
        DoesNotFitError: A tier is too small; the message has the arithmetic.
        InvalidInputError: The schedule is unknown or needs more expert slots at once, or the device
            needs torch or a GPU, and there is none.
    """
    wanted = with_device_memory(planned_config(config))
    split, draft, left_out = split_models(config, wanted, files, draft)
    dtype = planned_dtype(config, wanted, files)
    return split, fixed_plan(config, split, files, draft, dtype, left_out)


def fixed_plan(
    config: EngineConfig,
    split: MemorySplit,
    files: ModelFiles,
    draft: ModelFiles | None,
    dtype: Dtype,
    left_out: str = "",
) -> MemoryPlan:
    """Return an engine's plan for a split of which nothing is lent or traded."""
    longest = longest_sequence(config, files.model.config)
    several = len(split.tiers) > 1
    reservations = tuple(
        (f"{tier.name}: {name}" if several else name, num_bytes)
        for tier in split.tiers
        for name, num_bytes in (*tier.as_dict().items(), ("not needed", tier.free))
        if num_bytes
    )
    model, drafts = files.model.config, [] if draft is None else [draft.model.config]
    return MemoryPlan(
        Policy(
            memory=sum(tier.budget for tier in split.tiers),
            reservations=reservations,
            num_expert_slots=split.num_slots,
            min_expert_slots=split.num_slots,
            expert_slot_bytes=slot_bytes(files.expert_layouts()),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=split.max_tokens,
            max_model_len=min(longest, split.num_pages * PAGE_TOKENS),
            dtype=dtype,
            left_out=left_out,
        ),
        elastic_bytes=0,
        page_bytes=kv_page_bytes(model, config.kv_dtype),
        draft_page_bytes=split.draft_page_bytes,
        kv_pages=split.num_pages,
        distribution_bytes=split.distribution_bytes,
        passes=(model, *drafts),
        largest_step_bytes=0,
    )
