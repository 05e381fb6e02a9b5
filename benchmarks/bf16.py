"""Measures products with activations rounded to bfloat16 beside those with float32 activations.

Weights are bfloat16. Shapes of the demo's models (its LM head too) and of a 1B model; rows from one
sequence to a large batch. The two take turns, and the best time of each counts, so busy neighbours
disturb the ratio little. On a target without an instruction for bfloat16 the ratio is about 1.

    python benchmarks/bf16.py
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from harness.machine import machine
from harness.turns import best_seconds
from specmoeoff import kernels

if TYPE_CHECKING:
    from specmoeoff.kernels import Activations

SHAPES = [(576, 576), (49152, 576), (1536, 576), (2048, 5632)]  # N, K
ACTIVATIONS: tuple[Activations, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Measured:
    """Best seconds of one product [rows, k] @ [n, k]^T, with each kind of activations."""

    n: int
    k: int
    rows: int
    float32_s: float
    bfloat16_s: float

    @property
    def ratio(self) -> float:
        """How many times as fast bfloat16 activations are."""
        return self.float32_s / self.bfloat16_s

    @property
    def multiply_adds(self) -> int:
        """Of one product."""
        return self.rows * self.n * self.k


def measure(n: int, k: int, rows: int, budget_s: float) -> Measured:
    """Time both products of random operands."""
    rng = np.random.default_rng(0)
    weight = kernels.to_bfloat16(rng.standard_normal((n, k)).astype(np.float32))
    x = rng.standard_normal((rows, k)).astype(np.float32)
    out = np.empty((rows, n), np.float32)
    calls = [lambda a=a: kernels.linear(x, weight, out=out, activations=a) for a in ACTIVATIONS]
    return Measured(n, k, rows, *best_seconds(calls, budget_s / len(calls)))


def show(results: list[Measured]) -> None:
    """Print a table."""
    table = Table("N x K", "rows", "float32 us", "bfloat16 us", "ratio", "Gmadd/s", "GB/s")
    for m in results:
        table.add_row(
            f"{m.n} x {m.k}",
            str(m.rows),
            f"{m.float32_s * 1e6:.0f}",
            f"{m.bfloat16_s * 1e6:.0f}",
            f"{m.ratio:.2f}",
            f"{m.multiply_adds / m.bfloat16_s / 1e9:.0f}",
            f"{2 * m.n * m.k / m.bfloat16_s / 1e9:.0f}",
        )
    Console().print(table)


def main() -> None:
    """Measure all cases; the last line is one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--threads", type=int, default=kernels.num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    options = parser.parse_args()
    kernels.set_num_threads(options.threads)
    results = [measure(n, k, rows, options.seconds) for n, k in SHAPES for rows in options.rows]
    show(results)
    record = {
        "benchmark": "bf16",
        "machine": machine(),
        "threads": options.threads,
        "cpu_target": kernels.cpu_target(),
        "cases": [asdict(m) | {"ratio": m.ratio} for m in results],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
