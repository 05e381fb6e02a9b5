"""Does a step on a simulated device take what the simulator says, with all its lanes busy at once?

A little random Mixtral is run by our schedule on a device, a link and a host whose speeds are those
of a known host, all scaled down alike, so that their ratios are kept and this machine's real work
fits below the pace. Attention on the host, experts on the device and weights on the link are all
large: many short sequences, each verifying a few drafted tokens (all rejected) in a step.

    python benchmarks/sim_overlap.py
    python benchmarks/sim_overlap.py --png overlap.png --trace overlap.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.machine import machine
from harness.table import table
from specmoeoff.config import EngineConfig
from specmoeoff.engine.planned_build import open_planned
from specmoeoff.engine.planned_memory import PlannedConfig
from specmoeoff.engine.record import Recording, longest, record
from specmoeoff.memory_size import parse_memory_size
from specmoeoff.pipeline.hosts import costs_of
from specmoeoff.pipeline.picture import draw
from specmoeoff.pipeline.timeline import Timeline, lane_shares, overlap_s
from specmoeoff.pipeline.trace import to_chrome
from specmoeoff.pipeline.tune import steady_step_s

if TYPE_CHECKING:
    from specmoeoff.pipeline.costs import Costs

MODEL = (
    *("--hidden", "64", "--intermediate", "3584", "--layers", "6", "--vocabulary", "1000"),
    *("--heads", "4", "--kv-heads", "1", "--head-dim", "16"),
)
"""Experts a quarter as wide as Mixtral 8x7B's, for a quarter of the context (144 tokens for 576):
that keeps the device's work for each of attention. Activations weigh four times as much beside it.
"""


def main() -> None:
    """Run the steps, print what they took beside what was simulated."""
    options = _options()
    if options.target is not None:
        _report(options, options.target)
        return
    with tempfile.TemporaryDirectory() as directory:
        script = Path(__file__).with_name("random_mixtral.py")
        subprocess.run([sys.executable, str(script), directory, *MODEL], check=True)
        _report(options, Path(directory))


def _report(options: argparse.Namespace, target: Path) -> None:
    costs = costs_of(options.host, options.scale)
    made = _run(options, target, costs)
    steps = made.timelines
    simulated_s = steady_step_s("specmoeoff", made.shape, costs)
    # From begin to begin, so that what happens between steps counts.
    rounds_s = [b.begin_s - a.begin_s for a, b in itertools.pairwise(steps)]
    found: dict[str, Any] = {
        "simulated_s": simulated_s,
        "step_s": statistics.median(step.step_s for step in steps),
        "round_s": statistics.median(rounds_s),
        "rounds_s": rounds_s,
        "lane_shares": {k: v for k, v in lane_shares(steps).items() if v},
        "late": _late(steps, costs),
        "overlap_share": _overlaps(steps),
        "waves": made.shape.waves,
        "ring_slots": made.shape.ring_slots,
        "num_slots": made.shape.num_slots,
    }
    found["round_over_simulated"] = found["round_s"] / simulated_s
    _print(found)
    if options.png is not None:
        draw([("measured on the simulated device", steps[-1])], options.png)
    if options.trace is not None:
        options.trace.write_text(to_chrome(steps, {"times": "measured on a simulated device"}))
    asked = {key: str(value) for key, value in vars(options).items()}
    print(json.dumps({"machine": machine(), "options": asked, "results": found}))


def _run(options: argparse.Namespace, target: Path, costs: Costs) -> Recording:
    max_tokens = options.batch * options.verified
    wanted = PlannedConfig(
        device="sim",
        num_micro_batches=options.micro_batches,
        num_seqs=options.batch,
        max_len=longest(options.context, options.steps, options.verified),
        max_tokens=max_tokens,
        device_memory=parse_memory_size(options.device_memory),
        costs=costs,
    )
    planned = open_planned(EngineConfig(model=str(target)), wanted)
    try:
        return record(
            planned.forward,
            options.batch,
            options.context,
            options.steps,
            max_tokens,
            verified=options.verified,
        )
    finally:
        planned.close()


def _late(steps: tuple[Timeline, ...], costs: Costs) -> dict[str, float]:
    """Return by how much each lane's ops outlasted what was set, as a share of that."""
    ran: dict[str, float] = {}
    set_s: dict[str, float] = {}
    for step in steps:
        for number, when in step.ran.items():
            op = step.plan.ops[number]
            ran[op.lane] = ran.get(op.lane, 0.0) + when.duration_s
            set_s[op.lane] = set_s.get(op.lane, 0.0) + costs.seconds(op)
    return {lane: seconds / set_s[lane] - 1 for lane, seconds in ran.items()}


def _overlaps(steps: tuple[Timeline, ...]) -> dict[str, float]:
    """Return how much of the time two lanes, or all three, were busy at once."""
    whole_s = steps[-1].begin_s + steps[-1].step_s - steps[0].begin_s
    groups = [("cpu", "device"), ("cpu", "h2d"), ("device", "h2d"), ("cpu", "device", "h2d")]
    return {" and ".join(lanes): overlap_s(steps, *lanes) / whole_s for lanes in groups}


def _print(found: dict[str, Any]) -> None:
    times = ("simulated_s", "step_s", "round_s")
    print(table(["", "ms"], [[name[:-2], f"{found[name] * 1e3:.4g}"] for name in times]))
    print(f"\na round is {found['round_over_simulated']:.3f} of the simulated step")
    for title in ("lane_shares", "overlap_share", "late"):
        rows = [[name, f"{share:.1%}"] for name, share in found[title].items()]
        print("\n" + table([title.replace("_", " "), "share"], rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, help="a model; without one a little one is written")
    parser.add_argument("--host", default="a30")
    parser.add_argument("--scale", type=float, default=0.0003)
    parser.add_argument("--device-memory", default="322MB")
    parser.add_argument("--batch", type=int, default=1125)
    parser.add_argument("--verified", type=int, default=8, help="tokens a sequence and step")
    parser.add_argument("--context", type=int, default=144)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--trace", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
