"""Chooses the tokens of the next step: who decodes, who drafts, which pieces of prompts ride along.

Running sequences come first, oldest first; what is left of the step's token budget goes to new ones
in order of arrival. When the KV cache is full, the youngest running sequence gives its pages up and
starts over later (its tokens are kept and read again), so the oldest always makes progress and
nothing starves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from specmoeoff.engine.sequence import Sequence
    from specmoeoff.offload.kv_cache import KvCache

EXPECTED_OUTPUT = 32
"""Output tokens that admission reserves room for beside the prompt; more are taken as they come."""


@dataclass(frozen=True)
class Scheduled:
    """One sequence's share of a step."""

    sequence: Sequence
    num_tokens: int
    """Unread tokens of the sequence that go through this pass."""
    num_drafts: int
    """Most draft tokens that may follow them; their room in the KV cache is reserved."""
    completes: bool
    """Whether the pass reaches the sequence's end, so that a new token comes out."""
    decodes: bool
    """Whether the sequence was past its prompt before the pass."""


class Scheduler:
    """The waiting and the running sequences, and the limits of a step."""

    def __init__(
        self,
        kv: KvCache,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        on_preempt: Callable[[Sequence], None],
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._kv = kv
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max_num_batched_tokens
        self._on_preempt = on_preempt

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that ended, wherever it is, and free its KV."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._kv.free(sequence.kv)

    def schedule(self, num_drafts: int) -> list[Scheduled]:
        """Return the next step's work, at most ``num_drafts`` draft tokens per sequence."""
        step: list[Scheduled] = []
        budget = self._max_tokens
        was_full = False
        for sequence in list(self.running):
            if budget < 1:
                break
            if sequence not in self.running:
                continue
            work = self._continue(sequence, budget, num_drafts)
            if work is None:
                was_full = True
                continue
            budget -= work.num_tokens + work.num_drafts
            step.append(work)
        step = [work for work in step if work.sequence in self.running]
        # Whoever was just preempted waits at the front; admitting in the same step would thrash.
        # But a sequence that preempted itself when alone starts over, in memory that is now whole.
        if was_full and self.running:
            return step
        while self.waiting and budget > 0 and self._may_admit():
            work = self._admit(budget)
            budget -= work.num_tokens
            step.append(work)
        return step

    def _continue(self, sequence: Sequence, budget: int, num_drafts: int) -> Scheduled | None:
        """Schedule a running sequence, preempting younger ones for its KV; None if it gave up."""
        take = min(sequence.num_unread, budget)
        drafts = 0
        if sequence.is_decoding:
            drafts = max(0, min(num_drafts, budget - take, sequence.room - 1))
        while not self._kv.reserve(sequence.kv, sequence.kv.length + take + drafts):
            if drafts:
                drafts = 0
                continue
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return None
        return _work(sequence, take, drafts)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's memory; it keeps its tokens and goes first in the queue."""
        self.running.remove(sequence)
        self._kv.free(sequence.kv)
        sequence.request.num_preemptions += 1
        self.num_preemptions += 1
        self._on_preempt(sequence)
        self.waiting.appendleft(sequence)

    def _may_admit(self) -> bool:
        """Reserve the first waiting sequence's room, or say that it must wait."""
        if len(self.running) >= self._max_num_seqs:
            return False
        sequence = self.waiting[0]
        wanted = len(sequence.token_ids) + min(EXPECTED_OUTPUT, sequence.room)
        if self._kv.reserve(sequence.kv, wanted):
            return True
        # Alone it must be able to start, with only as much as it needs now.
        return not self.running and self._kv.reserve(sequence.kv, len(sequence.token_ids))

    def _admit(self, budget: int) -> Scheduled:
        sequence = self.waiting.popleft()
        self.running.append(sequence)
        return _work(sequence, min(sequence.num_unread, budget), 0)


def _work(sequence: Sequence, num_tokens: int, num_drafts: int) -> Scheduled:
    completes = num_tokens == sequence.num_unread
    return Scheduled(sequence, num_tokens, num_drafts, completes, sequence.is_decoding)
