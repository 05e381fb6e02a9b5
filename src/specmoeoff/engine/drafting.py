"""The drafts of one step, made when the pass asks: for some sequences at a time or all at once.

Tokens that are proposed together or apart are the same, since a drafter looks at one sequence only;
except that distributions that drafts were drawn from may fill the memory they have in a step.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from specmoeoff.engine.forward import Span
from specmoeoff.engine.verification import num_outputs
from specmoeoff.speculative.drafter import DraftRequest, Proposal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.engine.scheduler import Scheduled
    from specmoeoff.speculative.drafter import Drafter


class Drafting:
    """What a drafter adds to a step's work."""

    def __init__(self, batch: Sequence[Scheduled], drafter: Drafter | None) -> None:
        self.proposals = [Proposal() for _ in batch]
        """Of each sequence, once the pass has asked for them."""
        self.draft_s = 0.0
        """Seconds that the drafter took."""
        self._batch = batch
        # Taken now: after a failure the sequences go on with others, see commit.py.
        self._requests = [_request(work) for work in batch]
        self._drafter = drafter

    def spans(self) -> list[Span]:
        """Return each sequence's tokens for the pass, without drafts."""
        return [self._span(place) for place in range(len(self._batch))]

    def with_drafts(self, places: Sequence[int]) -> list[Span]:
        """Draft for some sequences and return their spans.

        For those that decode tokens are proposed; of the others the drafter reads the piece of the
        prompt that the target is about to read.
        """
        start = time.perf_counter()
        if self._drafter is not None:
            reading = [i for i in places if not self._batch[i].decodes]
            self._drafter.prefill(
                [self._requests[i] for i in reading],
                [self._requests[i].kv.length + self._batch[i].num_tokens for i in reading],
            )
            drafted = [i for i in places if self._batch[i].num_drafts]
            held_bytes = sum(proposal.num_bytes for proposal in self.proposals)
            made = self._drafter.propose([self._requests[i] for i in drafted], held_bytes)
            for i, proposal in zip(drafted, made, strict=True):
                self.proposals[i] = proposal
        self.draft_s += time.perf_counter() - start
        return [self._span(place) for place in places]

    def _span(self, place: int) -> Span:
        work, request, proposal = self._batch[place], self._requests[place], self.proposals[place]
        start = request.kv.length
        token_ids = [*request.token_ids[start : start + work.num_tokens], *proposal.token_ids]
        left = work.num_drafts - len(proposal.token_ids)
        return Span(request.kv, token_ids, num_outputs(work, proposal), left)


def _request(work: Scheduled) -> DraftRequest:
    sequence = work.sequence
    return DraftRequest(
        sequence.key, sequence.token_ids, work.num_drafts, sequence.sampler, sequence.kv
    )
