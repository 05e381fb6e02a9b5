"""How much faster are a draft's int8 x int8 products than products with bfloat16 weights?

Shapes of the demo's draft and of a 1B model; rows from one sequence to a large batch. The two take
turns, and the best time of each counts, so busy neighbours disturb the ratio little.

    python benchmarks/int8_dot.py
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
    from specmoeoff.kernels import Weight

SHAPES = [(1536, 576), (576, 1536), (5632, 2048)]  # N, K


@dataclass(frozen=True)
class Measured:
    """Best seconds of one product [rows, k] @ [n, k]^T, with each kind of weight."""

    n: int
    k: int
    rows: int
    bfloat16_s: float
    int8_dot_s: float

    @property
    def ratio(self) -> float:
        """How many times as fast int8 x int8 is."""
        return self.bfloat16_s / self.int8_dot_s

    @property
    def multiply_adds(self) -> int:
        """Of one product."""
        return self.rows * self.n * self.k


def measure(n: int, k: int, rows: int, budget_s: float) -> Measured:
    """Time both products of random operands."""
    rng = np.random.default_rng(0)
    bfloat16 = kernels.to_bfloat16(rng.standard_normal((n, k)).astype(np.float32))
    weights: list[Weight] = [bfloat16, kernels.pack_int8_dot(bfloat16)]
    x = rng.standard_normal((rows, k)).astype(np.float32)
    out = np.empty((rows, n), np.float32)
    calls = [lambda w=w: kernels.linear(x, w, out=out) for w in weights]
    return Measured(n, k, rows, *best_seconds(calls, budget_s / len(calls)))


def show(results: list[Measured]) -> None:
    """Print a table."""
    table = Table("N x K", "rows", "bfloat16 us", "int8 x int8 us", "ratio", "Gmadd/s", "GB/s")
    for m in results:
        table.add_row(
            f"{m.n} x {m.k}",
            str(m.rows),
            f"{m.bfloat16_s * 1e6:.0f}",
            f"{m.int8_dot_s * 1e6:.0f}",
            f"{m.ratio:.2f}",
            f"{m.multiply_adds / m.int8_dot_s / 1e9:.0f}",
            f"{m.n * m.k / m.int8_dot_s / 1e9:.0f}",
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
        "benchmark": "int8_dot",
        "machine": machine(),
        "threads": options.threads,
        "cpu_target": kernels.cpu_target(),
        "cases": [asdict(m) | {"ratio": m.ratio} for m in results],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
