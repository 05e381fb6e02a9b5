"""A pass whose experts come and go: what the reactive target runs.

While all of them are in memory it is the plain pass; else each layer adds its experts in the order
that their bytes arrive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from specmoeoff import kernels
from specmoeoff.engine.forward import Forward

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from specmoeoff.engine.forward import AllExperts, Span
    from specmoeoff.engine.weights import ModelWeights
    from specmoeoff.kernels import DecoderPass, Weight
    from specmoeoff.models.base import Model
    from specmoeoff.offload.kv_cache import KvCache


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


class StreamingForward(Forward):
    """A model, its dense weights, where its experts come from, and its KV cache."""

    def __init__(
        self, model: Model, weights: ModelWeights, experts: ExpertSource, kv: KvCache
    ) -> None:
        super().__init__(model, weights, kv)
        self._experts = experts

    def run(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Run one pass, see ``Forward.run``.

        Raises:
            StreamError: An expert could not be read.
        """
        resident = self._experts.resident()
        self._use(resident)
        if resident is None:
            self._experts.begin_step(sum(len(span.token_ids) for span in spans))
        return super().run(spans)

    def _run_layers(self, layers: DecoderPass, x: NDArray[np.float32]) -> None:
        if self._resident is None:
            for layer in range(self._decoder.num_layers):
                layers.attend(layer)
                self._stream_experts(layer, layers, x)
            return
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
