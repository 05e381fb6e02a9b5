"""Drafts with a small model that has the target's vocabulary and lives wholly in memory.

A proposal goes on from a sequence's context (draft_context.py) token by token, all sequences in one
batch.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from specmoeoff.speculative.drafter import DraftRequest, Proposal

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from specmoeoff.offload.kv_cache import KvSequence
    from specmoeoff.sampling import Distribution, SequenceSampler
    from specmoeoff.speculative.draft_context import Contexts

MAX_LOGIT_ROWS = 32


class DraftForward(Protocol):
    """The draft model: see engine.forward.Forward."""

    def run_tokens(
        self, rows: Sequence[tuple[KvSequence, Sequence[int], int]]
    ) -> NDArray[np.float32]:
        """Run (kv, token_ids, num_outputs) of each sequence; return hidden states."""

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits of hidden states, [R, V]."""

    def best(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the largest logit and its token of each hidden state, [R] each."""


class ModelDrafter:
    """A drafter that runs a model; sequences that have no context go undrafted.

    Args:
        forward: The draft model.
        contexts: Where the keys and values of the tokens so far are.
        max_model_len: Longest sequence it can read.
        max_distribution_bytes: What the distributions of one step's proposals may take; at the
            limit, sampled sequences get fewer drafts.
    """

    def __init__(
        self,
        forward: DraftForward,
        contexts: Contexts,
        max_model_len: int,
        max_distribution_bytes: int = sys.maxsize,
    ) -> None:
        self._forward = forward
        self._contexts = contexts
        self._max_model_len = max_model_len
        self._max_distribution_bytes = max_distribution_bytes

    def prefill(self, requests: Sequence[DraftRequest], num_tokens: Sequence[int]) -> None:
        """Read prompts alongside the target, so that the first proposal need not."""
        self._contexts.prefill(requests, num_tokens)

    def propose(self, requests: Sequence[DraftRequest], held_bytes: int = 0) -> list[Proposal]:
        """Draft up to ``num_tokens`` for each request, all requests in one batch per token."""
        proposals = [Proposal() for _ in requests]
        possible = [i for i, request in enumerate(requests) if self._may_draft(request)]
        opened = self._contexts.open([requests[i] for i in possible])
        contexts = {i: c for i, c in zip(possible, opened, strict=True) if c is not None}
        live = list(contexts)
        rows = [requests[i].token_ids[contexts[i].kv.length :] for i in live]
        choosers = {i: requests[i].sampler.fork() for i in live}
        while live:
            hidden = self._forward.run_tokens(
                [(contexts[i].kv, row, 1) for i, row in zip(live, rows, strict=True)]
            )
            going = []
            for i, row in zip(live, rows, strict=True):
                contexts[i].seen.extend(row)
            room = self._max_distribution_bytes - held_bytes
            drawn = self._draw(hidden, [choosers[i] for i in live], room)
            for i, (token, distribution) in zip(live, drawn, strict=True):
                if token is None:
                    continue
                choosers[i].observe(token)
                proposals[i].token_ids.append(token)
                proposals[i].distributions.append(distribution)
                held_bytes += distribution.nbytes if distribution is not None else 0
                if len(proposals[i].token_ids) < requests[i].num_tokens:
                    going.append(i)
            live = going
            rows = [proposals[i].token_ids[-1:] for i in live]
        return proposals

    def release(self, key: int) -> None:
        """Forget a sequence."""
        self._contexts.release(key)

    def _may_draft(self, request: DraftRequest) -> bool:
        length = len(request.token_ids) + request.num_tokens
        return request.num_tokens >= 1 and length <= self._max_model_len

    def _draw(
        self, hidden: NDArray[np.float32], choosers: Sequence[SequenceSampler], room: int
    ) -> list[tuple[int | None, Distribution | None]]:
        """Choose a token for each hidden state; None once distributions would exceed the room."""
        drawn: list[tuple[int | None, Distribution | None]] = [(None, None)] * len(choosers)
        best = [i for i, chooser in enumerate(choosers) if chooser.takes_best]
        if best:
            logits, token_ids = self._forward.best(hidden[best])
            for i, logit, token in zip(best, logits.tolist(), token_ids.tolist(), strict=True):
                drawn[i] = choosers[i].take_best(logit, token), None
        others = [i for i, chooser in enumerate(choosers) if not chooser.takes_best]
        for at in range(0, len(others), MAX_LOGIT_ROWS):
            some = others[at : at + MAX_LOGIT_ROWS]
            for i, scores in zip(some, self._forward.logits(hidden[some]), strict=True):
                if not choosers[i].greedy and scores.nbytes > room:
                    continue
                drawn[i] = choosers[i].draw(scores)
                distribution = drawn[i][1]
                room -= distribution.nbytes if distribution is not None else 0
        return drawn
