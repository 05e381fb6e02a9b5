"""Splits a memory budget before any weight is read, or says by how much it is too small.

Everything the process will hold has a name here: the interpreter and its libraries, the dense
weights, the draft, the activations of the largest step, the threads' scratch. What is left is
elastic: expert slots, of which the KV caches take what sequences need while they need it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from specmoeoff.config import EngineConfig, KvDtype, ModelConfig, Policy
from specmoeoff.engine.draft_worth import Streaming, can_pay
from specmoeoff.engine.dtype import choose_dtype
from specmoeoff.engine.model_files import ModelFiles, check_pair
from specmoeoff.engine.weights import Loader
from specmoeoff.errors import DoesNotFitError
from specmoeoff.memory_size import format_memory_size
from specmoeoff.offload.kv_cache import page_bytes

if TYPE_CHECKING:
    from specmoeoff.engine.draft_kv import SharedDraft

MIB = 1 << 20
RUNTIME_FLOOR = 40 * MIB
"""The interpreter with numpy, the kernels, a tokenizer and the command line, as measured; a process
that already holds more is counted at what it holds."""
RUNTIME_MARGIN = 20 * MIB
"""Allocator slack, the kernels' shared scratch, Python objects of a long job."""
THREAD_BYTES = 2 * MIB
"""Stack and kernel scratch of one compute thread."""
MIN_SLOTS = 2
"""One expert in use and one arriving."""
MIN_KV_TOKENS = 256
"""The KV cache must at least hold one sequence of this length (or of max_model_len)."""
LOGIT_ROWS = 32
"""Rows of logits that exist at once; verification goes over a step's rows in such groups."""
STEP_TOKENS = (4096, 2048, 1024, 512, 256, 128, 64, 32)
"""Step budgets that are tried, largest first: a pass costs its stream whatever rides on it."""
DISTRIBUTIONS = "draft distributions"
DISTRIBUTION_ROWS = 128
"""Most drafts sampled from the whole vocabulary that wait for verification at once; what top_k or
top_p left is small, and greedy drafts have none."""
DRAFT_ACTIVATIONS = "draft activations"
DRAFT_ROWS = 256
"""Most rows of a draft's pass, when it reads what the target has read before it."""
PAGE_TOKENS = 32
"""Tokens in a page of a KV cache."""
ACTIVATION_SHARE = 0.08
"""Share of the budget that activations may take when the step budget is ours to choose."""


@dataclass(frozen=True)
class MemoryPlan:
    """The policy, and the numbers the engine builds its parts from."""

    policy: Policy
    elastic_bytes: int
    page_bytes: int
    draft_page_bytes: int
    kv_pages: int
    """Most pages the target's cache can ever have."""
    distribution_bytes: int
    """What the distributions that drafts were drawn from may take until they are verified."""
    passes: tuple[ModelConfig, ...]
    """The models whose passes a step consists of, the target first."""
    largest_step_bytes: int
    draft_rows: int = DRAFT_ROWS
    """Most rows of a draft's pass."""

    def without_draft_kv(self, longest: int) -> MemoryPlan:
        """Return the plan for a draft that reads the target's KV cache: prompts are not for it.

        Args:
            longest: Tokens that the model and the user allow a sequence, see longest_sequence.
        """
        policy = self.policy
        pages = (self.elastic_bytes - MIN_SLOTS * policy.expert_slot_bytes) // self.page_bytes
        return replace(
            self,
            policy=replace(policy, max_model_len=min(longest, pages * PAGE_TOKENS)),
            draft_page_bytes=0,
            kv_pages=_kv_pages(pages, policy.max_num_seqs, longest),
            draft_rows=min(DRAFT_ROWS, policy.max_num_seqs),
        )

    def spare_step_bytes(self, num_tokens: int, samples: bool, needs_logits: bool) -> int:
        """Return what a step of ``num_tokens`` leaves of the memory put aside for the largest one.

        Args:
            num_tokens: Rows of the target's pass.
            samples: Whether any sequence draws its tokens, so that drafts keep distributions.
            needs_logits: Whether any sequence looks at more than the best token.
        """
        logit_rows = LOGIT_ROWS if needs_logits else 0
        needs = [activation_bytes(self.passes[0], num_tokens, logit_rows)]
        needs += [activation_bytes(draft, self.draft_rows, logit_rows) for draft in self.passes[1:]]
        return max(0, self.largest_step_bytes - max(needs) - samples * self.distribution_bytes)


def plan_memory(config: EngineConfig) -> Policy:
    """Compute the split for a configuration from file headers alone.

    Raises:
        DoesNotFitError: The budget is too small; the message has the arithmetic.
        CheckpointError: A model cannot be used.
    """
    return plan_models(config, *open_models(config))[0].policy


def plan_models(
    config: EngineConfig, target: ModelFiles, draft: ModelFiles | None
) -> tuple[MemoryPlan, ModelFiles | None]:
    """Split the budget, and leave out a draft that may be left out and could not pay.

    Returns:
        The plan and the draft to load, if any.
    """
    if draft is None or config.speculative is None or not config.speculative.adaptive:
        return make_plan(config, target, draft), draft
    without = make_plan(replace(config, speculative=None), target, None)
    model, slots = target.model.config, without.policy.num_expert_slots
    try:
        plan = make_plan(config, target, draft)
    except DoesNotFitError:
        reason = "the budget has no room for it"
    else:
        streaming = Streaming(
            target.model.num_ffn_experts,
            max(model.num_experts_per_tok, 1),
            model.num_layers * target.model.num_ffn_experts,
            slots,
            plan.policy.num_expert_slots,
        )
        most = config.speculative.num_speculative_tokens
        if can_pay(streaming, config.max_num_seqs, most):
            return plan, draft
        reason = (
            f"with max_num_seqs {config.max_num_seqs} its tokens would want more experts than "
            f"they save, and it would take {slots - plan.policy.num_expert_slots} slots"
        )
    return replace(without, policy=replace(without.policy, left_out=reason)), None


def open_models(config: EngineConfig) -> tuple[ModelFiles, ModelFiles | None]:
    """Open the target and, if there is one, the draft."""
    target = ModelFiles.open(config.model)
    if config.speculative is None or config.speculative.model is None:
        return target, None
    draft = ModelFiles.open(config.speculative.model)
    check_pair(target, draft)
    return target, draft


def make_plan(
    config: EngineConfig,
    target: ModelFiles,
    draft: ModelFiles | None,
    shared: SharedDraft | None = None,
) -> MemoryPlan:
    """Split the budget between the named parts."""
    memory = config.memory or default_memory()
    model = target.model.config
    model_len = longest_sequence(config, model)
    slot = max(layout.num_bytes for layer in target.expert_layouts() for layout in layer)
    page = kv_page_bytes(model, config.kv_dtype)
    draft_page = draft_page_bytes(config, draft, shared)
    least_slots = MIN_SLOTS * slot
    least_kv = -(-min(MIN_KV_TOKENS, model_len) // PAGE_TOKENS) * (page + draft_page)
    parts = weight_parts(config, target, draft, shared)
    room = memory - sum(num_bytes for _, num_bytes in parts) - least_slots - least_kv
    # No more than half of what is free, or sequences would have no room for their tokens.
    activations = int(min(ACTIVATION_SHARE * memory, room / 2))
    step_tokens, held = _step(config, model, draft, room, activations)
    parts += held
    elastic = memory - sum(num_bytes for _, num_bytes in parts)
    if elastic < least_slots + least_kv:
        raise _too_small(memory, parts, least_slots, least_kv)
    pages = (elastic - least_slots) // (page + draft_page)
    total_experts = model.num_layers * target.model.num_ffn_experts
    parts.append(("expert slots and KV cache", elastic))
    return MemoryPlan(
        Policy(
            memory=memory,
            reservations=tuple(parts),
            num_expert_slots=min(elastic // slot, total_experts),
            min_expert_slots=MIN_SLOTS,
            expert_slot_bytes=slot,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=step_tokens,
            max_model_len=min(model_len, pages * PAGE_TOKENS),
            dtype=choose_dtype(config.dtype, target),
        ),
        elastic_bytes=elastic,
        page_bytes=page,
        draft_page_bytes=draft_page,
        kv_pages=_kv_pages(pages, config.max_num_seqs, model_len),
        distribution_bytes=dict(held).get(DISTRIBUTIONS, 0),
        passes=(model,) if draft is None else (model, draft.model.config),
        largest_step_bytes=sum(num_bytes for _, num_bytes in held),
    )


def longest_sequence(config: EngineConfig, model: ModelConfig) -> int:
    """Return the tokens of the longest sequence that the model and the user allow."""
    limit = model.max_position_embeddings
    return min(config.max_model_len or limit, limit)


def activation_bytes(model: ModelConfig, num_tokens: int, logit_rows: int = LOGIT_ROWS) -> int:
    """Return the bytes a step of ``num_tokens`` holds at its peak, logits of so many rows included.

    Float32 per token: the residual stream, its norm and the embedding (3 hidden), queries, keys,
    values and the attention output, and the intermediate activations of experts with their rows.
    """
    heads = 3 * model.num_heads + 4 * model.num_kv_heads
    per_token = 4 * model.hidden_size + heads * model.head_dim + 2 * model.intermediate_size
    logits = 2 * min(logit_rows, num_tokens) * model.vocab_size
    return 4 * (num_tokens * per_token + logits)


def weight_parts(
    config: EngineConfig,
    target: ModelFiles,
    draft: ModelFiles | None,
    shared: SharedDraft | None = None,
) -> list[tuple[str, int]]:
    """Return what is there whatever a step does: the runtime and what is loaded once."""
    parts = [
        ("runtime", _runtime_bytes(config) if shared is None else shared.runtime_bytes),
        ("target dense weights", target.dense_bytes(Loader(target.checkpoint))),
    ]
    if draft is not None and config.speculative is not None:
        loader = Loader(draft.checkpoint, to_int8=config.speculative.draft_weight_dtype == "int8")
        num_bytes = draft.dense_bytes(loader) + draft.expert_bytes(loader)
        parts.append(("draft weights", num_bytes - (shared.weight_bytes if shared else 0)))
    return parts


def _runtime_bytes(config: EngineConfig) -> int:
    threads = config.num_threads or len(os.sched_getaffinity(0))
    return max(RUNTIME_FLOOR, resident_bytes()) + RUNTIME_MARGIN + threads * THREAD_BYTES


def _step(
    config: EngineConfig,
    model: ModelConfig,
    draft: ModelFiles | None,
    room: int,
    max_activations: int,
) -> tuple[int, list[tuple[str, int]]]:
    """Return a step's token budget and what such a step holds.

    The budget is the one asked for, or else the largest whose activations are within their share
    and that fits ``room``.
    """
    asked = config.max_num_batched_tokens
    choices = STEP_TOKENS if asked is None else (asked,)
    for tokens in choices:
        held = step_parts(config, model, draft, tokens)
        fits = sum(num_bytes for _, num_bytes in held) <= room
        if fits and activation_bytes(model, tokens) <= max_activations:
            break
    return tokens, held


def step_parts(
    config: EngineConfig, model: ModelConfig, draft: ModelFiles | None, tokens: int
) -> list[tuple[str, int]]:
    """Return what a step of so many tokens holds beside weights and KV.

    A draft passes before the target does, but in a plan while other micro-batches are on their way.
    """
    activations = activation_bytes(model, tokens)
    drafting = 0 if draft is None else activation_bytes(draft.model.config, DRAFT_ROWS)
    held = [("activations", activations if config.is_planned else max(activations, drafting))]
    if drafting and config.is_planned:
        held.append((DRAFT_ACTIVATIONS, drafting))
    if draft is not None and config.speculative is not None:
        # Every draft token takes a row of the step, so there are no more of them than tokens.
        rows = min(config.max_num_seqs * config.speculative.num_speculative_tokens, tokens)
        held.append((DISTRIBUTIONS, 4 * model.vocab_size * min(rows, DISTRIBUTION_ROWS)))
    return held


def _kv_pages(pages: int, max_num_seqs: int, max_model_len: int) -> int:
    """Return how many of the pages that fit so many sequences could ever use."""
    return max(1, min(pages, max_num_seqs * (-(-max_model_len // PAGE_TOKENS) + 1)))


def kv_page_bytes(model: ModelConfig, dtype: KvDtype) -> int:
    """Return the bytes of a page of a model's KV cache, all layers."""
    return page_bytes(model.num_layers, model.num_kv_heads, model.head_dim, dtype)


def draft_page_bytes(
    config: EngineConfig, draft: ModelFiles | None, shared: SharedDraft | None = None
) -> int:
    """Return the bytes of a page of the draft's own KV cache; 0 if it has none."""
    if draft is None or (shared is not None and shared.reads_target_kv):
        return 0
    return kv_page_bytes(draft.model.config, draft_kv_dtype(config))


def draft_kv_dtype(config: EngineConfig) -> KvDtype:
    """Return the element type of the draft's KV cache."""
    speculative = config.speculative
    if speculative is None or speculative.draft_kv_dtype == "auto":
        return config.kv_dtype
    return speculative.draft_kv_dtype


def _too_small(memory: int, parts: list[tuple[str, int]], slots: int, kv: int) -> DoesNotFitError:
    needs = [*parts, (f"{MIN_SLOTS} expert slots", slots), ("smallest KV cache", kv)]
    total = sum(num_bytes for _, num_bytes in needs)
    sums = " + ".join(f"{name} {format_memory_size(num_bytes)}" for name, num_bytes in needs)
    smallest = -(-total // MIB)
    return DoesNotFitError(
        f"the model needs {format_memory_size(total)}, more than the budget of "
        f"{format_memory_size(memory)}: {sums}; the smallest budget that works is {smallest}MiB"
    )


def default_memory() -> int:
    """Return what this process may use: free memory or the cgroup's limit, less a margin."""
    free = _meminfo()["MemAvailable"] + resident_bytes()
    return int(0.9 * min(free, cgroup_limit() or free))


def cgroup_limit() -> int | None:
    """Return the memory limit of this process's cgroup (version 1 or 2) in bytes, if it has one."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        # A parent's limit holds for its children too.
        for directory in (group, *group.parents):
            file = directory / name
            if file.exists() and (text := file.read_text().strip()).isdigit():
                limits.append(int(text))
            if directory == root:
                break
    # Version 1 writes "unlimited" as a number near 2^63.
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def resident_bytes() -> int:
    """Return this process's resident set now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """Return the largest resident set this process had, in bytes (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resident_bytes()


def _meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
