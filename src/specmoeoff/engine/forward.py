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
    from specmoeoff.kernels import DecoderPass, Weight
    from specmoeoff.models.base import Model
    from specmoeoff.offload.kv_cache import KvCache, KvLayers, KvSequence

    AllExperts = Sequence[Sequence[Mapping[str, Weight]]]
    """[num_layers][num_experts] of gate, up and down."""


class ExpertSource(Protocol):
    """Where a pass gets its experts from."""

    def resident(self) -> AllExperts | None:
        """Return all experts if they are in memory to stay, the same object while they are."""

    def ran(self, counts: NDArray[np.int32]) -> None:
        """Note a pass over resident experts: tokens routed to each, [num_layers, E]."""

    def begin_step(self, num_tokens: int) -> None:
        """Say how many tokens the coming pass has; not called where all are resident."""

    def serve(
        self, layer: int, counts: NDArray[np.int32]
    ) -> Iterator[Sequence[tuple[int, Mapping[str, Weight]]]]:
        """Yield the experts with a count, rising, in runs of (expert, gate/up/down)."""


class ResidentExperts:
    """Experts that are all in memory, [num_layers][num_experts]."""

    def __init__(self, experts: AllExperts) -> None:
        self._experts = experts

    def resident(self) -> AllExperts:
        """Return them."""
        return self._experts

    def ran(self, counts: NDArray[np.int32]) -> None:
        """Nothing to learn."""

    def begin_step(self, num_tokens: int) -> None:
        """Nothing to prepare."""

    def serve(
        self, layer: int, counts: NDArray[np.int32]
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
        layers = range(len(weights.layers))
        pages = [(*kv.layer(layer), *kv.scales(layer)) for layer in layers]
        self._decoder = model.decoder(weights.layers, pages)
        self._resident: AllExperts | None = None

    def run(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Run one pass; room for the new tokens must have been reserved in the KV cache.

        Returns:
            Hidden states of the wanted tokens, span after span, [R, hidden].
        """
        lengths = [len(span.token_ids) for span in spans]
        resident = self._experts.resident()
        self._use(resident)
        if resident is None:
            self._experts.begin_step(sum(lengths))
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
        if resident is None:
            for layer in range(self._decoder.num_layers):
                layers.attend(layer)
                self._stream_experts(layer, layers, x)
        else:
            self._run_resident(layers)
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

    def _run_resident(self, layers: DecoderPass) -> None:
        """Run all layers, their experts where they are."""
        counts = np.empty((self._decoder.num_layers, self.model.num_ffn_experts), np.int32)
        for layer, routed in enumerate(counts):
            layers.attend(layer)
            layers.run_experts(layer)
            np.subtract(layers.offsets[1:], layers.offsets[:-1], out=routed)
        self._experts.ran(counts)

    def _stream_experts(self, layer: int, routed: DecoderPass, x: NDArray[np.float32]) -> None:
        """Add the routed experts' outputs to x, in rising order, as they arrive."""
        offsets = routed.offsets
        for run in self._experts.serve(layer, np.diff(offsets)):
            # Those in between have no rows, so each ends where the next of the run begins.
            bounds = offsets[[*(e for e, _ in run), run[-1][0] + 1]]
            kernels.expert_ffn_many(
                routed.h,
                [(t["gate"], t["up"], t["down"]) for _, t in run],
                bounds,
                routed.rows,
                routed.row_weights,
                x,
                activations=self.model.activations,
            )


def _output_rows(spans: Sequence[Span], q_offsets: NDArray[np.int32]) -> NDArray[np.int64]:
    rows = [
        np.arange(stop - span.num_outputs, stop)
        for span, stop in zip(spans, q_offsets[1:], strict=True)
    ]
    return np.concatenate(rows) if rows else np.zeros(0, np.int64)
