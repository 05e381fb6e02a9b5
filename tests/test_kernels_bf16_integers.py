"""int8 and int4 weights with activations rounded to bfloat16: the order of sums, and its promises.

Where the CPU multiplies pairs of bfloat16, integers are multiplied as they are, which bfloat16
holds exactly, and scaled by run or by row. Elsewhere they take the float32 path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_cases import EPS, make_experts, make_weight, same_bits
from specmoeoff import kernels
from specmoeoff.kernels import Int4Weight, Int8Weight, _native, reference

if TYPE_CHECKING:
    from specmoeoff.kernels import Weight

pytestmark = pytest.mark.usefixtures("kernel_settings")

PAIRS = "avx512bf16"
KINDS = ["int8", "int8/32", "int8/64", "int4/32", "int4/64", "int4/128"]
PAIR_TARGETS = [t for t in kernels.cpu_targets() if t in (PAIRS, "amx")]


def linear(
    x: np.ndarray, weight: Int8Weight | Int4Weight, bias: np.ndarray | None = None
) -> np.ndarray:
    return kernels.linear(x, weight, bias, activations="bfloat16")


def single(x: np.ndarray) -> np.ndarray:
    """Round to float32, and go on in float64, where a product of two bfloat16 is exact."""
    return x.astype(np.float32).astype(np.float64)


def values_of(weight: Int8Weight | Int4Weight) -> np.ndarray:
    """Return the integers [N, K]."""
    one = type(weight)(weight.values, np.ones_like(weight.scales))
    return reference.widen(one).astype(np.float64)


def in_pairs(x: np.ndarray, weight: Int8Weight | Int4Weight) -> np.ndarray:
    """What a target with pairs returns for one row x [K], to the last bit: [N].

    Each of 16 partial sums of a run of 32 adds the second of its pair, then the first, and is then
    added to the row's with one rounding, times the run's scale. With one scale a row nothing is
    scaled before the end.
    """
    values = values_of(weight)
    n, k = values.shape
    padding = -k % 32
    x = np.pad(reference.widen(reference.to_bfloat16(x)), (0, padding)).astype(np.float64)
    values = np.pad(values, ((0, 0), (0, padding)))
    if isinstance(weight, Int4Weight):  # of each 16 the even elements, then the odd ones
        order = np.arange(k).reshape(-1, 8, 2).transpose(0, 2, 1).ravel()
        x, values = x[order], values[:, order]
    scales = weight.scales.astype(np.float64)
    by_row = scales.shape[1] == 1 and isinstance(weight, Int8Weight)
    lanes = np.zeros((n, 16))
    for at in range(0, len(x), 32):
        run = lanes if by_row else np.zeros((n, 16))
        for place in (1, 0):
            part = slice(at + place, at + 32, 2)
            run = single(run + x[part] * values[:, part])
        scale = scales[:, at * scales.shape[1] // len(x), None]
        # Exact in float64 but for the last bits of a sum: see single().
        lanes = run if by_row else fused(run, scale, lanes)
    for width in (8, 4, 2, 1):
        lanes = single(lanes[:, :width] + lanes[:, width : 2 * width])
    return single(lanes[:, 0] * scales[:, 0]) if by_row else lanes[:, 0]


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c of float32 values, rounded once.

    The product is exact in float64, the sum may not be: where its float64 lies halfway between two
    float32, what was lost decides.
    """
    product = a * b
    total = product + c
    virtual = total - product
    lost = (product - (total - virtual)) + (c - virtual)
    halfway = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    nudged = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return single(np.where(halfway & (lost != 0), nudged, total))


def bound(x: np.ndarray, weight: Int8Weight | Int4Weight) -> np.ndarray:
    """Most that a result can be off: three roundings a run of 32, the tree, scale and bias."""
    runs = -(-x.shape[1] // 32)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(reference.widen(weight)).astype(np.float64).T
    return (3 * runs + 4 + 3) * EPS * magnitude


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    n=st.integers(1, 40),
    groups=st.integers(1, 8),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
)
def test_linear_is_the_reference_on_every_target(
    rows: int, n: int, groups: int, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    k = groups * int(kind.partition("/")[2] or 19)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    weight, bias = make_weight(rng, n, k, kind), rng.standard_normal(n).astype(np.float32)
    want = reference.linear(x, weight, bias, activations="bfloat16")
    plain = kernels.linear(reference.widen(reference.to_bfloat16(x)), weight, bias)
    tolerance = bound(x, weight) + EPS * np.abs(bias)
    for target in kernels.cpu_targets():
        kernels.use_cpu_target(target)
        got = linear(x, weight, bias)
        assert (np.abs(got - want) <= tolerance).all(), target
        assert target in PAIR_TARGETS or same_bits(got, plain)


@pytest.mark.parametrize("target", PAIR_TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [128, 640])
def test_pairs_are_summed_in_the_documented_order(target: str, kind: str, k: int) -> None:
    kernels.use_cpu_target(target)
    rng = np.random.default_rng(1)
    k -= 3 if kind == "int8" else 0
    x, weight = rng.standard_normal((1, k)).astype(np.float32), make_weight(rng, 100, k, kind)
    assert same_bits(linear(x, weight), in_pairs(x[0], weight).astype(np.float32)[None, :])


@pytest.mark.parametrize("target", kernels.cpu_targets())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [256, 1152, 4224])
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(
    target: str, kind: str, k: int
) -> None:
    kernels.use_cpu_target(target)
    rng = np.random.default_rng(2)
    k -= 5 if kind == "int8" else 0
    x = rng.standard_normal((150, k)).astype(np.float32)
    weight = make_weight(rng, 71, k, kind)
    whole = linear(x, weight)
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 25, 61):
        kernels.set_num_threads(1 + rows % 3)
        assert same_bits(linear(x[:rows], weight), whole[:rows])
    assert same_bits(linear(x[140:141], weight), whole[140:141])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [2, 20])
def test_nothing_is_read_outside_the_operands(kind: str, rows: int) -> None:
    """What lies around weights, scales and bias would show: 127, NaN and NaN.

    The sanitizers see reads whose values are not used (``make asan``).
    """
    rng = np.random.default_rng(3)
    k = 115 if kind == "int8" else 128
    x, weight = rng.standard_normal((rows, k)).astype(np.float32), make_weight(rng, 7, k, kind)
    assert isinstance(weight, Int8Weight | Int4Weight)
    bias = rng.standard_normal(7).astype(np.float32)
    odd = type(weight)(amidst(weight.values, 0x7F), amidst(weight.scales, np.nan))
    got = linear(x, odd, amidst(bias, np.nan))
    assert same_bits(got, linear(x, weight, bias))


def amidst(array: np.ndarray, filler: float) -> np.ndarray:
    """Return a copy with one filler before and after it in memory."""
    memory = np.full(array.size + 2, filler, array.dtype)
    memory[1:-1] = array.ravel()
    return memory[1:-1].reshape(array.shape)


@pytest.mark.parametrize("kinds", [("int8/32", "bfloat16"), ("int4/32", "int8"), ("int4/32",)])
def test_an_expert_may_mix_forms(kinds: tuple[str, ...]) -> None:
    """Its activations are packed once, in a form that its three matrices have in common."""
    rng = np.random.default_rng(4)
    (expert,) = make_experts(rng, 1, 128, 64, kinds[0])
    mixed = (expert[0], make_weight(rng, 64, 128, kinds[-1]), expert[2])
    x = (rng.standard_normal((9, 128)) / 12).astype(np.float32)
    for target in kernels.cpu_targets():
        kernels.use_cpu_target(target)
        out, want = np.zeros_like(x), np.zeros_like(x)
        kernels.expert_ffn(x, *mixed, out, activations="bfloat16")
        reference.expert_ffn(x, *mixed, want, activations="bfloat16")
        assert np.abs(out - want).max() < 2e-2 * np.abs(want).max()


def native_linear_many(x: np.ndarray, weights: list[Weight]) -> list[np.ndarray]:
    """``kernels.linear_many`` gives quantised weights to the native module one by one."""
    outs = [np.empty((len(x), 33), np.float32) for _ in weights]
    _native.linear_many(x, weights, [None] * len(weights), outs, True)
    return outs


@pytest.mark.parametrize("kinds", [("int8", "int8/32", "int8/64"), ("int4/32", "int4/64")])
def test_operands_of_one_form_share_a_call(kinds: tuple[str, ...]) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((7, 128)).astype(np.float32)
    weights = [make_weight(rng, 33, 128, kind) for kind in kinds]
    for target in kernels.cpu_targets():
        kernels.use_cpu_target(target)
        for got, weight in zip(native_linear_many(x, weights), weights, strict=True):
            assert same_bits(got, kernels.linear(x, weight, activations="bfloat16"))


def test_operands_of_other_groups_are_refused() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((7, 128)).astype(np.float32)
    weights = [make_weight(rng, 33, 128, kind) for kind in ("int8/32", "int8/8")]
    with pytest.raises(ValueError, match=r"weights\[1\] has groups unlike those of weights\[0\]"):
        native_linear_many(x, weights)
