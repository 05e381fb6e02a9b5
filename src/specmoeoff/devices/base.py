"""What planned passes ask of a device: its arrays, its copies, and the maths between them.

Arrays of a device are opaque to who asks, apart from slicing rows and assigning to them. What the
host computes (attention over its KV cache) it computes itself; ``upload`` and ``download`` are the
link. Letters as in ``models.base``: T tokens, R rows, H, G, D, E experts, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from specmoeoff.pipeline.plan import Lane

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
DeviceArray = Any
"""An array of the device: numpy for the host, a tensor for torch."""


@dataclass(frozen=True)
class Pages:
    """One layer of a paged KV cache, or of a copied part of it, all on one side of the link."""

    k: DeviceArray
    """[N, G, D, P]"""
    v: DeviceArray
    """[N, G, P, D]"""
    k_scales: DeviceArray | None
    """[N, G, P] for int8, else None."""
    v_scales: DeviceArray | None


@dataclass(frozen=True)
class Places:
    """Where the queries of some sequences are and what they attend to, as ``chunked_attention``."""

    page_table: I32
    q_offsets: I32
    kv_lens: I32
    sliding_window: int


@dataclass(frozen=True)
class Routed:
    """Rows sorted by the expert they are routed to, each once per expert."""

    rows: DeviceArray
    """int32 [T * k]"""
    weights: DeviceArray
    """float32 [T * k]"""
    counts: NDArray[np.int64]
    """[E], on the host."""


class Device(Protocol):
    """A device with a model's dense weights; experts come from slots, tensor by tensor."""

    def on(self, lane: Lane) -> AbstractContextManager[None]:
        """Run what is inside on a lane; on leaving, its results are there for every lane.

        Arrays that another lane made must not be let go of before.
        """

    def empty(self, shape: tuple[int, ...], dtype: type[np.generic]) -> DeviceArray:
        """Return an array, float32 or int32, of anything."""

    def upload(self, array: NDArray[np.generic]) -> DeviceArray:
        """Return a copy on the device."""

    def upload_pages(self, pages: NDArray[np.generic], wanted: I32) -> DeviceArray:
        """Return a copy of some pages [N, ...] on the device."""

    def download(self, array: DeviceArray) -> F32:
        """Return a copy on the host."""

    def stage(self, array: F32) -> F32:
        """Return an array of the host's, or a copy of it from which uploads are fast."""

    def embed(self, token_ids: I32) -> DeviceArray:
        """Return embeddings [T, hidden]."""

    def pre_attention(
        self, layer: int, x: DeviceArray, rope: tuple[F32, F32]
    ) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
        """Norm, project, rotate: x [T, hidden] -> q [T, H, D], k and v [T, G, D]."""

    def post_attention(self, layer: int, x: DeviceArray, attended: DeviceArray) -> DeviceArray:
        """Add the O projection of attended [T, H, D] to x IN PLACE; return the FFN's input."""

    def router(self, layer: int, h: DeviceArray) -> tuple[DeviceArray, DeviceArray]:
        """Choose experts: ids int32 [T, k] and weights float32 [T, k]."""

    def sort_by_expert(
        self, expert_ids: DeviceArray, expert_weights: DeviceArray, num_experts: int
    ) -> Routed:
        """Sort the rows of ids and weights [T, k] by expert, rows rising within each."""

    def run_experts(
        self,
        h: DeviceArray,
        experts: Sequence[Mapping[str, Any]],
        offsets: Sequence[int],
        rows: DeviceArray,
        weights: DeviceArray,
        x: DeviceArray,
    ) -> None:
        """Add what experts make of rows of h [T, hidden] to x, in the order given.

        Expert i has the rows ``rows[offsets[i]:offsets[i + 1]]`` with their weights.
        """

    def kv_pages(self, layer: int, host: Pages) -> Pages:
        """Return a layer's cache on the device, of the shape of the host's."""

    def store_kv(self, k: DeviceArray, v: DeviceArray, pages: Pages, slots: I32) -> None:
        """Write new keys and values [T, G, D] into pages on the device."""

    def attend(self, q: DeviceArray, pages: Pages, places: Places) -> DeviceArray:
        """Attend q [T, H, D] to pages on the device, which hold the new tokens already."""

    def peak_bytes(self) -> int | None:
        """Return the most bytes that its memory held at once; None if it cannot say."""

    def close(self) -> None:
        """Give back what the host's memory was pinned with; no lane is at work any more."""

    def head(self, hidden: F32) -> F32:
        """Return logits [R, V] of hidden states [R, hidden], both on the host."""

    def head_best(self, hidden: F32) -> tuple[F32, I32]:
        """Return the largest logit and its token, [R] each, the lowest among equals."""
