"""Sampling draws from the same distribution with speculation as without: chi-square tests."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

import pytest

from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from tiny import write_draft, write_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VOCABULARY = 7
DRAWS = 2000
PROMPT = {"prompt_token_ids": [1, 4, 2]}
CRITICAL = 1e-4
"""A right engine fails one case in so many; seeds are fixed, so a pass stays a pass."""

# The tiny model's logits are steep: warm temperatures leave something to draw.
FILTERS: dict[str, SamplingParams] = {
    "plain": SamplingParams(temperature=3.0),
    "cold": SamplingParams(temperature=2.0),
    "top_k": SamplingParams(temperature=4.0, top_k=3),
    "top_p": SamplingParams(temperature=3.0, top_p=0.8),
    "min_p": SamplingParams(temperature=4.0, min_p=0.2),
    "penalties": SamplingParams(
        temperature=2.5, repetition_penalty=1.2, presence_penalty=0.6, frequency_penalty=0.9
    ),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(
        tmp_path_factory.mktemp("sampling") / "target",
        seed=41,
        vocab_size=VOCABULARY,
        expert_spread=0.3,
        eos_token_id=0,
        bos_token_id=1,
        hidden_size=24,
        intermediate_size=28,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


@pytest.fixture(scope="module", params=["good", "kin", "bad", "ngram"])
def speculative(
    request: pytest.FixtureRequest, target: Path, tmp_path_factory: pytest.TempPathFactory
) -> SpeculativeConfig:
    directory = tmp_path_factory.mktemp("sampling") / "draft"
    if request.param == "ngram":
        return SpeculativeConfig("ngram", num_speculative_tokens=3, prompt_lookup_min=1)
    if request.param in ("good", "kin"):
        # The second one has the target's attention, so it reads the target's KV cache.
        write_draft(target, directory, noise=0.05, same_attention=request.param == "kin")
    else:
        write_tiny(directory, "llama", seed=77, vocab_size=VOCABULARY, hidden_size=12)
    return SpeculativeConfig(
        model=str(directory), num_speculative_tokens=3, draft_weight_dtype="auto"
    )


@pytest.fixture(scope="module")
def plain(target: Path) -> Iterator[LLM]:
    with LLM(str(target), memory="4GiB") as llm:
        yield llm


@pytest.fixture(scope="module")
def fast(target: Path, speculative: SpeculativeConfig) -> Iterator[LLM]:
    with LLM(str(target), memory="4GiB", speculative_config=speculative) as llm:
        yield llm


def draws(llm: LLM, params: SamplingParams, seed: int) -> list[tuple[int, ...]]:
    """Many samples of four tokens; the middle ones come out of accepted and recovered drafts."""
    params = params.replace(n=DRAWS, seed=seed, max_tokens=4, ignore_eos=True)
    (output,) = llm.generate(PROMPT, params)
    return [tuple(completion.token_ids) for completion in output.outputs]


@lru_cache
def plain_draws(plain: LLM, name: str) -> list[tuple[int, ...]]:
    return draws(plain, FILTERS[name], 1)


def chi_square_p(a: Counter[object], b: Counter[object]) -> float:
    """Return the chance that two samples of one distribution differ as much as these.

    Cells with fewer than 8 draws in both together are pooled. The tail of the distribution is
    Wilson and Hilferty's cube-root approximation, good to a few percent here.
    """
    cells = [(a[key], b[key]) for key in a | b if a[key] + b[key] >= 8]
    rest_a, rest_b = a.total() - sum(x for x, _ in cells), b.total() - sum(y for _, y in cells)
    if rest_a + rest_b:
        cells.append((rest_a, rest_b))
    if len(cells) < 2:
        return 1.0
    share = a.total() / (a.total() + b.total())
    statistic = sum(
        (x - share * (x + y)) ** 2 / (share * (x + y))
        + (y - (1 - share) * (x + y)) ** 2 / ((1 - share) * (x + y))
        for x, y in cells
    )
    degrees = len(cells) - 1
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    return 0.5 * math.erfc(z / 2**0.5)


@pytest.mark.parametrize("name", FILTERS)
def test_the_same_distribution(plain: LLM, fast: LLM, name: str) -> None:
    params = FILTERS[name]
    before = fast.stats()
    drafted, accepted = before.drafted_tokens, before.accepted_tokens
    without, with_drafts = plain_draws(plain, name), draws(fast, params, 2)
    after = fast.stats()
    assert after.drafted_tokens - drafted > DRAWS / 4
    if name == "plain":
        assert after.accepted_tokens > accepted
    for length in (1, 2, 4):
        p = chi_square_p(
            Counter(sample[:length] for sample in without),
            Counter(sample[:length] for sample in with_drafts),
        )
        assert p > CRITICAL, f"the first {length} tokens"


def test_the_test_can_tell(plain: LLM) -> None:
    cold = Counter(draws(plain, FILTERS["plain"].replace(temperature=2.4), 1))
    warm = Counter(draws(plain, FILTERS["plain"], 2))
    assert chi_square_p(cold, warm) < CRITICAL
    assert chi_square_p(Counter(draws(plain, FILTERS["plain"], 3)), warm) > CRITICAL


def test_seeds_repeat_with_drafts(fast: LLM) -> None:
    params = FILTERS["plain"].replace(n=40, max_tokens=12, ignore_eos=True)

    def samples(seed: int) -> list[list[int]]:
        (output,) = fast.generate(PROMPT, params.replace(seed=seed))
        return [completion.token_ids for completion in output.outputs]

    first = samples(9)
    assert samples(9) == first
    assert samples(10) != first


@pytest.mark.parametrize("name", ["plain", "penalties"])
def test_company_does_not_change_seeded_samples(fast: LLM, name: str) -> None:
    params = FILTERS[name].replace(seed=5, max_tokens=12, ignore_eos=True)
    alone = fast.generate(PROMPT, params)[0].outputs[0].token_ids
    others = [{"prompt_token_ids": [i % VOCABULARY, 3, i % 5]} for i in range(11)]
    outputs = fast.generate(
        [*others, PROMPT], [*[params.replace(seed=i) for i in range(11)], params]
    )
    assert outputs[-1].outputs[0].token_ids == alone
