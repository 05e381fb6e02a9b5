"""Products with activations rounded to bfloat16: against the specification, and bit for bit.

A result is within the error bound of its order of summation on every CPU target. On one target it
does not depend on row counts, thread counts, tiles or neighbours; all targets without an
instruction for bfloat16 agree, since they round and then use the float32 path.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_cases import EPS, make_experts, make_weight, route_rows, same_bits
from specmoeoff import kernels
from specmoeoff.kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from specmoeoff.kernels import Weight

pytestmark = pytest.mark.usefixtures("kernel_settings")

BFLOAT16_EPS = 2.0**-7
KINDS = ["float32", "float16", "bfloat16", "int8", "int8/8"]


def linear(x: np.ndarray, weight: Weight, bias: np.ndarray | None = None) -> np.ndarray:
    return kernels.linear(x, weight, bias, activations="bfloat16")


def rounded(x: np.ndarray) -> np.ndarray:
    return reference.widen(reference.to_bfloat16(x))


def on_each_target(compute: Callable[[], np.ndarray]) -> dict[str, np.ndarray]:
    """Return what every CPU target computes; those without the instruction agree bit for bit."""
    results = {}
    plain = []
    for target in kernels.cpu_targets():
        kernels.use_cpu_target(target)
        results[target] = compute()
        if not kernels.multiplies_bfloat16():
            plain.append(results[target])
    assert all(same_bits(result, plain[0]) for result in plain)
    return results


def linear_bound(x: np.ndarray, weight: Weight) -> np.ndarray:
    """Most that a dot product can be off: roundings in a row, the tree, scale and bias.

    One rounding per 16 elements either way, two per step of 32 with pairs; tiles have one per step
    and those within a step. Below, what denormals taken as zero can lose: each product at most the
    least normal number.
    """
    steps = -(-x.shape[1] // 32)
    roundings = max(2 * steps + 4 + 3, steps + 17 + 2)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(reference.widen(weight)).astype(np.float64).T
    return roundings * EPS * magnitude + 2 * x.shape[1] * float(np.finfo(np.float32).tiny)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    n=st.integers(1, 40),
    k=st.one_of(st.integers(1, 100), st.sampled_from([576, 640])),
    kind=st.sampled_from([*KINDS, "bfloat16", "bfloat16"]),
    seed=st.integers(0, 2**16),
)
def test_linear_is_the_reference_on_every_target(
    rows: int, n: int, k: int, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    weight, bias = make_weight(rng, n, k, kind), rng.standard_normal(n).astype(np.float32)
    want = reference.linear(x, weight, bias, activations="bfloat16")
    bound = linear_bound(rounded(x), weight) + EPS * np.abs(bias)
    for target, got in on_each_target(lambda: linear(x, weight, bias)).items():
        assert (np.abs(got - want) <= bound).all(), target


def test_activations_are_rounded_to_nearest_even() -> None:
    # Halfway cases both ways, and their neighbours; each alone, so that sums are exact.
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0xBF808000], np.uint32)
    x = bits.view(np.float32)[:, None]
    one = np.full((1, 1), 0x3F80, np.uint16)
    for got in on_each_target(lambda: linear(x, one)).values():
        assert same_bits(got, rounded(x))
    assert not same_bits(kernels.linear(x, one), rounded(x))


@pytest.mark.parametrize("kind", ["float32", "float16", "int8/8"])
def test_other_weights_take_the_float32_path_after_rounding(kind: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 72)).astype(np.float32)
    weight = make_weight(rng, 21, 72, kind)
    for got in on_each_target(lambda: linear(x, weight)).values():
        assert same_bits(got, kernels.linear(rounded(x), weight))


def test_an_int8_dot_weight_rounds_in_its_own_way() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 72)).astype(np.float32)
    weight = kernels.pack_int8_dot(make_weight(rng, 21, 72))
    assert same_bits(linear(x, weight), kernels.linear(x, weight))
    assert same_bits(linear(x, weight), reference.linear(x, weight, activations="bfloat16"))


def single(x: np.ndarray) -> np.ndarray:
    """Round to float32, and go on in float64, where a product of two bfloat16 is exact."""
    return x.astype(np.float32).astype(np.float64)


def tree(lanes: np.ndarray) -> np.ndarray:
    for width in (8, 4, 2, 1):
        lanes = single(lanes[:, :width] + lanes[:, width : 2 * width])
    return lanes[:, 0]


def in_lanes(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """16 partial sums of single products, then their tree."""
    lanes = np.zeros((len(w), 16))
    for at in range(0, len(x), 16):
        lanes = single(lanes + x[at : at + 16] * w[:, at : at + 16])
    return tree(lanes)


def in_pairs(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """16 partial sums of pairs, the odd product first, then their tree."""
    lanes = np.zeros((len(w), 16))
    for at in range(0, len(x), 32):
        for place in (1, 0):
            part = slice(at + place, at + 32, 2)
            lanes = single(lanes + x[part] * w[:, part])
    return tree(lanes)


def in_tiles(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Of every 32 elements the even ones and the odd ones, then both, then the sum so far."""
    sums = np.zeros(len(w))
    for at in range(0, len(x), 32):
        parts = np.zeros((len(w), 2))
        for pair in range(at, at + 32, 2):
            parts = single(parts + x[pair : pair + 2] * w[:, pair : pair + 2])
        sums = single(sums + single(parts[:, 0] + parts[:, 1]))
    return sums


ORDERS = {"avx512bf16": in_pairs, "amx": in_tiles}


@pytest.mark.parametrize("target", kernels.cpu_targets())
@pytest.mark.parametrize("k", [1, 2, 31, 33, 960, 1017])
def test_products_are_summed_in_the_documented_order(target: str, k: int) -> None:
    kernels.use_cpu_target(target)
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((1, k)).astype(np.float32), make_weight(rng, 100, k)
    padding = (0, -k % 32)
    wide_x = np.pad(rounded(x)[0], padding).astype(np.float64)
    wide_w = np.pad(reference.widen(weight), ((0, 0), padding)).astype(np.float64)
    sums = ORDERS.get(target, in_lanes)(wide_x, wide_w)
    assert same_bits(linear(x, weight), sums.astype(np.float32)[None, :])


@pytest.mark.parametrize("target", kernels.cpu_targets())
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(target: str) -> None:
    kernels.use_cpu_target(target)
    rng = np.random.default_rng(3)
    # Enough rows for several chunks and blocks, enough columns for several pieces; a tail in K,
    # which is so long that few rows are walked differently.
    x = rng.standard_normal((700, 1067)).astype(np.float32)
    weight = make_weight(rng, 71, 1067)
    whole = linear(x, weight)
    for rows in (1, 2, 3, 4, 5, 6, 7, 25, 331):
        kernels.set_num_threads(1 + rows % 3)
        assert same_bits(linear(x[:rows], weight), whole[:rows])
    assert same_bits(linear(x[650:651], weight), whole[650:651])
    few = linear(x[:9], np.ascontiguousarray(weight[5:8]))
    assert same_bits(few, np.ascontiguousarray(whole[:9, 5:8]))


def test_linear_reads_nothing_outside_its_operands() -> None:
    rng = np.random.default_rng(4)
    k, n = 43, 9
    weight = make_weight(rng, n, k)
    # Rows lie at an odd place in a buffer of NaN.
    buffer = np.full(n * k + 128, 0x7FFF, np.uint16)
    view = buffer[33 : 33 + n * k].reshape(n, k)
    view[...] = weight
    big = np.full((12, k), np.nan, np.float32)
    big[4:8] = rng.standard_normal((4, k))
    for got in on_each_target(lambda: linear(big[4:8], view)).values():
        assert np.isfinite(got).all()
    assert same_bits(linear(big[4:8], view), linear(big[4:8].copy(), weight))


def test_special_values_stay_in_their_row_and_column() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((8, 67)).astype(np.float32)
    w = rng.standard_normal((6, 67)).astype(np.float32)
    x[2, 5], x[4, 66], w[3, 66] = np.nan, -np.inf, np.inf
    x[6, 0] = np.finfo(np.float32).max  # infinite as bfloat16
    weight = reference.to_bfloat16(w)
    for got in on_each_target(lambda: linear(x, weight)).values():
        assert np.isnan(got[2]).all()
        assert np.isinf(got[[4, 6]]).all()
        rest = np.delete(got, [2, 4, 6], 0)
        assert np.isinf(rest[:, 3]).all()
        assert np.isfinite(np.delete(rest, 3, 1)).all()


def test_denormals_count_for_at_most_themselves() -> None:
    tiny = np.float32(np.finfo(np.float32).tiny)
    x = np.full((3, 40), tiny / 4, np.float32)
    x[1] = tiny * 3
    weight = np.full((2, 40), 0x3F00, np.uint16)  # 0.5
    want = reference.linear(x, weight, activations="bfloat16")
    for got in on_each_target(lambda: linear(x, weight)).values():
        assert (np.abs(got - want) <= linear_bound(x, weight)).all()


# --- experts -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 30),
    k=st.integers(1, 70),
    inner=st.integers(1, 70),
    kind=st.sampled_from([*KINDS, "bfloat16", "bfloat16"]),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=4),
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

    def run(ffn: Callable[..., None], **options: Any) -> np.ndarray:
        out = np.ones((num_rows, k), np.float32)
        ffn(x, experts, *routing, out, **options)
        return out

    want = run(reference.expert_ffn_many, activations="bfloat16")
    # A hidden value that is off by a float32 rounding may round to the other bfloat16: each is off
    # by BFLOAT16_EPS of itself at most, so the sum is by that much of the sum of magnitudes.
    magnitudes = np.zeros_like(want)
    for (gate, up, down), (begin, end) in zip(experts, pairwise(routing[0]), strict=True):
        rows = routing[1][begin:end]
        g = reference.linear(x[rows], gate, activations="bfloat16").astype(np.float64)
        u = reference.linear(x[rows], up, activations="bfloat16")
        hidden = np.abs(g / (1 + np.exp(-g)) * u)
        weighted = hidden * routing[2][begin:end, None]
        magnitudes[rows] += weighted @ np.abs(reference.widen(down)).T.astype(np.float64)
    tolerance = 8 * EPS * (k + inner + 32) * len(counts)
    bound = BFLOAT16_EPS * magnitudes + tolerance * (1 + np.abs(want))
    for target, got in on_each_target(
        lambda: run(kernels.expert_ffn_many, activations="bfloat16")
    ).items():
        assert (np.abs(got - want) <= bound).all(), target


@pytest.mark.parametrize(("num_rows", "k", "inner"), [(5, 65, 97), (300, 96, 48), (700, 720, 49)])
def test_many_experts_equal_one_after_the_other(num_rows: int, k: int, inner: int) -> None:
    rng = np.random.default_rng(6)
    counts = [num_rows, 0, 1, num_rows // 2, num_rows]
    experts = make_experts(rng, 4, k, inner)
    # One with a float32 matrix: it takes the other path, its neighbours do not.
    experts.insert(2, (experts[0][0], experts[0][1], make_weight(rng, k, inner, "float32")))
    x = rng.standard_normal((num_rows, k)).astype(np.float32)
    offsets, rows, row_weights = route_rows(rng, num_rows, counts)
    together = np.zeros_like(x)
    kernels.set_num_threads(3)
    kernels.expert_ffn_many(
        x, experts, offsets, rows, row_weights, together, activations="bfloat16"
    )
    kernels.set_num_threads(1)
    in_turn = np.zeros_like(x)
    for i, expert in enumerate(experts):
        part = slice(offsets[i], offsets[i + 1])
        kernels.expert_ffn(
            x, *expert, in_turn, rows[part], row_weights[part], activations="bfloat16"
        )
    assert same_bits(together, in_turn)


@pytest.mark.parametrize(("k", "inner"), [(48, 80), (33, 17), (64, 144), (2048, 40)])
def test_an_expert_is_its_products_in_a_row(k: int, inner: int) -> None:
    rng = np.random.default_rng(7)
    ((gate, up, down),) = make_experts(rng, 1, k, inner)
    x = (rng.standard_normal((13, k)) / np.sqrt(k)).astype(np.float32)
    out = np.zeros_like(x)
    kernels.expert_ffn(x, gate, up, down, out, activations="bfloat16")
    g, u = linear(x, gate).astype(np.float64), linear(x, up)
    hidden = (g / (1 + np.exp(-g))).astype(np.float32) * u
    # SwiGLU is native, so a hidden value may differ in its last bits, and rarely round elsewhere.
    bound = BFLOAT16_EPS * (np.abs(hidden) @ np.abs(reference.widen(down)).T)
    assert (np.abs(out - linear(hidden, down)) <= bound + 1e-6).all()
    alone = np.zeros_like(x[:1])
    kernels.expert_ffn(x[4:5].copy(), gate, up, down, alone, activations="bfloat16")
    assert same_bits(alone[0], out[4])


def test_what_goes_into_down_is_rounded() -> None:
    # silu(129) is 129 in float32, and 129 * 129 = 16641 lies between the bfloat16 16640 and 16768.
    x, one = np.ones((1, 1), np.float32), np.full((1, 1), 0x3F80, np.uint16)
    gate = reference.to_bfloat16(np.full((1, 1), 129, np.float32))

    def run(activations: kernels.Activations) -> np.ndarray:
        out = np.zeros((1, 1), np.float32)
        kernels.expert_ffn(x, gate, gate, one, out, activations=activations)
        return out

    assert run("float32")[0, 0] == 16641
    for got in on_each_target(lambda: run("bfloat16")).values():
        assert got[0, 0] == 16640


def test_an_unknown_kind_of_activations_is_refused() -> None:
    x = np.zeros((1, 16), np.float32)
    w = np.zeros((16, 16), np.uint16)
    none = np.zeros(0, np.int32), np.zeros(0, np.float32)
    wrong: Any = "float16"
    match = "activations is 'float16'; it must be 'float32' or 'bfloat16'"
    with pytest.raises(ValueError, match=match):
        kernels.linear(x, w, activations=wrong)
    with pytest.raises(ValueError, match=match):
        kernels.expert_ffn(x, w, w, w, x.copy(), activations=wrong)
    with pytest.raises(ValueError, match=match):
        kernels.expert_ffn_many(x, [], np.zeros(1, np.int32), *none, x.copy(), activations=wrong)
