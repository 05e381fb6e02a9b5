"""What the demo's bytes rest on: arithmetic that no order of summation changes, and its uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoeoff.demo import exact, noise
from specmoeoff.demo.router import balanced_router
from specmoeoff.demo.safetensors_file import TensorPlan
from specmoeoff.demo.upcycle import deviation, pack_shards
from specmoeoff.kernels import to_bfloat16, widen


@given(st.integers(0, 2**32), st.integers(1, 300), st.floats(1e-6, 1e6))
def test_exact_sums_do_not_depend_on_order(seed: int, inner: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    # Heavy tails: plain float64 sums of these do depend on their order.
    a = rng.standard_cauchy((3, inner)) * scale
    b = rng.standard_cauchy((4, inner))
    order = rng.permutation(inner)
    np.testing.assert_array_equal(exact.total(a), exact.total(a[:, order]))
    np.testing.assert_array_equal(exact.dot(a, b), exact.dot(a[:, order], b[:, order]))
    bound = np.abs(a).max(1)[:, None] * np.abs(b).max(1)[None] * inner * 2.0**-18
    assert (np.abs(exact.dot(a, b) - a @ b.T) <= bound).all()


def test_exact_functions_are_accurate() -> None:
    x = -np.geomspace(1e-6, 39, 500)
    np.testing.assert_allclose(exact.exp(x), np.exp(x), rtol=1e-10)
    assert exact.exp(np.array([0.0, -50.0, -np.inf])).tolist() == [1.0, 0.0, 0.0]
    y = np.linspace(-30, 30, 101)
    np.testing.assert_allclose(exact.sigmoid(y), 1 / (1 + np.exp(-y)), rtol=1e-10)
    frequencies = np.array([1.0, 0.3, 1e-5])
    angles = np.arange(300)[:, None] * frequencies
    cos, sin = exact.cos_sin(frequencies, 300)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-12)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-12)


def test_exact_dot_refuses_what_would_round() -> None:
    long = np.ones((1, exact.MAX_INNER_SIZE + 1))
    with pytest.raises(ValueError, match="8193"):
        exact.dot(long, long)


def test_cholesky_and_solve() -> None:
    a = np.random.default_rng(0).standard_normal((20, 12))
    lower = exact.cholesky(a.T @ a)
    np.testing.assert_allclose(lower, np.linalg.cholesky(a.T @ a), atol=1e-12)
    np.testing.assert_allclose(exact.solve_right(a, lower) @ lower, a, atol=1e-12)


def test_noise_is_a_bell_and_every_key_has_its_own() -> None:
    x = noise.centred_sums(200_000, 1, 2)
    np.testing.assert_array_equal(x, np.rint(x))
    assert abs(x.mean()) < 5 * noise.DEVIATION / np.sqrt(x.size)
    assert x.std() == pytest.approx(noise.DEVIATION, rel=0.01)
    inside = np.mean(np.abs(x) < noise.DEVIATION)
    assert inside == pytest.approx(0.67, abs=0.01)
    assert abs(np.corrcoef(x, noise.centred_sums(200_000, 2, 1))[0, 1]) < 0.01


def test_router_spreads_tokens_that_random_directions_pile_up() -> None:
    rng = np.random.default_rng(0)
    # A large common mean and very unequal directions, as FFN inputs have.
    h = rng.standard_normal((4000, 32)) * np.geomspace(4, 0.1, 32) + 3 * rng.standard_normal(32)
    calibration, other = h[:2000], h[2000:]

    def heaviest(weight: np.ndarray[Any, Any]) -> float:
        chosen = np.argsort(-(other @ weight.T), axis=1)[:, :2]
        return float(np.bincount(chosen.ravel(), minlength=8).max() / (2 * len(other) / 8))

    router = widen(balanced_router(calibration, 8, 2, (0, 0, 1)))
    assert heaviest(router) < 1.2
    assert heaviest(rng.standard_normal((8, 32))) > 1.8
    assert (other @ router.T).std() == pytest.approx(1, rel=0.2)


def test_deviation_is_that_of_numpy() -> None:
    weight = to_bfloat16(np.random.default_rng(0).standard_normal((50, 60)).astype(np.float32))
    assert deviation(weight) == pytest.approx(float(widen(weight).std()), rel=1e-4)


def test_shards_never_cut_a_unit() -> None:
    units = [[TensorPlan(f"{i}.{j}", (10,)) for j in range(3)] for i in range(7)]
    shards = pack_shards(units, max_bytes=130)
    assert [len(shard) for shard in shards] == [6, 6, 6, 3]
    assert [plan for shard in shards for plan in shard] == [plan for unit in units for plan in unit]
