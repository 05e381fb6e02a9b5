"""The target that reacts to routing: passes over an expert store that reads ahead by itself.

Not a plan: at small batches it reads only what tokens are routed to, which nobody knows before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specmoeoff.engine.streaming_forward import StreamingForward

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from specmoeoff.engine.forward import Span
    from specmoeoff.engine.stats import EngineStats
    from specmoeoff.engine.target import WithDrafts
    from specmoeoff.engine.weights import ModelWeights
    from specmoeoff.models.base import Model
    from specmoeoff.offload.elastic import ElasticMemory
    from specmoeoff.offload.expert_store import ExpertStore
    from specmoeoff.offload.kv_cache import KvCache
    from specmoeoff.offload.reader import Reader
    from specmoeoff.offload.tiers import Tier


class ReactiveTarget:
    """See ``engine.target.Target``."""

    def __init__(
        self,
        model: Model,
        weights: ModelWeights,
        store: ExpertStore,
        kv: KvCache,
        elastic: ElasticMemory,
        reader: Reader,
        memory: Tier,
    ) -> None:
        self.kv = kv
        self.model = model
        self._forward = StreamingForward(model, weights, store, kv)
        self._store = store
        self._elastic = elastic
        self._reader = reader
        self._memory = memory

    def run(
        self, spans: Sequence[Span], with_drafts: WithDrafts | None = None
    ) -> NDArray[np.float32]:
        """Draft for all sequences, then run one pass; the reader goes on meanwhile."""
        if with_drafts is not None:
            spans = with_drafts(range(len(spans)))
        return self._forward.run(spans)

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of hidden states: [R, hidden] -> [R, V]."""
        return self._forward.logits(hidden)

    def best(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the largest logit and its token of each hidden state, [R] each."""
        return self._forward.best(hidden)

    def lend(self, num_bytes: int) -> None:
        """Give the expert slots memory that steps leave free."""
        self._elastic.lend(num_bytes)

    def rebalance(self) -> None:
        """Give the expert slots what the KV caches no longer hold."""
        self._elastic.rebalance()

    def count(self, stats: EngineStats) -> None:
        """Enter the reader's and the store's counters; two lanes, and drafts beside them.

        The one tier is the process.
        """
        stats.tiers = {self._memory.name: self._memory.use(stats.peak_memory_bytes)}
        stats.streamed_bytes = self._reader.stats.bytes
        stats.streamed_s = self._reader.busy_seconds()
        stats.stalled_s = self._store.stats.stalled_s
        stats.wanted_experts = self._store.stats.wanted_experts
        stats.fetched_experts = self._store.stats.fetched_experts
        stats.expert_slots = self._store.num_slots
        stats.lane_busy_s = {
            "disk": stats.streamed_s,
            "cpu": stats.step_s - stats.stalled_s,
            "draft": stats.draft_s,
        }

    def close(self) -> None:
        """Stop the reader."""
        self._reader.close()
