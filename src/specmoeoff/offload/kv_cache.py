"""A paged KV cache that is resident only where sequences are.

A page is a record of P tokens through all layers: [layer][K: G, D, P][V: G, P, D], with int8
followed by the scales of K and of V, float32 [G, P] each. Pages are handed out lowest first, so the
cache ends at a high-water mark, and what lies above it costs nothing. A sequence's interface is
append, truncate and free; truncation moves a number, nothing else.

Knows tokens by count only. Whether memory may grow is asked of a callback, see elastic.py.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from specmoeoff.offload.arena import Arena, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)

_DTYPES: dict[str, np.dtype[np.generic]] = {
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
}
_SCALE = np.dtype(np.float32)


@dataclass
class KvSequence:
    """One sequence's part of the cache."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    """Tokens whose keys and values count; what lies after them in the pages is stale."""


class KvCache:
    """Keys and values of many sequences, for all layers of one model."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_pages: int,
        dtype: str = "bfloat16",
        page_size: int = 32,
    ) -> None:
        self.page_size = page_size
        self.max_pages = max_pages
        self.page_bytes = page_bytes(num_layers, num_kv_heads, head_dim, dtype, page_size)
        self._arena = Arena(max_pages * self.page_bytes)
        item = _DTYPES[dtype]
        records = self._arena.bytes[: max_pages * self.page_bytes].reshape(max_pages, -1)
        k_shape = (max_pages, num_kv_heads, head_dim, page_size)
        v_shape = (max_pages, num_kv_heads, page_size, head_dim)
        half_bytes = num_kv_heads * head_dim * page_size * item.itemsize
        scales_shape = (max_pages, num_kv_heads, page_size)
        scales_bytes = _scales_bytes(num_kv_heads, dtype, page_size)
        self._k = []
        self._v = []
        self._scales: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
        for layer in range(num_layers):
            at = 2 * layer * (half_bytes + scales_bytes)
            self._k.append(_field(records, at, item, k_shape))
            self._v.append(_field(records, at + half_bytes, item, v_shape))
            if scales_bytes:
                at += 2 * half_bytes
                k_scales = _field(records, at, _SCALE, scales_shape)
                v_scales = _field(records, at + scales_bytes, _SCALE, scales_shape)
                self._scales.append((k_scales, v_scales))
        self._free = list(range(max_pages))
        self.num_used = 0
        self.high_water = 0
        """Pages below this index are resident and count against the budget."""
        self.may_grow: Callable[[int], bool] = lambda num_pages: True
        """Asked before the high-water mark rises to ``num_pages``; False refuses."""

    def layer(self, layer: int) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
        """Return a layer's k_pages [max_pages, G, D, P] and v_pages [max_pages, G, P, D]."""
        return self._k[layer], self._v[layer]

    def scales(
        self, layer: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | tuple[None, None]:
        """Return a layer's k_scales and v_scales [max_pages, G, P] for int8, else None twice."""
        return self._scales[layer] if self._scales else (None, None)

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages hold ``num_tokens``."""
        return -(-num_tokens // self.page_size)

    def reserve(self, sequence: KvSequence, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` in all; False (and no change) if there is none."""
        missing = self.pages_for(num_tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        if missing > len(self._free):
            return False
        pages = [heapq.heappop(self._free) for _ in range(missing)]
        top = pages[-1] + 1
        granted = top <= self.high_water
        try:
            if not granted and self.may_grow(top):
                self._set_high_water(top)
                granted = True
        finally:
            # Refused, or whatever was raised: they are nobody's.
            if not granted:
                for page in pages:
                    heapq.heappush(self._free, page)
        if not granted:
            return False
        sequence.pages.extend(pages)
        self.num_used += missing
        return True

    def append(self, sequence: KvSequence, num_tokens: int) -> NDArray[np.int32]:
        """Count ``num_tokens`` more tokens and return their slots, int32 [num_tokens].

        Room must have been reserved.
        """
        positions = np.arange(sequence.length, sequence.length + num_tokens)
        pages = np.asarray(sequence.pages, np.int64)[positions // self.page_size]
        sequence.length += num_tokens
        return (pages * self.page_size + positions % self.page_size).astype(np.int32)

    def truncate(self, sequence: KvSequence, length: int) -> None:
        """Forget the tokens after ``length``.

        They stay where they are: attention never reads past the length, and the next append
        overwrites them.
        """
        sequence.length = min(sequence.length, length)

    def free(self, sequence: KvSequence) -> None:
        """Give a sequence's pages back; memory above the new high-water mark is returned."""
        # Taken first: an interrupted call must not give a page back twice when it is repeated.
        pages, sequence.pages, sequence.length = sequence.pages, [], 0
        for page in pages:
            heapq.heappush(self._free, page)
        self.num_used -= len(pages)
        self._lower_high_water()

    def page_table(self, sequences: Sequence[KvSequence]) -> NDArray[np.int32]:
        """Return the sequences' pages, int32 [B, longest], padded with zeros."""
        longest = max((len(sequence.pages) for sequence in sequences), default=0)
        table = np.zeros((len(sequences), max(longest, 1)), np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        return table

    def _lower_high_water(self) -> None:
        free = set(self._free)
        top = self.high_water
        while top and top - 1 in free:
            top -= 1
        if top < self.high_water:
            self._set_high_water(top)

    def _set_high_water(self, num_pages: int) -> None:
        self._arena.hold(num_pages * self.page_bytes)
        self.high_water = num_pages


class KvLayers:
    """Some layers of a cache under numbers of their own: what a draft sees of its target's.

    Args:
        cache: The whole cache.
        layers: For each layer of the draft, the one of the cache that it reads and writes.
    """

    def __init__(self, cache: KvCache, layers: Sequence[int]) -> None:
        self._cache = cache
        self._layers = list(layers)
        self.append = cache.append
        self.page_table = cache.page_table

    def layer(self, layer: int) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
        """Return a layer's pages, as ``KvCache.layer``."""
        return self._cache.layer(self._layers[layer])

    def scales(
        self, layer: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | tuple[None, None]:
        """Return a layer's scales, as ``KvCache.scales``."""
        return self._cache.scales(self._layers[layer])


def page_bytes(
    num_layers: int, num_kv_heads: int, head_dim: int, dtype: str, page_size: int = 32
) -> int:
    """Return the bytes of one page record, rounded up to whole memory pages."""
    half = num_kv_heads * head_dim * page_size * _DTYPES[dtype].itemsize
    return round_up(2 * num_layers * (half + _scales_bytes(num_kv_heads, dtype, page_size)))


def _scales_bytes(num_kv_heads: int, dtype: str, page_size: int) -> int:
    """Return the bytes of K's scales in one layer of a page; V has as many."""
    return num_kv_heads * page_size * _SCALE.itemsize if dtype == "int8" else 0


def _field(
    records: NDArray[np.uint8], at: int, dtype: np.dtype[Scalar], shape: tuple[int, ...]
) -> NDArray[Scalar]:
    """View one field of every record as an array whose first stride is the record."""
    strides = [dtype.itemsize]
    for size in reversed(shape[2:]):
        strides.insert(0, strides[0] * size)
    return np.ndarray(shape, dtype, records, at, (records.strides[0], *strides))
