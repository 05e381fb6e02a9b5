"""The feed-forward shapes that kernels are measured at, and weights to fill them with."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Form = TypeVar("Form")

SHAPES = {
    "SmolLM2": (576, 1536),
    "TinyLlama": (2048, 5632),
    "Mixtral": (4096, 14336),
    "Qwen3-30B-A3B": (2048, 768),
}
"""Hidden size K and intermediate size I; the last two are of one expert."""

BEYOND_CACHES_BYTES = 128 << 20
"""Weights used in turn are as large as this together, so that few rows read RAM, as a streamed
model does. Change it for a CPU with more cache than half of it."""


def copies_beyond_caches(num_bytes: int) -> int:
    """Return how many matrices of that size leave the caches together."""
    return -(-BEYOND_CACHES_BYTES // num_bytes)


def copies(form: Form, count: int) -> list[Form]:
    """Return that many weights of equal values, each in memory of its own."""
    return [copy.deepcopy(form) for _ in range(count)]


def random_bfloat16(rng: np.random.Generator, n: int, k: int) -> NDArray[np.uint16]:
    """Return a matrix [n, k] of bfloat16 bits: magnitudes of 1/128 to 1/16, either sign."""
    magnitudes = rng.integers(0x3C00, 0x3D80, (n, k), np.uint16)
    return magnitudes | rng.integers(0, 2, (n, k), np.uint16) << np.uint16(15)
