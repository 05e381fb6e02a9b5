"""The tables of gpu.py: the link, a step beside its bound, the schedules, speculation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.table import table

if TYPE_CHECKING:
    from collections.abc import Sequence


def tables(
    found: dict[str, Any], batches: Sequence[int], speculation_batch: int, rates: Sequence[float]
) -> str:
    """Return all tables; ``rates`` are chances that a draft is accepted."""
    parts = (
        _link(found["steps"], found["plain_copy_bytes_per_s"]),
        _bounds(found["steps"]),
        _schedules(found["schedules"], batches),
        f"speculation, batch {speculation_batch}, SYNTHETIC acceptance, drafts free: tok/s (gain)",
        _speculation(found["speculation"], speculation_batch, rates),
    )
    return "\n\n".join(parts)


def _link(steps: dict[int, dict[str, float]], plain: float) -> str:
    columns = ("loads_alone_bytes_per_s", "loads_bytes_per_s", "step_bytes_per_s")
    rows = [
        [
            f"batch {batch}",
            f"{plain / 1e6:.4g}",
            *(f"{step[c] / 1e6:.4g} ({step[c] / plain:.1%})" for c in columns),
        ]
        for batch, step in steps.items()
    ]
    return table(
        ["to the device, MB/s", "plain loop", "loads alone", "loads in a step", "whole step"], rows
    )


def _bounds(steps: dict[int, dict[str, float]]) -> str:
    times = ("link_s", "attention_s", "device_s", "bound_s", "step_s")
    rows = [
        [f"batch {batch}", *(_ms(s[t]) for t in times), f"{s['step_s'] / s['bound_s']:.3f}"]
        for batch, s in steps.items()
    ]
    heads = ["ms", "link", "attention on the host", "device", "lower bound", "step", "step / bound"]
    return table(heads, rows)


def _schedules(schedules: dict[str, dict[int, dict[str, Any]]], batches: Sequence[int]) -> str:
    rows = [
        [name, *(_cell(timings.get(batch)) for batch in batches)]
        for name, timings in schedules.items()
    ]
    return table(["ms a step (simulated)", *(f"batch {batch}" for batch in batches)], rows)


def _cell(timing: dict[str, Any] | None) -> str:
    return "-" if timing is None else f"{_ms(timing['step_s'])} ({_ms(timing['simulated_s'])})"


def _speculation(step_s: dict[int, float], batch: int, rates: Sequence[float]) -> str:
    plain, rows = batch / step_s[0], []
    for k, seconds in step_s.items():
        per_s = [batch * _tokens(a, k) / seconds for a in rates]
        rows.append([str(k), _ms(seconds), *(f"{r:.4g} ({r / plain:.2f}x)" for r in per_s)])
    return table(["k", "ms a step", *(f"a = {a:g}" for a in rates)], rows)


def _tokens(a: float, k: int) -> float:
    """Return what verifying k drafts yields (Leviathan et al. 2023, arXiv 2211.17192, eq. 1)."""
    return sum(a**i for i in range(k + 1))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"
