"""Runs a dense Llama over some text in exact arithmetic and collects what its FFNs are given.

A plain causal forward pass, layer by layer, over several chunks of tokens at once. It is written
apart from ``models`` because its results decide the bytes of the demo's routers: see ``exact``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from specmoeoff.demo import exact
from specmoeoff.kernels import widen

if TYPE_CHECKING:
    from specmoeoff.demo.exact import F64

Weights = Mapping[str, NDArray[np.uint16]]


def ffn_inputs(
    weights: Weights, config: Mapping[str, Any], chunks: NDArray[np.int32]
) -> Iterator[F64]:
    """Yield the normed FFN input of one layer after another.

    Args:
        weights: A Hugging Face Llama checkpoint, bfloat16 bits.
        config: Its config.json.
        chunks: Token ids, [chunks, tokens]; each chunk starts at position 0.

    Yields:
        Float64 [chunks * tokens, hidden].
    """
    num_chunks, length = chunks.shape
    x = widen(weights["model.embed_tokens.weight"][chunks.ravel()]).astype(np.float64)
    rotation = exact.cos_sin(_rope_frequencies(config), length)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."

        def load(name: str, prefix: str = prefix) -> F64:
            return widen(weights[f"{prefix}{name}.weight"]).astype(np.float64)

        h = _rms_norm(x, load("input_layernorm"), config["rms_norm_eps"])
        q, k, v = (
            exact.dot(h, load(f"self_attn.{name}_proj"))
            .reshape(num_chunks, length, -1, config["head_dim"])
            .transpose(0, 2, 1, 3)
            for name in "qkv"
        )
        attention = np.concatenate(
            [_attention(q[i], k[i], v[i], rotation) for i in range(num_chunks)]
        )
        x = x + exact.dot(attention, load("self_attn.o_proj"))
        h = _rms_norm(x, load("post_attention_layernorm"), config["rms_norm_eps"])
        yield h
        x = x + _ffn(h, load)


def _rope_frequencies(config: Mapping[str, Any]) -> F64:
    # Decimal's powers are the same everywhere; the C library's need not be.
    theta, size = Decimal(config["rope_theta"]), Decimal(config["head_dim"])
    return np.array([float(theta ** (-2 * i / size)) for i in range(config["head_dim"] // 2)])


def _rms_norm(x: F64, weight: F64, eps: float) -> F64:
    mean_square: F64 = exact.total(x * x) / x.shape[-1]
    return x / np.sqrt(mean_square + eps) * weight


def _rotate(x: F64, rotation: tuple[F64, F64]) -> F64:
    cos, sin = rotation
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def _attention(q: F64, k: F64, v: F64, rotation: tuple[F64, F64]) -> F64:
    """Attend within one chunk: q [H, T, D], k and v [G, T, D] -> [T, H * D]."""
    num_heads, length, head_dim = q.shape
    # A power of two where head_dim is 64, and correctly rounded elsewhere.
    scale = 1.0 / np.sqrt(np.float64(head_dim))
    q, k = _rotate(q, rotation) * scale, _rotate(k, rotation)
    group = num_heads // len(k)
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    hidden = np.triu(np.ones((length, length), bool), 1)
    scores = np.where(hidden, -np.inf, exact.dot(q, k))
    p = exact.exp(scores - scores.max(axis=-1, keepdims=True))
    p = p / exact.total(p)
    return exact.dot(p, v.swapaxes(-1, -2)).transpose(1, 0, 2).reshape(length, -1)


def _ffn(h: F64, load: Callable[[str], F64]) -> F64:
    gate = exact.dot(h, load("mlp.gate_proj"))
    up = exact.dot(h, load("mlp.up_proj"))
    return exact.dot(gate * exact.sigmoid(gate) * up, load("mlp.down_proj"))
