"""Where a draft model finds the keys and values of the tokens so far.

``OwnContexts``: in a KV cache of its own, brought up to date lazily. A proposal first reads the
tokens that the target has committed since, usually one or two; drafts that the target rejected are
truncated when it next looks.

``TargetContexts``: in the target's, for a draft that computes keys and values with the target's own
projections, as one cut or merged from its layers does. What the target has read need not be read
again, and no memory is taken. Drafted tokens lie in the room that the coming pass has reserved, and
that pass overwrites them before it attends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from specmoeoff.offload.kv_cache import KvSequence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from specmoeoff.offload.kv_cache import KvCache
    from specmoeoff.speculative.drafter import DraftRequest

    Rows = Sequence[tuple[KvSequence, Sequence[int], int]]

USUAL_UNREAD = 2
"""Tokens committed since a proposal that was wholly accepted; they ride on the first pass."""


@dataclass
class Context:
    """What a draft model has of one sequence."""

    kv: KvSequence
    seen: list[int] = field(default_factory=list)
    """The tokens whose keys and values are in ``kv``; kept by who needs to compare them."""


class Contexts(Protocol):
    """The contexts of all sequences."""

    def prefill(self, requests: Sequence[DraftRequest], num_tokens: Sequence[int]) -> None:
        """Read the first ``num_tokens[i]`` tokens of each prompt (the target is doing the same)."""

    def open(self, requests: Sequence[DraftRequest]) -> list[Context | None]:
        """Return contexts with room for the drafts, all read but a last few tokens; None: no room.

        At least one token is left, as the first draft comes from its hidden state.
        """

    def release(self, key: int) -> None:
        """Forget a sequence."""


class OwnContexts:
    """Contexts in a cache of the draft's own; sequences for which it has no room have none.

    Args:
        kv: The cache.
        read: Runs tokens (kv, token_ids, 0 outputs) through the draft model.
        max_model_len: Longest sequence it can read.
        max_rows: Most tokens of one pass, which bounds its activations.
    """

    def __init__(
        self, kv: KvCache, read: Callable[[Rows], object], max_model_len: int, max_rows: int
    ) -> None:
        self._kv = kv
        self._run = read
        self._max_model_len = max_model_len
        self._max_rows = max_rows
        self._contexts: dict[int, Context] = {}

    def prefill(self, requests: Sequence[DraftRequest], num_tokens: Sequence[int]) -> None:
        """Read prompts alongside the target, so that the first proposal need not."""
        work = []
        for request, upto in zip(requests, num_tokens, strict=True):
            context = self._context(request, upto) if upto <= self._max_model_len else None
            if context is not None:
                work.append((context, request.token_ids[context.kv.length : upto]))
        self._read(work)

    def open(self, requests: Sequence[DraftRequest]) -> list[Context | None]:
        """Truncate what was rejected and read what was committed since."""
        contexts = [
            self._context(request, len(request.token_ids) + request.num_tokens - 1)
            for request in requests
        ]
        self._read(
            [
                (context, request.token_ids[context.kv.length : -USUAL_UNREAD])
                for context, request in zip(contexts, requests, strict=True)
                if context is not None
            ]
        )
        return contexts

    def release(self, key: int) -> None:
        """Forget a sequence."""
        context = self._contexts.pop(key, None)
        if context is not None:
            self._kv.free(context.kv)

    def _context(self, request: DraftRequest, upto: int) -> Context | None:
        """Return the sequence's context with room for ``upto`` tokens, rejected ones truncated."""
        context = self._contexts.setdefault(request.key, Context(KvSequence()))
        if not self._kv.reserve(context.kv, upto):
            self.release(request.key)
            return None
        agreed = _common_prefix(context.seen, request.token_ids)
        agreed = min(agreed, len(request.token_ids) - 1)
        self._kv.truncate(context.kv, agreed)
        del context.seen[agreed:]
        return context

    def _read(self, work: Sequence[tuple[Context, Sequence[int]]]) -> None:
        """Read tokens of several sequences in passes of bounded size."""
        batch: list[tuple[KvSequence, Sequence[int], int]] = []
        room = self._max_rows
        for context, tokens in work:
            for at in range(0, len(tokens), self._max_rows):
                chunk = tokens[at : at + self._max_rows]
                if len(chunk) > room:
                    self._run(batch)
                    batch, room = [], self._max_rows
                batch.append((context.kv, chunk, 0))
                room -= len(chunk)
                context.seen.extend(chunk)
        if batch:
            self._run(batch)


class TargetContexts:
    """Contexts that are the target's; the engine has reserved room for the drafts in them."""

    def prefill(self, requests: Sequence[DraftRequest], num_tokens: Sequence[int]) -> None:
        """Nothing to do: the target is reading the prompts."""

    def open(self, requests: Sequence[DraftRequest]) -> list[Context | None]:
        """Return views of the target's pages, whose lengths may grow without the target's."""
        return [
            Context(
                KvSequence(request.kv.pages, min(request.kv.length, len(request.token_ids) - 1))
            )
            for request in requests
        ]

    def release(self, key: int) -> None:
        """Nothing to forget."""


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
