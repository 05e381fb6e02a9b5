"""Chunked attention's work in torch: n new tokens of each sequence against its whole KV.

torch has no paged KV: it gets contiguous keys and values for nothing, or gathers them from pages
first. Its kernel takes the n tokens at once with a mask, or one at a time without.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from specmoeoff import kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

NAMES = {
    "gathered": "bfloat16, pages gathered, then all tokens at once",
    "at_once": "bfloat16, all tokens at once",
    "one_by_one": "bfloat16, one token after the other",
    "at_once_f32": "float32, all tokens at once",
    "one_by_one_f32": "float32, one token after the other",
}


def times_in_torch(
    page_tables: np.ndarray,
    num_kv_heads: int,
    page_size: int,
    queries: int,
    group: int,
    head_dim: int,
) -> dict[str, float]:
    """Return seconds of each way in NAMES, the best of two runs after one that does not count."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(kernels.num_threads())
    batch, context = len(page_tables), page_tables.shape[1] * page_size
    shape = (batch, num_kv_heads, context, head_dim)
    mask = torch.ones(queries, context).tril(context - queries).bool()
    q = torch.ones(batch, num_kv_heads * group, queries, head_dim).bfloat16()
    tables = torch.from_numpy(page_tables).long()
    pages = torch.ones(int(page_tables.max()) + 1, num_kv_heads, page_size, head_dim).bfloat16()

    def at_once(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for i in range(queries):
            scaled_dot_product_attention(q[:, :, i : i + 1], k, v, enable_gqa=True)

    def gathered() -> None:
        k, v = (pages[tables].transpose(1, 2).reshape(shape) for _ in range(2))
        at_once(q, k, v)

    times = {"gathered": _best(gathered)}
    for suffix, dtype in (("", torch.bfloat16), ("_f32", torch.float32)):
        k, v = torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
        arguments = q.to(dtype), k, v
        times["at_once" + suffix] = _best(lambda a=arguments: at_once(*a))
        times["one_by_one" + suffix] = _best(lambda a=arguments: one_by_one(*a))
    return times


def _best(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
