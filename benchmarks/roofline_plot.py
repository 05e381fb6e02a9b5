"""Draws what linear.py, expert_ffn.py and attention.py recorded under the roofs they measured.

One picture per kernel: operations per byte read to the right, operations per second upwards, both
logarithmic. The slope is the read bandwidth, a band from the lowest to the highest measured beside
a case, with the median as a line; the flat part is the multiply-add rate. Needs matplotlib, the
extra ``plots``.

    python benchmarks/roofline_plot.py build/bench/linear.json --output docs/img
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import attention
from harness.kernel_benchmark import FORMS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

MARKERS = "os^Dvp*X"
BYTES_OF = {
    "linear": "weights",
    "expert_ffn": "weights",
    "attention": "keys and values",
}


@dataclass(frozen=True)
class Point:
    """One measured case."""

    series: str
    """What gives it its colour: the dtype of what is read."""
    shape: str
    """What gives it its marker."""
    flops: float
    num_bytes: float
    seconds: float
    read_bandwidth: float
    multiply_add: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.num_bytes


def products(record: dict[str, Any]) -> list[Point]:
    """Return the points of linear.py or expert_ffn.py: every form of every case."""
    return [
        Point(
            form,
            case["shape"],
            case["flops"],
            case["num_bytes"][form],
            case["seconds"][form],
            case["read_bandwidth"],
            case["multiply_add"],
        )
        for case in record["results"]
        for form in FORMS
    ]


def attentions(record: dict[str, Any]) -> list[Point]:
    """Return the points of attention.py: pages in a row, not shuffled ones."""
    points = []
    for entry in record["cases"]:
        case = attention.Case(**entry["case"])
        points.append(
            Point(
                case.kv_dtype,
                f"D {case.head_dim}, context {case.context}",
                entry["batch"] * case.flops,
                entry["batch"] * case.kv_bytes,
                entry["seconds"],
                entry["read_bandwidth"],
                entry["flops"],
            )
        )
    return points


READERS: dict[str, Callable[[dict[str, Any]], list[Point]]] = {
    "linear": products,
    "expert_ffn": products,
    "attention": attentions,
}


def draw(points: Sequence[Point], title: str, bytes_of: str) -> Figure:
    """Return the picture of one kernel."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot()
    _draw_roofs(axes, points)
    colours = {s: f"C{i}" for i, s in enumerate(dict.fromkeys(p.series for p in points))}
    shapes = list(dict.fromkeys(p.shape for p in points))
    markers = {s: MARKERS[i % len(MARKERS)] for i, s in enumerate(shapes)}
    for point in points:
        rate = point.flops / point.seconds / 1e9
        style = {"color": colours[point.series], "marker": markers[point.shape]}
        axes.plot(point.intensity, rate, **style, markersize=5, alpha=0.75, linestyle="none")
    for series, colour in colours.items():
        axes.plot([], [], color=colour, marker="o", linestyle="none", label=series)
    for shape, marker in markers.items():
        axes.plot([], [], color="grey", marker=marker, linestyle="none", label=shape)
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel=f"operations per byte of {bytes_of}", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small", loc="lower right")
    return figure


def _draw_roofs(axes: Axes, points: Sequence[Point]) -> None:
    first, last = (pick(p.intensity for p in points) for pick in (min, max))
    xs = [first / 1.5 * (last / first * 2.25) ** (i / 200) for i in range(201)]
    bandwidths = [p.read_bandwidth for p in points]
    flat = max(p.multiply_add for p in points)
    low, middle, high = (
        [min(bandwidth * x, flat) / 1e9 for x in xs]
        for bandwidth in (min(bandwidths), statistics.median(bandwidths), max(bandwidths))
    )
    axes.fill_between(xs, low, high, color="grey", alpha=0.2, linewidth=0)
    label = f"roofs: {statistics.median(bandwidths) / 1e9:.0f} GB/s, {flat / 1e9:.0f} GFLOP/s"
    axes.plot(xs, middle, color="black", linewidth=1.2, label=label)


def main() -> None:
    """Draw a picture per record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+", help="files written with --json")
    parser.add_argument("--output", type=Path, default=Path("docs/img"), help="directory")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for path in options.records:
        record = json.loads(path.read_text())
        name = record["benchmark"]
        if name not in READERS:
            raise SystemExit(f"{path} is a record of {name}; use {', '.join(READERS)}")
        machine = record["machine"]
        title = f"{name}: {machine['cores']} cores of {machine['cpu']}, {machine['commit']}"
        picture = options.output / f"roofline_{name}.png"
        draw(READERS[name](record), title, BYTES_OF[name]).savefig(picture, dpi=110)
        print(picture)


if __name__ == "__main__":
    main()
