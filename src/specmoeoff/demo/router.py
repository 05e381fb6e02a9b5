"""Makes a router for experts that have not learned anything to be routed by.

Random directions alone load the experts unevenly, because FFN inputs have a large mean and a few
strong directions. So the directions are whitened on real FFN inputs, made blind to the mean, scaled
to unit deviation, and given small offsets (along that mean, as Mixtral's router has no bias) until
the calibration tokens are spread evenly. Which token goes where stays arbitrary: cache-hit rates
measured on such a router say nothing about a trained one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.demo import exact, noise
from specmoeoff.kernels import to_bfloat16

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from specmoeoff.demo.exact import F64

_RIDGE = 0.05
"""Added to the covariance, as a share of its mean variance: weak directions are mostly noise."""
_BALANCE_ROUNDS = 60
_BALANCE_RATE = 0.1


def balanced_router(
    h: F64, num_experts: int, top_k: int, key: tuple[int, ...]
) -> NDArray[np.uint16]:
    """Return router weights, bfloat16 bits [E, hidden].

    Args:
        h: FFN inputs of the layer on calibration text, [T, hidden].
        num_experts: E.
        top_k: Experts per token, which the balance depends on.
        key: Names the random directions.
    """
    num_tokens, hidden_size = h.shape
    mean = exact.total(h.T)[:, 0] / num_tokens
    directions = noise.centred_sums(num_experts * hidden_size, *key).astype(np.float64)
    w = _whiten(directions.reshape(num_experts, hidden_size), h - mean)
    to_mean = mean / exact.total(mean * mean)
    w = w - exact.dot(w, mean[None]) * to_mean
    w = w / _deviation(exact.dot(w, h))
    offsets = _balance(exact.dot(h, w), exact.dot(h, to_mean[None]), top_k)
    return to_bfloat16((w + offsets[:, None] * to_mean).astype(np.float32))


def _whiten(directions: F64, centred: F64) -> F64:
    covariance = exact.dot(centred.T, centred.T) / len(centred)
    variance = float(exact.total(covariance.diagonal())[0]) / len(covariance)
    covariance[np.diag_indices_from(covariance)] += _RIDGE * variance
    return exact.solve_right(directions, exact.cholesky(covariance))


def _deviation(x: F64) -> F64:
    """Return the standard deviation of each row, kept as a column."""
    centred = x - exact.total(x) / x.shape[-1]
    variance: F64 = exact.total(centred * centred) / x.shape[-1]
    return np.sqrt(variance)


def _balance(logits: F64, strength: F64, top_k: int) -> F64:
    """Find offsets [E] that even out the load: logits [T, E], strength [T, 1] scales an offset."""
    num_tokens, num_experts = logits.shape
    fair = num_tokens * top_k / num_experts
    offsets = np.zeros(num_experts)
    for _ in range(_BALANCE_ROUNDS):
        remaining = logits + strength * offsets
        load = np.zeros(num_experts)
        for _ in range(top_k):
            best = remaining.argmax(axis=1)
            load += np.bincount(best, minlength=num_experts)
            remaining[np.arange(num_tokens), best] = -np.inf
        offsets -= _BALANCE_RATE * (load / fair - 1.0)
    return offsets
