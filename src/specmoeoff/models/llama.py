"""The Llama family: RMSNorm, grouped-query attention with RoPE, a SwiGLU feed-forward.

Mistral is the same maths; its sliding window is part of the config and applied by attention. Knows
shapes and names only: weights, KV cache and the experts' place in memory are the engine's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from specmoeoff import kernels
from specmoeoff.kernels import Decoder, DecoderShape
from specmoeoff.models.base import F32, I32, KvPages, RopeTables, TensorSpec, Weights
from specmoeoff.models.rope import Rope

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.config import ModelConfig
    from specmoeoff.kernels import Activations, Weight


class Llama:
    """A dense decoder. Its feed-forward is expert 0 of every layer, with weight 1."""

    def __init__(self, config: ModelConfig, activations: Activations = "float32") -> None:
        self.config = config
        self.activations = activations
        self._rope = Rope(config)

    @property
    def num_ffn_experts(self) -> int:
        """1: the feed-forward itself."""
        return 1

    def global_tensors(self) -> dict[str, TensorSpec]:
        """Return ``embed``, ``norm`` and ``head`` (absent when tied to ``embed``)."""
        table = (self.config.vocab_size, self.config.hidden_size)
        specs = {
            "embed": TensorSpec("model.embed_tokens.weight", table),
            "norm": TensorSpec("model.norm.weight", (self.config.hidden_size,), widen=True),
        }
        if not self.config.tie_word_embeddings:
            specs["head"] = TensorSpec("lm_head.weight", table)
        return specs

    def layer_tensors(self, layer: int) -> dict[str, TensorSpec]:
        """Return ``attn_norm q k v o ffn_norm``, with biases ``q_bias`` ... ``o_bias`` too."""
        config, prefix = self.config, f"model.layers.{layer}"
        hidden = config.hidden_size
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        shapes = {
            "q": (wide, hidden),
            "k": (narrow, hidden),
            "v": (narrow, hidden),
            "o": (hidden, wide),
        }
        specs = {
            "attn_norm": TensorSpec(f"{prefix}.input_layernorm.weight", (hidden,), widen=True),
            "ffn_norm": TensorSpec(
                f"{prefix}.post_attention_layernorm.weight", (hidden,), widen=True
            ),
        }
        for name, shape in shapes.items():
            specs[name] = TensorSpec(f"{prefix}.self_attn.{name}_proj.weight", shape)
            if config.attention_bias:
                specs[f"{name}_bias"] = TensorSpec(
                    f"{prefix}.self_attn.{name}_proj.bias", shape[:1], widen=True
                )
        return specs

    def expert_tensors(self, layer: int, expert: int) -> dict[str, TensorSpec]:
        """Return ``gate``, ``up`` [intermediate, hidden] and ``down`` [hidden, intermediate]."""
        prefix = f"model.layers.{layer}.mlp"
        return self._swiglu(f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj")

    def embed(self, weights: Weights, token_ids: I32) -> F32:
        """Return the embeddings x [T, hidden] of token_ids int32 [T]."""
        return kernels.embedding(token_ids, weights["embed"])

    def rope_tables(self, positions: I32) -> RopeTables:
        """Return cos and sin [T, rotary / 2] of positions int32 [T], attention scaling included."""
        return self._rope.tables(positions)

    def decoder(self, layers: Sequence[Weights], pages: Sequence[KvPages]) -> Decoder:
        """Return the layers, with their KV pages, as a ``kernels.Decoder``."""
        config = self.config
        shape = DecoderShape(
            hidden=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_experts=self.num_ffn_experts,
            top_k=1 if self.num_ffn_experts == 1 else config.num_experts_per_tok,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
            sliding_window=config.sliding_window or 0,
            activations=self.activations,
        )
        return Decoder(shape, layers, pages)

    def pre_attention(self, weights: Weights, x: F32, rope: RopeTables) -> tuple[F32, F32, F32]:
        """Norm, project and rotate: x [T, hidden] -> q [T, H, D], k [T, G, D], v [T, G, D]."""
        config = self.config
        normed = kernels.rms_norm(x, weights["attn_norm"], config.rms_norm_eps)
        flat_q, flat_k, flat_v = kernels.linear_many(
            normed,
            [weights[name] for name in ("q", "k", "v")],
            [weights.get(name) for name in ("q_bias", "k_bias", "v_bias")],
            activations=self.activations,
        )
        q = flat_q.reshape(len(x), config.num_heads, config.head_dim)
        k = flat_k.reshape(len(x), config.num_kv_heads, config.head_dim)
        v = flat_v.reshape(len(x), config.num_kv_heads, config.head_dim)
        kernels.rope(q, *rope)
        kernels.rope(k, *rope)
        return q, k, v

    def post_attention(self, weights: Weights, x: F32, attention: F32) -> F32:
        """Add the O projection of attention [T, H, D] to x IN PLACE; return the FFN's input h."""
        x += self._linear(attention.reshape(len(x), -1), weights["o"], weights.get("o_bias"))
        return kernels.rms_norm(x, weights["ffn_norm"], self.config.rms_norm_eps)

    def router(self, weights: Weights, h: F32) -> tuple[I32, F32]:
        """Send every row to expert 0 with weight 1: ids int32 [T, 1], weights float32 [T, 1]."""
        return np.zeros((len(h), 1), np.int32), np.ones((len(h), 1), np.float32)

    def head(self, weights: Weights, x: F32) -> F32:
        """Return logits [R, V] of the rows x [R, hidden], final norm included."""
        return self._linear(self._final_norm(weights, x), self._head_table(weights))

    def head_best(self, weights: Weights, x: F32) -> tuple[F32, I32]:
        """Return each row's largest logit [R] and its token int32 [R], the lowest among equals."""
        values, token_ids = kernels.linear_top(
            self._final_norm(weights, x), self._head_table(weights), 1, activations=self.activations
        )
        return values[:, 0], token_ids[:, 0]

    def _final_norm(self, weights: Weights, x: F32) -> F32:
        return kernels.rms_norm(x, weights["norm"], self.config.rms_norm_eps)

    def _head_table(self, weights: Weights) -> Weight:
        table: Weight = weights["embed" if self.config.tie_word_embeddings else "head"]
        return table

    def _linear(self, x: F32, weight: Weight, bias: F32 | None = None) -> F32:
        return kernels.linear(x, weight, bias, activations=self.activations)

    def _swiglu(self, gate: str, up: str, down: str) -> dict[str, TensorSpec]:
        hidden, intermediate = self.config.hidden_size, self.config.intermediate_size
        return {
            "gate": TensorSpec(f"{gate}.weight", (intermediate, hidden)),
            "up": TensorSpec(f"{up}.weight", (intermediate, hidden)),
            "down": TensorSpec(f"{down}.weight", (hidden, intermediate)),
        }
