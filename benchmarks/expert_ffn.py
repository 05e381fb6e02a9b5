"""kernels.expert_ffn_many beside the roofs of this machine and beside torch.

    python benchmarks/expert_ffn.py [--quick] [--json FILE]

One MoE layer: every expert once over its rows. The experts together exceed the caches, so with few
rows each the time is that of reading their weights. torch runs the same three products per expert,
all in bfloat16 or all in float32. What the columns mean is printed above them; see
harness/kernel_benchmark.py. The last line is JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from harness.kernel_benchmark import (
    MANY_ROWS,
    ROUNDED,
    TORCH_BF16,
    TORCH_F32,
    Call,
    kernel_benchmark,
)
from harness.layer_shapes import copies, copies_beyond_caches, random_bfloat16
from specmoeoff import kernels

if TYPE_CHECKING:
    from specmoeoff.kernels import Activations, Weight

    Expert = tuple[Weight, Weight, Weight]


def torch_ffn(x: torch.Tensor, experts: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Return the layer's output, [rows, K]: every expert works on every row, with weight 1."""
    out = torch.zeros_like(x)
    linear = torch.nn.functional.linear
    for gate, up, down in experts:
        out += linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)
    return out


class Layer:
    """The experts of one layer in every form, ours and torch's."""

    def __init__(self, k: int, inner: int) -> None:
        self.k = k
        self.elements = 3 * k * inner
        rng = np.random.default_rng(0)
        gate, up, down = (
            random_bfloat16(rng, *shape) for shape in ((inner, k), (inner, k), (k, inner))
        )
        matrices = gate, up, down
        forms: dict[str, Expert] = {
            "bf16": matrices,
            "int8": tuple(kernels.quantize_int8(w) for w in matrices),
            "int8/32": tuple(kernels.quantize_int8(w, 32) for w in matrices),
            "int4/32": tuple(kernels.quantize_int4(w, 32) for w in matrices),
        }
        count = max(copies_beyond_caches(num_bytes(expert)) for expert in forms.values())
        self.experts = {name: copies(expert, count) for name, expert in forms.items()}
        self.halves = [
            tuple(torch.from_numpy(w.view(np.int16)).view(torch.bfloat16) for w in expert)
            for expert in self.experts["bf16"]
        ]
        self.wide = [tuple(w.float() for w in expert) for expert in self.halves]

    def count(self, rows: int) -> int:
        """Return how many experts take part: a few where reading them costs next to nothing."""
        count = len(self.wide)
        return max(1, count // 4) if rows >= MANY_ROWS else count

    def flops(self, rows: int) -> float:
        """Return the operations of the layer."""
        return 2.0 * rows * self.elements * self.count(rows)

    def calls(self, rows: int) -> dict[str, Call]:
        """Return ours by form, ours with rounded activations, and torch's two."""
        count = self.count(rows)
        x = np.random.default_rng(1).standard_normal((rows, self.k)).astype(np.float32)
        out = np.zeros_like(x)
        offsets = (np.arange(count + 1) * rows).astype(np.int32)
        ids = np.tile(np.arange(rows, dtype=np.int32), count)
        ones = np.ones(len(ids), np.float32)

        def ours(form: str, activations: Activations) -> Call:
            experts = self.experts[form][:count]
            return Call(
                lambda: kernels.expert_ffn_many(
                    x, experts, offsets, ids, ones, out, activations=activations
                ),
                count * num_bytes(experts[0]),
            )

        def theirs(x: torch.Tensor, experts: list[tuple[torch.Tensor, ...]]) -> Call:
            return Call(
                lambda: torch_ffn(x, experts[:count]), count * self.elements * x.element_size()
            )

        return {
            **{form: ours(form, "float32") for form in self.experts},
            **{ROUNDED[form]: ours(form, "bfloat16") for form in self.experts},
            TORCH_BF16: theirs(torch.from_numpy(x).bfloat16(), self.halves),
            TORCH_F32: theirs(torch.from_numpy(x), self.wide),
        }


def num_bytes(expert: Expert) -> int:
    """Return the bytes of an expert, scales included."""
    return sum(weight.nbytes for weight in expert)


if __name__ == "__main__":
    kernel_benchmark("expert_ffn", __doc__, Layer, None)
