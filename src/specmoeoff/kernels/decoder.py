"""The layers of a decoder as two native calls each: up to the experts, and the experts.

What the calls compute is ``rms_norm``, ``linear_many``, ``rope``, ``append_kv``,
``chunked_attention``, ``linear``, ``rms_norm``, ``linear`` and ``route``, then ``expert_ffn_many``,
bit for bit. Weights and pages are checked once, when the decoder is made, so that a layer of few
tokens costs its arithmetic and not its arguments.

Letters: T tokens, H query heads, G KV heads, D head size, E experts, k experts a token, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.kernels import _native

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from specmoeoff.kernels.weights import F32, I32, Activations, Array, Weight

    KvPages = tuple[Array, Array, F32 | None, F32 | None]
    ExpertWeights = tuple[Weight, Weight, Weight]


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that all layers of a decoder have in common."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    """Experts per layer; 1 for a dense decoder, which has no router."""
    top_k: int
    """Experts per token."""
    eps: float
    """Of the norms."""
    scale: float
    """What attention's scores are multiplied by."""
    sliding_window: int = 0
    """Tokens that attention looks back; 0 for all."""
    activations: Activations = "float32"
    """What products round their activations to."""


class Decoder:
    """Layers whose weights and KV pages stay where they are.

    Args:
        shape: What the layers have in common.
        layers: For each layer ``attn_norm`` and ``ffn_norm``, float32 [hidden]; the matrices ``q``
            [H * D, hidden], ``k`` and ``v`` [G * D, hidden], ``o`` [hidden, H * D]; ``router``
            [E, hidden] unless it is dense; and, for any matrix, ``NAME_bias``.
        pages: For each layer k_pages [num_pages, G, D, P], v_pages [num_pages, G, P, D] and, for
            int8, their scales [num_pages, G, P], else None twice.

    Raises:
        TypeError: An array has the wrong dtype; the message names it.
        ValueError: An array has the wrong shape or layout; the message names it.
    """

    def __init__(
        self,
        shape: DecoderShape,
        layers: Sequence[Mapping[str, Weight]],
        pages: Sequence[KvPages],
    ) -> None:
        self.shape = shape
        self.num_layers = len(layers)
        self._native = _native.Decoder(
            layers=layers,
            pages=pages,
            hidden=shape.hidden,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            eps=shape.eps,
            scale=shape.scale,
            sliding_window=shape.sliding_window,
            bfloat16=shape.activations == "bfloat16",
        )

    def set_experts(self, experts: Sequence[Sequence[ExpertWeights]] | None) -> None:
        """Say where all experts are, [L][E] of (gate, up, down), or that not all are in memory.

        Not while a pass runs. They must stay where they are until this is called again.

        Raises:
            TypeError: As for the decoder.
            ValueError: As for the decoder.
        """
        self._native.set_experts(experts)

    def begin(
        self,
        x: F32,
        rope: tuple[F32, F32],
        slots: I32,
        page_tables: I32,
        q_offsets: I32,
        kv_lens: I32,
    ) -> DecoderPass:
        """Begin a pass of T tokens over the layers.

        Args:
            x: The residual stream [T, hidden], changed in place by every layer.
            rope: cos and sin [T, rotary / 2].
            slots: Where the tokens' keys and values go, as in ``append_kv``.
            page_tables: As in ``chunked_attention``, like the two that follow.
            q_offsets: [B + 1]
            kv_lens: [B], the new tokens included.

        Raises:
            TypeError: An array has the wrong dtype; the message names it.
            ValueError: An array has the wrong shape, layout or values; the message names it.
        """
        return DecoderPass(
            self.shape, self._native, x, rope, slots, page_tables, q_offsets, kv_lens
        )


class DecoderPass:
    """One pass. After ``attend``, ``h`` and the routing are those of that layer."""

    def __init__(
        self,
        shape: DecoderShape,
        decoder: _native.Decoder,
        x: F32,
        rope: tuple[F32, F32],
        slots: I32,
        page_tables: I32,
        q_offsets: I32,
        kv_lens: I32,
    ) -> None:
        num_tokens = len(x)
        entries = num_tokens * shape.top_k
        self.h: F32 = np.empty((num_tokens, shape.hidden), np.float32)
        """The input of the layer's experts, [T, hidden]."""
        self.rows: I32 = np.empty(entries, np.int32)
        """The tokens of each expert, expert after expert, rising, [T * k]."""
        self.row_weights: F32 = np.empty(entries, np.float32)
        """With what weight, [T * k]."""
        self.offsets: I32 = np.zeros(shape.num_experts + 1, np.int32)
        """Where in ``rows`` each expert begins, [E + 1]."""
        workspace = np.empty(num_tokens * decoder.row_floats, np.float32)
        self._native = _native.DecoderPass(
            decoder,
            x,
            *rope,
            slots,
            page_tables,
            q_offsets,
            kv_lens,
            workspace,
            self.h,
            self.rows,
            self.row_weights,
            self.offsets,
        )

    def attend(self, layer: int) -> None:
        """Do a layer up to its experts: x has attention's output added; routing is done."""
        self._native.attend(layer)

    def run_experts(self, layer: int) -> None:
        """Add the output of a layer's routed experts to x; the decoder knows where they are."""
        self._native.experts(layer)
