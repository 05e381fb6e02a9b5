"""How the memory of planned passes is split: who gets what is left, and what does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from budgets import MIB, forget_this_process
from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from specmoeoff.config import EngineConfig
from specmoeoff.engine import memory_plan
from specmoeoff.engine.memory_plan import (
    DRAFT_ROWS,
    activation_bytes,
    open_models,
    weight_parts,
)
from specmoeoff.engine.planned_memory import MemorySplit, split_memory
from specmoeoff.engine.planned_policy import planned_config
from specmoeoff.offload.planned_experts import slot_bytes
from specmoeoff.pipeline.schedules.shape import DEVICE
from tiny import HEAVY, write_draft, write_tiny

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with 14 MB of experts whose sequences may be long."""
    return write_tiny(
        tmp_path_factory.mktemp("split") / "target",
        **HEAVY,
        num_hidden_layers=2,
        num_local_experts=6,
        vocab_size=1000,
    )


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft that may read the target's KV cache."""
    return write_draft(target, tmp_path_factory.mktemp("split") / "draft", same_attention=True)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_this_process(monkeypatch)


def split_of(model: Path, memory: int, **options: Any) -> MemorySplit:
    options = {"device": "sim", "device_memory": 32 * MIB, "num_threads": 1} | options
    config = EngineConfig(str(model), memory=memory, max_num_batched_tokens=24, **options)
    files, draft = open_models(config)
    return split_memory(config, planned_config(config), files, draft)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_the_cache_leaves_host_memory_to_experts_that_fit_there(
    target: Path, kv_dtype: str
) -> None:
    files, _ = open_models(EngineConfig(str(target)))
    experts = files.total_experts * slot_bytes(files.expert_layouts())
    placements = []
    for memory in range(70 * MIB, 110 * MIB, MIB):
        split = split_of(target, memory, kv_dtype=kv_dtype)
        host = split.tiers[0].as_dict()
        page = host["KV cache"] // split.num_pages
        free = memory - host["runtime"] - host["activations"]
        # 256 tokens are the least that there must be room for.
        assert split.num_pages >= 8
        assert (split.placement is DEVICE) == (free >= experts + 8 * page)
        placements.append(split.placement)
    assert len(set(placements)) == 2


@pytest.mark.parametrize("schedule", ["specmoeoff", "flexgen", "moe_gen"])
@pytest.mark.parametrize("drafts", [False, True])
def test_more_host_memory_is_never_too_much_for_the_device(
    target: Path, draft: Path, schedule: str, drafts: bool
) -> None:
    speculative = SpeculativeConfig(model=str(draft)) if drafts else None
    pages = [
        split_of(target, memory * MIB, schedule=schedule, speculative=speculative).num_pages
        for memory in (80, 100, 200, 1000, 10000)
    ]
    assert pages == sorted(pages)
    assert pages[0] < pages[1]


@pytest.mark.parametrize(
    ("device", "prefix"),
    [
        ({"device": "sim", "device_memory": 14 * MIB}, "device: "),
        ({"device": "cpu", "schedule": "specmoeoff"}, ""),
    ],
)
def test_what_a_draft_shares_goes_to_the_experts(
    target: Path, draft: Path, device: dict[str, Any], prefix: str
) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(range(1, n))} for n in (4, 30, 70)]
    memory = 86 * MIB if device["device"] == "cpu" else 200 * MIB
    options = {"memory": memory, "max_num_batched_tokens": 24, "num_threads": 1}
    with LLM(str(target), memory="1GiB") as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
    plans, pages, shared = [], [], 0
    for share_kv in (False, True):
        speculative = SpeculativeConfig(model=str(draft), share_kv=share_kv)
        with LLM(str(target), speculative_config=speculative, **options, **device) as llm:
            got = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
            assert got == wanted
            assert llm.stats().accepted_tokens > 0
            shared = llm.stats().shared_bytes
            plans.append(dict(llm.policy.reservations))
            pages.append(llm._engine._target.kv.max_pages)
    apart, together = plans
    config = EngineConfig(
        str(target), speculative=SpeculativeConfig(model=str(draft)), num_threads=1
    )
    _, _, (name, unshared) = weight_parts(config, *open_models(config))
    assert 0 < shared < unshared
    assert apart[prefix + name] == together[prefix + name] == unshared - shared
    assert "device: KV cache of the draft" not in together
    assert ("device: KV cache of the draft" in apart) == (device["device"] == "sim")
    if device["device"] == "sim":
        assert together["device: expert slots"] > apart["device: expert slots"]
    else:
        assert pages[1] > pages[0]


@pytest.mark.parametrize(
    "options", [{}, {"device": "cpu", "device_memory": None, "schedule": "specmoeoff"}]
)
def test_a_draft_has_activations_beside_the_targets(
    target: Path, draft: Path, options: dict[str, Any]
) -> None:
    speculative = SpeculativeConfig(model=str(draft))
    split = split_of(target, 200 * MIB, speculative=speculative, **options)
    alone = split_of(target, 200 * MIB, **options)
    _, files = open_models(EngineConfig(str(target), speculative=speculative))
    assert files is not None
    used = split.tiers[-1].as_dict()
    assert used["activations"] == alone.tiers[-1].as_dict()["activations"]
    assert used["draft activations"] == activation_bytes(files.model.config, DRAFT_ROWS)


def test_what_is_loaded_is_not_counted_as_the_process_too(
    target: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = iter([0])
    monkeypatch.setattr(memory_plan, "resident_bytes", lambda: next(counted, 1 << 40))
    speculative = SpeculativeConfig(model=str(draft))
    options = {"device": "sim", "device_memory": 32 * MIB, "num_threads": 1}
    with LLM(str(target), memory=200 * MIB, speculative_config=speculative, **options) as llm:
        runtime = dict(llm.policy.reservations)["host: runtime"]
    parts = (memory_plan.RUNTIME_FLOOR, memory_plan.RUNTIME_MARGIN, memory_plan.THREAD_BYTES)
    assert runtime == sum(parts)
