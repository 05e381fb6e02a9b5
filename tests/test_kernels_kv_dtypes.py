"""KV in float16 and int8: the same guarantees as bfloat16 and float32 have.

Against ``reference`` a result is within the error bound of its order of summation; int8 is taken
as it was stored, so its rounding is no part of the error. Between CPU targets, splits of the
queries, batch mates, thread counts and page sizes it is equal bit for bit. Pages are NaN wherever
no token that counts was written (int8: 127 with a scale of NaN).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_cases import EPS, on_each_target, same_bits
from paged_kv import Problem, make_problem, problems
from specmoeoff import kernels

pytestmark = pytest.mark.usefixtures("kernel_settings")

RANGE = 1024
DTYPES = ["float16", "int8"]


def bound(problem: Problem) -> float:
    """Most that an output can be off; see ``test_kernels_attention.bound``.

    Three more roundings of a score and of a probability: those of the scales.
    """
    additions = min(max(problem.lens), RANGE) + max(problem.lens) // RANGE + 32
    largest_k = max(float(np.abs(k).sum(axis=2).max(initial=0)) for k in problem.keys)
    largest_v = max(float(np.abs(v).max(initial=0)) for v in problem.values)
    score = (problem.q.shape[2] + 8) * EPS * problem.scale
    score *= float(np.abs(problem.q).max(initial=0)) * 1.01 * largest_k
    score += 8 * EPS * problem.options.get("softcap", 0.0)
    return (2 * score + (additions + 4) * EPS) * 1.01 * largest_v + 1e-30


def check(problem: Problem) -> None:
    result = on_each_target(problem.attend)
    np.testing.assert_allclose(result, problem.expected(), rtol=0, atol=bound(problem))


@settings(max_examples=80)
@given(problems(DTYPES))
def test_is_the_reference_on_every_target(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize("head_dim", [96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_heads(head_dim: int, dtype: str) -> None:
    check(make_problem([77, 64], [3, 1], head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("head_dim", [32, 80, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_every_height(dtype: str, head_dim: int) -> None:
    """One row to thirteen: every size of tile alone, and two or three of them."""
    rows = range(1, 14)
    lens = [130 + 40 * n for n in rows]
    check(make_problem(lens, rows, num_heads=1, num_kv_heads=1, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 1100}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_are_combined_from_ranges(dtype: str, options: dict[str, Any]) -> None:
    lens, num_queries = [2 * RANGE + 5, RANGE, RANGE + 1, 9], [2, 1, 3, 1]
    shape = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    check(make_problem(lens, num_queries, **shape, dtype=dtype, **options))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 40, "softcap": 3.0}])
@pytest.mark.parametrize("length", [200, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_how_the_queries_are_split(
    length: int, dtype: str, options: dict[str, Any]
) -> None:
    problem = make_problem([length], [200], num_heads=6, dtype=dtype, head_dim=48, **options)
    whole = problem.attend()
    for sizes in ([1] * 200, [5] * 40, [64, 64, 64, 8], [1, 150, 49]):
        assert same_bits(problem.in_parts(sizes), whole), sizes[:4]


@given(
    lens=st.lists(st.integers(8, 1500), min_size=1, max_size=5),
    threads=st.sampled_from([1, 2, 3, 5]),
    page_size=st.sampled_from([16, 32, 48, 64, 128]),
    head_dim=st.sampled_from([24, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_bits_do_not_depend_on_batch_threads_or_pages(
    lens: list[int], threads: int, page_size: int, head_dim: int, dtype: str, seed: int
) -> None:
    num_queries = [(7 * i + seed) % 8 + 1 for i in range(len(lens))]
    together = make_problem(
        lens, num_queries, head_dim=head_dim, seed=seed, page_size=page_size, dtype=dtype
    )
    kernels.set_num_threads(threads)
    batch = together.attend(seed)
    kernels.set_num_threads(1)
    assert same_bits(together.one_by_one(page_size=32), batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_tokens_contribute_nothing_whatever_they_hold(dtype: str) -> None:
    # Two branches below one root: 0-1-2 and 0-3-4. The second one is garbage.
    bits = np.array([0b00001, 0b00011, 0b00111, 0b01001, 0b11001], np.uint64)
    problem = make_problem([100], [5], tree_mask=bits, dtype=dtype)
    clean = problem.attend()
    for garbage in (np.nan, np.inf, -np.inf):
        dirty = make_problem([100], [5], tree_mask=bits, dtype=dtype)
        dirty.keys[0][98:] = garbage
        dirty.values[0][98:] = garbage
        with np.errstate(invalid="ignore"):
            result = on_each_target(dirty.attend)
        assert same_bits(result[:3], clean[:3])
        assert np.isnan(result[3:]).all()


def test_int8_is_as_near_as_eight_bits_allow() -> None:
    exact = make_problem([300], [4], head_dim=64, dtype="float32")
    off = np.abs(replace(exact, dtype="int8").attend() - exact.attend()).max()
    step = max(float(np.abs(v).max()) for v in exact.values) / 127
    assert 0 < off < step


def arguments(dtype: str) -> dict[str, Any]:
    """Return good arguments of chunked_attention."""
    names = ["q", "k_pages", "v_pages", "page_tables", "q_offsets", "kv_lens"]
    problem = make_problem([40, 7], [2, 3], dtype=dtype)
    good = dict(zip(names, problem.arguments(), strict=True))
    return {**good, "scale": 1.0, **problem.scales()}


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (ValueError, lambda scales: None),
        (TypeError, lambda scales: scales.astype(np.float64)),
        (ValueError, lambda scales: scales[:1]),
        (ValueError, lambda scales: scales[:, :1]),
        (ValueError, lambda scales: scales[:, :, ::2]),
    ],
)
@pytest.mark.parametrize("name", ["k_scales", "v_scales"])
def test_wrong_scales_are_named(name: str, error: type[Exception], change: Any) -> None:
    good = arguments("int8")
    kernels.chunked_attention(**good)
    with pytest.raises(error, match=name):
        kernels.chunked_attention(**{**good, name: change(good[name])})


def test_scales_go_with_int8_alone() -> None:
    scales = {"k_scales": arguments("int8")["k_scales"]}
    with pytest.raises(ValueError, match="k_scales goes with pages of int8"):
        kernels.chunked_attention(**{**arguments("float16"), **scales})
