"""A timeline as a picture: lanes from top to bottom, time from left to right. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specmoeoff.errors import InvalidInputError
from specmoeoff.pipeline.plan import KINDS, LANES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from specmoeoff.pipeline.timeline import Timeline

WIDTH_INCHES = 14.0
LANE_INCHES = 0.6
DOTS_PER_INCH = 120


def draw(steps: Sequence[tuple[str, Timeline]], path: Path) -> None:
    """Write a PNG of titled timelines, one below the other on one scale of time.

    Raises:
        InvalidInputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise InvalidInputError(
            "a picture needs matplotlib: install 'specmoeoff[plots]', or leave --png out"
        ) from None
    lanes = [lane for lane in LANES if any(op.lane == lane for _, t in steps for op in t.plan.ops)]
    kinds = [kind for kind in KINDS if any(op.kind == kind for _, t in steps for op in t.plan.ops)]
    height = len(steps) * (LANE_INCHES * len(lanes) + 0.5) + 1.0
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    colors = {kind: f"C{i}" if i < 10 else f"{(i - 9) / 8:.2f}" for i, kind in enumerate(kinds)}
    axes = figure.subplots(len(steps), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, timeline) in zip(axes, steps, strict=True):
        for number, ran in timeline.ran.items():
            op = timeline.plan.ops[number]
            axis.broken_barh(
                [(ran.start_s * 1e3, ran.duration_s * 1e3)],
                (lanes.index(op.lane) - 0.4, 0.8),
                facecolors=colors[op.kind],
                linewidth=0.0,
                alpha=0.45 if op.ahead else 1.0,
            )
        axis.axvline(timeline.step_s * 1e3, color="black", linewidth=0.8)
        axis.set_yticks(range(len(lanes)), lanes)
        axis.invert_yaxis()
        axis.set_title(f"{title}: {timeline.step_s * 1e3:.4g} ms", loc="left", fontsize=10)
    axes[-1].set_xlabel("milliseconds; pale: for the next step; line: the step's end")
    legend = [Patch(color=colors[kind], label=kind) for kind in kinds]
    figure.legend(handles=legend, loc="outside lower center", ncols=7, fontsize=8)
    figure.savefig(path)
