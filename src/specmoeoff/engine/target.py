"""What the engine asks of its target: passes over sequences, which are drafted for in the pass.

Two answer it. ``ReactiveTarget`` reads experts as routing asks for them and ahead of it;
``PlannedTarget`` runs the plan of a schedule. The tokens are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from specmoeoff.engine.forward import Span

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from specmoeoff.engine.stats import EngineStats
    from specmoeoff.offload.kv_cache import KvCache

WithDrafts = Callable[[Sequence[int]], Sequence[Span]]
"""Drafts for the spans of some places; returns them with their drafts as further tokens. Called
with places that rise from 0, each of them once in a pass."""


class Target(Protocol):
    """A model that is ready to run passes."""

    @property
    def kv(self) -> KvCache:
        """Where the scheduler reserves room."""

    def run(
        self, spans: Sequence[Span], with_drafts: WithDrafts | None = None
    ) -> NDArray[np.float32]:
        """Run one pass; room for all tokens and drafts must have been reserved in the KV cache.

        Args:
            spans: New tokens, sequence by sequence.
            with_drafts: What drafts, where there is a drafter; asked before a span's tokens are
                looked at.

        Returns:
            Hidden states of the wanted tokens, span after span, [R, hidden].

        Raises:
            StreamError: Weights could not be read.
        """

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of hidden states: [R, hidden] -> [R, V]."""

    def best(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the largest logit and its token of each hidden state, [R] each."""

    def lend(self, num_bytes: int) -> None:
        """Have, until told otherwise, memory that steps leave free, to keep more experts in."""

    def rebalance(self) -> None:
        """Take back what the KV caches no longer hold (call after sequences ended)."""

    def count(self, stats: EngineStats) -> None:
        """Enter what was streamed, how busy each lane was and what each tier of memory held."""

    def close(self) -> None:
        """End reading; no pass can run afterwards."""
