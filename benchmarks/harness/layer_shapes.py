"""The feed-forward shapes that kernels are measured at, and weights to fill them with."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from specmoeoff.offload.arena import Arena

if TYPE_CHECKING:
    from collections.abc import Callable

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
    """Return that many weights of equal values, each in memory of its own.

    They lie one after the other in an arena that is held, so in huge pages, as the engine's experts
    do.

    Args:
        form: A matrix, one of the quantised weights, or a tuple of such.
        count: How many.
    """
    arena = Arena(count * _padded_bytes(form))
    arena.hold(arena.num_bytes)
    at = 0

    def place(array: NDArray[Any]) -> NDArray[Any]:
        nonlocal at
        placed = arena.bytes[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
        placed[...] = array
        at += _padded_bytes(array)
        return placed

    return [_placed(form, place) for _ in range(count)]


def _placed(form: Form, place: Callable[[NDArray[Any]], NDArray[Any]]) -> Form:
    """Return the form with every array of it placed."""
    if isinstance(form, np.ndarray):
        return place(form)
    if isinstance(form, tuple):
        return tuple(_placed(part, place) for part in form)
    return replace(form, **{f.name: _placed(getattr(form, f.name), place) for f in fields(form)})


def _padded_bytes(form: Any) -> int:
    """Return the bytes of a form, each array in whole cache lines."""
    if isinstance(form, np.ndarray):
        return -(-form.nbytes // 64) * 64
    parts = form if isinstance(form, tuple) else [getattr(form, f.name) for f in fields(form)]
    return sum(_padded_bytes(part) for part in parts)


def random_bfloat16(rng: np.random.Generator, n: int, k: int) -> NDArray[np.uint16]:
    """Return a matrix [n, k] of bfloat16 bits: magnitudes of 1/128 to 1/16, either sign."""
    magnitudes = rng.integers(0x3C00, 0x3D80, (n, k), np.uint16)
    return magnitudes | rng.integers(0, 2, (n, k), np.uint16) << np.uint16(15)
