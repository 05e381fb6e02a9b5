"""Decides what the target's activations are rounded to before each product: asked for or measured.

The choice belongs to a run, not to a step or a row, so it never depends on the schedule. ``auto``
depends on a measurement and so on the machine; who must repeat a run names the dtype.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import numpy as np

from specmoeoff import kernels

if TYPE_CHECKING:
    from specmoeoff.config import Dtype
    from specmoeoff.engine.model_files import ModelFiles

LEAST_GAIN = 1.5
"""How many times as fast bfloat16 must be for ``auto`` to give up float32's exactness."""
PROBE_ROWS = 64
"""Rows of the timed product: few rows wait for memory whatever they are rounded to."""
PROBE_ELEMENTS = 1 << 19
"""Most weights of the timed product: 1 MiB, well within the runtime's margin of the budget."""
PROBE_TURNS = 8


def choose_dtype(asked: Literal["auto"] | Dtype, target: ModelFiles, on_gpu: bool = False) -> Dtype:
    """Return the dtype of a run.

    ``auto`` is float32 unless experts are stored as bfloat16, the CPU target has instructions for
    it, and a product of the experts' inner size is at least LEAST_GAIN times as fast with it. GPUs
    are made for bfloat16, so on one it is enough that experts are stored so.
    """
    if asked != "auto":
        return asked
    name = target.model.expert_tensors(0, 0)["gate"].name
    stored = target.checkpoint.tensors[name].dtype
    if stored == "BF16" and on_gpu:
        return "bfloat16"
    if stored != "BF16" or not kernels.multiplies_bfloat16():
        return "float32"
    config = target.model.config
    gain = measure_gain(config.intermediate_size, config.hidden_size)
    return "bfloat16" if gain >= LEAST_GAIN else "float32"


def measure_gain(n: int, k: int) -> float:
    """Return how many times as fast a bfloat16 [n, k] multiplies rounded activations.

    Takes a few milliseconds. Of more than PROBE_ELEMENTS weights only the first rows are timed. The
    two take turns and the best time of each counts, so that a busy neighbour hits both or neither.
    """
    columns = max(1, min(n, PROBE_ELEMENTS // k))
    weight = np.full((columns, k), 0x3F80, np.uint16)
    x = np.ones((PROBE_ROWS, k), np.float32)
    out = np.empty((PROBE_ROWS, columns), np.float32)
    best = {"float32": float("inf"), "bfloat16": float("inf")}
    activations: kernels.Activations
    for _ in range(PROBE_TURNS):
        for activations in ("float32", "bfloat16"):
            started_at = time.perf_counter()
            kernels.linear(x, weight, out=out, activations=activations)
            best[activations] = min(best[activations], time.perf_counter() - started_at)
    return best["float32"] / best["bfloat16"]
