"""Pages of keys and values for attention to read, as the engine's KV cache lays them out."""

from __future__ import annotations

import numpy as np

from specmoeoff.offload.kv_cache import KvCache, KvSequence

NUM_KV_HEADS = 4
DTYPES = {
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
}


class Pages:
    """KV of one head size and dtype, for as many tokens as fit some megabytes in bfloat16."""

    page_size = 32

    def __init__(self, head_dim: int, kv_dtype: str, megabytes: int) -> None:
        self.num_pages = int(megabytes * 1e6 / (4 * NUM_KV_HEADS * head_dim) / self.page_size)
        kv = KvCache(1, NUM_KV_HEADS, head_dim, self.num_pages, kv_dtype, self.page_size)
        # As in the engine, memory is huge pages only where all of one is held.
        kv.reserve(KvSequence(), self.num_pages * self.page_size)
        self.fields = [*kv.layer(0), *kv.scales(0)]
        rng = np.random.default_rng(0)
        for field in self.fields:
            if field is not None:
                fill(field[:64], rng)
                for start in range(64, self.num_pages, 64):
                    field[start : start + 64] = field[: min(64, self.num_pages - start)]


def fill(field: np.ndarray, rng: np.random.Generator) -> None:
    """Fill an array with ordinary numbers that differ."""
    if field.dtype == np.uint16:  # the bits of bfloat16 numbers between 1/8 and 1/2
        field[...] = rng.integers(0x3E00, 0x3F00, field.shape, np.uint16)
    elif field.dtype == np.int8:
        field[...] = rng.integers(-127, 128, field.shape, np.int8)
    else:
        field[...] = rng.uniform(0.001, 0.01, field.shape)
