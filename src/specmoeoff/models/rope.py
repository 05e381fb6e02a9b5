"""Rotary position embedding: the frequencies of each scaling rule, and tables for positions.

Every position's row depends on that position alone, whatever else is in the step. Frequencies and
angles are float32, as Transformers has them; the cosine is taken in double and rounded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from specmoeoff.config import ModelConfig, RopeConfig
    from specmoeoff.models.base import F32, I32, RopeTables

F64 = NDArray[np.float64]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


class Rope:
    """The rotary embedding of one model."""

    def __init__(self, config: ModelConfig) -> None:
        self._rope = config.rope
        self._dim = rotary_dim(config)
        self._max_positions = config.max_position_embeddings
        self._inv_freq = inverse_frequencies(config)
        self._scale = attention_factor(config.rope)

    def tables(self, positions: I32) -> RopeTables:
        """Return cos and sin, float32 [T, rotary / 2], for positions int32 [T]."""
        inv_freq = self._inv_freq[None, :]
        if self._rope.rope_type == "dynamic":
            inv_freq = self._dynamic_frequencies(positions)
        angles = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
        scale = self._scale
        return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(
            np.float32
        )

    def _dynamic_frequencies(self, positions: I32) -> F32:
        """Return the frequencies [T, rotary / 2] of NTK scaling by current length.

        The length that counts is a token's own position + 1. This is what Transformers does while
        it decodes; a prompt beyond the model's limit it turns as if all of it stood at its end,
        which would make a token depend on how the prompt was cut into chunks.
        """
        length = np.maximum(positions.astype(np.float64) + 1, self._max_positions)
        factor = float(self._rope.parameter("factor"))
        stretch = factor * length / self._max_positions - (factor - 1)
        bases = self._rope.theta * stretch ** (self._dim / (self._dim - 2))
        return _frequencies(bases[:, None], self._dim)


def rotary_dim(config: ModelConfig) -> int:
    """Return how many of a head's dimensions are rotated."""
    return int(config.head_dim * float(config.rope.parameter("partial_rotary_factor", 1.0)))


def inverse_frequencies(config: ModelConfig) -> F32:
    """Return radians per position, float32 [rotary / 2], with the scaling rule applied."""
    rope, dim = config.rope, rotary_dim(config)
    plain = _frequencies(np.float64(rope.theta), dim)
    if rope.rope_type == "linear":
        plain = plain / float(rope.parameter("factor"))
    elif rope.rope_type == "llama3":
        plain = _llama3(plain, rope)
    elif rope.rope_type == "yarn":
        plain = _yarn(plain, rope, dim)
    return plain


def attention_factor(rope: RopeConfig) -> float:
    """Return what cos and sin are multiplied by; only yarn has a factor other than 1."""
    if rope.rope_type != "yarn":
        return 1.0
    stated = rope.parameter("attention_factor")
    if stated is not None:
        return float(stated)
    factor = float(rope.parameter("factor"))
    mscale, mscale_all_dim = rope.parameter("mscale"), rope.parameter("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _mscale(factor, float(mscale)) / _mscale(factor, float(mscale_all_dim))
    return _mscale(factor, 1.0)


def _frequencies(theta: F64 | np.float64, dim: int) -> F32:
    """Return theta ** (-2i / dim) for i < dim / 2, rounded to float32 where Transformers rounds.

    At position 100,000 one unit in the last place is a hundredth of a radian.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    bases: F32 = (theta ** exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / bases


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(plain: F32, rope: RopeConfig) -> F32:
    """Leave short waves, divide long ones by the factor, blend those between."""
    factor = float(rope.parameter("factor"))
    low, high = float(rope.parameter("low_freq_factor")), float(rope.parameter("high_freq_factor"))
    turns = float(rope.parameter("original_max_position_embeddings")) * plain / (2 * math.pi)
    blend: F32 = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (blend + (1 - blend) / factor)


def _yarn(plain: F32, rope: RopeConfig, dim: int) -> F32:
    """Blend stretched and plain frequencies by how many turns fit the original context."""
    original = float(rope.parameter("original_max_position_embeddings"))

    def dimension_of(turns: float) -> float:
        ratio = math.log(original / (turns * 2 * math.pi))
        return dim * ratio / (2 * math.log(rope.theta))

    low = dimension_of(float(rope.parameter("beta_fast") or 32))
    high = dimension_of(float(rope.parameter("beta_slow") or 1))
    if rope.parameter("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    stretched: F32 = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return plain * (1 - stretched) + plain / float(rope.parameter("factor")) * stretched
