"""Times calls that take turns, so that a busy neighbour or a drifting clock hits them alike."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Item = TypeVar("Item")

LEAST_TURNS = 2
LEAST_RUNS, TURN_S = 2, 0.03
"""A turn is so many runs and so long at least: torch's threads spin for some milliseconds after
their last call, which the first runs of the next in turn would pay for."""


def best_seconds(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the best time of each call; all together take about ``seconds`` per call."""
    best = [float("inf")] * len(calls)
    deadline = time.perf_counter() + seconds * len(calls)
    turns = 0
    while turns < LEAST_TURNS or time.perf_counter() < deadline:
        for i, call in enumerate(calls):
            best[i] = min(best[i], _turn(call))
        turns += 1
    return best


def _turn(call: Callable[[], object]) -> float:
    best, runs, begin = float("inf"), 0, time.perf_counter()
    while runs < LEAST_RUNS or time.perf_counter() - begin < TURN_S:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best


def rotating(function: Callable[[Item], object], items: Sequence[Item]) -> Callable[[], object]:
    """Return a call of ``function`` with one item after another, round and round."""
    calls = 0

    def call() -> object:
        nonlocal calls
        calls += 1
        return function(items[calls % len(items)])

    return call
