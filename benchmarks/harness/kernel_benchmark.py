"""One kernel from 1 row to 1024, in each form of weights, beside the roofs and beside torch.

What linear.py and expert_ffn.py share: rows, turns, table, the list of what misses its goal, the
record. A share of the roof is the time that the nearer roof allows (the form's own weight bytes at
the measured read bandwidth, or FLOPs at the measured float32 multiply-add rate) over the time
taken. Each figure is the best of several turns, ours and torch's alternating. The roofs are
measured just before and after every case, because the bandwidth of a shared machine drifts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from harness.layer_shapes import SHAPES
from harness.record import add_json_option, finish
from harness.table import number
from harness.turns import best_seconds
from roofs import RoofMeter, Roofs
from specmoeoff import kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FORMS = ("bf16", "int8", "int8/32", "int4/32")
"""Ours with float32 activations, by what the weights are, and a scale per how many of them."""
ROUNDED = {form: f"{form} x bf16" for form in FORMS}
"""By form, the same with activations rounded to bfloat16; torch's ``TORCH_BF16`` does as much."""
TORCH_BF16, TORCH_F32 = "torch bf16", "torch f32"
CONTENDERS = (*FORMS, *ROUNDED.values(), TORCH_BF16, TORCH_F32)

FEW_ROWS, BANDWIDTH_GOAL = 4, 0.85
MANY_ROWS, FLOPS_GOAL = 64, 0.75


@dataclass(frozen=True)
class Call:
    """One contender at one number of rows."""

    run: Callable[[], object]
    num_bytes: int
    """Weights that a run reads, scales included."""


class Workload(Protocol):
    """A kernel at one shape."""

    def flops(self, rows: int) -> float:
        """Return the operations of one run, two per multiply-add."""

    def calls(self, rows: int) -> dict[str, Call]:
        """Return a call per contender; all do the same work."""


@dataclass(frozen=True)
class Case:
    """What was measured at one shape and number of rows."""

    shape: str
    rows: int
    flops: float
    num_bytes: dict[str, int]
    seconds: dict[str, float]
    roofs: Roofs

    def share(self, form: str) -> float:
        """Return the share of the nearer roof; 1 is at the roof."""
        return self.roofs.share(self.seconds[form], self.num_bytes[form], self.flops)

    @property
    def goal(self) -> float | None:
        """The share of the roof to reach; None between few rows and many."""
        if self.rows <= FEW_ROWS:
            return BANDWIDTH_GOAL
        return FLOPS_GOAL if self.rows >= MANY_ROWS else None

    @property
    def torch_best(self) -> str:
        """The faster of torch's two ways."""
        return min((TORCH_BF16, TORCH_F32), key=self.seconds.__getitem__)

    def over_torch(self, contender: str) -> float:
        """Return torch's best time over a contender's: above 1 the contender is faster."""
        return self.seconds[self.torch_best] / self.seconds[contender]

    @property
    def slower(self) -> list[str]:
        """Which of ours, float32 activations or rounded ones, are slower than torch's best."""
        return [name for name in ("bf16", ROUNDED["bf16"]) if self.over_torch(name) < 1]

    def line(self) -> str:
        """Return the row of the table."""
        bf16_s = self.seconds["bf16"]
        cells = [
            f"{self.shape:14}{self.rows:5}{bf16_s * 1e6:11.1f}",
            f"{self.num_bytes['bf16'] / bf16_s / 1e9:7.1f}{self.roofs.read_bandwidth / 1e9:6.1f}",
            f"{self.flops / bf16_s / 1e9:9.1f}{self.roofs.multiply_add / 1e9:6.0f}",
            *(f"{self.share(form):9.0%}" for form in FORMS),
            "  |",
            *(f"{self.share(ROUNDED[form]):9.0%}" for form in FORMS),
            "  |",
            f"{self.torch_best.removeprefix('torch '):>7}",
            f"{self.over_torch('bf16'):9.2f}{self.over_torch(ROUNDED['bf16']):12.2f}",
            f"  {', '.join(self.slower)}",
        ]
        return "".join(cells).rstrip()

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "shape": self.shape,
            "rows": self.rows,
            "flops": self.flops,
            "num_bytes": self.num_bytes,
            "seconds": self.seconds,
            "read_bandwidth": self.roofs.read_bandwidth,
            "multiply_add": self.roofs.multiply_add,
            "share_of_roof": {name: self.share(name) for name in (*FORMS, *ROUNDED.values())},
            "torch_best": self.torch_best,
            "over_torch": {name: self.over_torch(name) for name in ("bf16", ROUNDED["bf16"])},
            "slower_than_torch": self.slower,
        }


HEADER = (
    f"{'shape':14}{'rows':>5}{'bf16 us':>11}{'GB/s':>7}{'roof':>6}{'GFLOP/s':>9}{'roof':>6}"
    + 2 * ("".join(f"{form:>9}" for form in FORMS) + "  |")
    + f"{'torch':>7}{'over it':>9}{ROUNDED['bf16']:>12}  slower than torch"
)
LEGEND = f"""\
us, GB/s, GFLOP/s: bfloat16 weights, float32 activations, and the roofs measured around the case;
{", ".join(FORMS)}: share of the nearer roof by form of weights, with float32 activations,
and with activations rounded to bfloat16 (of the float32 roof too, which a CPU that multiplies
bfloat16 can exceed); torch: its faster dtype; over it: torch's best time over ours, with float32
activations and with rounded ones."""


def kernel_benchmark(
    name: str, description: str, make: Callable[[int, int], Workload], argv: Sequence[str] | None
) -> None:
    """Run the benchmark of a script: parse its options, measure, print, record.

    Args:
        name: The kernel's name, for the record.
        description: The script's docstring.
        make: Makes the workload from K and I of a shape.
        argv: The command line; None takes this process's.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, four row counts")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--seconds", type=float, default=0.2, help="per contender and case")
    add_json_option(parser)
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.rows, options.seconds = list(SHAPES)[:2], (1, 4, 16, 64), 0.05
    torch.set_num_threads(kernels.num_threads())
    meter = RoofMeter()
    roofs = meter.measure(200)
    print(f"{roofs.describe()}\n{LEGEND}\n{HEADER}")
    cases = []
    for shape in options.shapes:
        workload = make(*SHAPES[shape])
        for rows in options.rows:
            case = _measure(shape, workload, rows, options.seconds, meter)
            roofs = roofs.best_with(case.roofs)
            print(case.line(), flush=True)
            cases.append(case)
    print(_missed(cases))
    results = [case.as_dict() for case in cases]
    finish(name, options.json, {"roofs": roofs.as_dict(), "results": results})


def _measure(shape: str, workload: Workload, rows: int, seconds: float, meter: RoofMeter) -> Case:
    calls = workload.calls(rows)
    before = meter.measure()
    times = best_seconds([calls[name].run for name in CONTENDERS], seconds)
    return Case(
        shape,
        rows,
        workload.flops(rows),
        {name: calls[name].num_bytes for name in CONTENDERS},
        dict(zip(CONTENDERS, times, strict=True)),
        before.best_with(meter.measure()),
    )


def _missed(cases: list[Case]) -> str:
    """Return the lists of what misses each goal, one line each."""
    few, many, torch_wins = [], [], []
    for case in cases:
        where = f"{case.shape} {case.rows}"
        goal = 0.0 if case.goal is None else case.goal
        below = [name for name in (*FORMS, *ROUNDED.values()) if case.share(name) < goal]
        cells = [f"{where} {form} {case.share(form):.0%}" for form in below]
        (few if case.rows <= FEW_ROWS else many).extend(cells)
        if case.slower:
            ratios = [f"{name} {number(case.over_torch(name))}" for name in case.slower]
            torch_wins.append(f"{where} {', '.join(ratios)}")
    return "\n".join(
        f"{title}: {'; '.join(cells) or 'none'}"
        for title, cells in (
            (f"below {BANDWIDTH_GOAL:.0%} of the roof up to {FEW_ROWS} rows", few),
            (f"below {FLOPS_GOAL:.0%} of the roof from {MANY_ROWS} rows", many),
            ("slower than torch's best", torch_wins),
        )
    )
