"""The memory plan: parts that add up, refusals that name what works, and the promise kept."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgets import MIB, forget_this_process, smallest_budget
from specmoeoff.config import KV_DTYPES, EngineConfig, KvDtype, SpeculativeConfig
from specmoeoff.engine import memory_plan
from specmoeoff.engine.memory_plan import MemoryPlan, make_plan, open_models, plan_memory
from specmoeoff.errors import DoesNotFitError
from tiny import HEAVY, write_draft, write_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIN_SLOTS = memory_plan.MIN_SLOTS


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with 57 MB of experts, 1.2 MB each."""
    return write_tiny(
        tmp_path_factory.mktemp("plan") / "target",
        **HEAVY,
        num_hidden_layers=4,
        num_local_experts=12,
        vocab_size=8000,
    )


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_draft(target, tmp_path_factory.mktemp("plan") / "draft")


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget_this_process(monkeypatch)
    return


def speculative_of(method: str, draft: Path, **options: Any) -> SpeculativeConfig | None:
    if method == "off":
        return None
    return SpeculativeConfig(
        method,  # type: ignore[arg-type]
        str(draft) if method == "draft_model" else None,
        **options,
    )


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "max_num_seqs": st.sampled_from([1, 16, 300]),
        "max_num_batched_tokens": st.sampled_from([1, 64, 5000]),
        "max_model_len": st.sampled_from([1, 100, 1000, 9999]),
        "kv_dtype": st.sampled_from(KV_DTYPES),
    },
)


@given(
    extra=st.integers(0, 300),
    method=st.sampled_from(["off", "ngram", "draft_model"]),
    k=st.integers(1, 32),
    weight_dtype=st.sampled_from(["auto", "int8"]),
    options=OPTIONS,
)
def test_a_plan_adds_up(
    target: Path,
    draft: Path,
    extra: int,
    method: str,
    k: int,
    weight_dtype: str,
    options: dict[str, Any],
) -> None:
    speculative = speculative_of(
        method, draft, num_speculative_tokens=k, draft_weight_dtype=weight_dtype
    )
    memory = smallest_budget(target, speculative, **options) + extra * MIB
    config = EngineConfig(str(target), memory=memory, speculative=speculative, **options)
    plan = make_plan(config, *open_models(config))
    policy = plan.policy
    assert policy == plan_memory(config)
    assert policy.memory == memory == sum(num_bytes for _, num_bytes in policy.reservations)
    assert all(num_bytes > 0 for _, num_bytes in policy.reservations)
    assert plan.elastic_bytes == dict(policy.reservations)["expert slots and KV cache"]
    least_slots = MIN_SLOTS * policy.expert_slot_bytes
    page = plan.page_bytes + plan.draft_page_bytes
    assert plan.kv_pages * page + least_slots <= plan.elastic_bytes
    # The longest sequence there may be has room, in the target's cache and the draft's.
    assert policy.max_model_len <= plan.kv_pages * 32
    assert policy.max_model_len <= min(options.get("max_model_len", 2048), 2048)
    assert policy.max_model_len >= min(256, options.get("max_model_len", 2048))
    assert MIN_SLOTS <= policy.num_expert_slots <= 48
    if "max_num_batched_tokens" in options:
        assert policy.max_num_batched_tokens == options["max_num_batched_tokens"]
    assert (plan.draft_page_bytes > 0) == (method == "draft_model")
    assert (plan.distribution_bytes > 0) == (method == "draft_model")


@pytest.mark.parametrize("method", ["off", "draft_model"])
def test_the_smallest_budget_works_and_less_does_not(
    target: Path, draft: Path, method: str
) -> None:
    speculative = speculative_of(method, draft)
    smallest = smallest_budget(target, speculative)
    config = EngineConfig(str(target), memory=smallest, speculative=speculative)
    plan_memory(config)
    with pytest.raises(DoesNotFitError) as refusal:
        plan_memory(replace(config, memory=smallest - MIB))
    message = str(refusal.value)
    assert "\n" not in message
    assert f"is {smallest // MIB}MiB" in message
    for part in ("runtime", "target dense weights", "activations", "2 expert slots", "KV cache"):
        assert part in message
    assert ("draft weights" in message) == (method == "draft_model")


def test_a_draft_that_may_rest_is_left_out_where_it_cannot_pay(target: Path, draft: Path) -> None:
    adaptive = speculative_of("draft_model", draft, adaptive=True)
    memory = smallest_budget(target, speculative_of("draft_model", draft)) + MIB
    alone = EngineConfig(str(target), memory=memory, speculative=adaptive, max_num_seqs=1)
    off = plan_memory(replace(alone, speculative=None))
    left_out = plan_memory(alone)
    assert "with max_num_seqs 1 " in left_out.left_out
    assert replace(left_out, left_out="") == off
    together = plan_memory(replace(alone, max_num_seqs=64))
    assert together.left_out == ""
    assert "draft weights" in dict(together.reservations)
    # Asked for without leave to rest, it is there.
    fixed = replace(alone, speculative=speculative_of("draft_model", draft))
    assert "draft weights" in dict(plan_memory(fixed).reservations)
    # And where there is no room for it, an adaptive one costs nothing.
    tight = replace(alone, memory=smallest_budget(target), max_num_seqs=64)
    assert plan_memory(tight).left_out == "the budget has no room for it"


def test_each_cache_is_planned_in_its_own_dtype(target: Path, draft: Path) -> None:
    def plan(kv_dtype: KvDtype, **options: Any) -> MemoryPlan:
        speculative = speculative_of("draft_model", draft, **options)
        config = EngineConfig(
            str(target), memory=256 * MIB, kv_dtype=kv_dtype, speculative=speculative
        )
        return make_plan(config, *open_models(config))

    default, same = plan("bfloat16"), plan("bfloat16", draft_kv_dtype="auto")
    assert default.page_bytes == same.page_bytes == plan("float16").page_bytes
    assert default.draft_page_bytes < same.draft_page_bytes
    assert default.draft_page_bytes == plan("float32").draft_page_bytes
    assert plan("int8").page_bytes < default.page_bytes < plan("float32").page_bytes


@given(extra=st.integers(0, 300), max_num_seqs=st.sampled_from([1, 16, 300]))
def test_a_draft_without_a_cache_leaves_its_pages_to_the_target(
    target: Path, draft: Path, extra: int, max_num_seqs: int
) -> None:
    speculative = speculative_of("draft_model", draft)
    memory = smallest_budget(target, speculative, max_num_seqs=max_num_seqs) + extra * MIB
    config = EngineConfig(
        str(target), memory=memory, speculative=speculative, max_num_seqs=max_num_seqs
    )
    plan = make_plan(config, *open_models(config))
    shared = plan.without_draft_kv(2048)
    # Near the smallest budget, longer sequences fit.
    longest = shared.policy.max_model_len
    assert plan.policy.max_model_len <= longest <= min(2048, shared.kv_pages * 32)
    assert shared.policy == replace(plan.policy, max_model_len=longest)
    assert shared.draft_page_bytes == 0
    assert plan.kv_pages <= shared.kv_pages
    least_slots = MIN_SLOTS * plan.policy.expert_slot_bytes
    assert shared.kv_pages * shared.page_bytes + least_slots <= plan.elastic_bytes
    # Its passes have a row a sequence, so more of the step's memory can be lent.
    assert shared.draft_rows <= max_num_seqs
    assert shared.spare_step_bytes(1, False, False) >= plan.spare_step_bytes(1, False, False)


def test_what_more_memory_goes_to(target: Path) -> None:
    smallest = smallest_budget(target)
    extras = (0, 1, 2, 3, 5, 8, 10, 20, 50, 100, 1000)
    plans = [plan_memory(EngineConfig(str(target), memory=smallest + e * MIB)) for e in extras]
    for less, more in itertools.pairwise(plans):
        assert less.max_num_batched_tokens <= more.max_num_batched_tokens
    for extra, plan in zip(extras, plans, strict=True):
        # Long steps are not bought with the room of the sequences that would fill them.
        least = MIN_SLOTS * plan.expert_slot_bytes
        elastic = dict(plan.reservations)["expert slots and KV cache"]
        assert elastic - least >= extra * MIB / 2
        assert plan.max_model_len >= min(2048, 32 * (extra * MIB // 2 // (4 * 2 * 64 * 2 * 2 * 32)))
    assert plans[-1].num_expert_slots == 48
    assert plans[-1].max_num_batched_tokens > plans[0].max_num_batched_tokens


def test_a_process_that_already_holds_much_is_counted(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = smallest_budget(target)
    monkeypatch.setattr(memory_plan, "resident_bytes", lambda: 500 * MIB)
    assert smallest_budget(target) == fresh + 500 * MIB - memory_plan.RUNTIME_FLOOR


def test_without_a_budget_what_is_free_is_taken() -> None:
    assert 0 < memory_plan.default_memory() < 1 << 50


RUN = """
import json, sys
from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from specmoeoff.engine.memory_plan import peak_resident_bytes

asked = json.loads(sys.argv[1])
speculative = asked["speculative"] and SpeculativeConfig(**asked["speculative"])
llm = LLM(
    asked["model"],
    memory=asked["memory"],
    schedule=asked["schedule"],
    speculative_config=speculative,
)
longest = min(llm.policy.max_model_len - asked["max_tokens"], asked["prompt"])
prompts = [
    {"prompt_token_ids": [(i * j) % 7999 for j in range(longest - 5 * i)]}
    for i in range(asked["batch"])
]
params = SamplingParams(
    temperature=asked["temperature"], seed=1, max_tokens=asked["max_tokens"], ignore_eos=True
)
outputs = llm.generate(prompts, params)
print(json.dumps({
    "peak": peak_resident_bytes(),
    "tokens": [output.outputs[0].token_ids for output in outputs],
    "streamed": llm.stats().streamed_bytes,
    "slots": llm.stats().expert_slots - llm.policy.min_expert_slots,
}))
"""


def run_apart(model: Path, memory: int, speculative: Any, **asked: Any) -> dict[str, Any]:
    """Generate in a process of its own; return its peak resident set and the tokens."""
    asked = {"model": str(model), "memory": memory, "speculative": speculative, **asked}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(asked)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def keep_the_promise(
    target: Path,
    speculative: dict[str, Any] | None,
    extra_mib: int,
    *,
    schedule: str,
    **asked: Any,
) -> dict[str, Any]:
    """Generate with the smallest budget and so much more; the peak must be within it."""
    config = SpeculativeConfig(**speculative) if speculative else None
    memory = smallest_budget(target, config, schedule=schedule) + extra_mib * MIB
    result = run_apart(target, memory, speculative, schedule=schedule, batch=16, **asked)
    assert result["peak"] <= memory
    return result


@pytest.mark.parametrize("schedule", ["reactive", "specmoeoff"])
@pytest.mark.parametrize(
    ("extra_mib", "method", "temperature"),
    [
        (0, "off", 0.0),
        (40, "off", 1.0),
        (0, "draft_model", 0.0),
        (40, "draft_model", 1.0),
        (20, "ngram", 0.0),
    ],
)
def test_the_promise(
    target: Path, draft: Path, extra_mib: int, method: str, temperature: float, schedule: str
) -> None:
    """The peak resident set of the whole process, prompts of hundreds of tokens, 16 sequences."""
    speculative: dict[str, Any] | None = None
    if method != "off":
        model = str(draft) if method == "draft_model" else None
        speculative = {"method": method, "model": model, "num_speculative_tokens": 4}
    result = keep_the_promise(
        target,
        speculative,
        extra_mib,
        schedule=schedule,
        prompt=400 if extra_mib else 100,
        max_tokens=12,
        temperature=temperature,
    )
    assert [len(tokens) for tokens in result["tokens"]] == [12] * 16
    if extra_mib:
        # When all is over the KV cache needs nothing, and experts have what it had.
        assert result["slots"] > 0
    if extra_mib == 0:
        assert result["streamed"] > 3 * 57e6, "at the smallest budget every pass streams"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "extra_mib", "drafts"),
    [
        ("reactive", 0, False),
        ("reactive", 40, False),
        ("reactive", 0, True),
        ("reactive", 40, True),
        ("specmoeoff", 40, True),
    ],
)
def test_the_promise_at_size(
    tmp_path_factory: pytest.TempPathFactory, extra_mib: int, drafts: bool, schedule: str
) -> None:
    """150 MB of experts and a vocabulary whose logits are what a step holds most of."""
    directory = tmp_path_factory.mktemp("promise")
    target = write_tiny(
        directory / "target",
        seed=4,
        expert_spread=0.1,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=8,
        head_dim=64,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    speculative = None
    if drafts:
        draft = write_draft(target, directory / "draft")
        speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 8}
    keep_the_promise(
        target, speculative, extra_mib, schedule=schedule, prompt=250, max_tokens=8, temperature=1.0
    )
