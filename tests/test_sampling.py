"""Sampling against a slow float64 twin, and the promises of greedy choice, draws and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoeoff.errors import CheckpointError
from specmoeoff.penalties import adjust
from specmoeoff.sampling import (
    Distribution,
    SequenceSampler,
    draw_index,
    generator,
    logprobs,
)
from specmoeoff.sampling_params import SamplingParams

VOCAB_SIZE = 40


def make_sampler(prompt: list[int] | None = None, eos: tuple[int, ...] = (), **params: Any):
    return SequenceSampler.create(SamplingParams(**params), prompt or [], eos_token_ids=eos)


def reference(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int], eos: list[int]
) -> np.ndarray:
    """Return the probabilities, [V], one rule at a time over Python numbers."""
    x = [float(value) for value in logits]
    for token in range(len(x)):
        if token in prompt or token in output:
            penalty = params.repetition_penalty
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
        x[token] -= params.frequency_penalty * output.count(token)
        x[token] -= params.presence_penalty * (token in output)
        if len(output) < params.min_tokens and token in [*eos, *(params.stop_token_ids or [])]:
            x[token] = -np.inf
    x = [value / params.temperature for value in x]
    keep = list(range(len(x)))
    best = max(x)
    keep = [i for i in keep if np.exp(x[i] - best) >= params.min_p]
    if params.top_k > 0:
        kth = sorted((x[i] for i in keep), reverse=True)[: params.top_k][-1]
        keep = [i for i in keep if x[i] >= kth]
    total = sum(np.exp(x[i] - best) for i in keep)
    nucleus, mass = [], 0.0
    for i in sorted(keep, key=lambda i: (-x[i], i)):
        if mass < params.top_p:
            nucleus.append(i)
        mass += np.exp(x[i] - best) / total
    dense = np.zeros(len(x))
    dense[nucleus] = [np.exp(x[i] - best) for i in nucleus]
    return dense / dense.sum()


# Multiples of 1/8 make ties; the penalties and temperatures keep them apart or equal exactly.
logit_rows = st.lists(
    st.integers(-40, 40).map(lambda n: n / 8), min_size=VOCAB_SIZE, max_size=VOCAB_SIZE
).map(lambda row: np.array(row, np.float32))
token_lists = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12)
filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.25, 1.0, 2.0]),
        "top_k": st.sampled_from([-1, 0, 1, 3, 10, 39, 40, 1000]),
        "top_p": st.sampled_from([1.0, 0.999, 0.87, 0.4, 0.01]),
        "min_p": st.sampled_from([0.0, 0.013, 0.31, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.25, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.25, -0.5]),
        "min_tokens": st.sampled_from([0, 4]),
        "stop_token_ids": st.sampled_from([None, [3, 5]]),
    }
)


@given(logit_rows, filters, token_lists, token_lists)
def test_filters_agree_with_the_slow_twin(
    logits: np.ndarray, fields: dict[str, Any], prompt: list[int], output: list[int]
) -> None:
    sampler = make_sampler(prompt, eos=(0, 7), **fields)
    for token in output:
        sampler.observe(token)
    expected = reference(logits, sampler.params, prompt, output, [0, 7])
    found = sampler.distribution(logits).dense(VOCAB_SIZE)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-12)


@given(logit_rows, filters, token_lists)
def test_reading_a_row_leaves_it_alone(
    logits: np.ndarray, fields: dict[str, Any], output: list[int]
) -> None:
    sampler = make_sampler([1, 2], eos=(0,), **fields)
    for token in output:
        sampler.observe(token)
    before = logits.copy()
    sampler.choose(logits)
    np.testing.assert_array_equal(logits, before)


def test_large_nucleus_agrees_with_a_full_sort() -> None:
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal(20_000) * 2).astype(np.float32)
    for top_p in (0.05, 0.5, 0.9, 0.99, 0.9999):
        found = make_sampler(top_p=top_p).distribution(logits)
        weights = np.exp(logits - logits.max()).astype(np.float64)
        order = np.argsort(-weights)
        share = np.cumsum(weights[order]) / weights.sum()
        expected = np.sort(order[: 1 + np.count_nonzero(share < top_p)])
        np.testing.assert_array_equal(found.token_ids, expected)


def test_nucleus_takes_lower_ids_first_among_equals() -> None:
    found = make_sampler(top_p=0.5).distribution(np.zeros(10, np.float32))
    assert found.token_ids is not None
    assert found.token_ids.tolist() == [0, 1, 2, 3, 4]


def test_one_token_can_be_all_that_is_left() -> None:
    logits = np.array([1.0, 5.0, 3.0], np.float32)
    for fields in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert make_sampler(**fields).distribution(logits).dense(3).tolist() == [0, 1, 0]


def test_masked_tokens_have_no_probability() -> None:
    sampler = make_sampler(eos=(1,), min_tokens=2, stop_token_ids=[2, 999])
    logits = np.array([1.0, 9.0, 9.0, 1.0], np.float32)
    np.testing.assert_allclose(sampler.distribution(logits).dense(4), [0.5, 0, 0, 0.5])
    sampler.observe(0)
    assert sampler.distribution(logits).probability(1) == 0.0
    sampler.observe(0)
    assert sampler.distribution(logits).probability(1) > 0.4


def test_minimum_length_masks_eos_even_when_it_is_ignored() -> None:
    logits = np.array([1.0, 9.0], np.float32)
    sampler = make_sampler(eos=(1,), min_tokens=1, ignore_eos=True, temperature=0.0)
    assert sampler.choose(logits) == 0


def test_without_adjustments_the_row_is_not_copied() -> None:
    logits = np.zeros(8, np.float32)
    sampler = make_sampler(temperature=0.0)
    assert adjust(logits, sampler.params, sampler.context) is logits


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([0, 2, 1, 2, 2], np.float32)
    assert make_sampler(temperature=0.0).choose(logits) == 1


def test_greedy_sees_penalties() -> None:
    logits = np.array([1.0, 2.0, 1.5], np.float32)
    sampler = make_sampler([], temperature=0.0, frequency_penalty=0.4)
    chosen = []
    for _ in range(4):
        token = sampler.choose(logits)
        sampler.observe(token)
        chosen.append(token)
    # 2.0, then 1.6, then 1.5 beats 1.2, then 1.2 beats 1.1.
    assert chosen == [1, 1, 2, 1]


def test_repetition_penalty_counts_the_prompt_and_spares_the_rest() -> None:
    logits = np.array([2.0, 2.0, -2.0, -2.0], np.float32)
    sampler = make_sampler([0, 2, 2], repetition_penalty=2.0)
    adjusted = adjust(logits, sampler.params, sampler.context)
    assert adjusted.tolist() == [1.0, 2.0, -4.0, -2.0]


@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_are_an_error_that_says_where(fill: float, temperature: float) -> None:
    sampler = make_sampler(temperature=temperature)
    sampler.observe(1)
    logits = np.full(4, fill, np.float32)
    with pytest.raises(CheckpointError, match="logits of output token 1 "):
        sampler.choose(logits)


def test_a_single_nan_is_noticed() -> None:
    logits = np.array([1.0, np.nan, 2.0], np.float32)
    for temperature in (0.0, 1.0):
        with pytest.raises(CheckpointError):
            make_sampler(temperature=temperature, top_k=2).choose(logits)


def test_extreme_temperatures_stay_finite() -> None:
    logits = np.array([-300.0, 400.0, 399.0], np.float32)
    cold = make_sampler(temperature=1e-5).distribution(logits)
    assert cold.dense(3).tolist() == [0.0, 1.0, 0.0]
    hot = make_sampler(temperature=1e6).distribution(logits)
    np.testing.assert_allclose(hot.dense(3), 1 / 3, rtol=1e-3)


class FixedRandom:
    """Stands for a generator whose uniform numbers are known."""

    def __init__(self, *values: float) -> None:
        self._values = list(values)

    def random(self) -> float:
        return self._values.pop(0)


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 7.0]), min_size=1, max_size=2000).filter(any),
    st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53, 0.5])),
)
def test_a_draw_is_the_inverse_of_the_cumulative_sum(weights: list[float], u: float) -> None:
    array = np.array(weights, np.float32)
    index = draw_index(array, FixedRandom(u))  # type: ignore[arg-type]
    assert array[index] > 0
    cumulative = np.cumsum(array.astype(np.float64))
    slack = 1e-12 * cumulative[-1]
    assert cumulative[index] >= u * cumulative[-1] - slack
    assert cumulative[index] - array[index] <= u * cumulative[-1] + slack


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    sampler = make_sampler(seed=3)
    counts = np.bincount([sampler.choose(logits) for _ in range(8000)], minlength=4)
    np.testing.assert_allclose(counts / 8000, [0.5, 0.25, 0.15, 0.1], atol=0.025)


def test_seeds_repeat_and_samples_differ() -> None:
    logits = np.zeros(1000, np.float32)

    def tokens(seed: int | None, sample_index: int, default: tuple[int, ...] = (0,)) -> list[int]:
        sampler = SequenceSampler.create(
            SamplingParams(seed=seed), [], sample_index=sample_index, default_seed=default
        )
        return [sampler.choose(logits) for _ in range(8)]

    assert tokens(5, 0) == tokens(5, 0, default=(9, 9))
    different = [tokens(5, 0), tokens(5, 1), tokens(6, 0), tokens(None, 0), tokens(None, 0, (0, 1))]
    assert len({tuple(each) for each in different}) == len(different)
    assert tokens(2**64 - 1, 0) == tokens(2**64 - 1, 0)


def test_a_fork_drafts_ahead_without_changing_its_origin() -> None:
    logits = np.array([1.0, 1.1, 0.9], np.float32)
    sampler = make_sampler(temperature=0.0, frequency_penalty=1.0)
    sampler.observe(0)
    fork = sampler.fork()
    drafted = []
    for _ in range(3):
        token, distribution = fork.draw(logits)
        assert distribution is None
        fork.observe(token)
        drafted.append(token)
    assert drafted == [1, 2, 1]
    assert sampler.context.output_counts == {0: 1}
    assert sampler.context.num_output_tokens == 1
    assert sampler.choose(logits) == 1


def test_a_fork_counts_length_for_the_minimum() -> None:
    logits = np.array([1.0, 5.0], np.float32)
    sampler = make_sampler(eos=(1,), temperature=0.0, min_tokens=2)
    fork = sampler.fork()
    drafted = []
    for _ in range(3):
        token, _ = fork.draw(logits)
        fork.observe(token)
        drafted.append(token)
    assert drafted == [0, 0, 1]
    assert sampler.context.num_output_tokens == 0


def test_a_drawn_draft_comes_with_its_distribution() -> None:
    fork = make_sampler(seed=1, top_k=2).fork()
    token, distribution = fork.draw(np.array([0.0, 3.0, 3.0], np.float32))
    assert distribution is not None
    assert distribution.probability(token) == 0.5
    assert distribution.probability(0) == 0.0
    assert distribution.nbytes == 16


def test_probability_of_filtered_tokens_is_zero() -> None:
    weights = np.array([1.0, 1.0], np.float32)
    distribution = Distribution(np.array([2, 5], np.int32), weights, 2.0)
    assert [distribution.probability(i) for i in range(7)] == [0, 0, 0.5, 0, 0, 0.5, 0]


@given(logit_rows, st.integers(0, VOCAB_SIZE - 1), st.sampled_from([-1, 0, 1, 5, 40, 99]))
def test_logprobs_agree_with_a_full_sort(logits: np.ndarray, token: int, num_top: int) -> None:
    found = logprobs(logits, token, num_top, decode=str)
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact - exact.max()).sum()) - exact.max()
    order = sorted(range(VOCAB_SIZE), key=lambda i: (-logits[i], i))
    count = VOCAB_SIZE if num_top < 0 else min(num_top, VOCAB_SIZE)
    assert next(iter(found)) == token
    assert set(found) == {token, *order[:count]}
    for each, record in found.items():
        assert record.rank == 1 + order.index(each)
        assert record.logprob == pytest.approx(exact[each], abs=1e-5)
        assert record.decoded_token == str(each)


def test_generators_of_different_streams_differ() -> None:
    assert generator(1, 2).random() == generator(1, 2).random()
    assert len({generator(*s).random() for s in [(1,), (1, 0), (1, 2), (2, 1), (12,)]}) == 5
