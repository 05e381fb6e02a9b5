"""``LLM(schedule=...)``: the tokens of the engine that reacts to routing, by plans and devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from budgets import few_slots, trade_nothing
from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from specmoeoff.engine import pass_ops, planned_build, planned_memory
from specmoeoff.engine.memory_plan import kv_page_bytes
from specmoeoff.engine.model_files import ModelFiles
from specmoeoff.engine.pass_ops import PassOps
from specmoeoff.engine.planned_target import PlannedTarget
from specmoeoff.errors import DoesNotFitError, InvalidInputError, OpError
from specmoeoff.pipeline.executor import SerialExecutor
from specmoeoff.pipeline.overlapped import OverlappedExecutor
from specmoeoff.pipeline.schedules import SCHEDULES
from specmoeoff.speculative.draft_context import TargetContexts
from tiny import write_draft

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from specmoeoff.pipeline.timeline import Timeline

DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "sim": {"device": "sim", "device_memory": 1 << 22},
}
EXECUTORS = {"serial": SerialExecutor, "overlapped": OverlappedExecutor}
SIX_SLOTS = few_slots(6)
"""For ten experts, so that some are streamed."""
SPECULATION = ("off", "ngram", "draft")
"""Nothing, the sequence's own past, a model with a KV cache of its own."""

TEXTS = ("abcabcabcabcabc", "the same the same the", "x", "one two one two one", "a b " * 12, "zz")
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=9, logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=1),
    SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=8),
    SamplingParams(temperature=0.0, max_tokens=12, repetition_penalty=1.2),
    SamplingParams(temperature=0.7, top_k=20, max_tokens=11),
)
"""More requests than run at once, of many lengths: hardly two steps have the same shape."""


def speculation(name: str, draft: Path) -> SpeculativeConfig | None:
    if name == "off":
        return None
    if name == "ngram":
        return SpeculativeConfig(method="ngram", num_speculative_tokens=3, prompt_lookup_min=1)
    return SpeculativeConfig(model=str(draft), num_speculative_tokens=3)


def opened(model: Path, **options: Any) -> LLM:
    defaults = {"memory": "4GiB", "max_num_seqs": 3, "max_num_batched_tokens": 24}
    return LLM(str(model), **(defaults | options))


def answers(llm: LLM) -> list[Any]:
    """Everything that must not depend on the order of work."""
    return [
        (output.prompt_logprobs, [(c.token_ids, c.text, c.logprobs) for c in output.outputs])
        for output in llm.generate(list(TEXTS), list(PARAMS))
    ]


@pytest.fixture(scope="module")
def expected(tiny_mixtral: Path, tiny_draft: Path) -> dict[str, list[Any]]:
    found = {}
    for name in SPECULATION:
        with opened(tiny_mixtral, speculative_config=speculation(name, tiny_draft)) as llm:
            found[name] = answers(llm)
    return found


# The same tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", SPECULATION)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_gives_the_same_answers(
    tiny_mixtral: Path,
    tiny_draft: Path,
    expected: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    schedule: str,
    device: str,
    executor: str,
    drafts: str,
) -> None:
    monkeypatch.setattr(planned_build, "OverlappedExecutor", EXECUTORS[executor])
    monkeypatch.setattr(planned_memory, "_reserve_slots", SIX_SLOTS)
    with opened(
        tiny_mixtral,
        schedule=schedule,
        speculative_config=speculation(drafts, tiny_draft),
        **DEVICES[device],
    ) as llm:
        assert answers(llm) == expected[drafts]
        assert (llm.stats().drafted_tokens > 0) == (drafts != "off")
        assert llm.stats().fetched_experts > 0


@pytest.mark.parametrize("num_micro_batches", [1, 3, 8])
@pytest.mark.parametrize("device", DEVICES)
def test_micro_batches_change_nothing(
    tiny_mixtral: Path,
    tiny_draft: Path,
    expected: dict[str, list[Any]],
    num_micro_batches: int,
    device: str,
) -> None:
    with opened(
        tiny_mixtral,
        schedule="specmoeoff",
        num_micro_batches=num_micro_batches,
        speculative_config=speculation("draft", tiny_draft),
        **DEVICES[device],
    ) as llm:
        assert answers(llm) == expected["draft"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_sequence_that_lost_its_pages_starts_over(
    tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    options = {"max_num_seqs": 4, "max_model_len": 96}
    # Nothing is expected to become long, so more are let in than there is room for.
    monkeypatch.setattr("specmoeoff.engine.expected_output.PRIOR_TOKENS", 1)
    with opened(tiny_mixtral, **options) as llm:
        wanted = [o.outputs[0].token_ids for o in llm.generate(list(TEXTS), params)]
    monkeypatch.setattr(planned_memory, "_pages", lambda *_: 5)
    with opened(tiny_mixtral, schedule="specmoeoff", **DEVICES[device], **options) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(list(TEXTS), params)] == wanted
        assert llm.stats().preemptions > 0


def test_a_dense_model_and_a_sliding_window(tiny_llama: Path, tiny_mistral: Path) -> None:
    for model in (tiny_llama, tiny_mistral):
        with opened(model) as llm:
            wanted = answers(llm)
        for device in DEVICES.values():
            with opened(model, schedule="moe_lightning", **device) as llm:
                assert answers(llm) == wanted


@pytest.mark.parametrize("schedule", ["specmoeoff", "flexgen"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_draft_that_reads_the_targets_cache(
    tiny_mixtral: Path, tmp_path: Path, schedule: str, device: str
) -> None:
    draft = write_draft(tiny_mixtral, tmp_path / "draft", same_attention=True)
    options = {"speculative_config": speculation("draft", draft)}
    with opened(tiny_mixtral, **options) as llm:
        assert isinstance(llm._engine._drafter._contexts, TargetContexts)
        wanted = answers(llm)
    with opened(tiny_mixtral, schedule=schedule, **DEVICES[device], **options) as llm:
        assert answers(llm) == wanted
        assert llm.stats().accepted_tokens > 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_draft_that_reads_the_targets_cache_takes_no_memory_for_its_own(
    tiny_mixtral: Path, tmp_path: Path, device: str
) -> None:
    draft = write_draft(tiny_mixtral, tmp_path / "draft", same_attention=True)
    taken, pages = {}, set()
    for share_kv in (True, False):
        with opened(
            tiny_mixtral,
            schedule="specmoeoff",
            max_model_len=96,
            speculative_config=SpeculativeConfig(model=str(draft), share_kv=share_kv),
            **DEVICES[device],
        ) as llm:
            reservations = llm.policy.reservations
            taken[share_kv] = sum(size for name, size in reservations if "KV cache" in name)
            pages.add(llm._engine._target.kv.max_pages)
    (num_pages,) = pages
    config = ModelFiles.open(str(draft)).model.config
    assert taken[False] - taken[True] == num_pages * kv_page_bytes(config, "int8")


def test_auto_leaves_out_a_draft_that_has_no_room(tiny_mixtral: Path, tiny_draft: Path) -> None:
    options = {"schedule": "specmoeoff", "device": "sim", "max_model_len": 96}
    auto = SpeculativeConfig(model=str(tiny_draft), adaptive=True)
    with opened(tiny_mixtral, device_memory=1 << 22, speculative_config=auto, **options) as llm:
        assert llm.policy.left_out == ""
        assert "device: draft weights" in dict(llm.policy.reservations)
    with opened(tiny_mixtral, device_memory=1 << 22, **options) as llm:
        wanted = answers(llm)
        parts = dict(llm.policy.reservations)
        slot = llm.policy.expert_slot_bytes
    others = ("device: target dense weights", "device: activations")
    tight = sum(parts[name] for name in others) + 2 * slot
    with opened(tiny_mixtral, device_memory=tight, speculative_config=auto, **options) as llm:
        assert llm.policy.left_out == "the memory has no room for it"
        assert "device: draft weights" not in dict(llm.policy.reservations)
        assert answers(llm) == wanted


def test_auto_leaves_out_a_draft_whose_slots_are_worth_more(
    tiny_mixtral: Path, tiny_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten experts one is streamed without the draft, and seven are with it: no k gains that."""
    least = {"with": 3}

    def slots(files: Any, tier: Any) -> int:
        number = least["with"] if "draft weights" in tier.as_dict() else 9
        tier.reserve("expert slots", number * planned_memory.slot_bytes(files.expert_layouts()))
        return number

    monkeypatch.setattr(planned_memory, "_reserve_slots", slots)
    auto = SpeculativeConfig(model=str(tiny_draft), adaptive=True)
    for number, reason in ((3, "the 6 expert slots that it would take are worth more"), (8, "")):
        least["with"] = number
        with opened(tiny_mixtral, speculative_config=auto, **DEVICES["sim"]) as llm:
            assert llm.policy.left_out == reason
            assert llm.policy.num_expert_slots == (9 if reason else 8)


def test_rounded_activations(tiny_mixtral: Path) -> None:
    with opened(tiny_mixtral, dtype="bfloat16") as llm:
        wanted = answers(llm)
    with opened(tiny_mixtral, dtype="bfloat16", schedule="specmoeoff") as llm:
        assert answers(llm) == wanted
        assert llm.policy.dtype == "bfloat16"


# Slots and pages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", SPECULATION)
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_experts_borrow_what_the_kv_cache_does_not_need(
    tiny_mixtral: Path,
    tiny_draft: Path,
    monkeypatch: pytest.MonkeyPatch,
    schedule: str,
    drafts: str,
) -> None:
    """Slots come and go between steps, never more than fit beside the pages, and no token changes.

    As many pages as take the room of four slots and a half; longer and longer sequences.
    """
    params = [
        SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (3, 40, 4, 70, 9)
    ]
    options = {
        "max_num_seqs": 2,
        "max_model_len": 96,
        "speculative_config": speculation(drafts, tiny_draft),
    }
    with opened(tiny_mixtral, **options) as llm:
        wanted = [o.outputs[0].token_ids for o in llm.generate(list(TEXTS[:5]), params)]
    files = ModelFiles.open(str(tiny_mixtral))
    slot = planned_memory.slot_bytes(files.expert_layouts())
    page = kv_page_bytes(files.model.config, "bfloat16")
    num_pages = 9 * slot // (2 * page)
    monkeypatch.setattr(planned_memory, "_pages", lambda *_: num_pages)
    monkeypatch.setattr(planned_memory, "_reserve_slots", few_slots(5))
    with opened(tiny_mixtral, schedule=schedule, device="cpu", **options) as llm:
        planned = llm._engine._target.planned  # type: ignore[attr-defined]
        kv, experts, arena = planned.forward.kv, planned.experts, planned.experts._own._arena
        assert experts.num_slots == 5 + 4
        seen = []
        hold = type(arena).hold

        def held(self: Any, num_bytes: int) -> None:
            hold(self, num_bytes)
            total = arena._held + kv._arena._held
            assert total <= 5 * slot + num_pages * page
            seen.append(experts.num_slots)

        monkeypatch.setattr(type(arena), "hold", held)
        outputs = llm.generate(list(TEXTS[:5]), params)
        assert [o.outputs[0].token_ids for o in outputs] == wanted
        assert min(seen) < 8
        assert experts.num_slots == llm.stats().expert_slots == 5 + 4


def test_an_expert_that_is_kept_is_not_read_again(
    tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for nine of ten experts in all each step reads one, without the extra ones five."""
    monkeypatch.setattr(planned_memory, "_reserve_slots", few_slots(6))
    read = {}
    for trades in (True, False):
        with monkeypatch.context() as patch:
            if not trades:
                trade_nothing(patch)
            with opened(tiny_mixtral, schedule="specmoeoff") as llm:
                llm._engine._target.planned.experts._max_slots = 9  # type: ignore[attr-defined]
                llm._engine._target.rebalance()
                read[trades] = [
                    sum(op.kind == "read" for op in step.plan.ops) for step in timelines(llm, 6)
                ]
    assert read[True][0] == read[False][0], "what is kept is read where it would be streamed anyway"
    assert read[False][-1] - read[True][-1] == 3


def test_what_is_kept_outlasts_a_step_that_fails(
    tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned_memory, "_reserve_slots", few_slots(6))
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    with opened(tiny_mixtral, schedule="specmoeoff") as llm:
        wanted = [o.outputs[0].token_ids for o in llm.generate(list(TEXTS), params)]
        forward = llm._engine._target.planned.forward  # type: ignore[attr-defined]
        kept = [held for held in forward._held if held.buffer.startswith("kept")]
        assert len(kept) == 4
        with monkeypatch.context() as patch:
            patch.setattr(PassOps, "_attend", lambda *_: 1 / 0)
            patch.setitem(pass_ops._OPS, "attend", PassOps._attend)
            with pytest.raises(OpError, match="attend"):
                llm.generate(list(TEXTS), params)
        assert set(forward._held) == set(kept)
        assert [o.outputs[0].token_ids for o in llm.generate(list(TEXTS), params)] == wanted
        forward.keeps_steps = True
        llm.generate(list(TEXTS), params)
        ops = [op for step in forward.steps for op in step.timeline().plan.ops]
        read = {(op.layer, op.experts[0]) for op in ops if op.kind == "read"}
        assert not read & {(held.layer, held.expert) for held in kept}


# What the engine says -----------------------------------------------------------------------------


def timelines(llm: LLM, count: int) -> Sequence[Timeline]:
    target = llm._engine._target
    assert isinstance(target, PlannedTarget)
    forward = target.planned.forward
    forward.keeps_steps = True
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    llm.generate(list(TEXTS[:3]), params)
    forward.machine.executor.settle()
    return [step.timeline() for step in forward.steps]


@pytest.mark.parametrize("drafts", ["ngram", "draft"])
def test_drafts_are_ops_of_the_step(tiny_mixtral: Path, tiny_draft: Path, drafts: str) -> None:
    with opened(
        tiny_mixtral,
        schedule="specmoeoff",
        speculative_config=speculation(drafts, tiny_draft),
        **DEVICES["sim"],
    ) as llm:
        *_, last = timelines(llm, 12)
    ops = last.plan.ops
    made = {op.micro_batches[0]: n for n, op in enumerate(ops) if op.kind == "draft"}
    embedded = {op.micro_batches[0]: n for n, op in enumerate(ops) if op.kind == "embed"}
    assert made.keys() == embedded.keys()
    assert made
    assert all(ops[n].lane == "device" for n in made.values())
    for m, number in made.items():
        assert last.ran[number].end_s <= last.ran[embedded[m]].start_s
        # What the drafter weighs is its price.
        assert (ops[number].num_bytes > 0) == (drafts == "draft")


@pytest.mark.parametrize("device", DEVICES)
def test_figures_of_planned_steps(
    tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(planned_memory, "_reserve_slots", SIX_SLOTS)
    trade_nothing(monkeypatch)
    with opened(tiny_mixtral, schedule="specmoeoff", **DEVICES[device]) as llm:
        steps = timelines(llm, 6)
        stats = llm.stats()
    lanes = {"cpu": {"disk", "cpu"}, "sim": {"h2d", "device", "cpu", "d2h"}}[device]
    link = {"cpu": "disk", "sim": "h2d"}[device]
    assert {lane for lane, seconds in stats.lane_busy_s.items() if seconds} == lanes
    ops = [op for step in steps for n, op in enumerate(step.plan.ops) if n in step.ran]
    brought = [op for op in ops if op.kind in ("read", "load") and op.lane == link]
    assert stats.fetched_experts == len(brought) > 0
    assert stats.streamed_bytes == sum(op.num_bytes for op in brought)
    assert 0 < stats.streamed_s <= stats.lane_busy_s[link]
    assert stats.lane_busy_s["cpu"] <= stats.step_s
    assert stats.wanted_experts > 0
    assert stats.expert_slots == 6
    assert stats.stalled_s <= stats.step_s
    assert list(stats.tiers) == {"cpu": ["main"], "sim": ["host", "device"]}[device]
    assert sum(use.peak for use in stats.tiers.values()) == stats.peak_memory_bytes
    for use in stats.tiers.values():
        assert 0 < use.reserved <= use.planned <= use.budget
    if device == "sim":
        assert stats.tiers["device"].peak <= stats.tiers["device"].planned


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drafts", SPECULATION)
def test_the_policy_adds_up(tiny_mixtral: Path, tiny_draft: Path, device: str, drafts: str) -> None:
    with opened(
        tiny_mixtral,
        memory="2GiB",
        schedule="flexgen",
        speculative_config=speculation(drafts, tiny_draft),
        **DEVICES[device],
    ) as llm:
        policy = llm.policy
    names = {name.rpartition(": ")[2] for name, _ in policy.reservations}
    assert policy.memory == sum(num_bytes for _, num_bytes in policy.reservations)
    assert policy.memory == (2 << 30) + DEVICES[device].get("device_memory", 0)
    assert {"runtime", "activations", "expert slots", "KV cache"} <= names
    assert ("draft weights" in names) == (drafts == "draft")


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "fast"}, r"schedule 'fast' is unknown; use one of auto, reactive, specmoeo"),
        ({"device": "tpu"}, r"device is 'tpu'; use one of auto, cpu, sim"),
        ({"device": "sim"}, r"give both, such as device_memory '8GiB'"),
        ({"device_memory": "1GiB"}, r"device 'sim' and device_memory go together"),
        ({"schedule": "reactive", **DEVICES["sim"]}, r"'reactive' runs on device 'cpu' only; use"),
        ({"schedule": "flexgen", "expert_mode": "belt"}, r"leave it 'auto', or use schedule 'rea"),
        ({"schedule": "flexgen", "num_micro_batches": 0}, r"num_micro_batches is 0; it must be"),
    ],
)
def test_options_that_do_not_go_are_refused(
    tiny_mixtral: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        opened(tiny_mixtral, **options)


def test_a_schedule_that_needs_more_slots_is_refused_before_the_start(
    tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned_memory, "_reserve_slots", lambda *_: 2)
    with pytest.raises(InvalidInputError, match=r"'flexgen' needs more than 2 expert slots"):
        opened(tiny_mixtral, schedule="flexgen")
    with opened(tiny_mixtral, schedule="specmoeoff") as llm:
        assert llm.policy.num_expert_slots == 2


def test_a_tier_that_is_too_small_is_refused_with_the_arithmetic(tiny_mixtral: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"device memory of .* too small for target dense"):
        opened(tiny_mixtral, device="sim", device_memory=1 << 14)
    with pytest.raises(DoesNotFitError, match=r"host memory of 1.00 MiB is too small for runtime"):
        opened(tiny_mixtral, memory="1MiB", **DEVICES["sim"])
    with pytest.raises(DoesNotFitError, match=r"the smallest budget that works is"):
        opened(tiny_mixtral, memory="1MiB", schedule="specmoeoff")


# Failures -----------------------------------------------------------------------------------------


class Breaks:
    """A drafter of which one call fails."""

    def __init__(self) -> None:
        self.calls = 0

    def prefill(self, *_: Any) -> None:
        pass

    def propose(self, requests: Sequence[Any], held_bytes: int) -> list[Any]:
        from specmoeoff.speculative.drafter import Proposal

        self.calls += 1
        if self.calls == 5:
            raise ZeroDivisionError("a bug in the drafter")
        return [Proposal() for _ in requests]

    def release(self, key: int) -> None:
        pass


def test_a_draft_that_fails_is_named_and_the_engine_goes_on(
    tiny_mixtral: Path, tiny_draft: Path
) -> None:
    options = {"speculative_config": speculation("ngram", tiny_draft)}
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    with opened(tiny_mixtral) as llm:
        wanted = [o.outputs[0].token_ids for o in llm.generate(list(TEXTS), params)]
    with opened(tiny_mixtral, schedule="specmoeoff", **options) as llm:
        llm._engine._drafter = Breaks()
        with pytest.raises(OpError, match=r"op \d+ \(draft M\d\) of the specmoeoff step failed: a"):
            llm.generate(list(TEXTS), params)
        assert [o.outputs[0].token_ids for o in llm.generate(list(TEXTS), params)] == wanted
