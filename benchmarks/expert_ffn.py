"""kernels.expert_ffn_many beside the roofs of this machine and beside torch.

    python benchmarks/expert_ffn.py [--quick]

One MoE layer: every expert once over its rows. The experts together exceed the caches, so with few
rows each the time is that of reading their weights. torch runs the same three products per expert,
in turn with ours, all in bfloat16 or all in float32; see linear.py. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch

from linear import best_seconds
from roofs import Roofs, measure_roofs
from specmoeoff import kernels

# name: (hidden size K, intermediate size I, experts)
SHAPES = {
    "SmolLM2-8x135M": (576, 1536, 16),
    "TinyLlama-8x1.1B": (2048, 5632, 4),
    "Qwen3-30B-A3B": (2048, 768, 16),
}
ROWS = [1, 2, 4, 8, 16, 64, 256]


def torch_ffn(x: torch.Tensor, experts: list[tuple[torch.Tensor, ...]], rows: int) -> torch.Tensor:
    """Return the layer's output: expert i works on rows [0, rows) with weight 1."""
    out = torch.zeros_like(x)
    linear = torch.nn.functional.linear
    for gate, up, down in experts:
        picked = x[:rows]
        hidden = torch.nn.functional.silu(linear(picked, gate)) * linear(picked, up)
        out[:rows] += linear(hidden, down)
    return out


def random_bits(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Return a random bfloat16 matrix as bits."""
    return rng.integers(0x3C00, 0x3D80, (rows, columns), np.uint16)


class Layer:
    """The experts of one layer in every form, ours and torch's."""

    def __init__(self, k: int, inner: int, count: int) -> None:
        rng = np.random.default_rng(0)
        shapes = ((inner, k), (inner, k), (k, inner))
        self.k = k
        self.experts = [tuple(random_bits(rng, *s) for s in shapes) for _ in range(count)]
        self.quantised = [tuple(map(kernels.quantize_int8, expert)) for expert in self.experts]
        self.halves = [
            tuple(torch.from_numpy(w.view(np.int16)).view(torch.bfloat16) for w in expert)
            for expert in self.experts
        ]
        self.wide = [tuple(w.float() for w in expert) for expert in self.halves]

    def time(self, rows: int, seconds: float) -> list[float]:
        """Return seconds of ours with bfloat16 and int8, torch's with bfloat16 and float32."""
        count = len(self.experts)
        x = np.random.default_rng(1).standard_normal((rows, self.k)).astype(np.float32)
        out = np.zeros_like(x)
        offsets = (np.arange(count + 1) * rows).astype(np.int32)
        ids = np.tile(np.arange(rows, dtype=np.int32), count)
        ones = np.ones(len(ids), np.float32)
        x_torch, x_half = torch.from_numpy(x), torch.from_numpy(x).bfloat16()
        ours = kernels.expert_ffn_many
        return best_seconds(
            [
                lambda: ours(x, self.experts, offsets, ids, ones, out),
                lambda: ours(x, self.quantised, offsets, ids, ones, out),
                lambda: torch_ffn(x_half, self.halves, rows),
                lambda: torch_ffn(x_torch, self.wide, rows),
            ],
            seconds,
        )


def bench_shape(
    name: str, rows_list: list[int], roofs: Roofs, seconds: float
) -> list[dict[str, object]]:
    """Print and return one line per number of rows per expert."""
    k, inner, count = SHAPES[name]
    layer = Layer(k, inner, count)
    records = []
    for rows in rows_list:
        times = layer.time(rows, seconds)
        elements = 3 * k * inner * count
        flops = 2.0 * rows * elements
        record = {
            "shape": name,
            "rows_per_expert": rows,
            "bf16_us": times[0] * 1e6,
            "bf16_gflops": flops / times[0] / 1e9,
            "bf16_gb_per_s": 2 * elements / times[0] / 1e9,
            "bf16_roof": roofs.share(times[0], 2 * elements, flops),
            "int8_roof": roofs.share(times[1], elements, flops),
            "torch_bf16_us": times[2] * 1e6,
            "torch_f32_us": times[3] * 1e6,
            "over_torch_bf16": times[2] / times[0],
            "over_torch_f32": times[3] / times[0],
        }
        records.append(record)
        print(
            f"{name:17} {rows:5} {record['bf16_us']:10.1f} {record['bf16_gb_per_s']:7.1f} "
            f"{record['bf16_gflops']:8.1f} {record['bf16_roof']:6.0%} {record['int8_roof']:6.0%} "
            f"{record['over_torch_bf16']:9.2f} {record['over_torch_f32']:9.2f}",
            flush=True,
        )
    return records


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rows")
    args = parser.parse_args()
    torch.set_num_threads(kernels.num_threads())
    roofs = measure_roofs()
    print(roofs.describe())
    print(
        f"{'shape':17} {'rows':>5} {'us':>10} {'GB/s':>7} {'GFLOP/s':>8} {'roof':>6} {'int8':>6} "
        f"{'over bf16':>9} {'over f32':>9}"
    )
    names = ["SmolLM2-8x135M"] if args.quick else list(SHAPES)
    rows_list = [1, 4, 16, 64] if args.quick else ROWS
    records = []
    for name in names:
        roofs = roofs.best_with(measure_roofs())
        records += bench_shape(name, rows_list, roofs, 0.05 if args.quick else 0.3)
    print(json.dumps({"benchmark": "expert_ffn", "roofs": roofs.as_dict(), "results": records}))


if __name__ == "__main__":
    main()
