"""Chooses the tokens of the next step: who decodes, who drafts, which pieces of prompts ride along.

Sequences that decode come first, oldest first; what is left of the step's token budget goes to the
prompts of running ones, then to new ones in order of arrival: prompts ride on the passes of those
that decode.

A new sequence is admitted when the pages that all are expected to need in the end are there, not
the most that they could need. Where that was wrong and the KV cache is full, the youngest running
sequence gives its pages up and starts over later (its tokens are kept and read again). It waits at
the front of the queue, so the running ones are always the oldest, the oldest of all makes progress,
and nothing starves. What made it wait is counted in the others' expectation, which does not fall
while they run; so it comes back only after one of them has ended or given up pages as well.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specmoeoff.engine.expected_output import ExpectedOutput

if TYPE_CHECKING:
    from collections.abc import Callable

    from specmoeoff.engine.sequence import Sequence
    from specmoeoff.offload.kv_cache import KvCache


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
        self._expected = ExpectedOutput()

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that ended, wherever it is, and free its KV."""
        if sequence.finish_reason in ("stop", "length"):
            was_cut = sequence.finish_reason == "length"
            self._expected.learn(sequence.num_output_tokens, was_cut)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._kv.free(sequence.kv)

    def schedule(self, num_drafts: int) -> list[Scheduled]:
        """Return the next step's work, at most ``num_drafts`` draft tokens per sequence."""
        step: list[Scheduled] = []
        budget = self._max_tokens
        num_preemptions = self.num_preemptions
        for sequence in sorted(self.running, key=_reads):
            if budget < 1:
                break
            if sequence not in self.running:
                continue
            work = self._continue(sequence, budget, num_drafts)
            if work is not None:
                budget -= work.num_tokens + work.num_drafts
                step.append(work)
        # Who was preempted waits; but one that preempted itself when alone starts over at once, in
        # memory that is now whole.
        if self.num_preemptions > num_preemptions and self.running:
            return [work for work in step if work.sequence in self.running]
        return step + self._admit(budget)

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

    def _admit(self, budget: int) -> list[Scheduled]:
        """Let waiting sequences in, first come first served, as far as tokens and pages reach."""
        admitted: list[Scheduled] = []
        expected = sum(self._expected_pages(sequence) for sequence in self.running)
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            expected += self._expected_pages(sequence)
            # Alone it may start whatever is expected: nothing will ever leave it more room.
            if self.running and expected > self._kv.max_pages:
                break
            take = min(sequence.num_unread, budget)
            if not self._kv.reserve(sequence.kv, take):
                break
            self.running.append(self.waiting.popleft())
            admitted.append(_work(sequence, take, 0))
            budget -= take
        return admitted

    def _expected_pages(self, sequence: Sequence) -> int:
        """Return the pages that a sequence is expected to hold in the end, at least what it has."""
        request, num_tokens = sequence.request, sequence.num_output_tokens
        output = min(self._expected.of(num_tokens), request.max_output_tokens)
        pages = self._kv.pages_for(len(request.prompt_token_ids) + output)
        return max(pages, len(sequence.kv.pages))


def _reads(sequence: Sequence) -> bool:
    """Sort those that still read their prompt after those that decode."""
    return not sequence.is_decoding


def _work(sequence: Sequence, num_tokens: int, num_drafts: int) -> Scheduled:
    completes = num_tokens == sequence.num_unread
    return Scheduled(sequence, num_tokens, num_drafts, completes, sequence.is_decoding)
