"""The draft budget: fixed stays fixed; adaptive finds k, 0 or what lies between by measuring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoeoff.speculative.budget import RETRY_STEPS, TRIALS, AdaptiveBudget, FixedBudget

if TYPE_CHECKING:
    from collections.abc import Callable


def simulate(
    budget: AdaptiveBudget,
    step_s: Callable[[int], float],
    acceptance: float,
    steps: int = 400,
    batch: int = 4,
    seed: int = 0,
) -> list[int]:
    """Run steps whose time and acceptance are known; return the draft lengths chosen."""
    rng = np.random.default_rng(seed)
    chosen = []
    for _ in range(steps):
        k = budget.num_drafts(batch)
        chosen.append(k)
        judged = accepted = 0
        for _ in range(batch):
            run = 0
            while run < k and rng.random() < acceptance:
                run += 1
            accepted += run
            judged += min(k, run + 1)
        budget.observe(batch, k, step_s(k), judged, accepted)
    return chosen


def best_length(most: int, step_s: Callable[[int], float], acceptance: float) -> int:
    return max(range(most + 1), key=lambda k: sum(acceptance**i for i in range(k + 1)) / step_s(k))


@given(k=st.integers(0, 32), batch=st.integers(0, 100))
def test_fixed(k: int, batch: int) -> None:
    budget = FixedBudget(k)
    budget.observe(batch, k, 1.0, 3, 1)
    assert budget.num_drafts(batch) == k


@pytest.mark.parametrize("cost", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("batch", [1, 16])
def test_drafts_that_are_always_rejected_are_given_up(cost: float, batch: int) -> None:
    chosen = simulate(AdaptiveBudget(4), lambda k: 1 + cost * k, 0.0, 600, batch)
    late = chosen[100:]
    assert late.count(0) > 0.8 * len(late)
    # The tries that remain cost next to nothing.
    assert cost * sum(late) <= 0.05 * len(late)


@pytest.mark.parametrize("batch", [1, 16])
def test_drafts_that_are_always_accepted_are_used_in_full(batch: int) -> None:
    chosen = simulate(AdaptiveBudget(4), lambda k: 1 + 0.05 * k, 1.0, 300, batch)
    late = chosen[20:]
    assert sum(k == 4 for k in late) >= len(late) * (1 - TRIALS / RETRY_STEPS) - TRIALS


def test_steps_too_dear_for_drafts() -> None:
    chosen = simulate(AdaptiveBudget(4), lambda k: 1 + 3.0 * k, 0.9)
    assert chosen[50:].count(0) >= 335


def test_something_between() -> None:
    def step_s(k: int) -> float:
        return 1 + 0.2 * k

    chosen = simulate(AdaptiveBudget(8), step_s, 0.7, batch=16)
    wanted = best_length(8, step_s, 0.7)
    assert 0 < wanted < 8
    assert abs(np.median(chosen[50:]) - wanted) <= 1


def test_it_notices_that_times_have_changed() -> None:
    budget = AdaptiveBudget(4)
    assert simulate(budget, lambda k: 1 + k, 0.5)[-1] == 0
    later = simulate(budget, lambda k: 1 + 0.01 * k, 1.0, 400)
    assert later[-1] == 4


def test_each_size_of_batch_has_its_own_times() -> None:
    budget = AdaptiveBudget(4)
    simulate(budget, lambda k: 1 + 0.01 * k, 0.8, batch=1)
    simulate(budget, lambda k: 1 + 3.0 * k, 0.8, batch=16)
    assert budget.num_drafts(1) == 4
    assert budget.num_drafts(16) == 0


def test_the_trials_come_first_and_an_idle_step_drafts_nothing() -> None:
    budget = AdaptiveBudget(5)
    assert budget.num_drafts(0) == 0
    chosen = simulate(budget, lambda k: 1.0, 0.5, 2 * TRIALS)
    assert chosen == [5] * TRIALS + [0] * TRIALS


@given(
    most=st.integers(1, 32),
    steps=st.lists(
        st.tuples(st.integers(1, 64), st.floats(1e-6, 10), st.floats(0, 1)), max_size=150
    ),
)
def test_it_never_leaves_its_range(most: int, steps: list[tuple[int, float, float]]) -> None:
    budget = AdaptiveBudget(most)
    for batch, step_s, share in steps:
        k = budget.num_drafts(batch)
        assert 0 <= k <= most
        budget.observe(batch, k, step_s, k * batch, int(share * k * batch))
        assert 0 < budget.acceptance < 1
