"""What tests of kernels share: bits compared on every CPU target, random weights, routed rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from specmoeoff import kernels
from specmoeoff.kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from specmoeoff.kernels import Weight

    Expert = tuple[Weight, Weight, Weight]

EPS = float(np.finfo(np.float32).eps)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def on_each_target(compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return what every CPU target computes, having checked that they agree bit for bit."""
    results = []
    for target in kernels.cpu_targets():
        kernels.use_cpu_target(target)
        results.append(compute())
        assert same_bits(results[-1], results[0]), f"{target} differs from scalar"
    return results[-1]


def make_weight(rng: np.random.Generator, n: int, k: int, kind: str = "bfloat16") -> Weight:
    """Return a random matrix: ``float32``, ``float16``, ``bfloat16``, ``int8`` or ``int8/GROUP``.

    Or ``int4/GROUP``, whose group divides k. A group of int8 that does not becomes one for each
    row.
    """
    w = rng.standard_normal((n, k)).astype(np.float32)
    if kind == "bfloat16":
        return reference.to_bfloat16(w)
    if kind.startswith("int8"):
        group = int(kind.partition("/")[2] or k)
        return reference.quantize_int8(w, group if k % group == 0 else None)
    if kind.startswith("int4"):
        return reference.quantize_int4(w, int(kind.partition("/")[2]))
    return w.astype(kind)


def make_experts(
    rng: np.random.Generator, count: int, k: int, inner: int, kind: str = "bfloat16"
) -> list[Expert]:
    shapes = ((inner, k), (inner, k), (k, inner))
    return [tuple(make_weight(rng, *s, kind) for s in shapes) for _ in range(count)]  # type: ignore[misc]


def route_rows(
    rng: np.random.Generator, num_rows: int, counts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return random offsets, rows and row_weights, so many rows for each expert."""
    chosen = [rng.permutation(num_rows)[:c] for c in counts]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rows = np.concatenate([*chosen, []]).astype(np.int32)
    return offsets, rows, rng.random(len(rows)).astype(np.float32)


def expert_ffn_in_turn(
    x: np.ndarray,
    experts: Sequence[Expert],
    offsets: np.ndarray,
    rows: np.ndarray,
    row_weights: np.ndarray,
    out: np.ndarray,
) -> None:
    """What ``expert_ffn_many`` does, by a call for each expert."""
    for i, expert in enumerate(experts):
        part = slice(offsets[i], offsets[i + 1])
        kernels.expert_ffn(x, *expert, out, rows[part], row_weights[part])
