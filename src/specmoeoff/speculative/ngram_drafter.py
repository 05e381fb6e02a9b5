"""Drafts by prompt lookup: an n-gram index per sequence, no model and no memory to speak of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specmoeoff.speculative.drafter import DraftRequest, Proposal
from specmoeoff.speculative.ngram import NgramDrafter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.config import SpeculativeConfig


class NgramDrafting:
    """A drafter that looks the last tokens up in each sequence's own past."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._indices: dict[int, NgramDrafter] = {}

    def prefill(self, requests: Sequence[DraftRequest], num_tokens: Sequence[int]) -> None:
        """Nothing to read ahead of the first proposal."""

    def propose(self, requests: Sequence[DraftRequest], held_bytes: int = 0) -> list[Proposal]:
        """Propose what followed the last tokens where they stood before, if they did."""
        return [self._propose(request) for request in requests]

    def release(self, key: int) -> None:
        """Forget a sequence's index."""
        self._indices.pop(key, None)

    def _propose(self, request: DraftRequest) -> Proposal:
        index = self._indices.get(request.key)
        if index is None:
            index = NgramDrafter(self._config.prompt_lookup_max, self._config.prompt_lookup_min)
            self._indices[request.key] = index
        token_ids = index.propose(request.token_ids, request.num_tokens)
        return Proposal(token_ids, [None] * len(token_ids))
