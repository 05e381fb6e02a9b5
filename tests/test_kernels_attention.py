"""Chunked attention: the native module against its specification.

Against ``reference`` a result is within the error bound of its order of summation. Between CPU
targets, splits of the queries, batch mates, thread counts and page sizes it is equal bit for bit.
All pages are NaN wherever no token that counts was written.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_cases import EPS, on_each_target, same_bits
from paged_kv import Problem, empty_pages, make_problem, problems
from specmoeoff import kernels

pytestmark = pytest.mark.usefixtures("kernel_settings")

RANGE = 1024


def largest_score_magnitude(problem: Problem) -> float:
    """Return the largest sum of |q| |k| behind any score, scaled."""
    largest, start = 0.0, 0
    group = problem.q.shape[1] // problem.keys[0].shape[1]
    for keys, n in zip(problem.keys, problem.num_queries, strict=True):
        q = np.abs(problem.q[start : start + n]).astype(np.float64)
        k = np.repeat(np.abs(keys), group, axis=1)
        start += n
        largest = max(largest, float(np.einsum("nhd,thd->nht", q, k).max(initial=0)))
    return problem.scale * largest


def bound(problem: Problem) -> float:
    """Most that an output can be off.

    A score is off by its additions times the magnitude of what is added, a probability by twice
    that (relative), the weighted sum of values by its additions in a row on top.
    """
    additions = min(max(problem.lens), RANGE) + max(problem.lens) // RANGE + 32
    score = (problem.q.shape[2] + 4) * EPS * largest_score_magnitude(problem)
    score += 8 * EPS * problem.options.get("softcap", 0.0)
    largest_v = max(float(np.abs(v).max(initial=0)) for v in problem.values)
    return (2 * score + additions * EPS) * largest_v + 1e-30


def check(problem: Problem) -> None:
    result = on_each_target(problem.attend)
    np.testing.assert_allclose(result, problem.expected(), rtol=0, atol=bound(problem))


@settings(max_examples=120)
@given(problems(["bfloat16", "float32"]))
def test_is_the_reference_on_every_target(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize("head_dim", [96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_large_heads(head_dim: int, dtype: str) -> None:
    check(make_problem([77, 64], [3, 1], head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("head_dim", [32, 80, 96])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiles_of_every_height(dtype: str, head_dim: int) -> None:
    """One row to thirteen: every size of tile alone, and two or three of them."""
    rows = range(1, 14)
    lens = [130 + 40 * n for n in rows]
    check(make_problem(lens, rows, num_heads=1, num_kv_heads=1, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 1100}, {"sliding_window": 70}])
def test_long_contexts_are_combined_from_ranges(options: dict[str, Any]) -> None:
    check(
        make_problem(
            [3 * RANGE + 5, RANGE, RANGE + 1, 9],
            [2, 1, 3, 1],
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            **options,
        )
    )


def test_a_prompt_of_many_tiles() -> None:
    check(make_problem([300, 1100], [300, 150], num_heads=2, num_kv_heads=1, head_dim=8))


def test_extreme_scores_and_values() -> None:
    problem = make_problem([200], [4], spread=1e4)
    problem.keys[0][50] = 1e4
    problem.values[0][60:90] = 1e-40  # denormal in float32, zero or denormal in bfloat16
    result = on_each_target(problem.attend)
    # The largest score of each row stands far above the others, so rounding cannot swap them.
    np.testing.assert_allclose(result, problem.expected(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("step", [-6.0, 0.1, 3.0, 5.5, 7.0, 40.0])
def test_scores_that_rise_from_block_to_block(step: float) -> None:
    """The reference of the probabilities moves at once, after some blocks, or not at all."""
    problem = make_problem([1100], [3], num_heads=2, num_kv_heads=1, head_dim=16, spread=0.1)
    problem.q[:, :, 0] = 1.0
    block = np.arange(1100) // 128
    problem.keys[0][:, 0, 0] = step * block / problem.scale
    check(problem)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 40, "softcap": 3.0}])
@pytest.mark.parametrize("length", [200, 263, 1100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bits_do_not_depend_on_how_the_queries_are_split(
    length: int, dtype: str, options: dict[str, Any]
) -> None:
    problem = make_problem([length], [200], num_heads=6, dtype=dtype, head_dim=40, **options)
    whole = problem.attend()
    for sizes in ([1] * 200, [5] * 40, [64, 64, 64, 8], [199, 1], [1, 150, 49]):
        assert same_bits(problem.in_parts(sizes), whole), sizes[:4]


@given(
    lens=st.lists(st.integers(8, 1500), min_size=1, max_size=7),
    threads=st.sampled_from([1, 2, 3, 5]),
    page_size=st.sampled_from([16, 32, 48, 64, 128]),
    head_dim=st.sampled_from([24, 32, 64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30)
def test_bits_do_not_depend_on_batch_threads_or_pages(
    lens: list[int], threads: int, page_size: int, head_dim: int, seed: int
) -> None:
    num_queries = [(7 * i + seed) % 8 + 1 for i in range(len(lens))]
    together = make_problem(lens, num_queries, head_dim=head_dim, seed=seed, page_size=page_size)
    kernels.set_num_threads(threads)
    batch = together.attend(seed)
    kernels.set_num_threads(1)
    assert same_bits(together.one_by_one(page_size=32), batch)


def test_a_chain_is_a_tree_and_a_branch_is_a_chain() -> None:
    problem = make_problem([90], [6])
    chain = problem.with_options(
        tree_mask=np.array([2 ** (i + 1) - 1 for i in range(6)], np.uint64)
    )
    assert same_bits(chain.attend(), problem.attend())


def test_hidden_tokens_contribute_nothing_whatever_they_hold() -> None:
    # Two branches below one root: 0-1-2 and 0-3-4. The second one is garbage.
    bits = np.array([0b00001, 0b00011, 0b00111, 0b01001, 0b11001], np.uint64)
    problem = make_problem([100], [5], tree_mask=bits)
    clean = problem.attend()
    for garbage in (np.nan, np.inf, -np.inf):
        dirty = make_problem([100], [5], tree_mask=bits)
        dirty.keys[0][98:] = garbage
        dirty.values[0][98:] = garbage
        result = on_each_target(dirty.attend)
        assert same_bits(result[:3], clean[:3])
        assert np.isnan(result[3:]).all()


def test_a_query_that_sees_nothing() -> None:
    nothing = make_problem([3], [3], tree_mask=np.array([1, 0, 4], np.uint64))
    assert np.isnan(on_each_target(nothing.attend)[1]).all()
    sinks = np.zeros(4, np.float32)
    assert (on_each_target(nothing.with_options(sinks=sinks).attend)[1] == 0).all()


def test_no_queries_at_all() -> None:
    assert make_problem([0, 17], [0, 0]).attend().shape == (0, 4, 24)
    empty = (np.zeros((0, 4), np.int32), np.zeros(1, np.int32), np.zeros(0, np.int32))
    pages = empty_pages(1, 2, 24, 32, "bfloat16")
    assert (
        kernels.chunked_attention(np.zeros((0, 4, 24), np.float32), *pages, *empty, 1.0).size == 0
    )


def test_out_is_filled_and_returned() -> None:
    problem = make_problem([40], [2])
    out = np.full_like(problem.q, np.nan)
    result = kernels.chunked_attention(*problem.arguments(), problem.scale, out=out)
    assert result is out
    assert same_bits(out, problem.attend())


def test_two_python_threads_at_once() -> None:
    cases = [make_problem([300, 1200], [5, 3], seed=1), make_problem([77], [60], seed=2)]
    wanted = [case.attend() for case in cases]
    right: list[bool] = []

    def work(i: int) -> None:
        arguments = cases[i].arguments()
        results = [kernels.chunked_attention(*arguments, cases[i].scale) for _ in range(20)]
        right.extend(same_bits(result, wanted[i]) for result in results)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 80


def broken(**changes: Any) -> dict[str, Any]:
    """Return good arguments of chunked_attention with some replaced."""
    names = ["q", "k_pages", "v_pages", "page_tables", "q_offsets", "kv_lens"]
    problem = make_problem([40, 7], [2, 3])
    good = dict(zip(names, problem.arguments(), strict=True))
    edited = {k: v(good[k]) if callable(v) else v for k, v in changes.items()}
    return {**good, "scale": 1.0, **edited}


BAD = [
    ("q", TypeError, {"q": lambda a: a.astype(np.float64)}),
    ("q", ValueError, {"q": lambda a: a[:, :, ::2]}),
    ("q", ValueError, {"q": lambda a: a[0]}),
    ("q", ValueError, {"q": lambda a: np.ascontiguousarray(a[:, :3])}),
    ("q", ValueError, {"q": lambda a: np.ascontiguousarray(a[:, :, :8])}),
    ("k_pages", TypeError, {"k_pages": lambda a: a.astype(np.int32)}),
    ("k_pages", ValueError, {"k_pages": lambda a: a[:, :, ::2]}),
    ("v_pages", TypeError, {"v_pages": lambda a: a.astype(np.float32)}),
    ("v_pages", ValueError, {"v_pages": lambda a: a[:1]}),
    ("page_tables", TypeError, {"page_tables": lambda a: a.astype(np.int64)}),
    ("page_tables", ValueError, {"page_tables": lambda a: a[:1]}),
    ("page_tables", ValueError, {"page_tables": lambda a: np.ascontiguousarray(a[:, :1])}),
    ("page_tables", ValueError, {"page_tables": lambda a: a + 99}),
    ("page_tables", ValueError, {"page_tables": lambda a: a - 99}),
    ("q_offsets", ValueError, {"q_offsets": lambda a: a[:2]}),
    ("q_offsets", ValueError, {"q_offsets": lambda a: a + 1}),
    ("q_offsets", ValueError, {"q_offsets": np.array([0, 6, 5], np.int32)}),
    ("q_offsets", ValueError, {"q_offsets": np.array([0, 2, 4], np.int32)}),
    ("q_offsets", ValueError, {"q_offsets": np.array([0, 2, 900], np.int32)}),
    ("kv_lens", ValueError, {"kv_lens": np.array([40, 2], np.int32)}),
    ("kv_lens", ValueError, {"kv_lens": np.array([-1, 7], np.int32)}),
    ("kv_lens", TypeError, {"kv_lens": [40, 7]}),
    ("scale", ValueError, {"scale": float("nan")}),
    ("sliding_window", ValueError, {"sliding_window": -1}),
    ("softcap", ValueError, {"softcap": -1.0}),
    ("sinks", TypeError, {"sinks": np.zeros(4)}),
    ("sinks", ValueError, {"sinks": np.zeros(3, np.float32)}),
    ("tree_mask", TypeError, {"tree_mask": np.zeros(5, np.int64)}),
    ("tree_mask", ValueError, {"tree_mask": np.zeros(4, np.uint64)}),
    ("out", TypeError, {"out": np.zeros((5, 4, 24))}),
    ("out", ValueError, {"out": np.zeros((4, 4, 24), np.float32)}),
]


@pytest.mark.parametrize(("name", "error", "changes"), BAD)
def test_a_wrong_argument_is_named(
    name: str, error: type[Exception], changes: dict[str, Any]
) -> None:
    with pytest.raises(error, match=name):
        kernels.chunked_attention(**broken(**changes))


def test_pages_of_an_odd_size_are_refused() -> None:
    arguments = broken(k_pages=np.zeros((2, 2, 24, 20), np.uint16))
    arguments["v_pages"] = np.zeros((2, 2, 20, 24), np.uint16)
    with pytest.raises(ValueError, match="k_pages has pages of 20 tokens"):
        kernels.chunked_attention(**arguments)


def test_a_tree_has_at_most_64_nodes() -> None:
    problem = make_problem([70], [65], tree_mask=np.ones(65, np.uint64))
    with pytest.raises(ValueError, match="tree_mask"):
        problem.attend()
