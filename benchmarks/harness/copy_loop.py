"""The plain copy loop to a device, which a schedule's weights lane is measured against.

On a GPU: blocks as large as an expert from pinned memory, one after the other on one stream, by
torch and nothing of ours. On a simulated device: the same loop held to the speed that was set.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.pipeline.pace import paced
from specmoeoff.pipeline.plan import Op

if TYPE_CHECKING:
    from collections.abc import Callable

    from specmoeoff.pipeline.costs import Costs

NUM_BLOCKS = 3
"""Few, since torch keeps what it has pinned."""
ROUNDS = 5


def pinned_copy_rate(num_bytes: int) -> float:
    """Return the bytes a second of the best round of copies of so many bytes each to a GPU."""
    import torch

    sources = [torch.zeros(num_bytes, dtype=torch.uint8).pin_memory() for _ in range(NUM_BLOCKS)]
    targets = [torch.empty(num_bytes, dtype=torch.uint8, device="cuda")]

    def copy_all() -> None:
        for source in sources:
            targets[0].copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    copy_all()
    rate = _best_rate(copy_all, num_bytes)
    targets.clear()
    # Or it would count against the memory that the engine may take.
    torch.cuda.empty_cache()
    return rate


def paced_copy_rate(num_bytes: int, costs: Costs) -> float:
    """Return the same of copies in this machine's memory that take as long as ``costs`` says."""
    source, target = np.zeros(num_bytes, np.uint8), np.empty(num_bytes, np.uint8)
    copy = paced(lambda op, stop: np.copyto(target, source), costs)
    load, never = Op("load", "h2d", num_bytes=num_bytes), threading.Event()

    def copy_all() -> None:
        for _ in range(NUM_BLOCKS):
            copy(load, never)

    return _best_rate(copy_all, num_bytes)


def _best_rate(copy_all: Callable[[], None], num_bytes: int) -> float:
    best_s = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        copy_all()
        best_s = min(best_s, time.perf_counter() - start)
    return NUM_BLOCKS * num_bytes / best_s
