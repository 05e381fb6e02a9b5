"""Random attention problems over a paged KV cache whose unused parts are NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

from specmoeoff import kernels
from specmoeoff.kernels import reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.kernels.reference import Array


@dataclass(frozen=True)
class Problem:
    """The arguments of one chunked_attention call, and the keys and values behind its pages."""

    q: Array
    keys: list[Array]
    values: list[Array]
    lens: list[int]
    """Tokens of ``keys`` that count; the rest of the pages is NaN."""
    num_queries: list[int]
    page_size: int
    dtype: str
    options: dict[str, Any]
    scale: float

    def arguments(self, seed: int = 0) -> tuple[Array, ...]:
        """Return the positional arguments, pages in random order inside strided records."""
        return self._filled(seed)[0]

    def scales(self, seed: int = 0) -> dict[str, Array]:
        """Return k_scales and v_scales that go with them; nothing unless the dtype is int8."""
        return self._filled(seed)[1]

    def _filled(self, seed: int) -> tuple[tuple[Array, ...], dict[str, Array]]:
        heads, dim = self.keys[0].shape[1:]
        counts = [-(-length // self.page_size) for length in self.lens]
        k_pages, v_pages = empty_pages(sum(counts) + 2, heads, dim, self.page_size, self.dtype)
        scales = empty_scales(len(k_pages), heads, self.page_size, self.dtype)
        ids = np.random.default_rng(seed).permutation(len(k_pages)).astype(np.int32)
        tables = np.full((len(counts), max([*counts, 1])), -1, np.int32)
        at = 0
        for row, count, keys, values, length in zip(
            tables, counts, self.keys, self.values, self.lens, strict=True
        ):
            row[:count] = ids[at : at + count]
            at += count
            token = np.arange(length)
            slots = row[token // self.page_size] * self.page_size + token % self.page_size
            reference.append_kv(keys[:length], values[:length], k_pages, v_pages, slots, **scales)
        offsets = np.concatenate([[0], np.cumsum(self.num_queries)]).astype(np.int32)
        lens = np.array(self.lens, np.int32)
        return (self.q, k_pages, v_pages, tables, offsets, lens), scales

    def expected(self) -> Array:
        """Return what the specification says."""
        with np.errstate(invalid="ignore"):
            arguments, scales = self._filled(0)
            return reference.chunked_attention(*arguments, self.scale, **self.options, **scales)

    def attend(self, seed: int = 0) -> Array:
        """Return what the native module says."""
        arguments, scales = self._filled(seed)
        return kernels.chunked_attention(*arguments, self.scale, **self.options, **scales)

    def in_parts(self, sizes: Sequence[int]) -> Array:
        """Return what one sequence's queries give, so many at a time, each seeing what it may."""
        assert sum(sizes) == self.num_queries[0]
        outputs, done = [], 0
        for size in sizes:
            end = self.lens[0] - self.num_queries[0] + done + size
            q = self.q[done : done + size]
            outputs.append(replace(self, q=q, lens=[end], num_queries=[size]).attend())
            done += size
        return np.concatenate(outputs)

    def one_by_one(self, page_size: int) -> Array:
        """Return what its sequences give, each alone and in pages of another size."""
        outputs, start = [], 0
        for i, n in enumerate(self.num_queries):
            alone = replace(
                self,
                q=self.q[start : start + n],
                keys=self.keys[i : i + 1],
                values=self.values[i : i + 1],
                lens=self.lens[i : i + 1],
                num_queries=[n],
                page_size=page_size,
            )
            outputs.append(alone.attend())
            start += n
        return np.concatenate(outputs)

    def with_options(self, **options: Any) -> Problem:
        """Return the same problem with some options set."""
        return replace(self, options={**self.options, **options})


def empty_pages(
    num_pages: int, heads: int, dim: int, page_size: int, dtype: str
) -> tuple[Array, Array]:
    """Return k_pages and v_pages full of NaN (int8: 127), views into records that hold more."""
    half = heads * dim * page_size
    records = np.full((num_pages, 2 * half + 32), np.nan, np.float32)
    if dtype == "bfloat16":
        stored = reference.to_bfloat16(records)
    elif dtype == "int8":
        stored = np.full(records.shape, 127, np.int8)
    else:
        stored = records.astype(dtype)
    k_pages = stored[:, 16 : 16 + half].reshape(num_pages, heads, dim, page_size)
    v_pages = stored[:, 16 + half : -16].reshape(num_pages, heads, page_size, dim)
    assert np.shares_memory(k_pages, stored)
    assert np.shares_memory(v_pages, stored)
    return k_pages, v_pages


def empty_scales(num_pages: int, heads: int, page_size: int, dtype: str) -> dict[str, Array]:
    """Return k_scales and v_scales full of NaN, views into larger records, if the dtype is int8."""
    if dtype != "int8":
        return {}
    half = heads * page_size
    records = np.full((num_pages, 2 * half + 16), np.nan, np.float32)
    shape = (num_pages, heads, page_size)
    return {
        "k_scales": records[:, 16 : 16 + half].reshape(shape),
        "v_scales": records[:, 16 + half :].reshape(shape),
    }


def make_problem(
    lens: Sequence[int],
    num_queries: Sequence[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 24,
    page_size: int = 32,
    dtype: str = "bfloat16",
    spread: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Return a problem of random queries, keys and values; ``spread`` widens the scores."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    return Problem(
        q=normal(sum(num_queries), num_heads, head_dim) * np.float32(spread),
        keys=[normal(n, num_kv_heads, head_dim) for n in lens],
        values=[normal(n, num_kv_heads, head_dim) for n in lens],
        lens=list(lens),
        num_queries=list(num_queries),
        page_size=page_size,
        dtype=dtype,
        options=options,
        scale=head_dim**-0.5,
    )


@st.composite
def problems(draw: st.DrawFn, dtypes: Sequence[str]) -> Problem:
    """Draw problems of up to three sequences with any of the options."""
    lens, num_queries = [], []
    for _ in range(draw(st.integers(1, 3))):
        num_queries.append(draw(st.sampled_from([0, 1, 1, 2, 5, 16, 33])))
        lens.append(
            num_queries[-1] + draw(st.sampled_from([0, 1, 15, 31, 48, 63, 64, 65, 100, 150]))
        )
    num_kv_heads = draw(st.integers(1, 3))
    problem = make_problem(
        lens,
        num_queries,
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 3, 7])),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([1, 8, 16, 24, 32, 40, 48, 64, 80])),
        page_size=draw(st.sampled_from([16, 32, 48, 64])),
        dtype=draw(st.sampled_from(dtypes)),
        spread=draw(st.sampled_from([1.0, 1.0, 50.0, 1e-38])),
        seed=draw(st.integers(0, 2**16)),
    )
    if draw(st.booleans()) and max(num_queries) <= 16:
        problem = problem.with_options(tree_mask=random_tree_mask(num_queries, 5))
    if draw(st.booleans()):
        problem = problem.with_options(sliding_window=draw(st.sampled_from([1, 7, 64, 90])))
    if draw(st.booleans()):
        problem = problem.with_options(softcap=draw(st.sampled_from([0.5, 30.0])))
    if draw(st.booleans()):
        sinks = np.linspace(-30, 5, problem.q.shape[1]).astype(np.float32)
        problem = problem.with_options(sinks=sinks)
    return problem


def random_tree_mask(num_queries: Sequence[int], seed: int) -> Array:
    """Return ancestor bits of a random tree per sequence, every node seeing itself."""
    rng = np.random.default_rng(seed)
    masks = []
    for n in num_queries:
        rows: list[int] = []
        for node in range(n):
            parent = int(rng.integers(-1, node)) if node else -1
            rows.append((rows[parent] if parent >= 0 else 0) | 1 << node)
        masks.extend(rows)
    return np.array(masks, np.uint64)
