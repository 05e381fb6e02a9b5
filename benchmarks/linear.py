"""kernels.linear beside the roofs of this machine and beside torch, at known models' shapes.

    python benchmarks/linear.py [--quick] [--json FILE]

Every form of weights, ours and torch's, rotates through more memory than the caches hold. What the
columns mean is printed above them; see harness/kernel_benchmark.py. The last line is JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from harness.kernel_benchmark import ROUNDED, TORCH_BF16, TORCH_F32, Call, kernel_benchmark
from harness.layer_shapes import copies, copies_beyond_caches, random_bfloat16
from harness.turns import rotating
from specmoeoff import kernels

if TYPE_CHECKING:
    from specmoeoff.kernels import Weight


class Weights:
    """One [N, K] weight in every form, as many copies of each as leave the caches."""

    def __init__(self, k: int, n: int) -> None:
        self.shape = n, k
        bits = random_bfloat16(np.random.default_rng(0), n, k)
        forms: dict[str, Weight] = {
            "bf16": bits,
            "int8": kernels.quantize_int8(bits),
            "int8/32": kernels.quantize_int8(bits, 32),
            "int4/32": kernels.quantize_int4(bits, 32),
        }
        self.forms = {
            name: copies(form, copies_beyond_caches(form.nbytes)) for name, form in forms.items()
        }
        halves = [torch.from_numpy(w.view(np.int16)) for w in self.forms["bf16"]]
        self.halves = [half.view(torch.bfloat16) for half in halves]
        self.wide = [half.float() for half in self.halves[: copies_beyond_caches(4 * n * k)]]

    def flops(self, rows: int) -> float:
        """Return the operations of one product."""
        return 2.0 * rows * self.shape[0] * self.shape[1]

    def calls(self, rows: int) -> dict[str, Call]:
        """Return ours by form, ours with rounded activations, and torch's two."""
        n, k = self.shape
        x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
        out = np.empty((rows, n), np.float32)
        x_wide, x_half = torch.from_numpy(x), torch.from_numpy(x).bfloat16()
        theirs = torch.nn.functional.linear

        def ours(weight: Weight) -> None:
            kernels.linear(x, weight, out=out)

        def rounded(weight: Weight) -> None:
            kernels.linear(x, weight, out=out, activations="bfloat16")

        calls = {}
        for name, weights in self.forms.items():
            calls[name] = Call(rotating(ours, weights), weights[0].nbytes)
            calls[ROUNDED[name]] = Call(rotating(rounded, weights), weights[0].nbytes)
        calls[TORCH_BF16] = Call(rotating(lambda w: theirs(x_half, w), self.halves), 2 * n * k)
        calls[TORCH_F32] = Call(rotating(lambda w: theirs(x_wide, w), self.wide), 4 * n * k)
        return calls


if __name__ == "__main__":
    kernel_benchmark("linear", __doc__, Weights, None)
