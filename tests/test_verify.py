"""Verification changes speed, never what is sampled: shown exactly and over many draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff.errors import CheckpointError, InvalidInputError
from specmoeoff.sampling import Distribution, SequenceSampler
from specmoeoff.sampling_params import SamplingParams
from specmoeoff.speculative.verify import judge, truncate_at_stop, verify_best, verify_sequence

VOCAB_SIZE = 5
LENGTH = 3
NUM_DRAWS = 800
Model = Callable[[Sequence[int]], np.ndarray]
"""Tokens of output so far -> logits of the next, [V]."""


def random_model(seed: int, spread: float = 1.5) -> Model:
    """Return a model whose logits depend on the two tokens before."""
    table = np.random.default_rng(seed).normal(
        0, spread, (VOCAB_SIZE + 1, VOCAB_SIZE + 1, VOCAB_SIZE)
    )

    def model(output: Sequence[int]) -> np.ndarray:
        before, last = ([VOCAB_SIZE, VOCAB_SIZE, *output])[-2:]
        return table[before, last].astype(np.float32)

    return model


TARGET = random_model(1)


def near_target(output: Sequence[int]) -> np.ndarray:
    return TARGET(output) + random_model(2, 0.3)(output)


def lower_half(output: Sequence[int]) -> np.ndarray:
    return np.where(np.arange(VOCAB_SIZE) < 2, 0, -np.inf).astype(np.float32)


DRAFTS: dict[str, Model | None] = {
    "same": TARGET,
    "good": near_target,
    "bad": random_model(9, 3.0),
    "narrow": lower_half,
    "one-hot": None,
}
FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 2, "temperature": 0.7},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "penalties": {
        "repetition_penalty": 1.5,
        "presence_penalty": 0.7,
        "frequency_penalty": -0.5,
    },
    "all": {
        "temperature": 1.3,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.05,
        "frequency_penalty": 1.0,
        "min_tokens": 2,
        "stop_token_ids": [3],
    },
}


def new_sampler(params: SamplingParams, default_seed: int = 0) -> SequenceSampler:
    return SequenceSampler.create(params, [1], default_seed=(default_seed,))


def propose(
    draft: Model | None, sampler: SequenceSampler, output: list[int], k: int
) -> tuple[list[int], list[Distribution | None]]:
    fork, tokens, distributions = sampler.fork(), list(output), []
    for _ in range(k):
        if draft is None:
            # Proposes with certainty, rightly or wrongly.
            token, distribution = (sum(tokens) + len(tokens)) % VOCAB_SIZE, None
        else:
            token, distribution = fork.draw(draft(tokens))
        fork.observe(token)
        tokens.append(token)
        distributions.append(distribution)
    return tokens[len(output) :], distributions


def speculate(sampler: SequenceSampler, draft: Model | None, k: int, length: int) -> list[int]:
    output: list[int] = []
    while len(output) < length:
        draft_ids, distributions = propose(draft, sampler, output, k)
        rows = np.stack([TARGET([*output, *draft_ids[:i]]) for i in range(k + 1)])
        output += verify_sequence(rows, draft_ids, distributions, sampler).token_ids
    return output[:length]


def exact_joint(params: SamplingParams) -> np.ndarray:
    """Return the probability of every output of LENGTH tokens, without any speculation."""
    joint = np.zeros((VOCAB_SIZE,) * LENGTH)
    for output in itertools.product(range(VOCAB_SIZE), repeat=LENGTH):
        sampler, probability = new_sampler(params), 1.0
        for i, token in enumerate(output):
            probability *= sampler.distribution(TARGET(output[:i])).probability(token)
            sampler.observe(token)
        joint[output] = probability
    return joint


def chi_square_limit(degrees: int) -> float:
    """Return what chi-square exceeds about once in 30000 tries (Wilson and Hilferty)."""
    share = 2 / (9 * degrees)
    return degrees * (1 - share + 4.0 * share**0.5) ** 3


def assert_drawn_from(counts: np.ndarray, probabilities: np.ndarray) -> None:
    assert not counts[probabilities == 0].any(), "an impossible output was drawn"
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < chi_square_limit(max(1, len(expected) - 1))


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_speculation_keeps_the_joint_distribution(draft: str, filters: str) -> None:
    params = SamplingParams(**FILTERS[filters])
    counts = np.zeros((VOCAB_SIZE,) * LENGTH)
    for i in range(NUM_DRAWS):
        counts[tuple(speculate(new_sampler(params, i), DRAFTS[draft], 2, LENGTH))] += 1
    assert_drawn_from(counts, exact_joint(params))


def test_the_chi_square_notices_a_wrong_distribution() -> None:
    params = SamplingParams(seed=0)
    joint = exact_joint(params)
    sharper = exact_joint(SamplingParams(temperature=0.8))
    counts = np.random.default_rng(0).multinomial(NUM_DRAWS, sharper.ravel()).reshape(joint.shape)
    with pytest.raises(AssertionError):
        assert_drawn_from(counts, joint)


class RecordedRandom:
    """Stands for a generator: gives the numbers it was told to give."""

    def __init__(self, *values: float) -> None:
        self._values = list(values)

    def random(self) -> float:
        return self._values.pop(0)


def outcome_probabilities(
    target: np.ndarray, draft: Distribution | None, draft_id: int, params: SamplingParams
) -> np.ndarray:
    """Return P(token | draft_id) of ``judge``, summed over a fine grid of its random numbers."""
    grid = 400
    result = np.zeros(len(target))
    middles = (np.arange(grid) + 0.5) / grid
    for u in middles:
        sampler = new_sampler(params)
        sampler.rng = RecordedRandom(u, 0.5)  # type: ignore[assignment]
        token, accepted = judge(target, draft_id, draft, sampler)
        if accepted:
            result[token] += 1 / grid
    rejected = 1 - result.sum()
    if rejected > 1e-9:
        for u in middles:
            sampler = new_sampler(params)
            sampler.rng = RecordedRandom(1 - 1e-12, u)  # type: ignore[assignment]
            token, accepted = judge(target, draft_id, draft, sampler)
            assert not accepted
            result[token] += rejected / grid
    return result


@pytest.mark.parametrize("filters", ["plain", "top_k", "min_p"])
@pytest.mark.parametrize("seed", range(3))
def test_drafting_then_judging_adds_up_to_the_target(filters: str, seed: int) -> None:
    params = SamplingParams(**FILTERS[filters])
    rng = np.random.default_rng(seed)
    target, draft = rng.normal(0, 1.5, (2, VOCAB_SIZE)).astype(np.float32)
    sampler = new_sampler(params)
    p, q = sampler.distribution(target), sampler.distribution(draft)
    total = np.zeros(VOCAB_SIZE)
    for draft_id in range(VOCAB_SIZE):
        if q.probability(draft_id) > 0:
            share = q.probability(draft_id)
            total += share * outcome_probabilities(target, q, draft_id, params)
    np.testing.assert_allclose(total, p.dense(VOCAB_SIZE), atol=0.01)


@pytest.mark.parametrize("filters", ["plain", "top_k"])
@pytest.mark.parametrize("draft_id", range(VOCAB_SIZE))
def test_a_certain_draft_leaves_the_target_distribution(filters: str, draft_id: int) -> None:
    params = SamplingParams(**FILTERS[filters])
    target = TARGET([])
    found = outcome_probabilities(target, None, draft_id, params)
    expected = new_sampler(params).distribution(target).dense(VOCAB_SIZE)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_disjoint_supports_always_reject_and_sample_the_target() -> None:
    target = np.array([0, 1, -np.inf, -np.inf], np.float32)
    sampler = new_sampler(SamplingParams(seed=1))
    draft = sampler.distribution(np.array([-np.inf, -np.inf, 0, 0], np.float32))
    tokens = []
    for _ in range(2000):
        token, accepted = judge(target, 2, draft, sampler)
        assert not accepted
        tokens.append(token)
    expected = sampler.distribution(target).dense(4)
    assert_drawn_from(np.bincount(tokens, minlength=4).astype(float), expected)


def test_equal_distributions_always_accept() -> None:
    sampler = new_sampler(SamplingParams(seed=1, top_p=0.9))
    for _ in range(300):
        draft_ids, distributions = propose(TARGET, sampler, [], 3)
        rows = np.stack([TARGET(draft_ids[:i]) for i in range(4)])
        assert verify_sequence(rows, draft_ids, distributions, sampler).num_accepted == 3


def test_mean_acceptance_is_one_minus_the_total_variation() -> None:
    sampler = new_sampler(SamplingParams(seed=4))
    target, draft = TARGET([]), DRAFTS["good"]([])  # type: ignore[misc]
    p, q = sampler.distribution(target), sampler.distribution(draft)
    accepted = 0
    for _ in range(4000):
        accepted += judge(target, q.draw(sampler.rng), q, sampler)[1]
    expected = np.minimum(p.dense(VOCAB_SIZE), q.dense(VOCAB_SIZE)).sum()
    assert accepted / 4000 == pytest.approx(expected, abs=0.03)


def test_seeds_repeat() -> None:
    params = SamplingParams(seed=11, top_p=0.9)
    runs = [speculate(new_sampler(params), near_target, 3, 40) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] != speculate(new_sampler(params.replace(seed=12)), near_target, 3, 40)


GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.1},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": [0, 2]},
}


@pytest.mark.parametrize("filters", GREEDY)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("k", [0, 1, 2, 5, 8])
def test_greedy_tokens_are_those_of_plain_decoding(draft: str, filters: str, k: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=None, **GREEDY[filters])
    plain: list[int] = []
    sampler = new_sampler(params)
    for _ in range(30):
        plain.append(sampler.choose(TARGET(plain)))
        sampler.observe(plain[-1])
    assert speculate(new_sampler(params), DRAFTS[draft], k, 30) == plain


def test_greedy_verification_by_hand() -> None:
    rows = np.eye(4, dtype=np.float32)[[2, 0, 3]]

    def verify(drafts: list[int]) -> tuple[list[int], int]:
        sampler = new_sampler(SamplingParams(temperature=0.0))
        found = verify_sequence(rows, drafts, None, sampler)
        assert sampler.context.num_output_tokens == len(found.token_ids)
        return found.token_ids, found.num_accepted

    assert verify([2, 0]) == ([2, 0, 3], 2)
    assert verify([2, 1]) == ([2, 0], 1)
    assert verify([1, 0]) == ([2], 0)


def test_nothing_drafted_is_plain_decoding() -> None:
    params = SamplingParams(seed=3)
    plain = new_sampler(params).choose(TARGET([]))
    found = verify_sequence(TARGET([])[None], [], None, new_sampler(params))
    assert (found.token_ids, found.num_accepted, found.logprobs) == ([plain], 0, None)


def test_logprobs_cover_the_tokens_kept_and_come_from_the_raw_logits() -> None:
    rows = np.array([[0, 0, 3], [0, 2, 0], [1, 0, 0]], np.float32)
    params = SamplingParams(temperature=0.0, logprobs=1, repetition_penalty=1.2)
    found = verify_sequence(rows, [2, 0], None, new_sampler(params), decode="<{}>".format)
    assert found.token_ids == [2, 1]
    assert found.logprobs is not None
    assert [list(each) for each in found.logprobs] == [[2], [1]]
    expected = 3 - np.log(np.exp(3) + 2)
    assert found.logprobs[0][2].logprob == pytest.approx(expected)
    assert found.logprobs[1][1].decoded_token == "<1>"


@pytest.mark.parametrize("draft_id", [-1, 5, 2**31])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_outside_the_vocabulary_are_refused(draft_id: int, temperature: float) -> None:
    rows = np.zeros((3, VOCAB_SIZE), np.float32)
    sampler = new_sampler(SamplingParams(temperature=temperature))
    message = rf"draft token 1 is {draft_id}; the vocabulary has 0 to 4"
    with pytest.raises(InvalidInputError, match=message):
        verify_sequence(rows, [0, draft_id], None, sampler)
    assert sampler.context.num_output_tokens == 0, "refused before anything was observed"


def test_drafts_impossible_under_their_distribution_are_refused() -> None:
    sampler = new_sampler(SamplingParams(top_k=1))
    distribution = sampler.distribution(np.array([0, 1, 0], np.float32))
    with pytest.raises(InvalidInputError, match="draft token 0 is 2, which is impossible"):
        verify_sequence(np.zeros((2, 3), np.float32), [2], [distribution], sampler)


def test_numbers_of_rows_must_match() -> None:
    sampler = new_sampler(SamplingParams())
    with pytest.raises(InvalidInputError, match=r"need 2 rows .* shape \(3, 4\)"):
        verify_sequence(np.zeros((3, 4), np.float32), [1], None, sampler)


def test_broken_logits_are_noticed_at_any_row() -> None:
    rows = np.zeros((2, 3), np.float32)
    rows[1, 1] = np.nan
    with pytest.raises(CheckpointError, match="output token 1"):
        verify_sequence(rows, [0], None, new_sampler(SamplingParams(temperature=0.0)))


EOS = 9


@pytest.mark.parametrize(
    ("tokens", "before", "fields", "expected"),
    [
        ([1, 2, 3], 0, {}, ([1, 2, 3], None, None)),
        ([1, EOS, 3], 0, {}, ([1, EOS], "stop", None)),
        ([1, EOS, 3], 0, {"ignore_eos": True}, ([1, EOS, 3], None, None)),
        ([1, 2, 3], 0, {"stop_token_ids": [2]}, ([1, 2], "stop", 2)),
        ([1, EOS], 0, {"stop_token_ids": [EOS]}, ([1, EOS], "stop", None)),
        ([1, EOS], 0, {"stop_token_ids": [EOS], "ignore_eos": True}, ([1, EOS], "stop", EOS)),
        ([1, 2, 3], 14, {}, ([1, 2], "length", None)),
        ([1, EOS, 3], 14, {}, ([1, EOS], "stop", None)),
        ([1, 2, EOS], 14, {}, ([1, 2], "length", None)),
        ([1, 2, 3], 14, {"max_tokens": None}, ([1, 2, 3], None, None)),
        ([1, EOS, EOS, EOS], 0, {"min_tokens": 2}, ([1, EOS, EOS], "stop", None)),
        ([], 3, {}, ([], None, None)),
    ],
)
def test_truncation(
    tokens: list[int], before: int, fields: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert truncate_at_stop(tokens, SamplingParams(**fields), [EOS], before) == expected


def test_the_models_limit_truncates_too() -> None:
    params = SamplingParams(max_tokens=None)
    assert truncate_at_stop([1, 2, 3], params, [], 5, 7) == ([1, 2], "length", None)
    assert truncate_at_stop([1, 2, 3], params, [], 5, 8) == ([1, 2, 3], "length", None)
    assert truncate_at_stop([1, 2, 3], params.replace(max_tokens=6), [], 5, 8)[0] == [1]


@given(
    st.lists(st.integers(0, EOS), max_size=30),
    st.lists(st.integers(1, 6), min_size=30, max_size=30),
    st.integers(1, 25),
    st.sampled_from([0, 1, 5]),
)
def test_where_an_output_ends_does_not_depend_on_the_runs(
    tokens: list[int], run_lengths: list[int], max_tokens: int, min_tokens: int
) -> None:
    params = SamplingParams(
        max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens), stop_token_ids=[4]
    )

    def collect(lengths: list[int]) -> tuple[list[int], str | None, int | None]:
        output: list[int] = []
        rest = list(tokens)
        for length in lengths:
            run, rest = rest[:length], rest[length:]
            kept, reason, stop = truncate_at_stop(run, params, [EOS], len(output))
            output += kept
            if reason:
                return output, reason, stop
        return output, None, None

    assert collect(run_lengths) == collect([1] * 30)


@settings(max_examples=80, deadline=None)
@given(
    draft_lengths=st.lists(st.integers(0, 6), max_size=24),
    agreement=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_the_best_tokens_alone_lead_to_the_same_verdicts(
    draft_lengths: list[int], agreement: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # The hidden states are the logits themselves; few values, so that some are equal.
    hidden = [rng.integers(0, 4, (k + 1, VOCAB_SIZE)).astype(np.float32) for k in draft_lengths]
    drafts = [
        [
            int(row.argmax()) if rng.random() < agreement else int(rng.integers(VOCAB_SIZE))
            for row in rows[:-1]
        ]
        for rows in hidden
    ]
    params = SamplingParams(temperature=0.0, max_tokens=100)
    samplers = [new_sampler(params) for _ in hidden]
    asked = 0

    def best(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal asked
        asked += len(rows)
        return rows.max(axis=1), rows.argmax(axis=1).astype(np.int32)

    verified = verify_best(hidden, drafts, samplers, best)
    for rows, ids, sampler, got in zip(hidden, drafts, samplers, verified, strict=True):
        other = new_sampler(params)
        expected = verify_sequence(rows, ids, None, other)
        assert got == expected
        assert sampler.context.num_output_tokens == other.context.num_output_tokens
    assert sum(len(v.token_ids) for v in verified) <= asked <= sum(map(len, hidden))


def test_a_poisoned_best_logit_is_an_error() -> None:
    def best(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(rows), np.nan, np.float32), np.zeros(len(rows), np.int32)

    with pytest.raises(CheckpointError, match="no usable maximum"):
        verify_best(
            [np.zeros((1, 3), np.float32)],
            [[]],
            [new_sampler(SamplingParams(temperature=0.0))],
            best,
        )
