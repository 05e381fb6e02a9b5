"""The six schedules side by side: the same model, memory and kernels, without speculation.

With a model, steps are run: on this machine, or on a simulated device whose links and processors
are held to a set speed. Beside each measured step stands the simulator's, at the speeds that were
set or measured. Without a model nothing is run: a Mixtral 8x7B is priced at a host's peak speeds.
A round runs all six schedules in turn, each round from another one on; with more rounds a figure is
the median over rounds of the round's best step, so that a disk that drifts favours none of them.
Where it drifts too much for that, --disk-rate holds it to a rate that it always gives (needs root).

    python benchmarks/schedules.py --host a30 --batch 1 16 64 256 1817
    python benchmarks/schedules.py --target DIR --device sim --device-memory 20MB --scale 0.001
    python benchmarks/schedules.py --target DIR --device cpu --memory 1GiB --rounds 3
    python benchmarks/schedules.py --target DIR --device cpu --memory 1GiB --disk-rate 500MB
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from harness.disk_rate import held_disk_rate
from harness.machine import machine
from harness.table import table
from specmoeoff.config import EngineConfig, ModelConfig, RopeConfig
from specmoeoff.engine.planned_build import open_planned
from specmoeoff.engine.planned_memory import PlannedConfig
from specmoeoff.engine.record import longest, record
from specmoeoff.memory_size import parse_memory_size
from specmoeoff.pipeline.hosts import costs_of
from specmoeoff.pipeline.picture import draw
from specmoeoff.pipeline.schedules import SCHEDULES
from specmoeoff.pipeline.schedules.shape import DEVICE, Draft, MicroBatch, StepShape
from specmoeoff.pipeline.simulator import simulate_steps
from specmoeoff.pipeline.timeline import Timeline, lane_shares
from specmoeoff.pipeline.tune import steady_step_s, steps_of, tuned

if TYPE_CHECKING:
    from collections.abc import Iterator

    from specmoeoff.engine.record import Recording

MIXTRAL = ModelConfig(
    model_type="mixtral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
    rope=RopeConfig(theta=1e6),
    num_experts=8,
    num_experts_per_tok=2,
)
MIXTRAL_EXPERT_BYTES = 3 * 4096 * 14336 * 2
MIXTRAL_OTHER_BYTES = int(5e9)
"""Dense weights (3.2 GB) and activations."""
EAGLE = Draft(num_tokens=4, weight_bytes=int(1.6e9), num_weights=int(0.8e9))


@dataclass(frozen=True)
class Round:
    """One schedule's turn: its best step, the simulator's, and the lanes over all its steps."""

    step_s: float
    simulated_s: float
    lane_shares: dict[str, float]
    timeline: Timeline

    def figures(self) -> dict[str, object]:
        """Return what the record keeps."""
        shares = {lane: share for lane, share in self.lane_shares.items() if share}
        return {"step_s": self.step_s, "simulated_s": self.simulated_s, "lane_shares": shares}


@dataclass(frozen=True)
class Result:
    """One schedule at one batch, round after round."""

    schedule: str
    batch: int
    rounds: list[Round]

    @property
    def step_s(self) -> float:
        """The median of the rounds' best steps."""
        return median(r.step_s for r in self.rounds)

    @property
    def simulated_s(self) -> float:
        """The median over the rounds, whose measured speeds may differ."""
        return median(r.simulated_s for r in self.rounds)

    @property
    def timeline(self) -> Timeline:
        """A step of the round nearest to the median."""
        return min(self.rounds, key=lambda r: abs(r.step_s - self.step_s)).timeline


def main() -> None:
    """Run or price every schedule at every batch."""
    options = _options()
    with contextlib.ExitStack() as held:
        if options.disk_rate:
            held.enter_context(held_disk_rate(parse_memory_size(options.disk_rate), options.target))
        results = list(_measured(options) if options.target else _priced(options))
    names = list(SCHEDULES)
    rows = []
    for name in names:
        row = [name]
        for batch in options.batch:
            result = _find(results, name, batch)
            cell = f"{result.step_s * 1e3:.4g}"
            row.append(f"{cell} ({result.simulated_s * 1e3:.4g})" if options.target else cell)
        rows.append(row)
    title = "milliseconds a step, measured (simulated)" if options.target else "simulated ms a step"
    print(table([title, *(f"batch {batch}" for batch in options.batch)], rows))
    if options.png is not None:
        last = options.batch[-1]
        draw([(n, _find(results, n, last).timeline) for n in names], options.png)
    found = [
        {
            "schedule": r.schedule,
            "batch": r.batch,
            "step_s": r.step_s,
            "simulated_s": r.simulated_s,
            "rounds": [one.figures() for one in r.rounds],
        }
        for r in results
    ]
    asked = {key: str(value) for key, value in vars(options).items()}
    print(json.dumps({"machine": machine(), "options": asked, "results": found}))


def _find(results: list[Result], schedule: str, batch: int) -> Result:
    return next(r for r in results if (r.schedule, r.batch) == (schedule, batch))


def _priced(options: argparse.Namespace) -> Iterator[Result]:
    costs = costs_of(options.host, options.scale)
    memory = parse_memory_size(options.device_memory or "24GB")
    for batch in options.batch:
        count = min(options.micro_batches, batch)
        sizes = [batch * (m + 1) // count - batch * m // count for m in range(count)]
        n = options.verified
        batches = tuple(MicroBatch(s * n, s, s * options.context, s * n) for s in sizes)
        shape = StepShape(
            MIXTRAL,
            batches,
            DEVICE,
            (memory - MIXTRAL_OTHER_BYTES) // MIXTRAL_EXPERT_BYTES,
            MIXTRAL_EXPERT_BYTES,
            draft=EAGLE if n > 1 else None,
        )
        best = tuned(shape, costs)
        for name in SCHEDULES:
            steps = simulate_steps(steps_of(name, best, 4), costs)[1:]
            step_s = steps[-1].step_s
            priced = Round(step_s, step_s, dict(lane_shares(steps)), steps[-1])
            yield Result(name, batch, [priced])


def _measured(options: argparse.Namespace) -> Iterator[Result]:
    for batch in options.batch:
        results = [Result(name, batch, []) for name in SCHEDULES]
        for number in range(1, options.rounds + 1):
            # Each round starts with another one: what came before leaves its mark on the disk.
            first = (number - 1) % len(results)
            for result in (*results[first:], *results[:first]):
                found = _round(options, result.schedule, batch)
                result.rounds.append(found)
                cell = f"{result.schedule} {batch}, round {number}"
                print(f"# {cell}: {found.step_s:.4f} s ({found.simulated_s:.4f})", flush=True)
        yield from results


def _round(options: argparse.Namespace, schedule: str, batch: int) -> Round:
    costs = costs_of(options.host, options.scale) if options.device == "sim" else None
    memory = parse_memory_size(options.memory) if options.memory else None
    wanted = PlannedConfig(
        schedule=schedule,
        device=options.device,
        num_micro_batches=min(options.micro_batches, batch),
        num_seqs=batch,
        max_len=longest(options.context, options.steps),
        max_tokens=max(batch, 512),
        device_memory=parse_memory_size(options.device_memory) if options.device_memory else 0,
        costs=costs,
    )
    made = _record(options, EngineConfig(str(options.target), memory=memory), wanted)
    best = min(made.timelines, key=lambda timeline: timeline.step_s)
    simulated_s = steady_step_s(schedule, made.shape, costs or made.costs)
    return Round(best.step_s, simulated_s, dict(lane_shares(made.timelines)), best)


def _record(options: argparse.Namespace, config: EngineConfig, wanted: PlannedConfig) -> Recording:
    planned = open_planned(config, wanted)
    try:
        return record(
            planned.forward, wanted.num_seqs, options.context, options.steps, wanted.max_tokens
        )
    finally:
        planned.close()
        # The next one's budget is the whole process's.
        del planned
        gc.collect()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, help="a model; without one a Mixtral is priced")
    parser.add_argument("--device", choices=("cpu", "sim"), default="sim")
    parser.add_argument("--memory", help="of the process (cpu), or of the simulated host")
    parser.add_argument("--device-memory")
    parser.add_argument("--host", default="a30")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--context", type=int, default=576)
    parser.add_argument("--verified", type=int, default=1, help="tokens a sequence and step")
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--rounds", type=int, default=1, help="over all schedules, when run")
    parser.add_argument("--disk-rate", help="bytes per second read from the disk at most")
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.disk_rate and not options.target:
        parser.error("--disk-rate is for steps that are run: give a --target")
    return options


if __name__ == "__main__":
    main()
