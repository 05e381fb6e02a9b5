"""How fast is chunked attention beside this machine's roofs, and beside torch?

A batch of sequences with contexts of equal length, large enough to leave the caches, laid out as
the engine's KV cache lays them out. Their pages lie in a row, as the cache hands them out to a
prompt, or in random order, the worst it can come to. The roof of a case is the longer of the times
that reading its KV once and doing its multiply-adds would take at the bandwidth and FLOPs measured
just before, the bandwidth being that of one long plain read. With several KV dtypes a case is
measured in each by turns; the last column is how much faster than the first.

    python benchmarks/attention.py                        # a few cases, half a minute
    python benchmarks/attention.py --full                 # all, bfloat16 and int8, some minutes
    python benchmarks/attention.py --kv-dtype bfloat16 int8 float16 --json record.json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.kv_pages import DTYPES, NUM_KV_HEADS, Pages
from harness.machine import machine
from harness.table import number, table
from harness.torch_attention import NAMES, times_in_torch
from specmoeoff import kernels
from specmoeoff.kernels import _native

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Case:
    """One shape: KV tokens, queries per sequence, query heads per KV head, head size, KV dtype."""

    context: int
    queries: int
    group: int
    head_dim: int
    kv_dtype: str

    @property
    def kv_bytes(self) -> int:
        """KV bytes of one sequence, scales included."""
        scale_bytes = 4 if self.kv_dtype == "int8" else 0
        head_bytes = self.head_dim * DTYPES[self.kv_dtype].itemsize + scale_bytes
        return 2 * NUM_KV_HEADS * head_bytes * self.context

    @property
    def flops(self) -> int:
        """Operations of one sequence: two products, two operations per multiply-add."""
        heads = NUM_KV_HEADS * self.group
        return 4 * self.queries * heads * self.head_dim * self.context


@dataclass(frozen=True)
class Measured:
    """A case's best time and what it means."""

    case: Case
    batch: int
    read_bandwidth: float
    """The roofs, measured just before, in bytes/s and operations/s."""
    flops: float
    seconds: float
    shuffled_s: float
    """With pages in random order."""
    speedup: float = 1.0
    """Over the same case in the first KV dtype, by time per sequence."""

    @property
    def roof_s(self) -> float:
        """The time no kernel can beat."""
        return self.batch * max(
            self.case.kv_bytes / self.read_bandwidth, self.case.flops / self.flops
        )

    @property
    def share(self) -> float:
        """How much of the roof is reached."""
        return self.roof_s / self.seconds

    @property
    def knees(self) -> float:
        """Operations per byte, over those at which both roofs bind."""
        return self.case.flops / self.case.kv_bytes * self.read_bandwidth / self.flops

    def row(self) -> list[str]:
        """Return the cells of the table."""
        case, gigabytes = self.case, self.batch * self.case.kv_bytes / 1e9
        return [
            case.kv_dtype,
            f"{case.head_dim}",
            *map(str, (case.context, case.queries, case.group, case.queries * case.group)),
            number(gigabytes / self.seconds, 1),
            number(self.batch * case.flops / self.seconds / 1e9, 0),
            number(self.read_bandwidth / 1e9, 1),
            number(self.flops / 1e9, 0),
            number(self.knees, 2),
            f"{self.share:.0%}",
            f"{self.roof_s / self.shuffled_s:.0%}",
            f"{self.speedup:.2f}",
        ]


HEADER = ["KV", "D", "context", "n", "group", "rows", "GB/s", "GFLOP/s"]
HEADER += ["roof GB/s", "roof GFLOP/s", "x knee", "of roof", "shuffled", "speedup"]


class Workload:
    """The arguments of one call, reused by every repetition."""

    def __init__(self, case: Case, pages: Pages, *, shuffled: bool) -> None:
        self.case, self.pages = case, pages
        width = -(-case.context // Pages.page_size)
        self.batch = pages.num_pages // width
        rng = np.random.default_rng(0)
        used = self.batch * width
        order = rng.permutation(pages.num_pages)[:used] if shuffled else np.arange(used)
        shape = (self.batch * case.queries, NUM_KV_HEADS * case.group, case.head_dim)
        self.q = rng.standard_normal(shape, np.float32)
        self.page_tables = order.astype(np.int32).reshape(self.batch, width)
        self.q_offsets = np.arange(0, len(self.q) + 1, case.queries, dtype=np.int32)
        self.kv_lens = np.full(self.batch, case.context, np.int32)
        self.out = np.empty_like(self.q)

    def run(self) -> None:
        """Attend once."""
        k_pages, v_pages, k_scales, v_scales = self.pages.fields
        kernels.chunked_attention(
            self.q,
            k_pages,
            v_pages,
            self.page_tables,
            self.q_offsets,
            self.kv_lens,
            self.case.head_dim**-0.5,
            k_scales=k_scales,
            v_scales=v_scales,
            out=self.out,
        )


def best_times(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return each run's best time in seconds, after one that does not count.

    They take turns, so that a noisy neighbour hits them alike.
    """
    times = [float("inf")] * len(runs)
    for repeat in range(repeats + 1):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if repeat > 0:
                times[i] = min(times[i], time.perf_counter() - start)
    return times


def measure(
    shape: list[Case], pages: dict[str, Pages], data: np.ndarray, repeats: int
) -> list[Measured]:
    """Time a shape in each KV dtype beside the roofs, which every shape has its own of."""
    read_bandwidth = _native.measure_read_bandwidth(data, 6)
    flops = _native.measure_fma(4)
    seconds = []
    for shuffled in (False, True):
        workloads = [Workload(case, pages[case.kv_dtype], shuffled=shuffled) for case in shape]
        seconds.append(best_times([workload.run for workload in workloads], repeats))
    batch = workloads[0].batch  # alike for all: they have the same tokens
    return [
        Measured(
            case, batch, read_bandwidth, flops, in_a_row_s, shuffled_s, seconds[0][0] / in_a_row_s
        )
        for case, in_a_row_s, shuffled_s in zip(shape, *seconds, strict=True)
    ]


def shapes(full: bool) -> list[tuple[int, int, int]]:
    """Return context, queries and group of all cases, or of those that show each regime."""
    if full:
        return [
            (context, queries, group)
            for context in (512, 2048, 8192)
            for group in (1, 3, 4, 8)
            for queries in (1, 2, 4, 8, 16)
        ]
    few = [(1, 1), (1, 4), (2, 4), (6, 4), (16, 8)]
    return [(context, *shape) for context in (512, 2048) for shape in few]


def measure_all(full: bool, kv_dtypes: list[str], megabytes: int, repeats: int) -> list[Measured]:
    """Measure every shape in every dtype; one set of pages per head size is alive at a time."""
    data = np.ones(64_000_000, np.float32)
    results = []
    for head_dim in (64, 128):
        pages = {dtype: Pages(head_dim, dtype, megabytes) for dtype in kv_dtypes}
        for context, queries, group in shapes(full):
            shape = [Case(context, queries, group, head_dim, dtype) for dtype in kv_dtypes]
            results += measure(shape, pages, data, repeats)
    return results


def summary(results: list[Measured]) -> list[str]:
    """Return a line per regime of the first dtype, and one per further dtype."""
    first = results[0].case.kv_dtype
    near = [r for r in results if r.case.kv_dtype == first and 0.5 <= r.knees <= 2]
    far = [r for r in results if r.case.kv_dtype == first and not 0.5 <= r.knees <= 2]
    lines = []
    for name, rows, goal in (("far from the knee", far, 0.8), ("within a factor 2", near, 0.7)):
        if rows:
            reached = sum(row.share >= goal for row in rows)
            least = min(row.share for row in rows)
            lines.append(
                f"{first}, {name}: {reached} of {len(rows)} at {goal:.0%}, least {least:.0%}"
            )
    for dtype in sorted({r.case.kv_dtype for r in results} - {first}):
        for name, low, high in (("far below", 0.0, 0.5), ("within a factor 2 below", 0.5, 1.0)):
            speedups = [
                r.speedup for r in results if r.case.kv_dtype == dtype and low <= r.knees < high
            ]
            if speedups:
                reached = sum(speedup >= 1.6 for speedup in speedups)
                lines.append(
                    f"{dtype} over {first} {name} {dtype}'s knee: {min(speedups):.2f} to "
                    f"{max(speedups):.2f}, {reached} of {len(speedups)} at 1.6"
                )
    return lines


def compare_with_torch(megabytes: int, repeats: int) -> dict[str, float]:
    """Return times of the same work in torch relative to ours: n 6, context 2048, group 4."""
    case = Case(2048, 6, 4, 128, "bfloat16")
    workload = Workload(case, Pages(case.head_dim, case.kv_dtype, megabytes), shuffled=True)
    ours = best_times([workload.run], repeats)[0]
    theirs = times_in_torch(
        workload.page_tables, NUM_KV_HEADS, Pages.page_size, case.queries, case.group, case.head_dim
    )
    return {NAMES[name]: seconds / ours for name, seconds in theirs.items()}


def main() -> None:
    """Measure roofs, cases and torch; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all shapes instead of a few")
    parser.add_argument("--megabytes", type=int, default=150, help="KV of a case in bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--kv-dtype", nargs="+", choices=DTYPES, help="default: bfloat16 [int8]")
    parser.add_argument("--json", type=Path, help="also write the record to this file")
    options = parser.parse_args()
    kv_dtypes = options.kv_dtype or (["bfloat16", "int8"] if options.full else ["bfloat16"])
    results = measure_all(options.full, kv_dtypes, options.megabytes, options.repeats)
    print(table(HEADER, [result.row() for result in results]))
    print("\n".join(summary(results)))
    ratios = {} if options.no_torch else compare_with_torch(options.megabytes, options.repeats)
    for name, ratio in ratios.items():
        print(
            f"n 6, context 2048, group 4: torch, {name}: {number(ratio, 1)} times as long as ours"
        )
    record = {
        "benchmark": "attention",
        "machine": machine(),
        "options": {key: str(value) for key, value in vars(options).items()},
        "cpu_target": kernels.cpu_target(),
        "num_threads": kernels.num_threads(),
        "cases": [
            {**asdict(result), "roof_s": result.roof_s, "share_of_roof": result.share}
            for result in results
        ],
        "torch_time_over_ours": ratios,
    }
    if options.json:
        options.json.write_text(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
