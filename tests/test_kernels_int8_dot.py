"""Products of int8 with int8, for drafts: specified to the last bit, so compared to the last bit.

Only what passes through exp, the experts' SwiGLU, is compared within a bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_cases import EPS, expert_ffn_in_turn, on_each_target, route_rows, same_bits
from specmoeoff import kernels
from specmoeoff.kernels import Int8DotWeight, reference

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("kernel_settings")

Expert = tuple[Int8DotWeight, Int8DotWeight, Int8DotWeight]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    n=st.one_of(st.integers(1, 100), st.sampled_from([128, 144, 336])),
    k=st.one_of(st.integers(1, 100), st.sampled_from([576, 640])),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_linear_is_the_reference_bit_for_bit(
    rows: int, n: int, k: int, with_bias: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, weight = normal(rng, rows, k), normal(rng, n, k)
    bias = normal(rng, n) if with_bias else None
    packed = kernels.pack_int8_dot(weight)
    got = on_each_target(lambda: kernels.linear(x, packed, bias))
    assert same_bits(got, reference.linear(x, reference.pack_int8_dot(weight), bias))


def test_linear_is_near_the_product_without_rounding() -> None:
    rng = np.random.default_rng(1)
    x, weight = normal(rng, 20, 400), normal(rng, 100, 400)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    error = kernels.linear(x, kernels.pack_int8_dot(weight)) - exact
    assert np.sqrt((error**2).mean() / (exact**2).mean()) < 0.015


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 4), (50, 67), (33, 20000)])
def test_packing_is_the_reference(kind: str, n: int, k: int) -> None:
    rng = np.random.default_rng(2)
    weight = normal(rng, n, k)
    weight[n // 2] = 0
    if kind == "float16":
        weight = weight.astype(np.float16)
    elif kind == "bfloat16":
        weight = reference.to_bfloat16(weight)
    elif kind == "int8":
        weight = reference.quantize_int8(weight)
    want = reference.pack_int8_dot(weight)
    assert same_bits(on_each_target(lambda: kernels.pack_int8_dot(weight).packed), want.packed)
    assert same_bits(on_each_target(lambda: kernels.pack_int8_dot(weight).scales), want.scales)
    assert kernels.pack_int8_dot(weight).shape == (n, k)


def test_packing_keeps_the_values_of_quantize_int8() -> None:
    weight = normal(np.random.default_rng(3), 50, 67)
    packed = kernels.pack_int8_dot(weight)
    assert same_bits(kernels.widen(packed), kernels.widen(kernels.quantize_int8(weight)))
    assert packed.nbytes == kernels.packed_int8_bytes(50, 67) == 64 * 68 + 4 * 50
    assert kernels.pack_int8_dot(packed) is packed


def test_widen_and_embedding_are_the_reference() -> None:
    rng = np.random.default_rng(4)
    packed = kernels.pack_int8_dot(normal(rng, 300, 130))
    ids = rng.integers(0, 300, 70).astype(np.int32)
    assert same_bits(on_each_target(lambda: kernels.widen(packed)), reference.widen(packed))
    want = reference.embedding(ids, packed)
    assert same_bits(on_each_target(lambda: kernels.embedding(ids, packed)), want)


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads() -> None:
    rng = np.random.default_rng(5)
    # Enough rows for several chunks and blocks, enough columns for several pieces.
    x = normal(rng, 2000, 1500)
    weight = kernels.pack_int8_dot(normal(rng, 150, 1500))
    whole = kernels.linear(x, weight)
    for rows in (*range(1, 28), 331):
        kernels.set_num_threads(1 + rows % 3)
        assert same_bits(kernels.linear(x[:rows], weight), whole[:rows])
    assert same_bits(kernels.linear(x[1950:1951], weight), whole[1950:1951])


def test_the_largest_values_do_not_overflow_anywhere() -> None:
    k = 1 << 17
    x = np.ones((3, k), np.float32)
    x[1] = -1
    x[2, ::2] = -1
    packed = kernels.pack_int8_dot(np.ones((2, k), np.float32))
    got = on_each_target(lambda: kernels.linear(x, packed))
    np.testing.assert_allclose(got, [[k, k], [-k, -k], [0, 0]], rtol=4 * EPS)


def test_special_rows_stay_among_themselves() -> None:
    rng = np.random.default_rng(6)
    x, weight, bias = normal(rng, 7, 33), normal(rng, 21, 33), normal(rng, 21)
    weight[4] = 0
    packed = kernels.pack_int8_dot(weight)
    plain = kernels.linear(x, packed, bias)
    x[1], x[2, 5], x[3, 32], x[4, 0] = 0, np.nan, np.inf, -np.inf
    x[5] = np.float32(1e-45)  # the scale of this row is 0 too
    got = on_each_target(lambda: kernels.linear(x, packed, bias))
    assert np.isnan(got[2:5]).all()
    assert same_bits(got[1], bias)
    assert same_bits(got[5], bias)
    assert same_bits(got[[0, 6]], plain[[0, 6]])
    assert (got[[0, 1, 5, 6], 4] == bias[4]).all()


def test_linear_reads_only_its_rows_and_writes_where_it_is_told() -> None:
    rng = np.random.default_rng(7)
    packed = kernels.pack_int8_dot(normal(rng, 9, 42))
    big = np.full((12, 42), np.nan, np.float32)
    big[4:8] = normal(rng, 4, 42)
    out = np.full((6, 9), 7, np.float32)
    assert kernels.linear(big[4:8], packed, out=out[1:5]).base is out
    assert same_bits(out[1:5], kernels.linear(big[4:8].copy(), packed))
    assert (out[[0, 5]] == 7).all()


# --- experts -------------------------------------------------------------------------------------


def make_expert(rng: np.random.Generator, k: int, inner: int) -> Expert:
    gate, up, down = (
        kernels.pack_int8_dot(normal(rng, *shape) / np.float32(np.sqrt(shape[1])))
        for shape in ((inner, k), (inner, k), (k, inner))
    )
    return gate, up, down


def one_step_of_hidden(x: np.ndarray, expert: Expert) -> float:
    """Most that a result changes if one value of the hidden row is rounded the other way."""
    gate, up, down = expert
    hidden = np.abs(reference.linear(x, gate) * reference.linear(x, up)).max()
    return float(hidden / 127 * np.abs(reference.widen(down)).max())


@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(1, 30),
    k=st.integers(1, 70),
    inner=st.integers(1, 150),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_experts_are_the_reference_on_every_target(
    num_rows: int, k: int, inner: int, shares: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = [round(share * num_rows) for share in shares]
    experts = [make_expert(rng, k, inner) for _ in counts]
    x = normal(rng, num_rows, k)
    routing = route_rows(rng, num_rows, counts)

    def run(ffn: Callable[..., None]) -> np.ndarray:
        out = np.ones((num_rows, k), np.float32)
        ffn(x, experts, *routing, out)
        return out

    got = on_each_target(lambda: run(kernels.expert_ffn_many))
    steps = sum(one_step_of_hidden(x, expert) for expert in experts)
    np.testing.assert_allclose(got, run(reference.expert_ffn_many), rtol=1e-5, atol=steps + 1e-5)


@pytest.mark.parametrize(("num_rows", "k", "inner"), [(5, 64, 96), (300, 96, 640), (700, 720, 48)])
def test_many_experts_equal_one_after_the_other(num_rows: int, k: int, inner: int) -> None:
    rng = np.random.default_rng(8)
    counts = [num_rows, 0, 1, num_rows // 2, num_rows]
    experts = [make_expert(rng, k, inner) for _ in counts]
    x = normal(rng, num_rows, k)
    routing = route_rows(rng, num_rows, counts)
    together, in_turn = np.zeros_like(x), np.zeros_like(x)
    kernels.set_num_threads(3)
    kernels.expert_ffn_many(x, experts, *routing, together)
    kernels.set_num_threads(1)
    expert_ffn_in_turn(x, experts, *routing, in_turn)
    assert same_bits(together, in_turn)


def test_an_expert_works_on_all_rows_by_default() -> None:
    rng = np.random.default_rng(9)
    expert = make_expert(rng, 48, 80)
    x = normal(rng, 600, 48)
    plain, listed = np.zeros_like(x), np.zeros_like(x)
    kernels.expert_ffn(x, *expert, plain)
    kernels.expert_ffn(x, *expert, listed, np.arange(600, dtype=np.int32), np.ones(600, np.float32))
    assert same_bits(plain, listed)
    alone = np.zeros_like(x[:1])
    kernels.expert_ffn(x[550:551], *expert, alone)
    assert same_bits(alone[0], plain[550])


def test_an_expert_keeps_nan_in_its_row() -> None:
    rng = np.random.default_rng(10)
    expert = make_expert(rng, 48, 80)
    x = normal(rng, 5, 48)
    x[1, 3], x[2] = np.nan, 0
    out = np.ones_like(x)
    kernels.expert_ffn(x, *expert, out)
    assert np.isnan(out[1]).all()
    assert (out[2] == 1).all()
    assert np.isfinite(out[[0, 3, 4]]).all()


def test_no_experts_and_no_rows_change_nothing() -> None:
    expert = make_expert(np.random.default_rng(11), 16, 16)
    x, out = np.ones((2, 16), np.float32), np.full((2, 16), 3, np.float32)
    none, nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    kernels.expert_ffn_many(x, [expert], np.zeros(2, np.int32), none, nothing, out)
    kernels.expert_ffn(x, *expert, out, none, nothing)
    assert (out == 3).all()


# --- refusals ------------------------------------------------------------------------------------

X = np.ones((2, 16), np.float32)
PACKED = reference.pack_int8_dot(np.ones((16, 16), np.float32))
IDS = np.zeros(2, np.int32)


def other(**changes: object) -> Int8DotWeight:
    fields = {"packed": PACKED.packed, "scales": PACKED.scales, "shape": PACKED.shape, **changes}
    return Int8DotWeight(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: kernels.linear(X.astype(np.float64), PACKED), TypeError, "x must be .* float32"),
        (lambda: kernels.linear(X[:, :15].copy(), PACKED), ValueError, "x has shape"),
        (lambda: kernels.linear(X, PACKED, bias=X[0, :3].copy()), ValueError, "bias has shape"),
        (lambda: kernels.linear(X, PACKED, out=X[:, :3].copy()), ValueError, "out has shape"),
        (
            lambda: kernels.linear(X, other(shape=(17, 16)), out=X.copy()),
            ValueError,
            "weight.packed has shape",
        ),
        (lambda: kernels.linear(X, other(shape=(16, 0))), ValueError, "rows of length 0"),
        (
            lambda: kernels.linear(X, other(shape=(16, 1 << 18))),
            ValueError,
            "rows of length 262144",
        ),
        (lambda: kernels.linear(X, other(scales=X[0, :3].copy())), ValueError, "weight.scales"),
        (
            lambda: kernels.linear(X, other(packed=PACKED.packed.astype(np.int32))),
            TypeError,
            "weight.packed",
        ),
        (lambda: kernels.embedding(IDS + 16, PACKED), ValueError, "token_ids has 16"),
        (lambda: kernels.pack_int8_dot(X[0]), ValueError, "weight has 1 dimensions"),
        (lambda: kernels.pack_int8_dot(X[:, :0]), ValueError, "weight has rows of length 0"),
        (lambda: kernels.pack_int8_dot(X.astype(np.int32)), TypeError, "weight must be"),
        (
            lambda: kernels.expert_ffn(X, PACKED, PACKED, np.ones((16, 16), np.float32), X.copy()),
            TypeError,
            "down must be an Int8DotWeight",
        ),
        (
            lambda: kernels.expert_ffn(X, np.ones((16, 16), np.float32), PACKED, PACKED, X.copy()),
            TypeError,
            "up must be",
        ),
        (
            lambda: kernels.expert_ffn(X, PACKED, PACKED, PACKED, X),
            ValueError,
            "out overlaps x",
        ),
    ],
)
def test_wrong_arguments_are_named(
    call: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call()
