"""The same tokens, whatever the schedule: drafts, budgets, modes, company, chunks, threads."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgets import MIB, forget_this_process, smallest_budget
from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from specmoeoff.config import DTYPES, KV_DTYPES
from tiny import EOS_TOKEN_ID, write_draft, write_tiny

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
LENGTHS = (1, 2, 3, 5, 9, 17, 31, 32, 33, 40, 64, 65, 70, 90, 7, 12)
SHAPES = {
    "num_hidden_layers": 3,
    "hidden_size": 88,
    "intermediate_size": 384,
    "num_local_experts": 6,
}


@dataclass(frozen=True)
class Models:
    """One target and drafts that are often, sometimes and never right; ``kin`` shares its KV."""

    target: Path
    good: Path
    kin: Path
    fair: Path
    random: Path

    def speculative(self, kind: str, k: int, **options: Any) -> SpeculativeConfig | None:
        if kind == "off":
            return None
        if kind == "ngram":
            return SpeculativeConfig("ngram", None, k, prompt_lookup_min=1, **options)
        return SpeculativeConfig("draft_model", str(getattr(self, kind)), k, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    directory = tmp_path_factory.mktemp("lossless")
    target = write_tiny(directory / "target", seed=11, expert_spread=0.1, **SHAPES)
    random = write_tiny(directory / "random", "llama", seed=99, hidden_size=36)
    fair = write_draft(target, directory / "fair", noise=0.3)
    good = write_draft(target, directory / "good")
    kin = write_draft(target, directory / "kin", noise=0.1, same_attention=True)
    return Models(target, good, kin, fair, random)


@pytest.fixture(scope="module", autouse=True)
def fresh_process() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        forget_this_process(patch)
        yield


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(4)
    made = [rng.integers(0, 250, length).tolist() for length in LENGTHS]
    # A prompt that repeats itself gives prompt lookup something to find.
    made[9] = (made[5] * 3)[:40]
    made[12] = (made[4] * 8)[:70]
    return made


DEFAULT = ("float32", "bfloat16")
Expected = dict[tuple[str, str], list[list[int]]]
"""By dtype and kv_dtype: each pair rounds in its own way."""


@pytest.fixture(scope="module")
def expected(models: Models, prompts: list[list[int]]) -> Expected:
    """What each prompt gives alone, everything in memory, no speculation, one thread."""
    tokens: Expected = {}
    for key in itertools.product(DTYPES, KV_DTYPES):
        options: dict[str, Any] = {"dtype": key[0], "kv_dtype": key[1], "num_threads": 1}
        with LLM(str(models.target), memory="1GiB", **options) as llm:
            tokens[key] = [run(llm, [prompt])[0] for prompt in prompts]
    for each in tokens.values():
        assert all(len(ids) == 24 or ids[-1] == EOS_TOKEN_ID for ids in each)
        assert len({tuple(ids) for ids in each}) == len(prompts)
    # An option that reached no kernel would pass every test below.
    assert tokens["float32", "float32"] != tokens["bfloat16", "float32"]
    return tokens


def rounding(options: dict[str, Any]) -> tuple[str, str]:
    """Return the key of ``Expected`` for an engine's options."""
    return options.get("dtype", DEFAULT[0]), options.get("kv_dtype", DEFAULT[1])


def run(
    llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams] = GREEDY
) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    assert [output.error for output in outputs] == [None] * len(prompts)
    return [output.outputs[0].token_ids for output in outputs]


@dataclass(frozen=True)
class Case:
    """One way to run; ``extra`` is MiB above the smallest budget, None everything in memory."""

    draft: str = "off"
    k: int = 4
    extra: int | None = None
    batch: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    speculative: dict[str, Any] = field(default_factory=dict)


# Every value of every dimension at least once, beside values that a bug would need.
CASES = [
    Case("off", extra=0, batch=1, options={"expert_mode": "belt"}),
    Case("off", extra=0, batch=16, options={"expert_mode": "demand", "num_threads": 2}),
    Case("off", extra=1, batch=3, options={"max_num_batched_tokens": 5, "kv_dtype": "int8"}),
    Case("off", batch=16, options={"max_num_batched_tokens": 4096, "num_threads": 1}),
    Case("off", extra=0, batch=16, options={"dtype": "bfloat16", "num_threads": 2}),
    Case("ngram", 4, 0, 3, {"dtype": "bfloat16", "kv_dtype": "float32"}),
    Case("good", 4, 1, 1, {"dtype": "bfloat16", "max_num_batched_tokens": 5}),
    Case("fair", 6, None, 16, {"dtype": "bfloat16", "kv_dtype": "int8"}),
    Case("ngram", 1, 0, 16, {"expert_mode": "auto"}),
    Case("ngram", 3, 2, 3, {"kv_dtype": "float32", "max_num_batched_tokens": 8}),
    Case("ngram", 8, None, 1, {"expert_mode": "belt", "kv_dtype": "float16"}),
    Case("good", 1, 1, 16, {"expert_mode": "belt", "num_threads": 2}),
    Case("good", 2, 0, 3, {"expert_mode": "demand", "max_num_batched_tokens": 3}),
    Case("good", 4, None, 16, {"kv_dtype": "float32"}, {"draft_weight_dtype": "auto"}),
    Case("good", 5, 0, 16, {"max_num_batched_tokens": 40, "num_threads": 1}),
    Case("good", 8, 2, 1, {"expert_mode": "auto"}, {"draft_kv_dtype": "float16"}),
    Case("kin", 1, 0, 16, {"expert_mode": "belt", "kv_dtype": "int8"}),
    Case("kin", 4, 1, 16, {"max_num_batched_tokens": 40}, {"draft_weight_dtype": "auto"}),
    Case("kin", 4, 0, 3, {"kv_dtype": "float32"}, {"share_kv": False}),
    Case("kin", 8, None, 1, {"dtype": "bfloat16", "kv_dtype": "float16"}),
    Case("fair", 3, 1, 16, {"max_num_seqs": 3, "kv_dtype": "int8"}),
    Case("fair", 6, 0, 3, {"kv_dtype": "float32", "expert_mode": "belt"}),
    Case("fair", 7, None, 1, {"expert_mode": "demand"}, {"draft_kv_dtype": "auto"}),
    Case("fair", 8, 2, 16, {}, {"adaptive": True}),
    Case("random", 4, 0, 16, {"expert_mode": "belt", "max_num_batched_tokens": 64}),
    Case("random", 8, None, 3, {"num_threads": 2}),
    Case("random", 2, 1, 1, {"expert_mode": "demand", "kv_dtype": "float32"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.draft}-{case.k}-{case.batch}")
def test_the_same_tokens(
    models: Models, prompts: list[list[int]], expected: Expected, case: Case
) -> None:
    speculative = models.speculative(case.draft, case.k, **case.speculative)
    memory = 1 << 30
    if case.extra is not None:
        smallest = smallest_budget(models.target, speculative, **case.options)
        memory = smallest + case.extra * MIB
    with LLM(
        str(models.target), memory=memory, speculative_config=speculative, **case.options
    ) as llm:
        if case.extra == 0:
            assert llm.policy.num_expert_slots < 18, "the budget was to be too small for all"
        got = []
        some = prompts if case.batch != 1 else prompts[::3]
        for at in range(0, len(some), case.batch):
            got += run(llm, some[at : at + case.batch])
        stats = llm.stats()
    reference = expected[rounding(case.options)]
    assert got == (reference if case.batch != 1 else reference[::3])
    if case.draft in ("good", "kin", "fair") and not case.speculative.get("adaptive"):
        assert stats.accepted_tokens > 0
    if case.draft == "random":
        assert stats.drafted_tokens > 10 * stats.accepted_tokens > -1


@given(data=st.data())
@settings(max_examples=12)
def test_any_way_to_run(
    models: Models, prompts: list[list[int]], expected: Expected, data: st.DataObject
) -> None:
    options: dict[str, Any] = {
        "expert_mode": data.draw(st.sampled_from(["auto", "belt", "demand"])),
        "max_num_batched_tokens": data.draw(st.sampled_from([None, 1, 2, 7, 33, 200])),
        "max_num_seqs": data.draw(st.sampled_from([1, 2, 5, 64])),
        "dtype": data.draw(st.sampled_from(DTYPES)),
        "kv_dtype": data.draw(st.sampled_from(KV_DTYPES)),
        "num_threads": data.draw(st.sampled_from([1, 2])),
    }
    speculative = models.speculative(
        data.draw(st.sampled_from(["off", "ngram", "good", "kin", "fair", "random"])),
        data.draw(st.integers(1, 8)),
    )
    memory = smallest_budget(models.target, speculative, **options)
    memory += data.draw(st.sampled_from([0, 1, 3, 200])) * MIB
    order = data.draw(st.permutations(range(len(prompts))))[: data.draw(st.integers(1, 6))]
    with LLM(str(models.target), memory=memory, speculative_config=speculative, **options) as llm:
        got = run(llm, [prompts[i] for i in order])
    assert got == [expected[rounding(options)][i] for i in order]


def test_arrival_while_others_run(
    models: Models, prompts: list[list[int]], expected: Expected
) -> None:
    with LLM(
        str(models.target), memory="1GiB", speculative_config=models.speculative("good", 3)
    ) as llm:
        tokens: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        first = llm.generate_stream([{"prompt_token_ids": prompts[i]} for i in (0, 1)], GREEDY)
        for number, output in enumerate(first):
            tokens[int(output.request_id)] += output.outputs[0].token_ids
            if number == 3:  # a second run begins in the middle of the first
                rest = run(llm, prompts[2:])
                tokens |= dict(enumerate(rest, 2))
    assert list(tokens.values()) == expected[DEFAULT]


@pytest.mark.parametrize("draft", ["off", "good", "random", "ngram"])
def test_what_adjusts_greedy_choices_does_not_depend_on_drafts(
    models: Models, prompts: list[list[int]], draft: str
) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3),
        SamplingParams(temperature=0, max_tokens=20, frequency_penalty=0.7, presence_penalty=0.4),
        SamplingParams(temperature=0, max_tokens=20, min_tokens=20, stop_token_ids=[3, 100, 200]),
        SamplingParams(temperature=0, max_tokens=7, ignore_eos=True),
    ]
    some = prompts[4:8]
    with LLM(str(models.target), memory="1GiB") as llm:
        wanted = [run(llm, [prompt], each)[0] for prompt, each in zip(some, params, strict=True)]
    with LLM(
        str(models.target), memory="1GiB", speculative_config=models.speculative(draft, 4)
    ) as llm:
        assert run(llm, some, params) == wanted


@pytest.mark.parametrize("draft", ["good", "ngram"])
def test_logprobs_do_not_depend_on_drafts(
    models: Models, prompts: list[list[int]], draft: str
) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=2)
    some = [{"prompt_token_ids": prompt} for prompt in prompts[6:10]]
    with LLM(str(models.target), memory="1GiB") as llm:
        plain = llm.generate(some, params)
    with LLM(
        str(models.target),
        memory="1GiB",
        max_num_batched_tokens=20,
        speculative_config=models.speculative(draft, 4),
    ) as llm:
        fast = llm.generate(some, params)
    for a, b in zip(plain, fast, strict=True):
        assert a.outputs[0].logprobs == b.outputs[0].logprobs
        assert a.outputs[0].cumulative_logprob == b.outputs[0].cumulative_logprob
        assert a.prompt_logprobs == b.prompt_logprobs
        assert len(a.prompt_logprobs or ()) == len(a.prompt_token_ids)
