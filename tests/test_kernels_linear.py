"""Products, experts and row kernels: the native module against its specification.

Two kinds of claim. Against ``reference`` a result is within the error bound of its order of
summation. Between CPU targets, row counts, thread counts and neighbours it is equal bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_cases import (
    EPS,
    expert_ffn_in_turn,
    make_experts,
    make_weight,
    on_each_target,
    route_rows,
    same_bits,
)
from specmoeoff import kernels
from specmoeoff.kernels import Int8Weight, reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from specmoeoff.kernels import Weight

pytestmark = pytest.mark.usefixtures("kernel_settings")

KINDS = ["float32", "float16", "bfloat16", "int8", "int8/8", "int8/32"]


def linear_bound(x: np.ndarray, weight: Weight) -> np.ndarray:
    """Most that a dot product can be off: additions in a row, plus the tree, scale and bias."""
    additions = -(-x.shape[1] // 16) + 4 + 3
    magnitude = np.abs(x).astype(np.float64) @ np.abs(reference.widen(weight)).astype(np.float64).T
    return additions * EPS * magnitude + 1e-30


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    n=st.integers(1, 40),
    k=st.one_of(st.integers(1, 100), st.sampled_from([576, 640])),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
)
def test_linear_is_the_reference_on_every_target(
    rows: int, n: int, k: int, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    weight, bias = make_weight(rng, n, k, kind), rng.standard_normal(n).astype(np.float32)
    got = on_each_target(lambda: kernels.linear(x, weight, bias))
    error = np.abs(got - reference.linear(x, weight, bias))
    assert (error <= linear_bound(x, weight) + EPS * np.abs(bias)).all()


def test_linear_sums_in_the_documented_order() -> None:
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((2, 1, 53)).astype(np.float32)
    lanes = np.zeros(16, np.float64)
    for k in range(53):
        # One rounding per step: the product of two float32 is exact in float64.
        lanes[k % 16] = np.float32(lanes[k % 16] + np.float64(x[0, k]) * np.float64(w[0, k]))
    sums = lanes.astype(np.float32)
    for width in (8, 4, 2, 1):
        sums = sums[:width] + sums[width : 2 * width]
    assert on_each_target(lambda: kernels.linear(x, w))[0, 0] == sums[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("most_rows", "k"), [(700, 800), (30, 2144)])
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(
    kind: str, most_rows: int, k: int
) -> None:
    rng = np.random.default_rng(2)
    # Enough rows for several chunks and blocks, enough columns for several pieces; K so long that
    # few rows are walked differently.
    x = rng.standard_normal((most_rows, k)).astype(np.float32)
    weight = make_weight(rng, 70, k, kind)
    whole = kernels.linear(x, weight)
    for rows in (1, 2, 5, 6, 7, 25, 331):
        kernels.set_num_threads(1 + rows % 3)
        assert same_bits(kernels.linear(x[:rows], weight), whole[:rows])
    assert same_bits(kernels.linear(x[-9:-8], weight), whole[-9:-8])


@pytest.mark.parametrize("kind", KINDS)
def test_linear_reads_nothing_outside_its_operands(kind: str) -> None:
    rng = np.random.default_rng(3)
    k, n = 40, 9
    weight = make_weight(rng, n, k, kind)
    values = weight.values if isinstance(weight, Int8Weight) else weight
    # Rows lie at an odd place in a buffer, NaN (or the largest int8) all around them.
    buffer = np.full(values.nbytes + 256, 0x7F, np.uint8)
    start = 64 + max(values.itemsize, 1)
    view = buffer[start : start + values.nbytes].view(values.dtype).reshape(n, k)
    view[...] = values
    inner = Int8Weight(view, weight.scales) if isinstance(weight, Int8Weight) else view
    big = np.full((12, k), np.nan, np.float32)
    big[4:8] = rng.standard_normal((4, k))
    got = on_each_target(lambda: kernels.linear(big[4:8], inner))
    assert same_bits(got, kernels.linear(big[4:8].copy(), weight))
    assert np.isfinite(got).all()


def test_linear_writes_where_it_is_told() -> None:
    x, w = np.ones((2, 3), np.float32), np.full((4, 3), 2, np.float32)
    out = np.zeros((2, 4), np.float32)
    assert kernels.linear(x, w, out=out) is out
    assert (out == 6).all()


def test_special_values_stay_in_their_row_and_column() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((7, 33)).astype(np.float32)
    w = rng.standard_normal((6, 33)).astype(np.float32)
    x[2, 5], w[3, 32] = np.nan, np.inf
    got = on_each_target(lambda: kernels.linear(x, w))
    assert np.isnan(got[2]).all()
    assert np.isinf(np.delete(got[:, 3], 2)).all()
    assert np.isfinite(np.delete(np.delete(got, 2, 0), 3, 1)).all()


def test_float16_widens_exactly_whatever_the_bits() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits[~np.isnan(bits.view(np.float16))].view(np.float16).reshape(1, -1)
    got = on_each_target(lambda: kernels.widen(halves))
    assert same_bits(got, halves.astype(np.float32))


# --- experts -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 30),
    k=st.integers(1, 70),
    inner=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_experts_are_the_reference_on_every_target(
    num_rows: int, k: int, inner: int, kind: str, shares: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = [round(share * num_rows) for share in shares]
    experts = make_experts(rng, len(counts), k, inner, kind)
    x = (rng.standard_normal((num_rows, k)) / np.sqrt(k)).astype(np.float32)
    routing = route_rows(rng, num_rows, counts)

    def run(ffn: Callable[..., None]) -> np.ndarray:
        out = np.ones((num_rows, k), np.float32)
        ffn(x, experts, *routing, out)
        return out

    got = on_each_target(lambda: run(kernels.expert_ffn_many))
    want = run(reference.expert_ffn_many)
    # Errors of two products in a row; values here are of the order of sqrt(inner) per expert.
    tolerance = 8 * EPS * (k + inner + 32) * len(counts)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("num_rows", "k", "inner"), [(5, 64, 96), (300, 96, 64), (700, 720, 48)])
def test_many_experts_equal_one_after_the_other(num_rows: int, k: int, inner: int) -> None:
    rng = np.random.default_rng(5)
    counts = [num_rows, 0, 1, num_rows // 2, num_rows]
    experts = make_experts(rng, len(counts), k, inner, "bfloat16")
    x = rng.standard_normal((num_rows, k)).astype(np.float32)
    routing = route_rows(rng, num_rows, counts)
    together, in_turn = np.zeros_like(x), np.zeros_like(x)
    kernels.set_num_threads(3)
    kernels.expert_ffn_many(x, experts, *routing, together)
    kernels.set_num_threads(1)
    expert_ffn_in_turn(x, experts, *routing, in_turn)
    assert same_bits(together, in_turn)


def test_an_expert_works_on_all_rows_by_default() -> None:
    rng = np.random.default_rng(6)
    (expert,) = make_experts(rng, 1, 48, 80, "bfloat16")
    x = rng.standard_normal((9, 48)).astype(np.float32)
    plain, listed = np.zeros_like(x), np.zeros_like(x)
    kernels.expert_ffn(x, *expert, plain)
    kernels.expert_ffn(x, *expert, listed, np.arange(9, dtype=np.int32), np.ones(9, np.float32))
    assert same_bits(plain, listed)
    alone = np.zeros_like(x[:1])
    kernels.expert_ffn(x[4:5].copy(), *expert, alone)
    assert same_bits(alone[0], plain[4])


def test_swiglu_takes_extreme_activations() -> None:
    gate = np.array([-1e30, -200.0, -100.0, -0.0, 1e-40, 88.0, 1e30], np.float32)[:, None]
    one = np.ones((len(gate), 1), np.float32)
    x = np.ones((1, 1), np.float32)

    def run() -> np.ndarray:
        out = np.zeros((1, 1), np.float32)
        kernels.expert_ffn(x, gate, one, np.ones((1, len(gate)), np.float32), out)
        return out

    got = on_each_target(run)
    assert got[0, 0] == np.float32(1e30)


def test_no_experts_and_no_rows_change_nothing() -> None:
    x = np.ones((2, 16), np.float32)
    out = np.full((2, 16), 3, np.float32)
    none, nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    kernels.expert_ffn_many(x, [], np.zeros(1, np.int32), none, nothing, out)
    w = np.ones((16, 16), np.float32)
    kernels.expert_ffn(x, w, w, w, out, none, nothing)
    assert (out == 3).all()


# --- row kernels ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 9),
    k=st.integers(1, 90),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e15]),
    seed=st.integers(0, 2**16),
)
def test_rms_norm(rows: int, k: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, k)) * scale).astype(np.float32)
    weight = rng.standard_normal(k).astype(np.float32)
    got = on_each_target(lambda: kernels.rms_norm(x, weight, 1e-5))
    want = reference.rms_norm(x, weight, 1e-5)
    np.testing.assert_allclose(got, want, rtol=EPS * (k / 16 + 10), atol=1e-37)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 5),
    heads=st.integers(1, 4),
    half=st.integers(0, 40),
    rest=st.integers(0, 20),
    seed=st.integers(0, 2**16),
)
def test_rope_is_exact(rows: int, heads: int, half: int, rest: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, heads, max(1, 2 * half + rest))).astype(np.float32)
    cos, sin = rng.standard_normal((2, rows, half)).astype(np.float32)

    def run(rope: Callable[..., None]) -> np.ndarray:
        y = x.copy()
        rope(y, cos, sin)
        return y

    assert same_bits(on_each_target(lambda: run(kernels.rope)), run(reference.rope))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 6),
    experts=st.integers(1, 70),
    top_k=st.integers(1, 70),
    spread=st.sampled_from([0.0, 1.0, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_route(rows: int, experts: int, top_k: int, spread: float, seed: int) -> None:
    top_k = min(top_k, experts)
    rng = np.random.default_rng(seed)
    # Few distinct values, so that there are ties.
    logits = (rng.integers(-4, 5, (rows, experts)) * spread).astype(np.float32)
    weights = on_each_target(lambda: kernels.route(logits, top_k)[1])
    ids = kernels.route(logits, top_k)[0]
    want_ids, want_weights = reference.route(logits, top_k)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=EPS * (experts + 8), atol=1e-37)


def test_route_survives_nan_and_infinity() -> None:
    logits = np.array([[np.nan] * 4, [1.0, np.nan, -np.inf, 2.0]], np.float32)
    ids, _ = kernels.route(logits, 4)
    assert sorted(ids[0]) == sorted(ids[1]) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [8, 96, 1056])
def test_widen_and_embedding_are_exact(kind: str, k: int) -> None:
    rng = np.random.default_rng(7)
    weight = make_weight(rng, 50, k, kind)
    want = reference.widen(weight)
    assert same_bits(on_each_target(lambda: kernels.widen(weight)), want)
    ids = rng.integers(0, 50, 70).astype(np.int32)
    assert same_bits(on_each_target(lambda: kernels.embedding(ids, weight)), want[ids])


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [None, 32, 96, 4])
def test_quantize_is_exact(kind: str, group: int | None) -> None:
    rng = np.random.default_rng(8)
    weight = make_weight(rng, 21, 192, kind)
    assert not isinstance(weight, Int8Weight)
    weight[3] = 0
    want = reference.quantize_int8(weight, group)
    scales = on_each_target(lambda: kernels.quantize_int8(weight, group).scales)
    values = on_each_target(lambda: kernels.quantize_int8(weight, group).values)
    assert same_bits(scales, want.scales)
    assert same_bits(values, want.values)


def test_to_bfloat16_rounds_every_way_there_is() -> None:
    high = np.arange(0, 1 << 16, 7, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (high[:, None] | low).view(np.float32)
    assert same_bits(on_each_target(lambda: kernels.to_bfloat16(x)), reference.to_bfloat16(x))


# --- refusals ------------------------------------------------------------------------------------

X = np.ones((2, 16), np.float32)
W = np.ones((4, 16), np.float32)
SQUARE = np.ones((16, 16), np.float32)
IDS = np.zeros(2, np.int32)
READ_ONLY = np.zeros((2, 4), np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: kernels.linear(X.astype(np.float64), W), TypeError, "x must be .* float32"),
        (lambda: kernels.linear(X, W.astype(np.int32)), TypeError, "weight must be"),
        (lambda: kernels.linear(X, [[1.0]], out=X), TypeError, "weight must be"),  # type: ignore[arg-type]
        (lambda: kernels.linear(X[:, :8], W), ValueError, "x must be C-contiguous"),
        (lambda: kernels.linear(X, W[:, ::2]), ValueError, "weight must be C-contiguous"),
        (lambda: kernels.linear(X, W[:, :15].copy()), ValueError, "x has shape"),
        (lambda: kernels.linear(X[0], W), ValueError, "x has 1 dimensions"),
        (lambda: kernels.linear(X, W[0]), ValueError, "weight has 1 dimensions"),
        (lambda: kernels.linear(X, W, bias=X[0, :3].copy()), ValueError, "bias has shape"),
        (lambda: kernels.linear(X, W, out=X), ValueError, "out has shape"),
        (lambda: kernels.linear(X, W, out=READ_ONLY), ValueError, "out is read-only"),
        (lambda: kernels.linear(X, W[:, :0]), ValueError, "weight"),
        (
            lambda: kernels.linear(X, Int8Weight(W.astype(np.int8), np.ones((4, 3), np.float32))),
            ValueError,
            "weight.scales",
        ),
        (
            lambda: kernels.linear(X, Int8Weight(W, np.ones((4, 1), np.float32))),  # type: ignore[arg-type]
            TypeError,
            "weight.values",
        ),
        (lambda: kernels.embedding(IDS + 4, W), ValueError, "token_ids has 4"),
        (lambda: kernels.embedding(IDS - 1, W), ValueError, "token_ids has -1"),
        (lambda: kernels.embedding(IDS.astype(np.int64), W), TypeError, "token_ids"),
        (lambda: kernels.rms_norm(X, X[0, :8].copy(), 1e-5), ValueError, "weight has shape"),
        (lambda: kernels.rope(X.reshape(2, 2, 8), X, X), ValueError, "cos"),
        (lambda: kernels.rope(X.reshape(2, 2, 8), X[:1], X[:1]), ValueError, "cos has shape"),
        (lambda: kernels.route(X, 17), ValueError, "top_k is 17"),
        (lambda: kernels.route(X, 0), ValueError, "top_k is 0"),
        (lambda: kernels.quantize_int8(W, 5), ValueError, "group is 5"),
        (lambda: kernels.expert_ffn(X, W, W, W, X.copy()), ValueError, "down has shape"),
        (lambda: kernels.expert_ffn(X, W, SQUARE, W.T.copy(), X.copy()), ValueError, "up has"),
        (lambda: kernels.expert_ffn(X, SQUARE, SQUARE, SQUARE, X), ValueError, "out overlaps x"),
        (
            lambda: kernels.expert_ffn(X, SQUARE, SQUARE, SQUARE, X.copy(), IDS),
            ValueError,
            "rows has 0 twice",
        ),
        (
            lambda: kernels.expert_ffn(X, SQUARE, SQUARE, SQUARE, X.copy(), IDS[:1] + 2),
            ValueError,
            "rows has 2",
        ),
        (
            lambda: kernels.expert_ffn(X, SQUARE, SQUARE, SQUARE, X.copy(), IDS[:1], X[0]),
            ValueError,
            "row_weights has shape",
        ),
        (
            lambda: kernels.expert_ffn_many(
                X, [(SQUARE, SQUARE)], IDS, IDS, X[0, :2].copy(), X.copy()
            ),  # type: ignore[list-item]
            TypeError,
            r"experts\[0\]",
        ),
        (
            lambda: kernels.expert_ffn_many(
                X, [(SQUARE, SQUARE, SQUARE)], IDS + 3, IDS, X[0, :2].copy(), X.copy()
            ),
            ValueError,
            "offsets must rise",
        ),
        (lambda: kernels.use_cpu_target("pentium"), ValueError, "pentium"),
        (lambda: kernels.set_num_threads(0), ValueError, "n must be"),
    ],
)
def test_wrong_arguments_are_named(
    call: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 30),
    depth=st.integers(1, 90),
    columns=st.lists(st.integers(0, 90), min_size=1, max_size=10),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=2),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_many_products_of_one_input_are_those_one_by_one(
    rows: int, depth: int, columns: list[int], kinds: list[str], threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, depth)).astype(np.float32)
    weights = [make_weight(rng, n, depth, kinds[i % len(kinds)]) for i, n in enumerate(columns)]
    biases = [
        rng.standard_normal(n).astype(np.float32) if i % 2 else None for i, n in enumerate(columns)
    ]
    kernels.set_num_threads(threads)
    for activations in ("float32", "bfloat16"):
        got = kernels.linear_many(x, weights, biases, activations=activations)
        for out, weight, bias in zip(got, weights, biases, strict=True):
            assert same_bits(out, kernels.linear(x, weight, bias, activations=activations))


def test_operands_of_different_length_are_named() -> None:
    x = np.ones((2, 8), np.float32)
    weights = [np.ones((3, 8), np.float32), np.ones((3, 9), np.float32)]
    with pytest.raises(ValueError, match="x has shape"):
        kernels.linear_many(x, weights, [None, None])
    with pytest.raises(ValueError, match=r"biases\[1\] has shape"):
        kernels.linear_many(x, [weights[0], weights[0]], [None, np.ones(4, np.float32)])
