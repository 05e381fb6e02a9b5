"""How fast is chunked attention beside this machine's roofs, and beside torch?

A batch of sequences with contexts of equal length, large enough to leave the caches, laid out as
the engine's KV cache lays them out. Their pages lie in a row, as the cache hands them out to a
prompt, or in random order, the worst it can come to. The roof of a case is the longer of the times
that reading its KV once and doing its multiply-adds would take at the measured bandwidth and FLOPs,
the bandwidth being that of one long plain read.

    python benchmarks/attention.py            # a few cases, half a minute
    python benchmarks/attention.py --full     # all of them
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

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_KV_HEADS = 4


@dataclass(frozen=True)
class Case:
    """One shape: KV tokens, queries per sequence, query heads per KV head, head size."""

    context: int
    queries: int
    group: int
    head_dim: int

    @property
    def kv_bytes(self) -> int:
        """KV bytes of one sequence in bfloat16."""
        return 2 * 2 * NUM_KV_HEADS * self.head_dim * self.context

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
            f"{case.head_dim}",
            *map(str, (case.context, case.queries, case.group, case.queries * case.group)),
            number(gigabytes / self.seconds, 1),
            number(self.batch * case.flops / self.seconds / 1e9, 0),
            number(self.read_bandwidth / 1e9, 1),
            number(self.flops / 1e9, 0),
            number(intensity, 2),
            f"{self.roof_s / self.seconds:.0%}",
            f"{self.roof_s / self.shuffled_s:.0%}",
        ]


HEADER = ["D", "context", "n", "group", "rows", "GB/s", "GFLOP/s", "roof GB/s", "roof GFLOP/s"]
HEADER += ["x knee", "of roof", "shuffled"]


class Workload:
    """The arguments of one call, reused by every repetition."""

    def __init__(
        self, case: Case, kv_megabytes: int, *, shuffled: bool, page_size: int = 32
    ) -> None:
        self.case = case
        self.batch = max(2, round(kv_megabytes * 1e6 / case.kv_bytes))
        rng = np.random.default_rng(0)
        pages = -(-case.context // page_size)
        half = NUM_KV_HEADS * case.head_dim * page_size
        # Any bits that are ordinary numbers will do; a random mantissa keeps the scores apart.
        records = rng.integers(0x3E00, 0x3F00, (self.batch * pages, 2 * half), np.uint16)
        k_shape = (len(records), NUM_KV_HEADS, case.head_dim, page_size)
        v_shape = (len(records), NUM_KV_HEADS, page_size, case.head_dim)
        order = rng.permutation(len(records)) if shuffled else np.arange(len(records))
        shape = (self.batch * case.queries, NUM_KV_HEADS * case.group, case.head_dim)
        self.q = rng.standard_normal(shape).astype(np.float32)
        self.k_pages = records[:, :half].reshape(k_shape)
        self.v_pages = records[:, half:].reshape(v_shape)
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
            out=self.out,
        )


def best_time(run: Callable[[], object], repeats: int) -> float:
    """Return the shortest of ``repeats`` runs in seconds, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(case: Case, data: np.ndarray, megabytes: int, repeats: int) -> Measured:
    """Time a case beside the roofs; neighbours come and go, so each case has its own."""
    seconds = []
    for shuffled in (False, True):
        workload = Workload(case, megabytes, shuffled=shuffled)
        seconds.append(best_time(workload.run, repeats))
    return Measured(
        case,
        workload.batch,
        _native.measure_read_bandwidth(data, 3),
        _native.measure_fma(2),
        *seconds,
    )


def cases(full: bool) -> list[Case]:
    """Return all cases, or those that show each regime."""
    if full:
        return [
            Case(context, queries, group, head_dim)
            for head_dim in (64, 128)
            for context in (512, 2048, 8192)
            for group in (1, 3, 4, 8)
            for queries in (1, 2, 4, 8, 16)
        ]
    shapes = [(1, 1), (1, 4), (2, 4), (6, 4), (16, 8)]
    return [
        Case(context, queries, group, head_dim)
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

    case = Case(2048, 6, 4, 128)
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
    options = parser.parse_args()
    data = np.ones(64_000_000, np.float32)
    results = [
        measure(case, data, options.megabytes, options.repeats) for case in cases(options.full)
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
