"""Mixtral: Llama's attention, and a feed-forward of E experts; a router picks k for each token."""

from __future__ import annotations

from specmoeoff import kernels
from specmoeoff.models.base import F32, I32, TensorSpec, Weights
from specmoeoff.models.llama import Llama


class Mixtral(Llama):
    """A decoder with routed experts: softmax over all, the k likeliest, renormalised."""

    @property
    def num_ffn_experts(self) -> int:
        """Experts per layer."""
        return self.config.num_experts

    def layer_tensors(self, layer: int) -> dict[str, TensorSpec]:
        """Return what Llama has, and ``router`` [E, hidden]."""
        specs = super().layer_tensors(layer)
        specs["router"] = TensorSpec(
            f"model.layers.{layer}.block_sparse_moe.gate.weight",
            (self.config.num_experts, self.config.hidden_size),
            widen=True,
        )
        return specs

    def expert_tensors(self, layer: int, expert: int) -> dict[str, TensorSpec]:
        """Return ``gate``, ``up`` [intermediate, hidden] and ``down`` [hidden, intermediate]."""
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        return self._swiglu(f"{prefix}.w1", f"{prefix}.w3", f"{prefix}.w2")

    def router(self, weights: Weights, h: F32) -> tuple[I32, F32]:
        """Choose experts for h [T, hidden]: ids int32 [T, k] and weights float32 [T, k]."""
        return kernels.route(self._linear(h, weights["router"]), self.config.num_experts_per_tok)
