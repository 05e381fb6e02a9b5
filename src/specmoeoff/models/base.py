"""What the engine asks of a model. A model owns no weight: it names them, and is handed them.

Weights come as dictionaries, canonical name -> array. Matrices are ``kernels.Weight`` as stored
(float32, float16, bfloat16 bits or int8); what a TensorSpec says to widen is float32.
Letters: T tokens, R rows, H query heads, G KV heads, D head size, V vocabulary, k experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from specmoeoff.config import ModelConfig
    from specmoeoff.kernels import Activations, Decoder

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

Weights = Mapping[str, Any]
"""Canonical name -> ``kernels.Weight`` (matrices) or float32 vector (norms and biases)."""

KvPages = tuple[NDArray[Any], NDArray[Any], F32 | None, F32 | None]
"""A layer's k_pages, v_pages, k_scales and v_scales; see ``offload.kv_cache``."""

RopeTables = tuple[F32, F32]
"""cos and sin, each [T, rotary / 2]."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a model needs."""

    name: str
    """Its name in the checkpoint."""
    shape: tuple[int, ...]
    widen: bool = False
    """Whether it is made float32 when loaded: norms, biases and routers, which are small."""


class Model(Protocol):
    """One model: which tensors it needs, and the maths between attention and experts."""

    config: ModelConfig
    activations: Activations
    """What its products, experts included, round their activations to."""

    @property
    def num_ffn_experts(self) -> int:
        """Experts per layer; 1 for a dense model, whose FFN is its expert 0."""

    def global_tensors(self) -> dict[str, TensorSpec]:
        """Return ``embed``, ``norm`` and ``head`` (absent when tied to ``embed``)."""

    def layer_tensors(self, layer: int) -> dict[str, TensorSpec]:
        """Return ``attn_norm q k v o ffn_norm``, ``q_bias`` ... with biases, ``router`` if MoE."""

    def expert_tensors(self, layer: int, expert: int) -> dict[str, TensorSpec]:
        """Return ``gate``, ``up`` [intermediate, hidden] and ``down`` [hidden, intermediate]."""

    def embed(self, weights: Weights, token_ids: I32) -> F32:
        """Return the embeddings x [T, hidden] of token_ids int32 [T]."""

    def rope_tables(self, positions: I32) -> RopeTables:
        """Return cos and sin [T, rotary / 2] of positions int32 [T], attention scaling included."""

    def decoder(self, layers: Sequence[Weights], pages: Sequence[KvPages]) -> Decoder:
        """Return the layers, with their KV pages, as a ``kernels.Decoder``.

        Its passes are ``pre_attention``, attention, ``post_attention`` and ``router``, bit for bit.
        """

    def pre_attention(self, weights: Weights, x: F32, rope: RopeTables) -> tuple[F32, F32, F32]:
        """Norm, project and rotate: x [T, hidden] -> q [T, H, D], k [T, G, D], v [T, G, D]."""

    def post_attention(self, weights: Weights, x: F32, attention: F32) -> F32:
        """Add the O projection of attention [T, H, D] to x IN PLACE; return the FFN's input h."""

    def router(self, weights: Weights, h: F32) -> tuple[I32, F32]:
        """Choose experts for h [T, hidden]: ids int32 [T, k] and weights [T, k]; dense: 0 and 1."""

    def head(self, weights: Weights, x: F32) -> F32:
        """Return logits [R, V] of the rows x [R, hidden], final norm included."""

    def head_best(self, weights: Weights, x: F32) -> tuple[F32, I32]:
        """Return each row's largest logit [R] and its token int32 [R], the lowest among equals."""
