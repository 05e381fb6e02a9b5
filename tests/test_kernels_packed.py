"""Packed bfloat16: nothing is lost, products are the plain matrix's, nonsense leads nowhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_cases import same_bits
from specmoeoff import kernels
from specmoeoff.kernels import PackedBfloat16, reference

pytestmark = pytest.mark.usefixtures("kernel_settings")


def trained(rng: np.random.Generator, n: int, k: int, patches: float = 0.01) -> np.ndarray:
    """Return bfloat16 bits of the size of weights, some elements much smaller, some zero."""
    values = rng.standard_normal((n, k), np.float32) * np.float32(0.02)
    small = rng.random((n, k)) < patches
    values[small] *= np.float32(2.0) ** rng.integers(-60, -20, int(small.sum()))
    values[rng.random((n, k)) < patches / 2] = 0
    return kernels.to_bfloat16(values)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 1 << 30), st.booleans())
def test_what_is_packed_unpacks_to_itself(n: int, runs: int, seed: int, any_bits: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = (n, 32 * runs)
    bits = rng.integers(0, 1 << 16, shape, np.uint16) if any_bits else trained(rng, *shape)
    packed = kernels.pack_bfloat16(bits)
    assert packed.nbytes % 64 == 0
    np.testing.assert_array_equal(kernels.unpack_bfloat16(packed), bits)
    assert same_bits(kernels.widen(packed), reference.widen(bits))


def test_weights_take_three_quarters() -> None:
    bits = kernels.to_bfloat16(np.random.default_rng(0).standard_normal((512, 512), np.float32))
    assert kernels.pack_bfloat16(bits).nbytes < 0.76 * bits.nbytes


def test_known_bytes() -> None:
    bits = np.full((1, 32), 0x3F80, np.uint16)  # 1.0: exponent 127, nothing else
    bits[0, 17] = 0xBFC1  # -1.5078125: exponent 127, sign and mantissa
    packed = kernels.pack_bfloat16(bits)
    blob = packed.blob
    assert blob[0] == 127
    assert blob[16:20].tobytes() == b"\0\0\0\0"
    assert (blob[64:80] == 0).all()
    assert blob[80 + 17] == 0xC1
    assert (np.delete(blob[80:112], 17) == 0).all()


@pytest.mark.parametrize("target", kernels.cpu_targets())
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_products_are_those_of_the_plain_matrix(
    target: str, activations: kernels.Activations, data: st.DataObject
) -> None:
    kernels.use_cpu_target(target)
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    rows = data.draw(st.sampled_from([0, 1, 2, 4, 5, 6, 7, 13, 50]))
    bits = trained(rng, data.draw(st.integers(1, 40)), 32 * data.draw(st.integers(1, 20)))
    packed = kernels.pack_bfloat16(bits)
    x = rng.standard_normal((rows, bits.shape[1]), np.float32)
    bias = rng.standard_normal(len(bits), np.float32)
    wanted = kernels.linear(x, bits, bias, activations=activations)
    assert same_bits(kernels.linear(x, packed, bias, activations=activations), wanted)
    values, ids = kernels.linear_top(x, packed, 1, bias, activations=activations)
    other = kernels.linear_top(x, bits, 1, bias, activations=activations)
    assert same_bits(values, other[0])
    assert same_bits(ids, other[1])


@pytest.mark.parametrize("target", kernels.cpu_targets())
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed_parts", [(0, 1, 2), (2,), (0,)])
def test_experts_are_those_of_the_plain_matrices(
    target: str, activations: kernels.Activations, packed_parts: tuple[int, ...]
) -> None:
    kernels.use_cpu_target(target)
    rng = np.random.default_rng(3)
    counts = [0, 1, 5, 17]
    plain = [(trained(rng, 96, 64), trained(rng, 96, 64), trained(rng, 64, 96)) for _ in counts]
    mixed = [
        tuple(
            kernels.pack_bfloat16(bits) if i in packed_parts else bits
            for i, bits in enumerate(expert)
        )
        for expert in plain
    ]
    x = rng.standard_normal((20, 64), np.float32)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rows = np.concatenate([np.sort(rng.permutation(20)[:n]) for n in counts]).astype(np.int32)
    weights = rng.random(len(rows), np.float32)
    results = []
    for experts in (plain, mixed):
        out = np.zeros_like(x)
        kernels.expert_ffn_many(
            x,
            experts,  # type: ignore[arg-type]
            offsets,
            rows,
            weights,
            out,
            activations=activations,
        )
        results.append(out)
    if activations == "float32" or packed_parts == (0, 1, 2):
        assert same_bits(*results)
    else:  # with one part rounded the same way, the order of sums may be another target's
        np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_a_long_row_is_the_longest() -> None:
    rng = np.random.default_rng(4)
    bits = trained(rng, 5, 16384)
    x = rng.standard_normal((3, 16384), np.float32)
    packed = kernels.pack_bfloat16(bits)
    assert same_bits(kernels.linear(x, packed), kernels.linear(x, bits))
    with pytest.raises(ValueError, match="up to 16384"):
        kernels.pack_bfloat16(np.zeros((1, 16416), np.uint16))


@pytest.mark.parametrize("shape", [(3, 33), (3, 0), (32,), (2, 2, 32)])
def test_a_shape_that_cannot_be_packed_is_refused(shape: tuple[int, ...]) -> None:
    assert not kernels.can_pack_bfloat16(shape)
    with pytest.raises(ValueError, match="bits has shape"):
        kernels.pack_bfloat16(np.zeros(shape, np.uint16))


def small() -> PackedBfloat16:
    return kernels.pack_bfloat16(trained(np.random.default_rng(5), 7, 64, patches=0.2))


@pytest.mark.parametrize(
    ("blob", "shape", "error", "message"),
    [
        (small().blob[:-64], (7, 64), ValueError, "weight.blob is no packed matrix"),
        (small().blob, (8, 64), ValueError, "weight.blob is no packed matrix"),
        (small().blob, (7, 63), ValueError, "weight.blob is no packed matrix"),
        (small().blob[:0], (0, 0), ValueError, "weight.blob is no packed matrix"),
        (small().blob.astype(np.int8), (7, 64), TypeError, "weight.blob must be an array of uint8"),
        (small().blob, (7, "64"), TypeError, "weight.shape must be two integers"),
        (small().blob[None], (7, 64), ValueError, "weight.blob has 2 dimensions"),
    ],
)
def test_a_wrong_blob_is_named(blob: Any, shape: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kernels.linear(np.zeros((1, 64), np.float32), PackedBfloat16(blob, shape))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1 << 30), st.booleans())
def test_damaged_patches_lead_nowhere(seed: int, in_words: bool) -> None:
    """Whatever the words say, no memory is touched but the matrix; AddressSanitizer watches."""
    rng = np.random.default_rng(seed)
    packed = small()
    blob = packed.blob.copy()
    words = blob[64 + 7 * 2 * 48 :]
    at = rng.integers(0, len(words), 40)
    words[at] = rng.integers(0, 256, 40)
    if not in_words:
        blob[16:18] = rng.integers(0, 3, 2)
    try:
        result = kernels.linear(np.ones((2, 64), np.float32), PackedBfloat16(blob, packed.shape))
    except ValueError:
        return  # more patches than there is room for
    assert result.shape == (2, 7)


@pytest.mark.parametrize("at", [16, 64 + 7 * 2 * 48, 64 + 7 * 2 * 48 + 28])
def test_damage_is_noticed_when_unpacking(at: int) -> None:
    packed = small()
    blob = packed.blob.copy()
    blob[at] ^= 0xFF
    with pytest.raises(ValueError, match="blob has"):
        kernels.unpack_bfloat16(PackedBfloat16(blob, packed.shape))
