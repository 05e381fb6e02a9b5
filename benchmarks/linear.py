"""kernels.linear beside the roofs of this machine and beside torch.

    python benchmarks/linear.py [--quick]

Weights rotate through more memory than the caches hold, so few rows read RAM as a streamed model
does. A percentage is the time the nearer roof allows (bytes at the measured read bandwidth, or
FLOPs at the measured float32 multiply-add rate) over the time taken. Each figure is the best of
several turns, ours and torch's alternating. "over f32" is torch's time with float32 weights and
activations over ours with bfloat16 weights and float32 activations; "over bf16" is torch's with
both in bfloat16, which rounds activations and may use the CPU's bfloat16 dot product. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from roofs import Roofs, measure_roofs
from specmoeoff import kernels

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = {
    "SmolLM2": (576, 1536),
    "TinyLlama": (2048, 5632),
    "Mixtral": (4096, 14336),
    "Qwen3-30B-A3B": (2048, 768),
}
ROWS = [1, 2, 4, 8, 16, 32, 64, 256, 1024]
ROTATED_BYTES = 128 << 20


def best_seconds(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Return the best time of each call; the calls take turns for about ``seconds`` each."""
    best = [float("inf")] * len(calls)
    deadline = time.perf_counter() + seconds * len(calls)
    turns = 0
    while turns < 3 or time.perf_counter() < deadline:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
        turns += 1
    return best


def rotating(function: Callable[[int], object], count: int) -> Callable[[], object]:
    """Call ``function`` with 0, 1, ... count - 1, 0, ... in turn."""
    state = [0]

    def call() -> object:
        state[0] = (state[0] + 1) % count
        return function(state[0])

    return call


class Weights:
    """Copies of one [N, K] weight in every form, ours and torch's."""

    def __init__(self, n: int, k: int) -> None:
        copies = max(1, -(-ROTATED_BYTES // (2 * n * k)))
        rng = np.random.default_rng(0)
        self.bits = rng.integers(0x3C00, 0x3F80, (copies, n, k), np.uint16)
        self.quantised = [kernels.quantize_int8(w) for w in self.bits]
        self.in_torch = torch.from_numpy(self.bits.view(np.int16)).view(torch.bfloat16)
        self.wide = self.in_torch[: max(1, copies // 2)].float()

    def time(self, rows: int, seconds: float) -> list[float]:
        """Return seconds of ours with bfloat16 and int8, torch's with bfloat16 and float32."""
        copies, n, k = self.bits.shape
        x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
        out = np.empty((rows, n), np.float32)
        x_torch, x_half = torch.from_numpy(x), torch.from_numpy(x).bfloat16()
        linear = torch.nn.functional.linear
        return best_seconds(
            [
                rotating(lambda i: kernels.linear(x, self.bits[i], out=out), copies),
                rotating(lambda i: kernels.linear(x, self.quantised[i], out=out), copies),
                rotating(lambda i: linear(x_half, self.in_torch[i]), copies),
                rotating(lambda i: linear(x_torch, self.wide[i]), len(self.wide)),
            ],
            seconds,
        )


def bench_shape(
    name: str, rows_list: list[int], roofs: Roofs, seconds: float
) -> list[dict[str, object]]:
    """Print and return one line per number of rows for a K x N shape."""
    k, n = SHAPES[name]
    weights = Weights(n, k)
    records = []
    for rows in rows_list:
        times = weights.time(rows, seconds)
        flops = 2.0 * rows * n * k
        record = {
            "shape": name,
            "rows": rows,
            "bf16_us": times[0] * 1e6,
            "bf16_gflops": flops / times[0] / 1e9,
            "bf16_gb_per_s": 2 * n * k / times[0] / 1e9,
            "bf16_roof": roofs.share(times[0], 2 * n * k, flops),
            "int8_roof": roofs.share(times[1], n * k, flops),
            "int8_speedup": times[0] / times[1],
            "torch_bf16_us": times[2] * 1e6,
            "torch_f32_us": times[3] * 1e6,
            "over_torch_bf16": times[2] / times[0],
            "over_torch_f32": times[3] / times[0],
        }
        records.append(record)
        print(
            f"{name:14} {rows:5} {record['bf16_us']:10.1f} {record['bf16_gb_per_s']:7.1f} "
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
        f"{'shape':14} {'rows':>5} {'us':>10} {'GB/s':>7} {'GFLOP/s':>8} {'roof':>6} {'int8':>6} "
        f"{'over bf16':>9} {'over f32':>9}"
    )
    names = ["SmolLM2", "TinyLlama"] if args.quick else list(SHAPES)
    rows_list = [1, 4, 16, 64] if args.quick else ROWS
    records = []
    for name in names:
        roofs = roofs.best_with(measure_roofs())
        records += bench_shape(name, rows_list, roofs, 0.05 if args.quick else 0.2)
    print(json.dumps({"benchmark": "linear", "roofs": roofs.as_dict(), "results": records}))


if __name__ == "__main__":
    main()
