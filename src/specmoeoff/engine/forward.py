"""One pass of a model over many sequences: the maths of a layer, in the order that bytes arrive.

The same code runs the target (experts from the store) and the draft (experts in memory). Tokens of
all sequences form one block of rows [T]; each row's result depends on its own sequence alone, so
it does not matter who else is in the batch or how a prompt is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from specmoeoff import kernels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from specmoeoff.engine.weights import ModelWeights
    from specmoeoff.kernels import Weight
    from specmoeoff.models.base import Model
    from specmoeoff.offload.kv_cache import KvCache, KvLayers, KvSequence


class ExpertSource(Protocol):
    """Where a pass gets its experts from."""

    def begin_step(self, num_tokens: int) -> None:
        """Say how many tokens the coming pass has."""

    def serve(
        self, layer: int, counts: NDArray[np.int64]
    ) -> Iterator[Sequence[tuple[int, Mapping[str, Weight]]]]:
        """Yield the experts with a count, rising, in runs of (expert, gate/up/down)."""


class ResidentExperts:
    """Experts that are all in memory, [num_layers][num_experts]."""

    def __init__(self, experts: Sequence[Sequence[Mapping[str, Weight]]]) -> None:
        self._experts = experts

    def begin_step(self, num_tokens: int) -> None:
        """Nothing to prepare."""

    def serve(
        self, layer: int, counts: NDArray[np.int64]
    ) -> Iterator[Sequence[tuple[int, Mapping[str, Weight]]]]:
        """Yield all wanted experts at once."""
        yield [(int(e), self._experts[layer][int(e)]) for e in np.flatnonzero(counts)]


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
    """A model, its dense weights, its experts and its KV cache, ready to run passes."""

    def __init__(
        self, model: Model, weights: ModelWeights, experts: ExpertSource, kv: KvCache | KvLayers
    ) -> None:
        self.model = model
        self.kv = kv
        self._weights = weights
        self._experts = experts
        config = model.config
        self._scale = config.head_dim**-0.5
        self._window = config.sliding_window or 0

    def run(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Run one pass; room for the new tokens must have been reserved in the KV cache.

        Returns:
            Hidden states of the wanted tokens, span after span, [R, hidden].
        """
        lengths = [len(span.token_ids) for span in spans]
        self._experts.begin_step(sum(lengths))
        positions = np.concatenate(
            [span.kv.length + np.arange(n) for span, n in zip(spans, lengths, strict=True)]
        ).astype(np.int32)
        slots = np.concatenate(
            [self.kv.append(span.kv, n) for span, n in zip(spans, lengths, strict=True)]
        )
        places = _Places(
            slots=slots,
            page_table=self.kv.page_table([span.kv for span in spans]),
            q_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            kv_lens=np.array([span.kv.length for span in spans], np.int32),
        )
        token_ids = np.concatenate([np.asarray(span.token_ids, np.int32) for span in spans])
        x = self.model.embed(self._weights.globals, token_ids)
        rope = self.model.rope_tables(positions)
        for layer, weights in enumerate(self._weights.layers):
            self._layer(layer, weights, x, rope, places)
        return x[_output_rows(spans, places.q_offsets)]

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of hidden states: [R, hidden] -> [R, V]."""
        return self.model.head(self._weights.globals, hidden)

    def best(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the largest logit and its token of each hidden state, [R] each.

        The rest of the vocabulary's logits are never in memory.
        """
        return self.model.head_best(self._weights.globals, hidden)

    def _layer(
        self,
        layer: int,
        weights: Mapping[str, Weight],
        x: NDArray[np.float32],
        rope: tuple[NDArray[np.float32], NDArray[np.float32]],
        places: _Places,
    ) -> None:
        q, k, v = self.model.pre_attention(weights, x, rope)
        k_pages, v_pages = self.kv.layer(layer)
        k_scales, v_scales = self.kv.scales(layer)
        kernels.append_kv(k, v, k_pages, v_pages, places.slots, k_scales, v_scales)
        attention = kernels.chunked_attention(
            q,
            k_pages,
            v_pages,
            places.page_table,
            places.q_offsets,
            places.kv_lens,
            self._scale,
            sliding_window=self._window,
            k_scales=k_scales,
            v_scales=v_scales,
        )
        h = self.model.post_attention(weights, x, attention)
        if self.model.num_ffn_experts == 1:
            self._dense_ffn(layer, h, x)
        else:
            expert_ids, expert_weights = self.model.router(weights, h)
            self._experts_of(layer, h, expert_ids, expert_weights, x)

    def _dense_ffn(self, layer: int, h: NDArray[np.float32], x: NDArray[np.float32]) -> None:
        """Add the output of a layer's only expert to x: nothing to route or to gather."""
        for ((_, t),) in self._experts.serve(layer, np.array([len(h)])):
            kernels.expert_ffn(
                h, t["gate"], t["up"], t["down"], x, activations=self.model.activations
            )

    def _experts_of(
        self,
        layer: int,
        h: NDArray[np.float32],
        expert_ids: NDArray[np.int32],
        expert_weights: NDArray[np.float32],
        x: NDArray[np.float32],
    ) -> None:
        """Add the routed experts' outputs to x, expert by expert in rising order."""
        top_k = expert_ids.shape[1]
        flat = expert_ids.reshape(-1)
        order = np.argsort(flat, kind="stable")
        rows = (order // top_k).astype(np.int32)
        row_weights = expert_weights.reshape(-1)[order]
        counts = np.bincount(flat, minlength=self.model.num_ffn_experts)
        ends = np.cumsum(counts)
        for run in self._experts.serve(layer, counts):
            first, last = run[0][0], run[-1][0]
            start = int(ends[first] - counts[first])
            offsets = np.array([0, *(int(ends[e]) - start for e, _ in run)], np.int32)
            part = slice(start, int(ends[last]))
            experts = [(t["gate"], t["up"], t["down"]) for _, t in run]
            kernels.expert_ffn_many(
                h,
                experts,
                offsets,
                rows[part],
                row_weights[part],
                x,
                activations=self.model.activations,
            )


@dataclass(frozen=True)
class _Places:
    """Where this pass's tokens are written and what they attend to."""

    slots: NDArray[np.int32]
    page_table: NDArray[np.int32]
    q_offsets: NDArray[np.int32]
    kv_lens: NDArray[np.int32]


def _output_rows(spans: Sequence[Span], q_offsets: NDArray[np.int32]) -> NDArray[np.int64]:
    rows = [
        np.arange(stop - span.num_outputs, stop)
        for span, stop in zip(spans, q_offsets[1:], strict=True)
    ]
    return np.concatenate(rows) if rows else np.zeros(0, np.int64)
