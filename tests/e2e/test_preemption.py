"""With a KV cache too small for all, sequences start over and still say the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from budgets import MIB, forget_this_process, smallest_budget
from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from specmoeoff.engine import expected_output

if TYPE_CHECKING:
    from pathlib import Path

PROMPT_LENGTHS = (5, 60, 33, 100, 20, 80, 47, 9, 64, 31)
PARAMS = [
    SamplingParams(temperature=1.0 if i % 3 == 0 else 0.0, seed=i, max_tokens=90, ignore_eos=True)
    for i in range(len(PROMPT_LENGTHS))
]


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(8)
    return [
        {"prompt_token_ids": rng.integers(0, 250, length).tolist()} for length in PROMPT_LENGTHS
    ]


@pytest.fixture(scope="module")
def expected(wide_target: Path, prompts: list[dict[str, list[int]]]) -> list[list[int]]:
    with LLM(str(wide_target), memory="4GiB") as llm:
        return [
            llm.generate(prompt, params)[0].outputs[0].token_ids
            for prompt, params in zip(prompts, PARAMS, strict=True)
        ]


@pytest.mark.parametrize("method", ["off", "ngram", "draft_model"])
@pytest.mark.parametrize("extra_mib", [0, 1, 3])
@pytest.mark.parametrize("step_tokens", [None, 12])
def test_preempted_sequences_say_the_same(
    wide_target: Path,
    wide_draft: Path,
    prompts: list[dict[str, list[int]]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    extra_mib: int,
    step_tokens: int | None,
) -> None:
    forget_this_process(monkeypatch)
    # Expected to say little, so that many are admitted, which is wrong.
    monkeypatch.setattr(expected_output, "PRIOR_TOKENS", 8)
    speculative = None
    if method != "off":
        speculative = SpeculativeConfig(
            method,  # type: ignore[arg-type]
            str(wide_draft) if method == "draft_model" else None,
            num_speculative_tokens=3,
            prompt_lookup_min=1,
        )
    options = {"max_num_batched_tokens": step_tokens, "max_model_len": 192}
    memory = smallest_budget(wide_target, speculative, **options) + extra_mib * MIB
    with LLM(str(wide_target), memory=memory, speculative_config=speculative, **options) as llm:  # type: ignore[arg-type]
        assert llm.policy.max_model_len == 192
        outputs = llm.generate(prompts, PARAMS)
        stats = llm.stats()
        kv = llm._engine._target.kv
        assert (kv.num_used, kv.high_water) == (0, 0)
    got = [output.outputs[0].token_ids for output in outputs]
    for output, params, tokens, wanted in zip(outputs, PARAMS, got, expected, strict=True):
        assert output.error is None
        assert len(tokens) == params.max_tokens
        # A draft draws from the sequence's generator too, so sampled tokens are others then.
        if params.greedy or method == "off":
            assert tokens == wanted
    if extra_mib == 0:
        assert stats.preemptions > 0
    assert stats.preemptions == sum(output.metrics.num_preemptions for output in outputs)


def test_what_is_expected_rightly_is_not_preempted(
    wide_target: Path,
    prompts: list[dict[str, list[int]]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit of 90 tokens is less than what is expected before anything has ended."""
    forget_this_process(monkeypatch)
    memory = smallest_budget(wide_target, max_model_len=192)
    with LLM(str(wide_target), memory=memory, max_model_len=192) as llm:
        outputs = llm.generate(prompts, PARAMS)
        assert llm.stats().preemptions == 0
    assert [output.outputs[0].token_ids for output in outputs] == expected
