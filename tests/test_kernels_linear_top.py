"""linear_top: the largest outputs of a product, exactly those of linear, in a fixed order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff import kernels
from specmoeoff.kernels import reference

if TYPE_CHECKING:
    from specmoeoff.kernels import Weight

pytestmark = pytest.mark.usefixtures("kernel_settings")

KINDS = ["float32", "bfloat16", "int8", "int8 dot"]


def make_weight(values: np.ndarray, kind: str) -> Weight:
    if kind == "bfloat16":
        return reference.to_bfloat16(values)
    if kind == "int8":
        return kernels.quantize_int8(values)
    if kind == "int8 dot":
        return kernels.pack_int8_dot(values)
    return values


def expect_top(y: np.ndarray, top: int, values: np.ndarray, ids: np.ndarray) -> None:
    """Check against all outputs y, [T, N]: a sort by value, then by column."""
    for row, got_values, got_ids in zip(y, values, ids, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))[:top]
        assert got_ids.tolist() == order
        assert got_values.tobytes() == row[order].tobytes()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 700),
    depth=st.integers(1, 40),
    top=st.integers(1, 64),
    kind=st.sampled_from(KINDS),
    threads=st.integers(1, 4),
    few_values=st.booleans(),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_they_are_the_largest_of_all_outputs(
    rows: int,
    columns: int,
    depth: int,
    top: int,
    kind: str,
    threads: int,
    few_values: bool,
    with_bias: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    shapes = ((rows, depth), (columns, depth), (columns,))
    x, w, b = (rng.standard_normal(shape, np.float32) for shape in shapes)
    if few_values:
        # Many outputs are equal then.
        x, w, b = np.round(x), np.round(w), np.round(b)
    weight, bias, top = make_weight(w, kind), b if with_bias else None, min(top, columns)
    kernels.set_num_threads(threads)
    for target in kernels.cpu_targets():
        kernels.use_cpu_target(target)
        y = kernels.linear(x, weight, bias)
        values, ids = kernels.linear_top(x, weight, top, bias)
        assert ids.dtype == np.int32
        expect_top(y, top, values, ids)


def test_it_agrees_with_the_reference() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((7, 96)).astype(np.float32)
    w = rng.standard_normal((500, 96)).astype(np.float32)
    x[2] = np.nan
    w[[40, 41]] = np.nan
    values, ids = kernels.linear_top(x, w, 5)
    _, expected = reference.linear_top(x, w, 5)
    np.testing.assert_array_equal(ids, expected)
    # A poisoned output is the best one, so nobody can take another for the best.
    assert np.isnan(values[:, :2]).all()
    assert ids[0, :2].tolist() == [40, 41]
    assert ids[2].tolist() == [0, 1, 2, 3, 4]


def test_no_rows_give_nothing() -> None:
    values, ids = kernels.linear_top(np.zeros((0, 8), np.float32), np.ones((9, 8), np.float32), 3)
    assert values.shape == ids.shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", [-1, 0, 6, 65])
def test_a_number_that_cannot_be_is_refused(kind: str, top: int) -> None:
    weight = make_weight(np.ones((5 if top < 65 else 100, 8), np.float32), kind)
    with pytest.raises(ValueError, match=f"top is {top}; it must be"):
        kernels.linear_top(np.ones((2, 8), np.float32), weight, top)


def test_wrong_arguments_are_named() -> None:
    w = np.ones((5, 8), np.float32)
    with pytest.raises(TypeError, match="x"):
        kernels.linear_top(np.ones((2, 8)), w, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bias"):
        kernels.linear_top(np.ones((2, 8), np.float32), w, 1, np.ones(4, np.float32))
