"""kt-kernel's bfloat16 MoE on demand: a process that kernel_peers.py starts and asks for timings.

    python kt_kernel_process.py K INNER COUNT THREADS DIRECTORY

Runs in an environment of its own. DIRECTORY and the requests are those of ggml_peer.cc with
``experts``; the result, ``kt-kernel.out``, is summed over the experts, float32 [rows, K].
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from kt_kernel import kt_kernel_ext

MOST_ROWS = 256


class Layer:
    """A layer of equal experts, all of which every token goes through."""

    def __init__(self, k: int, inner: int, count: int, threads: int, directory: Path) -> None:
        self._count = count
        x = torch.from_numpy(np.fromfile(directory / "x", np.float32).reshape(-1, k))
        self._x = x.bfloat16().contiguous()
        self._out = torch.zeros_like(self._x)
        self._ids = torch.arange(count).repeat(len(x), 1).contiguous()
        self._weights = torch.ones(len(x), count)
        pool = kt_kernel_ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self._infer = kt_kernel_ext.CPUInfer(pool)
        # Copied when they are loaded; kept until then.
        bits = np.fromfile(directory / "weights", np.int16).reshape(3, -1)
        projections = [torch.from_numpy(matrix).repeat(count) for matrix in bits]
        # Looked at in every run, so it has to stay.
        self._on_gpu = torch.zeros(count, dtype=torch.bool)
        config = kt_kernel_ext.moe.MOEConfig(count, count, k, inner, self._on_gpu.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, self._infer.backend_, MOST_ROWS
        config.gate_proj, config.up_proj, config.down_proj = (p.data_ptr() for p in projections)
        self._moe = kt_kernel_ext.moe.AMXBF16_MOE(config)
        order = torch.arange(count)
        self._infer.submit(self._moe.load_weights_task(order.data_ptr()))
        self._infer.sync()

    def run(self, rows: int) -> None:
        """Run the layer over the first rows of x."""
        size = torch.tensor([rows], dtype=torch.int32)
        pointers = (t.data_ptr() for t in (self._ids, self._weights, self._x, self._out))
        self._infer.submit(self._moe.forward_task(size.data_ptr(), self._count, *pointers, False))
        self._infer.sync()

    def result(self, rows: int) -> np.ndarray:
        """Return the result of the last run, [rows, K]."""
        return self._out[:rows].float().numpy()


def main() -> None:
    """Answer requests until there are no more."""
    k, inner, count, threads = map(int, sys.argv[1:5])
    directory = Path(sys.argv[5])
    layer = Layer(k, inner, count, threads, directory)
    print("ready", flush=True)
    for line in sys.stdin:
        rows, seconds = int(line.split()[0]), float(line.split()[1])
        layer.run(rows)
        best, begin = float("inf"), time.perf_counter()
        while best == float("inf") or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            layer.run(rows)
            best = min(best, time.perf_counter() - start)
        layer.result(rows).tofile(directory / "kt-kernel.out")
        print(best, flush=True)


if __name__ == "__main__":
    main()
