"""One pass of a model over many sequences, with all its experts in memory: what a draft runs.

``streaming_forward`` does the same with experts that come and go. Tokens of all sequences form one
block of rows [T]; each row's result depends on its own sequence alone, so it does not matter who
else is in the batch or how a prompt is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from specmoeoff.engine.weights import ModelWeights
    from specmoeoff.kernels import DecoderPass, Weight
    from specmoeoff.models.base import Model
    from specmoeoff.offload.kv_cache import KvCache, KvLayers, KvSequence

    AllExperts = Sequence[Sequence[Mapping[str, Weight]]]
    """[num_layers][num_experts] of gate, up and down."""


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence in a pass."""

    kv: KvSequence
    token_ids: Sequence[int]
    num_outputs: int
    """Of how many of the last tokens the hidden state is wanted."""
    num_drafts: int = 0
    """Most tokens that may still be drafted after these; see ``engine.target``."""


class Forward:
    """A model, its weights and its KV cache, ready to run passes."""

    def __init__(self, model: Model, weights: ModelWeights, kv: KvCache | KvLayers) -> None:
        self.model = model
        self.kv = kv
        self._weights = weights
        layers = range(len(weights.layers))
        pages = [(*kv.layer(layer), *kv.scales(layer)) for layer in layers]
        self._decoder = model.decoder(weights.layers, pages)
        self._resident: AllExperts | None = None
        self._use(weights.experts or None)

    def run(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Run one pass; room for the new tokens must have been reserved in the KV cache.

        Returns:
            Hidden states of the wanted tokens, span after span, [R, hidden].
        """
        lengths = [len(span.token_ids) for span in spans]
        positions = np.concatenate(
            [span.kv.length + np.arange(n) for span, n in zip(spans, lengths, strict=True)]
        ).astype(np.int32)
        slots = np.concatenate(
            [self.kv.append(span.kv, n) for span, n in zip(spans, lengths, strict=True)]
        )
        q_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        kv_lens = np.array([span.kv.length for span in spans], np.int32)
        page_table = self.kv.page_table([span.kv for span in spans])
        token_ids = np.concatenate([np.asarray(span.token_ids, np.int32) for span in spans])
        x = self.model.embed(self._weights.globals, token_ids)
        rope = self.model.rope_tables(positions)
        layers = self._decoder.begin(x, rope, slots, page_table, q_offsets, kv_lens)
        self._run_layers(layers, x)
        return x[_output_rows(spans, q_offsets)]

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of hidden states: [R, hidden] -> [R, V]."""
        return self.model.head(self._weights.globals, hidden)

    def best(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the largest logit and its token of each hidden state, [R] each.

        The rest of the vocabulary's logits are never in memory.
        """
        return self.model.head_best(self._weights.globals, hidden)

    def _use(self, resident: AllExperts | None) -> None:
        """Have the decoder know all experts, or none."""
        if resident is self._resident:
            return
        experts = None
        if resident is not None:
            experts = [[(t["gate"], t["up"], t["down"]) for t in layer] for layer in resident]
        self._decoder.set_experts(experts)
        self._resident = resident

    def _run_layers(self, layers: DecoderPass, x: NDArray[np.float32]) -> None:
        """Take the residual stream x [T, hidden] through all layers, in place."""
        for layer in range(self._decoder.num_layers):
            layers.attend(layer)
            layers.run_experts(layer)


def _output_rows(spans: Sequence[Span], q_offsets: NDArray[np.int32]) -> NDArray[np.int64]:
    rows = [
        np.arange(stop - span.num_outputs, stop)
        for span, stop in zip(spans, q_offsets[1:], strict=True)
    ]
    return np.concatenate(rows) if rows else np.zeros(0, np.int64)
