"""This host's kernels as a device: the CPU itself, and what a simulated device computes with.

Copies are real copies, so that a simulated device shares no array with the host.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from specmoeoff import kernels
from specmoeoff.devices.base import F32, I32, Pages, Places, Routed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from specmoeoff.models.base import Model, Weights
    from specmoeoff.pipeline.plan import Lane


class HostDevice:
    """Numpy arrays and ``specmoeoff.kernels``; see ``Device``."""

    def __init__(self, model: Model, weights: Weights, layers: Sequence[Weights]) -> None:
        self._model = model
        self._weights = weights
        self._layers = layers

    def on(self, lane: Lane) -> AbstractContextManager[None]:
        """Nothing runs later than it is called."""
        return nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Return an array of anything."""
        return np.empty(shape, dtype)

    def upload(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return a copy."""
        return array.copy()

    def upload_pages(self, pages: NDArray[np.generic], wanted: I32) -> NDArray[np.generic]:
        """Return a copy of some pages."""
        return pages[wanted]

    def download(self, array: F32) -> F32:
        """Return a copy."""
        return array.copy()

    def stage(self, array: F32) -> F32:
        """Return the array itself."""
        return array

    def embed(self, token_ids: I32) -> F32:
        """Return embeddings [T, hidden]."""
        return self._model.embed(self._weights, token_ids)

    def pre_attention(self, layer: int, x: F32, rope: tuple[F32, F32]) -> tuple[F32, F32, F32]:
        """Norm, project, rotate."""
        return self._model.pre_attention(self._layers[layer], x, rope)

    def post_attention(self, layer: int, x: F32, attended: F32) -> F32:
        """Add the O projection to x IN PLACE; return the FFN's input."""
        return self._model.post_attention(self._layers[layer], x, attended)

    def router(self, layer: int, h: F32) -> tuple[I32, F32]:
        """Choose experts."""
        return self._model.router(self._layers[layer], h)

    def sort_by_expert(self, expert_ids: I32, expert_weights: F32, num_experts: int) -> Routed:
        """Sort rows by expert."""
        flat = expert_ids.reshape(-1)
        order = np.argsort(flat, kind="stable")
        return Routed(
            (order // expert_ids.shape[1]).astype(np.int32),
            expert_weights.reshape(-1)[order],
            np.bincount(flat, minlength=num_experts),
        )

    def run_experts(
        self,
        h: F32,
        experts: Sequence[Mapping[str, Any]],
        offsets: Sequence[int],
        rows: I32,
        weights: F32,
        x: F32,
    ) -> None:
        """Add what experts make of their rows to x."""
        kernels.expert_ffn_many(
            h,
            [(t["gate"], t["up"], t["down"]) for t in experts],
            np.array(offsets, np.int32),
            rows,
            weights,
            x,
            activations=self._model.activations,
        )

    def kv_pages(self, layer: int, host: Pages) -> Pages:
        """Return the host's pages: a simulated device's cache lies there too."""
        return host

    def store_kv(self, k: F32, v: F32, pages: Pages, slots: I32) -> None:
        """Write new keys and values into pages."""
        kernels.append_kv(k, v, pages.k, pages.v, slots, pages.k_scales, pages.v_scales)

    def attend(self, q: F32, pages: Pages, places: Places) -> F32:
        """Attend to pages."""
        return kernels.chunked_attention(
            q,
            pages.k,
            pages.v,
            places.page_table,
            places.q_offsets,
            places.kv_lens,
            self._model.config.head_dim**-0.5,
            sliding_window=places.sliding_window,
            k_scales=pages.k_scales,
            v_scales=pages.v_scales,
        )

    def peak_bytes(self) -> None:
        """What a simulated device holds is among all else that the process holds."""

    def close(self) -> None:
        """Nothing is pinned."""

    def head(self, hidden: F32) -> F32:
        """Return logits [R, V]."""
        return self._model.head(self._weights, hidden)

    def head_best(self, hidden: F32) -> tuple[F32, I32]:
        """Return the largest logit and its token, [R] each."""
        return self._model.head_best(self._weights, hidden)
