"""The slow twin of the engine: one sequence, all weights in memory, no batching, no streaming."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from specmoeoff import kernels
from specmoeoff.models import Model, TensorSpec, build_model, parse_config
from specmoeoff.offload.checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

F32 = NDArray[np.float32]
Loaded = dict[str, Any]

PAGE_SIZE = 16


class PlainForward:
    """A whole model in memory, fed any number of tokens at a time."""

    def __init__(self, directory: Path, activations: kernels.Activations = "float32") -> None:
        self.config = parse_config(directory)
        self.model: Model = build_model(self.config, activations)
        checkpoint = Checkpoint.open(directory)
        layers = range(self.config.num_layers)
        self.globals = _load(checkpoint, self.model.global_tensors())
        self.layers = [_load(checkpoint, self.model.layer_tensors(i)) for i in layers]
        self.experts = [
            [
                _load(checkpoint, self.model.expert_tensors(i, expert))
                for expert in range(self.model.num_ffn_experts)
            ]
            for i in layers
        ]
        self.reset()

    def reset(self, max_len: int = 512) -> None:
        """Forget the sequence and make room for ``max_len`` tokens, in float32 pages."""
        pages, config = -(-max_len // PAGE_SIZE), self.config
        shape = (config.num_layers, pages, config.num_kv_heads)
        self._k = np.zeros((*shape, config.head_dim, PAGE_SIZE), np.float32)
        self._v = np.zeros((*shape, PAGE_SIZE, config.head_dim), np.float32)
        self._kv_len = 0

    def logits(self, token_ids: Sequence[int]) -> F32:
        """Append tokens to the sequence and return the logits after each, [T, V]."""
        ids = np.asarray(token_ids, np.int32)
        positions = np.arange(self._kv_len, self._kv_len + len(ids), dtype=np.int32)
        self._kv_len += len(ids)
        rope = self.model.rope_tables(positions)
        x = self.model.embed(self.globals, ids)
        for layer, weights in enumerate(self.layers):
            q, k, v = self.model.pre_attention(weights, x, rope)
            attention = self._attend(layer, q, k, v, positions)
            h = self.model.post_attention(weights, x, attention)
            self._add_ffn(layer, h, x)
        return self.model.head(self.globals, x)

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Return the ``num_tokens`` likeliest tokens after a prompt, one by one."""
        self.reset(len(prompt) + num_tokens)
        logits = self.logits(prompt)
        tokens: list[int] = []
        for _ in range(num_tokens):
            tokens.append(int(logits[-1].argmax()))
            logits = self.logits(tokens[-1:])
        return tokens

    def _attend(self, layer: int, q: F32, k: F32, v: F32, positions: NDArray[np.int32]) -> F32:
        kernels.append_kv(k, v, self._k[layer], self._v[layer], positions)
        return kernels.chunked_attention(
            q,
            self._k[layer],
            self._v[layer],
            np.arange(self._k.shape[1], dtype=np.int32)[None, :],
            np.array([0, len(q)], np.int32),
            np.array([self._kv_len], np.int32),
            self.config.head_dim**-0.5,
            sliding_window=self.config.sliding_window or 0,
        )

    def _add_ffn(self, layer: int, h: F32, x: F32) -> None:
        """Add to x what the chosen experts make of h, expert by expert."""
        expert_ids, expert_weights = self.model.router(self.layers[layer], h)
        rows, offsets, row_weights = [], [0], []
        for expert in range(self.model.num_ffn_experts):
            row, choice = np.nonzero(expert_ids == expert)
            rows.append(row)
            row_weights.append(expert_weights[row, choice])
            offsets.append(offsets[-1] + len(row))
        kernels.expert_ffn_many(
            h,
            [(e["gate"], e["up"], e["down"]) for e in self.experts[layer]],
            np.array(offsets, np.int32),
            np.concatenate(rows).astype(np.int32),
            np.concatenate(row_weights).astype(np.float32),
            x,
            activations=self.model.activations,
        )


def _load(checkpoint: Checkpoint, specs: dict[str, TensorSpec]) -> Loaded:
    loaded: Loaded = {}
    for name, spec in specs.items():
        checkpoint.require(spec.name, spec.shape)
        array = checkpoint.read(spec.name)
        loaded[name] = kernels.widen(array) if spec.widen else array
    return loaded
