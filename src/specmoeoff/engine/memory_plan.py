"""Splits a memory budget before any weight is read, or says by how much it is too small.

Everything the process will hold has a name here: the interpreter and its libraries, the dense
weights, the draft, the activations of the largest step, the threads' scratch. What is left is
elastic: expert slots, of which the KV caches take what sequences need while they need it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from specmoeoff.config import EngineConfig, ModelConfig, Policy
from specmoeoff.engine.model_files import ModelFiles, check_pair
from specmoeoff.engine.weights import Loader
from specmoeoff.errors import DoesNotFitError
from specmoeoff.memory_size import format_memory_size
from specmoeoff.offload.kv_cache import page_bytes

MIB = 1 << 20
RUNTIME_FLOOR = 64 * MIB
"""The interpreter with numpy, the kernels, a tokenizer and the command line, as measured; a process
that already holds more is counted at what it holds."""
RUNTIME_MARGIN = 40 * MIB
"""Allocator slack, thread stacks, kernel scratch, Python objects of a long job."""
MIN_SLOTS = 2
"""One expert in use and one arriving."""
MIN_KV_TOKENS = 256
"""The KV cache must at least hold one sequence of this length (or of max_model_len)."""
LOGIT_ROWS = 64
"""Rows of logits that exist at once; verification goes over a step's rows in such groups."""
STEP_TOKENS = (4096, 2048, 1024, 512, 256, 128, 64, 32)
"""Step budgets that are tried, largest first: a pass costs its stream whatever rides on it."""
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


def plan_memory(config: EngineConfig) -> Policy:
    """Compute the split for a configuration from file headers alone.

    Raises:
        DoesNotFitError: The budget is too small; the message has the arithmetic.
        CheckpointError: A model cannot be used.
    """
    target, draft = open_models(config)
    return make_plan(config, target, draft).policy


def open_models(config: EngineConfig) -> tuple[ModelFiles, ModelFiles | None]:
    """Open the target and, if there is one, the draft."""
    target = ModelFiles.open(config.model)
    if config.speculative is None or config.speculative.model is None:
        return target, None
    draft = ModelFiles.open(config.speculative.model)
    check_pair(target, draft)
    return target, draft


def make_plan(config: EngineConfig, target: ModelFiles, draft: ModelFiles | None) -> MemoryPlan:
    """Split the budget between the named parts."""
    memory = config.memory or default_memory()
    model = target.model.config
    max_num_seqs = config.max_num_seqs
    step_tokens = _step_tokens(config, model, memory)
    parts = [
        ("runtime", max(RUNTIME_FLOOR, resident_bytes()) + RUNTIME_MARGIN),
        ("target dense weights", target.dense_bytes(Loader(target.checkpoint))),
        ("activations", activation_bytes(model, step_tokens)),
    ]
    draft_page = 0
    if draft is not None and config.speculative is not None:
        loader = Loader(draft.checkpoint, to_int8=config.speculative.draft_weight_dtype == "int8")
        parts.append(("draft weights", draft.dense_bytes(loader) + draft.expert_bytes(loader)))
        draft_page = _page_bytes(draft.model.config, config)
    slot = max(layout.num_bytes for layer in target.expert_layouts() for layout in layer)
    page = _page_bytes(model, config)
    elastic = memory - sum(num_bytes for _, num_bytes in parts)
    model_len = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    least_pages = -(-min(MIN_KV_TOKENS, model_len) // 32)
    least = MIN_SLOTS * slot + least_pages * (page + draft_page)
    if elastic < least:
        raise _too_small(memory, parts, MIN_SLOTS * slot, least - MIN_SLOTS * slot)
    pages = (elastic - MIN_SLOTS * slot) // (page + draft_page)
    wanted_pages = max_num_seqs * (-(-model_len // 32) + 1)
    total_experts = model.num_layers * target.model.num_ffn_experts
    parts.append(("expert slots and KV cache", elastic))
    return MemoryPlan(
        Policy(
            memory=memory,
            reservations=tuple(parts),
            num_expert_slots=min(elastic // slot, total_experts),
            min_expert_slots=MIN_SLOTS,
            expert_slot_bytes=slot,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=step_tokens,
            max_model_len=min(model_len, pages * 32),
        ),
        elastic_bytes=elastic,
        page_bytes=page,
        draft_page_bytes=draft_page,
        kv_pages=max(1, min(pages, wanted_pages)),
    )


def activation_bytes(model: ModelConfig, num_tokens: int) -> int:
    """Return the bytes a step of ``num_tokens`` holds at its peak, logits included.

    Float32 per token: the residual stream, its norm and the embedding (3 hidden), queries, keys,
    values and the attention output, and the expert's intermediate activations with its gathered rows.
    """
    heads = 3 * model.num_heads + 4 * model.num_kv_heads
    per_token = 4 * model.hidden_size + heads * model.head_dim + 2 * model.intermediate_size
    logits = 2 * min(LOGIT_ROWS, num_tokens) * model.vocab_size
    return 4 * (num_tokens * per_token + logits)


def _step_tokens(config: EngineConfig, model: ModelConfig, memory: int) -> int:
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    for tokens in STEP_TOKENS:
        if activation_bytes(model, tokens) <= ACTIVATION_SHARE * memory:
            return tokens
    return STEP_TOKENS[-1]


def _page_bytes(model: ModelConfig, config: EngineConfig) -> int:
    return page_bytes(model.num_layers, model.num_kv_heads, model.head_dim, config.kv_dtype)


def _too_small(
    memory: int, parts: list[tuple[str, int]], slots: int, kv: int
) -> DoesNotFitError:
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
    """Return the memory limit of this process's cgroup in bytes, version 1 or 2; None if unlimited."""
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
