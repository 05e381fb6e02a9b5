"""Arithmetic whose result no order of summation can change, and so no CPU, BLAS or thread count.

The router of the demo model is computed from a run of the dense model, and its bytes must be the
same everywhere. A sum of floating-point numbers depends on its order, a sum of integers does not:
``snap`` moves numbers onto a grid of 2^20 steps (30 for plain sums), after which every product
and partial sum is an integer multiple of one power of two and below 2^53 multiples of it, so
float64 holds it exactly. Everything else here is elementwise and correctly rounded by IEEE 754.
``np.exp`` and its kind are not, which is why there is an ``exp`` of our own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

_PRODUCT_BITS = 20
_SUM_BITS = 30
MAX_INNER_SIZE = 1 << (53 - 2 * _PRODUCT_BITS)
"""Longest dot product that stays exact: 8192 terms."""


def snap(x: F64, bits: int = _PRODUCT_BITS) -> F64:
    """Round the last dimension's runs to multiples of 2^-bits of their next power of two."""
    exponent = np.frexp(np.abs(x).max(axis=-1, keepdims=True))[1]
    snapped: F64 = np.ldexp(np.rint(np.ldexp(x, bits - exponent)), exponent - bits)
    return snapped + 0.0


def total(x: F64) -> F64:
    """Return the sum over the last dimension, kept as a dimension of size 1."""
    summed: F64 = snap(x, _SUM_BITS).sum(axis=-1, keepdims=True)
    return summed


def dot(a: F64, b: F64) -> F64:
    """Return every row of a times every row of b: a [..., T, K], b [..., N, K] -> [..., T, N].

    Both are snapped first, row by row, which keeps about six digits.
    """
    if a.shape[-1] > MAX_INNER_SIZE:
        raise ValueError(f"inner size {a.shape[-1]} exceeds {MAX_INNER_SIZE}: sums would round")
    product: F64 = np.matmul(snap(a), np.swapaxes(snap(b), -1, -2))
    # No zero of either sign: which one a sum starts from is up to the BLAS.
    return product + 0.0


def exp(x: F64) -> F64:
    """Return e^x for x <= 0 by nine Taylor terms of x / 256 and eight squarings; 0 below -40."""
    small = np.maximum(x, -40.0) / 256.0
    y = np.ones_like(small)
    for n in range(9, 0, -1):
        y = y * small / n + 1.0
    for _ in range(8):
        y = y * y
    return np.where(x < -40.0, 0.0, y)


def sigmoid(x: F64) -> F64:
    """Return 1 / (1 + e^-x)."""
    e = exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def cos_sin(frequencies: F64, num_positions: int) -> tuple[F64, F64]:
    """Return cos and sin of position * frequency for positions 0, 1, ...: two [positions, F].

    Frequencies are in (0, 1]. The angle is advanced by rotating, so that only the first one needs
    a series; the error grows by one rounding per position.
    """
    step_cos, step_sin = np.ones_like(frequencies), np.ones_like(frequencies)
    square = frequencies * frequencies
    for n in range(20, 0, -2):
        step_cos = 1.0 - step_cos * square / (n * (n - 1))
        step_sin = 1.0 - step_sin * square / (n * (n + 1))
    step_sin = step_sin * frequencies
    cos = np.ones((num_positions, frequencies.size))
    sin = np.zeros((num_positions, frequencies.size))
    for p in range(1, num_positions):
        cos[p] = cos[p - 1] * step_cos - sin[p - 1] * step_sin
        sin[p] = sin[p - 1] * step_cos + cos[p - 1] * step_sin
    return cos, sin


def cholesky(matrix: F64) -> F64:
    """Return the lower triangular L with L L^T = matrix, by elementwise column updates."""
    a = matrix.copy()
    for k in range(len(a)):
        a[k:, k] /= np.sqrt(a[k, k])
        column = a[k + 1 :, k]
        a[k + 1 :, k + 1 :] -= column[:, None] * column[None, :]
    return np.tril(a)


def solve_right(rows: F64, lower: F64) -> F64:
    """Return X with X L = rows: rows [E, K], lower triangular L [K, K]."""
    x = rows.copy()
    for k in range(len(lower) - 1, -1, -1):
        x[:, k] /= lower[k, k]
        x[:, :k] -= x[:, k : k + 1] * lower[k, :k]
    return x
