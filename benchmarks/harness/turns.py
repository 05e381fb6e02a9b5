"""Times calls that take turns, so that a busy neighbour or a drifting clock hits them alike."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Item = TypeVar("Item")

LEAST_TURNS = 3


def best_seconds(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the best time of each call; all together take about ``seconds`` per call."""
    best = [float("inf")] * len(calls)
    deadline = time.perf_counter() + seconds * len(calls)
    turns = 0
    while turns < LEAST_TURNS or time.perf_counter() < deadline:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
        turns += 1
    return best


def rotating(function: Callable[[Item], object], items: Sequence[Item]) -> Callable[[], object]:
    """Return a call of ``function`` with one item after another, round and round."""
    calls = 0

    def call() -> object:
        nonlocal calls
        calls += 1
        return function(items[calls % len(items)])

    return call
