"""How long an output is expected to become, learned from those that have ended.

A sequence that has said n tokens is compared with the ended ones that said more than n; so one that
turns out long is expected to become longer, and the expectation never falls while it runs. What
``max_tokens`` cut short would have gone on: it counts as long as it was expected to become.

Knows lengths only. Too low an expectation costs a preemption, too high a one costs batch mates.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import deque

PRIOR_TOKENS = 128
"""Expected before anything has ended, and beyond the longest output seen: a paragraph or two."""
PRIOR_WEIGHT = 8
"""The prior counts as so many outputs: those that end first are the short ones, and must not speak
for all."""
WINDOW = 256
"""Ended outputs that are remembered; the prior's leave the window as well."""


class ExpectedOutput:
    """The distribution of the lengths of the latest outputs."""

    def __init__(self) -> None:
        self._latest = deque([PRIOR_TOKENS] * PRIOR_WEIGHT, WINDOW)
        self._sorted: list[int] = []
        self._sums_above: list[int] = []
        """For each place in the sorted lengths, the sum of those from there on."""
        self._count()

    def learn(self, num_tokens: int, was_cut: bool) -> None:
        """Take an ended output into account; ``was_cut`` if only its limit ended it."""
        length = self.of(num_tokens) if was_cut else num_tokens
        self._latest.append(length)
        self._count()

    def of(self, num_tokens: int) -> int:
        """Return the expected length in the end, of an output that has ``num_tokens`` and goes on.

        It is more than ``num_tokens``, and never less for more of them.
        """
        place = bisect_right(self._sorted, num_tokens)
        longer = len(self._sorted) - place
        if not longer:
            return num_tokens + PRIOR_TOKENS
        return -(-self._sums_above[place] // longer)

    def _count(self) -> None:
        self._sorted = sorted(self._latest)
        self._sums_above = list(itertools.accumulate(reversed(self._sorted)))[::-1]
