"""Drafts with a small model that has the target's vocabulary and lives wholly in memory.

Each sequence has its own draft KV, which is brought up to date lazily: a proposal first reads the
tokens the target has committed since (usually one or two), then goes on token by token, all
sequences in one batch. Drafts that the target rejected are truncated when it next looks.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from specmoeoff.offload.kv_cache import KvCache, KvSequence
from specmoeoff.speculative.drafter import DraftRequest, Proposal

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from specmoeoff.sampling import Distribution, SequenceSampler

MAX_LOGIT_ROWS = 32
USUAL_UNREAD = 2
"""Tokens committed since a proposal that was wholly accepted; they ride on the first pass."""


class DraftForward(Protocol):
    """The draft model: see engine.forward.Forward."""

    kv: KvCache

    def run_tokens(
        self, rows: Sequence[tuple[KvSequence, Sequence[int], int]]
    ) -> NDArray[np.float32]:
        """Run (kv, token_ids, num_outputs) of each sequence; return hidden states."""

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits of hidden states, [R, V]."""

    def best(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the largest logit and its token of each hidden state, [R] each."""


@dataclass
class _State:
    kv: KvSequence
    seen: list[int]
    """The tokens whose keys and values are in ``kv``."""


class ModelDrafter:
    """A drafter that runs a model; sequences without room in its KV cache go undrafted.

    Args:
        forward: The draft model.
        max_model_len: Longest sequence it can read.
        max_rows: Most tokens of one of its passes, which bounds its activations.
        max_distribution_bytes: What the distributions of one step's proposals may take; at the
            limit, sampled sequences get fewer drafts.
    """

    def __init__(
        self,
        forward: DraftForward,
        max_model_len: int,
        max_rows: int = 512,
        max_distribution_bytes: int = sys.maxsize,
    ) -> None:
        self._forward = forward
        self._max_model_len = max_model_len
        self._max_rows = max_rows
        self._max_distribution_bytes = max_distribution_bytes
        self._states: dict[int, _State] = {}

    def prefill(self, requests: Sequence[DraftRequest], num_tokens: Sequence[int]) -> None:
        """Read prompts alongside the target, so that the first proposal need not."""
        work = []
        for request, upto in zip(requests, num_tokens, strict=True):
            state = self._state(request, upto) if upto <= self._max_model_len else None
            if state is not None:
                work.append((state, request.token_ids[state.kv.length : upto]))
        self._read(work)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Proposal]:
        """Draft up to ``num_tokens`` for each request, all requests in one batch per token."""
        proposals = [Proposal() for _ in requests]
        live: list[int] = []
        behind = []
        for i, request in enumerate(requests):
            length = len(request.token_ids)
            if request.num_tokens < 1 or length + request.num_tokens > self._max_model_len:
                continue
            state = self._state(request, length + request.num_tokens - 1)
            if state is not None:
                behind.append((state, request.token_ids[state.kv.length : -USUAL_UNREAD]))
                live.append(i)
        self._read(behind)
        rows = [self._unread(requests[i]) for i in live]
        choosers = {i: requests[i].sampler.fork() for i in live}
        held_bytes = 0
        while live:
            hidden = self._forward.run_tokens(
                [
                    (self._states[requests[i].key].kv, row, 1)
                    for i, row in zip(live, rows, strict=True)
                ]
            )
            going = []
            for i, row in zip(live, rows, strict=True):
                self._states[requests[i].key].seen.extend(row)
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
        state = self._states.pop(key, None)
        if state is not None:
            self._forward.kv.free(state.kv)

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

    def _state(self, request: DraftRequest, upto: int) -> _State | None:
        """Return the sequence's state with room for ``upto`` tokens, rejected drafts truncated."""
        state = self._states.setdefault(request.key, _State(KvSequence(), []))
        if not self._forward.kv.reserve(state.kv, upto):
            self.release(request.key)
            return None
        agreed = _common_prefix(state.seen, request.token_ids)
        # The last token is always read again: its hidden state is what the first draft comes from.
        agreed = min(agreed, len(request.token_ids) - 1)
        self._forward.kv.truncate(state.kv, agreed)
        del state.seen[agreed:]
        return state

    def _read(self, work: Sequence[tuple[_State, Sequence[int]]]) -> None:
        """Read tokens of several sequences in passes of bounded size."""
        batch: list[tuple[KvSequence, Sequence[int], int]] = []
        room = self._max_rows
        for state, tokens in work:
            for at in range(0, len(tokens), self._max_rows):
                chunk = tokens[at : at + self._max_rows]
                if len(chunk) > room:
                    self._forward.run_tokens(batch)
                    batch, room = [], self._max_rows
                batch.append((state.kv, chunk, 0))
                room -= len(chunk)
                state.seen.extend(chunk)
        if batch:
            self._forward.run_tokens(batch)

    def _unread(self, request: DraftRequest) -> list[int]:
        state = self._states[request.key]
        return list(request.token_ids[state.kv.length :])


def _common_prefix(seen: list[int], token_ids: Sequence[int]) -> int:
    """Return how many leading tokens agree; differences are near the end, so search there."""
    length = min(len(seen), len(token_ids))
    start = max(0, length - 64)
    if seen[:start] != list(token_ids[:start]):
        start = 0
    for i in range(start, length):
        if seen[i] != token_ids[i]:
            return i
    return length
