"""int4 weights: the native module against its specification, and bit for bit.

A product is that of the widened matrix, in the order of all products, so what is widened exactly
and summed in that order is equal over CPU targets, rows and threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_cases import EPS, expert_ffn_in_turn, on_each_target, route_rows, same_bits
from specmoeoff import kernels
from specmoeoff.kernels import Int4Weight, reference

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.usefixtures("kernel_settings")

GROUPS = [32, 64, 128]


def make_weight(rng: np.random.Generator, n: int, k: int, group: int) -> Int4Weight:
    """Return a weight of all sixteen integers, -8 too, which quantising never gives."""
    values = rng.integers(0, 256, (n, k // 2), np.uint8)
    return Int4Weight(values, rng.standard_normal((n, k // group)).astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    n=st.integers(1, 40),
    groups=st.integers(1, 9),
    group=st.sampled_from(GROUPS),
    seed=st.integers(0, 2**16),
)
def test_linear_is_that_of_the_widened_matrix(
    rows: int, n: int, groups: int, group: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, groups * group)).astype(np.float32)
    weight, bias = make_weight(rng, n, groups * group, group), np.ones(n, np.float32)
    wide = reference.widen(weight)
    got = on_each_target(lambda: kernels.linear(x, weight, bias))
    assert same_bits(got, kernels.linear(x, wide, bias))
    want = reference.linear(x, weight, bias)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(wide).astype(np.float64).T
    assert (np.abs(got - want) <= (x.shape[1] // 16 + 7) * EPS * (magnitude + 1)).all()


@pytest.mark.parametrize("group", GROUPS)
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(group: int) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((700, 768)).astype(np.float32)
    weight = make_weight(rng, 70, 768, group)
    whole = kernels.linear(x, weight)
    for rows in (1, 2, 5, 6, 7, 25, 331):
        kernels.set_num_threads(1 + rows % 3)
        assert same_bits(kernels.linear(x[:rows], weight), whole[:rows])
    assert same_bits(kernels.linear(x[650:651], weight), whole[650:651])


def test_linear_reads_nothing_outside_its_operands() -> None:
    rng = np.random.default_rng(3)
    weight = make_weight(rng, 9, 64, 32)
    buffer = np.full(9 * 32 + 2, 0x77, np.uint8)
    scales = np.full((11, 2), np.nan, np.float32)
    values = buffer[1:-1].reshape(9, 32)
    values[...], scales[1:-1] = weight.values, weight.scales
    x = np.full((12, 64), np.nan, np.float32)
    x[4:8] = rng.standard_normal((4, 64))
    inner = Int4Weight(values, scales[1:-1])
    got = on_each_target(lambda: kernels.linear(x[4:8], inner))
    assert np.isfinite(got).all()
    assert same_bits(got, kernels.linear(x[4:8].copy(), weight))


@settings(max_examples=20, deadline=None)
@given(
    num_rows=st.integers(1, 30),
    k=st.sampled_from([64, 96, 128]),
    inner=st.sampled_from([32, 64, 160]),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_experts_are_those_of_the_widened_matrices(
    num_rows: int, k: int, inner: int, shares: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shapes = ((inner, k), (inner, k), (k, inner))
    experts = [tuple(make_weight(rng, *s, 32) for s in shapes) for _ in shares]
    wide = [tuple(map(reference.widen, expert)) for expert in experts]
    x = (rng.standard_normal((num_rows, k)) / k).astype(np.float32)
    routing = route_rows(rng, num_rows, [round(share * num_rows) for share in shares])

    def run(ffn: Callable[..., None], which: list[Any]) -> np.ndarray:
        out = np.ones((num_rows, k), np.float32)
        ffn(x, which, *routing, out)
        return out

    got = on_each_target(lambda: run(kernels.expert_ffn_many, experts))
    assert same_bits(got, run(kernels.expert_ffn_many, wide))
    assert same_bits(got, run(expert_ffn_in_turn, experts))
    want = run(reference.expert_ffn_many, experts)
    tolerance = 8 * EPS * (k + inner + 32) * len(shares) * max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("group", GROUPS)
def test_widen_and_embedding_are_exact(group: int) -> None:
    rng = np.random.default_rng(4)
    weight = make_weight(rng, 50, 3 * group, group)
    want = reference.widen(weight)
    assert same_bits(on_each_target(lambda: kernels.widen(weight)), want)
    ids = rng.integers(0, 50, 70).astype(np.int32)
    assert same_bits(on_each_target(lambda: kernels.embedding(ids, weight)), want[ids])


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", GROUPS)
def test_quantize_is_exact(kind: str, group: int) -> None:
    rng = np.random.default_rng(5)
    wide = rng.standard_normal((21, 384)).astype(np.float32)
    wide[3] = 0
    weight = reference.to_bfloat16(wide) if kind == "bfloat16" else wide.astype(kind)
    want = reference.quantize_int4(weight, group)
    assert same_bits(
        on_each_target(lambda: kernels.quantize_int4(weight, group).scales), want.scales
    )
    assert same_bits(
        on_each_target(lambda: kernels.quantize_int4(weight, group).values), want.values
    )
    assert want.nbytes == 21 * (192 + 4 * 384 // group)
    # At most half a step away, a step being a seventh of the group's largest magnitude.
    steps = np.repeat(want.scales, group, axis=1)
    error = np.abs(reference.widen(want) - reference.widen(weight))
    assert (error <= steps * (0.5 + 8 * EPS)).all()


X = np.ones((2, 64), np.float32)
SCALES = np.ones((4, 2), np.float32)
VALUES = np.zeros((4, 32), np.uint8)
W = Int4Weight(VALUES, SCALES)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: kernels.linear(X[:, :32].copy(), W), ValueError, "x has shape"),
        (
            lambda: kernels.linear(X, Int4Weight(VALUES, SCALES[:3])),
            ValueError,
            "weight.scales must have",
        ),
        (
            lambda: kernels.linear(X, Int4Weight(VALUES, np.ones((4, 3), np.float32))),
            ValueError,
            "weight.scales must have",
        ),
        (
            lambda: kernels.linear(X, Int4Weight(VALUES, np.ones((4, 4), np.float32))),
            ValueError,
            "weight.scales makes groups of 16",
        ),
        (
            lambda: kernels.linear(X, Int4Weight(VALUES.astype(np.uint16), SCALES)),  # type: ignore[arg-type]
            TypeError,
            "weight.values must be",
        ),
        (
            lambda: kernels.linear(X, Int4Weight(VALUES[:, ::2], SCALES)),
            ValueError,
            "weight.values must be C-contiguous",
        ),
        (
            lambda: kernels.expert_ffn(X, W, W, W, X.copy()),
            ValueError,
            "down has shape",
        ),
        (lambda: kernels.linear(X, Int4Weight(VALUES[0], SCALES)), ValueError, "weight has 1 dim"),
        (lambda: kernels.quantize_int4(X, 16), ValueError, "group is 16"),
        (lambda: kernels.quantize_int4(X, 128), ValueError, "group is 128"),
        (lambda: kernels.quantize_int4(X[:, :48].copy()), ValueError, "group is 32"),
        (lambda: kernels.quantize_int4(X[0]), ValueError, "weight has 1 dimensions"),
    ],
)
def test_wrong_arguments_are_named(
    call: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call()
