"""Whether a draft may read the target's KV cache instead of keeping one of its own.

It may where each of its layers computes keys and values with the very projections of one of the
target's layers, and rotates them alike. So it is with a dense model that was upcycled to the
target, and with a draft made of some of the target's layers. The residual streams still differ a
little, so what it reads are not quite its own keys and values; they are the target's, which it is
to imitate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from specmoeoff.config import ModelConfig
    from specmoeoff.engine.weights import ModelWeights
    from specmoeoff.kernels import Weight

PROJECTIONS = ("k", "v", "attn_norm", "k_bias", "v_bias")
"""What keys and values are computed with."""


@dataclass(frozen=True)
class SharedDraft:
    """What a draft turned out to have in common with its target once both were loaded."""

    weight_bytes: int
    """Of its weights, those that are the target's."""
    reads_target_kv: bool
    """Whether it needs no KV cache of its own."""
    runtime_bytes: int
    """What the process was counted at before weights were loaded."""


def shared_layers(
    draft: ModelConfig, draft_weights: ModelWeights, target: ModelConfig, weights: ModelWeights
) -> list[int] | None:
    """Return the layer of the target whose keys and values each layer of the draft can read.

    Args:
        draft: The draft's config.
        draft_weights: Loaded beside ``weights``, so that equal matrices are the same object.
        target: The target's config.
        weights: The target's weights.

    Returns:
        Rising layers of the target, one for each of the draft's; None if some layer has none.
    """
    if _kv_shape(draft) != _kv_shape(target):
        return None
    layers: list[int] = []
    for tensors in draft_weights.layers:
        after = layers[-1] + 1 if layers else 0
        found = (
            layer
            for layer in range(after, len(weights.layers))
            if _same_projections(tensors, weights.layers[layer])
        )
        layer = next(found, None)
        if layer is None:
            return None
        layers.append(layer)
    return layers


def _kv_shape(config: ModelConfig) -> tuple[object, ...]:
    """Return what keys and values depend on beside the weights."""
    return (
        config.hidden_size,
        config.num_kv_heads,
        config.head_dim,
        config.rope,
        config.sliding_window,
        config.rms_norm_eps,
    )


def _same_projections(a: Mapping[str, Weight], b: Mapping[str, Weight]) -> bool:
    return all(_same(a.get(name), b.get(name)) for name in PROJECTIONS)


def _same(a: Weight | None, b: Weight | None) -> bool:
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return a is b
    # Vectors are small and not shared, so they are compared.
    return a is b or (a.ndim == b.ndim == 1 and np.array_equal(a, b))
