"""Chooses the draft length of each step: what was asked, or what measures fastest, zero included.

Goodput of draft length k is tokens per second: (1 + a + a^2 + ... + a^k) / T(k), with a the
measured chance that a draft token is accepted and T(k) the measured time of a step that drafts k.
Both ends, 0 and the most allowed, are tried first; T in between is interpolated until it has been
seen. Times depend on how many sequences decode, so each power of two of them has its own table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRIALS = 2
"""Steps of each end before the first choice."""
RETRY_STEPS = 96
"""After this many steps the other end is tried again: texts and caches change."""
FORGET = 0.25
"""Weight of the newest step in a measured time."""


class FixedBudget:
    """Always the same draft length."""

    def __init__(self, num_drafts: int) -> None:
        self._num_drafts = num_drafts

    def num_drafts(self, num_decoding: int) -> int:
        """Return the draft length for a step in which ``num_decoding`` sequences decode."""
        return self._num_drafts

    def observe(
        self, num_decoding: int, num_drafts: int, step_s: float, drafted: int, accepted: int
    ) -> None:
        """Nothing is learnt."""


@dataclass
class _Table:
    """What is known about steps of one batch size."""

    step_s: dict[int, float] = field(default_factory=dict)
    visits: dict[int, int] = field(default_factory=dict)
    last_step: dict[int, int] = field(default_factory=dict)
    steps: int = 0


class AdaptiveBudget:
    """The draft length with the best measured goodput."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tables: dict[int, _Table] = {}
        self._proposed = 0.0
        self._kept = 0.0

    @property
    def acceptance(self) -> float:
        """Chance that a draft token is accepted, given that those before it were."""
        # One accepted of two is what is believed before anything is known.
        return (self._kept + 1.0) / (self._proposed + 2.0)

    def num_drafts(self, num_decoding: int) -> int:
        """Return the draft length for a step in which ``num_decoding`` sequences decode."""
        if num_decoding == 0:
            return 0
        table = self._table(num_decoding)
        for end in (self._most, 0):
            if table.visits.get(end, 0) < TRIALS:
                return end
        best = max(range(self._most + 1), key=lambda k: self._goodput(table, k))
        if table.steps % RETRY_STEPS < TRIALS:
            return 0 if best else self._most
        return best

    def observe(
        self, num_decoding: int, num_drafts: int, step_s: float, drafted: int, accepted: int
    ) -> None:
        """Learn from a step without prompt tokens.

        Args:
            num_decoding: Sequences that decoded.
            num_drafts: The draft length that was asked for.
            step_s: Seconds from the start of drafting to the commit.
            drafted: Draft tokens that were verified and judged: accepted ones and first rejections.
            accepted: Draft tokens that were accepted.
        """
        table = self._table(num_decoding)
        table.steps += 1
        visits = table.visits.get(num_drafts, 0)
        table.visits[num_drafts] = visits + 1
        known = table.step_s.get(num_drafts, step_s)
        # The first step of a kind also pays for what the caches do not hold yet; and what was
        # measured before the last retry says little about now.
        is_new = visits < TRIALS or table.steps - table.last_step[num_drafts] > RETRY_STEPS // 2
        table.step_s[num_drafts] = step_s if is_new else known + FORGET * (step_s - known)
        table.last_step[num_drafts] = table.steps
        # Only newer evidence outdates evidence: steps without drafts say nothing about drafts.
        if drafted:
            self._proposed = 0.98 * self._proposed + drafted
            self._kept = 0.98 * self._kept + accepted

    def _table(self, num_decoding: int) -> _Table:
        return self._tables.setdefault(num_decoding.bit_length(), _Table())

    def _goodput(self, table: _Table, k: int) -> float:
        tokens = sum(self.acceptance**i for i in range(k + 1))
        return tokens / self._time(table, k)

    def _time(self, table: _Table, k: int) -> float:
        """Return the time of a step that drafts k, interpolated between the nearest known ones."""
        if k in table.step_s:
            return table.step_s[k]
        low = max(known for known in table.step_s if known < k)
        high = min(known for known in table.step_s if known > k)
        share = (k - low) / (high - low)
        return (1 - share) * table.step_s[low] + share * table.step_s[high]
