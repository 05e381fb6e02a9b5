"""How fast is chunked attention beside this machine's roofs, and beside torch?

A batch of sequences with contexts of equal length, large enough to leave the caches, laid out as
the engine's KV cache lays them out. Their pages lie in a row, as the cache hands them out to a
prompt, or in random order, the worst it can come to. The roof of a case is the longer of the times
that reading its KV once and doing its multiply-adds would take at the measured bandwidth and FLOPs,
the bandwidth being that of one long plain read. With several KV dtypes a case is measured in each
by turns; the last column is how much faster than the first.

    python benchmarks/attention.py                        # a few cases, half a minute
    python benchmarks/attention.py --full                 # all of them
    python benchmarks/attention.py --kv-dtype bfloat16 int8 float16
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.machine import machine
from harness.table import number, table
from specmoeoff import kernels
from specmoeoff.kernels import _native
from specmoeoff.offload.kv_cache import KvCache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NUM_KV_HEADS = 4
DTYPES = {
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
}


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

    def row(self) -> list[str]:
        """Return the cells of the table."""
        case, gigabytes = self.case, self.batch * self.case.kv_bytes / 1e9
        intensity = case.flops / case.kv_bytes * self.read_bandwidth / self.flops
        return [
            case.kv_dtype,
            f"{case.head_dim}",
            *map(str, (case.context, case.queries, case.group, case.queries * case.group)),
            number(gigabytes / self.seconds, 1),
            number(self.batch * case.flops / self.seconds / 1e9, 0),
            number(self.read_bandwidth / 1e9, 1),
            number(self.flops / 1e9, 0),
            number(intensity, 2),
            f"{self.roof_s / self.seconds:.0%}",
            f"{self.roof_s / self.shuffled_s:.0%}",
            f"{self.speedup:.2f}",
        ]


HEADER = ["KV", "D", "context", "n", "group", "rows", "GB/s", "GFLOP/s"]
HEADER += ["roof GB/s", "roof GFLOP/s", "x knee", "of roof", "shuffled", "speedup"]


class Workload:
    """The arguments of one call, reused by every repetition."""

    def __init__(
        self, case: Case, kv_megabytes: int, *, shuffled: bool, page_size: int = 32
    ) -> None:
        self.case = case
        self.batch = max(2, round(kv_megabytes * 1e6 / case.kv_bytes))
        rng = np.random.default_rng(0)
        pages = -(-case.context // page_size)
        num_pages = self.batch * pages
        kv = KvCache(1, NUM_KV_HEADS, case.head_dim, num_pages, case.kv_dtype, page_size)
        self.k_pages, self.v_pages = kv.layer(0)
        self.k_scales, self.v_scales = kv.scales(0)
        for field in (self.k_pages, self.v_pages, self.k_scales, self.v_scales):
            if field is not None:
                fill(field, rng)
        order = rng.permutation(num_pages) if shuffled else np.arange(num_pages)
        shape = (self.batch * case.queries, NUM_KV_HEADS * case.group, case.head_dim)
        self.q = rng.standard_normal(shape).astype(np.float32)
        self.page_tables = order.astype(np.int32).reshape(self.batch, pages)
        self.q_offsets = np.arange(0, len(self.q) + 1, case.queries, dtype=np.int32)
        self.kv_lens = np.full(self.batch, case.context, np.int32)
        self.out = np.empty_like(self.q)

    def run(self) -> None:
        """Attend once."""
        kernels.chunked_attention(
            self.q,
            self.k_pages,
            self.v_pages,
            self.page_tables,
            self.q_offsets,
            self.kv_lens,
            self.case.head_dim**-0.5,
            k_scales=self.k_scales,
            v_scales=self.v_scales,
            out=self.out,
        )


def fill(field: np.ndarray, rng: np.random.Generator) -> None:
    """Fill an array with ordinary numbers that differ."""
    if field.dtype == np.uint16:  # the bits of bfloat16 numbers between 1/8 and 1/2
        field[...] = rng.integers(0x3E00, 0x3F00, field.shape, np.uint16)
    elif field.dtype == np.int8:
        field[...] = rng.integers(-127, 128, field.shape, np.int8)
    else:
        field[...] = rng.uniform(0.001, 0.01, field.shape)


def best_time(run: Callable[[], object], repeats: int) -> float:
    """Return the shortest of ``repeats`` runs in seconds, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def best_times(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return each run's best time; they take turns, so that a noisy neighbour hits them alike."""
    times = [float("inf")] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            times[i] = min(times[i], best_time(run, 1))
    return times


def measure(shape: list[Case], data: np.ndarray, megabytes: int, repeats: int) -> list[Measured]:
    """Time a shape in each KV dtype beside the roofs, which every shape has its own of."""
    seconds = []
    for shuffled in (False, True):
        workloads = [Workload(case, megabytes, shuffled=shuffled) for case in shape]
        seconds.append(best_times([workload.run for workload in workloads], repeats))
    read_bandwidth, flops = _native.measure_read_bandwidth(data, 3), _native.measure_fma(2)
    first_s = seconds[0][0] / workloads[0].batch
    return [
        Measured(
            workload.case,
            workload.batch,
            read_bandwidth,
            flops,
            in_a_row_s,
            shuffled_s,
            first_s / (in_a_row_s / workload.batch),
        )
        for workload, in_a_row_s, shuffled_s in zip(workloads, *seconds, strict=True)
    ]


def cases(full: bool, kv_dtypes: list[str]) -> list[list[Case]]:
    """Return all cases, or those that show each regime; the dtypes of a shape side by side."""
    if full:
        return [
            [Case(context, queries, group, head_dim, kv_dtype) for kv_dtype in kv_dtypes]
            for head_dim in (64, 128)
            for context in (512, 2048, 8192)
            for group in (1, 3, 4, 8)
            for queries in (1, 2, 4, 8, 16)
        ]
    shapes = [(1, 1), (1, 4), (2, 4), (6, 4), (16, 8)]
    return [
        [Case(context, queries, group, head_dim, kv_dtype) for kv_dtype in kv_dtypes]
        for head_dim in (64, 128)
        for context in (512, 2048)
        for queries, group in shapes
    ]


def compare_with_torch(megabytes: int, repeats: int) -> dict[str, float]:
    """Return times of the same work in torch, n = 6, context 2048, group 4, relative to ours.

    torch gets contiguous KV for nothing, then the same with bfloat16 pages that it must gather.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    case = Case(2048, 6, 4, 128, "bfloat16")
    workload = Workload(case, megabytes, shuffled=True)
    ours = best_time(workload.run, repeats)
    shape = (workload.batch, NUM_KV_HEADS, case.context, case.head_dim)
    heads = NUM_KV_HEADS * case.group
    mask = torch.ones(case.queries, case.context).tril(case.context - case.queries).bool()
    ratios = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        k, v = torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
        q = torch.ones(workload.batch, heads, case.queries, case.head_dim, dtype=dtype)

        def at_once(q: Any = q, k: Any = k, v: Any = v) -> None:
            scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        def one_by_one(q: Any = q, k: Any = k, v: Any = v) -> None:
            for i in range(case.queries):
                scaled_dot_product_attention(q[:, :, i : i + 1], k, v, enable_gqa=True)

        ratios[f"{name} at once"] = best_time(at_once, 2) / ours
        ratios[f"{name} one token at a time"] = best_time(one_by_one, 2) / ours
    pages = torch.ones(workload.page_tables.size, NUM_KV_HEADS, 32, case.head_dim).bfloat16()
    tables = torch.from_numpy(workload.page_tables).long()
    q = torch.ones(workload.batch, heads, case.queries, case.head_dim, dtype=torch.bfloat16)

    def gathered() -> None:
        k, v = (pages[tables].transpose(1, 2).reshape(shape) for _ in range(2))
        scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    ratios["bfloat16 at once, pages gathered first"] = best_time(gathered, 2) / ours
    return ratios


def main() -> None:
    """Measure roofs, cases and torch; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all shapes instead of a few")
    parser.add_argument("--megabytes", type=int, default=150, help="KV of a case's batch")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--kv-dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    options = parser.parse_args()
    data = np.ones(64_000_000, np.float32)
    results = [
        result
        for shape in cases(options.full, options.kv_dtype)
        for result in measure(shape, data, options.megabytes, options.repeats)
    ]
    print(table(HEADER, [result.row() for result in results]))
    ratios = {} if options.no_torch else compare_with_torch(options.megabytes, options.repeats)
    print("torch, n 6, context 2048, group 4, times as long as ours:")
    for name, ratio in ratios.items():
        print(f"  {name}: {number(ratio, 1)}")
    record = {
        "benchmark": "attention",
        "machine": machine(),
        "cpu_target": kernels.cpu_target(),
        "num_threads": kernels.num_threads(),
        "cases": [{**asdict(result), "roof_s": result.roof_s} for result in results],
        "torch_time_over_ours": ratios,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
