"""What a GPU gets out of the plans: its link, a step beside its lower bound, rivals, speculation.

A random model of Mixtral 8x7B's shape, with as many layers as host memory holds, is run with 24 GB
of the GPU's memory. Four tables:

1. the lane that brings weights beside a plain loop of copies from pinned memory;
2. our step beside max(link, attention on the host, GPU): the bytes that it sends at the rate of
   that loop, and what its ops on the other two take one at a time;
3. the six schedules, with the simulator's figure at the speeds that were measured;
4. speculation with a SYNTHETIC acceptance: drafts are random tokens that cost nothing to make, a
   step verifies k of them a sequence, and what it yields is counted as if each were accepted with
   probability a: 1 + a + ... + a^k tokens. It shows what verification costs, not what a draft does.

Without a GPU it runs dry: a little model on a simulated device with the ratios of a known host.
Those figures are simulated and say nothing of a GPU.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --layers 8 --batch 64 --directory models/mixtral-8
    python benchmarks/gpu.py --dry
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.copy_loop import paced_copy_rate, pinned_copy_rate
from harness.gpu_tables import tables
from harness.random_model import SHAPE, random_model
from harness.record import add_json_option, finish
from specmoeoff.config import EngineConfig
from specmoeoff.engine.model_files import ModelFiles
from specmoeoff.engine.planned_build import open_planned
from specmoeoff.engine.planned_memory import PlannedConfig
from specmoeoff.engine.record import Recording, longest, record
from specmoeoff.errors import DoesNotFitError, InvalidInputError
from specmoeoff.memory_size import format_memory_size, parse_memory_size
from specmoeoff.offload.planned_experts import slot_bytes
from specmoeoff.pipeline.executor import SerialExecutor
from specmoeoff.pipeline.hosts import costs_of
from specmoeoff.pipeline.schedules import SCHEDULES
from specmoeoff.pipeline.timeline import lane_shares
from specmoeoff.pipeline.tune import steady_step_s

if TYPE_CHECKING:
    from specmoeoff.engine.planned_build import Planned
    from specmoeoff.engine.planned_forward import PlannedForward
    from specmoeoff.pipeline.costs import Costs

OURS = "specmoeoff"
NOTICE = (
    "DRY RUN without a GPU: all figures are of a simulated device; the figures of a GPU are owed."
)
ON_GPU: dict[str, Any] = {
    **dict(zip(SHAPE, (4096, 14336, 32, 8, 128, 8, 32000), strict=True)),
    "device_memory": "24GB",
    "dtype": "bfloat16",
    "batch": [1, 64, 256],
    "speculation_batch": 64,
    "context": 256,
}
DRY: dict[str, Any] = {
    **dict(zip(SHAPE, (64, 256, 4, 1, 16, 8, 1000), strict=True)),
    "layers": 12,
    "device_memory": "5MB",
    "dtype": "float32",
    "batch": [1, 16, 64],
    "speculation_batch": 16,
    "context": 32,
}
"""Somewhat more than a quarter of the experts stays; of Mixtral 8x7B's in 24 GB, about a fifth."""


def main() -> None:
    """Run on the GPU, or dry; print the tables."""
    options = _options()
    where = NOTICE if options.dry else _gpu_name()
    # At once, since another process writes the model.
    print(where, flush=True)
    shape = {name: getattr(options, name) for name in SHAPE}
    with random_model(options.directory, options.layers, shape) as target:
        found = _measure(options, target)
    memory = format_memory_size(parse_memory_size(options.device_memory))
    print(f"\n{memory}: {found['slots']} slots for {found['experts']} experts\n")
    print(tables(found, options.batch, options.speculation_batch, options.acceptance))
    print("\n" + where)
    asked = {key: str(value) for key, value in vars(options).items()}
    finish("gpu", options.json, {"note": where, "options": asked, **found})


def _measure(options: argparse.Namespace, target: Path) -> dict[str, Any]:
    expert_bytes = slot_bytes(ModelFiles.open(str(target)).expert_layouts())
    # Before a model is open, which takes all memory that is allowed.
    rate = _copy_rate(expert_bytes, _costs(options))
    found: dict[str, Any] = {
        "expert_bytes": expert_bytes,
        "plain_copy_bytes_per_s": rate,
        "schedules": {},
    }
    for name in SCHEDULES:
        found["schedules"][name] = _run(options, target, name, found)
        # Its memory must be free before the next schedule takes as much.
        gc.collect()
    return found


def _run(
    options: argparse.Namespace, target: Path, name: str, found: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """Run a schedule at every batch; with ours, enter in ``found`` what only ours is asked."""
    try:
        planned = _open(options, target, name)
    except (DoesNotFitError, InvalidInputError) as error:
        if name == OURS:
            raise
        _say(f"{name} does not run: {error}")
        return {}
    timings, steps = {}, {}
    try:
        for batch in options.batch:
            made = _record(options, planned.forward, batch)
            timings[batch] = _timing(name, made, _costs(options))
            _say(f"{name}, batch {batch}: {timings[batch]['step_s']:.4g} s a step")
            if name == OURS:
                alone = _alone(options, planned.forward, batch)
                steps[batch] = _beside_bound(made, alone, found["plain_copy_bytes_per_s"])
        if name == OURS:
            shape, memory = made.shape, planned.tiers[-1].as_dict()
            found |= {"experts": shape.total_experts, "slots": shape.num_slots}
            found |= {"layers": shape.config.num_layers, "device_bytes": memory, "steps": steps}
            found["speculation"] = _speculation(options, planned.forward)
    finally:
        planned.close()
    return timings


def _record(
    options: argparse.Namespace, forward: PlannedForward, batch: int, k: int = 0, tunes: bool = True
) -> Recording:
    return record(
        forward,
        batch,
        options.context,
        options.steps,
        _most_tokens(options),
        verified=k + 1,
        tunes=tunes,
    )


def _alone(options: argparse.Namespace, forward: PlannedForward, batch: int) -> Recording:
    """Run the same steps op by op, so that no lane is slowed by another."""
    forward.machine.executor.settle()
    overlapped = forward.machine.executor
    forward.machine = replace(forward.machine, executor=SerialExecutor())
    try:
        return _record(options, forward, batch, tunes=False)
    finally:
        forward.machine = replace(forward.machine, executor=overlapped)


def _round_s(made: Recording) -> float:
    """Return the seconds from a step's begin to the next one's, so that nothing is left out."""
    begins = [step.begin_s for step in made.timelines]
    return statistics.median(b - a for a, b in itertools.pairwise(begins))


def _timing(name: str, made: Recording, costs: Costs | None) -> dict[str, Any]:
    return {
        "step_s": _round_s(made),
        "simulated_s": steady_step_s(name, made.shape, costs or made.costs),
        "lane_shares": {
            lane: share for lane, share in lane_shares(made.timelines).items() if share
        },
    }


def _beside_bound(made: Recording, alone: Recording, copy_rate: float) -> dict[str, float]:
    """Return a step's time and what bounds it from below: seconds, and bytes a second."""
    count = len(alone.timelines)
    lane_s, sent = {"cpu": 0.0, "device": 0.0}, 0
    for step in alone.timelines:
        for number, ran in step.ran.items():
            op = step.plan.ops[number]
            if op.lane in lane_s:
                lane_s[op.lane] += ran.duration_s / count
            elif op.lane == "h2d":
                sent += op.num_bytes
    link_s, step_s = sent / count / copy_rate, _round_s(made)
    return {
        "step_s": step_s,
        "link_s": link_s,
        "attention_s": lane_s["cpu"],
        "device_s": lane_s["device"],
        "bound_s": max(link_s, *lane_s.values()),
        "loads_alone_bytes_per_s": _load_rate(alone),
        "loads_bytes_per_s": _load_rate(made),
        "step_bytes_per_s": sent / count / step_s,
    }


def _load_rate(made: Recording) -> float:
    """Return the bytes a second of experts while they were copied; 0 if all of them stay."""
    rate = made.costs.kinds.get(("h2d", "load"))
    return 0.0 if rate is None else rate.bytes_per_s


def _speculation(options: argparse.Namespace, forward: PlannedForward) -> dict[int, float]:
    """Return the seconds of a step that verifies k drafts a sequence, by k; 0 is without."""
    found = {}
    for k in (0, *options.k):
        found[k] = _round_s(_record(options, forward, options.speculation_batch, k))
        _say(f"verifying {k} drafts a sequence: {found[k]:.4g} s a step")
    return found


# The device and the model -------------------------------------------------------------------------


def _open(options: argparse.Namespace, target: Path, schedule: str) -> Planned:
    """Open the model, with room for the largest batch whichever will run."""
    wanted = PlannedConfig(
        schedule=schedule,
        device="sim" if options.dry else "cuda",
        num_micro_batches=options.micro_batches,
        num_seqs=max(*options.batch, options.speculation_batch),
        max_len=longest(options.context, options.steps, max(options.k) + 1),
        max_tokens=_most_tokens(options),
        device_memory=parse_memory_size(options.device_memory),
        costs=_costs(options),
    )
    return open_planned(EngineConfig(model=str(target), dtype=options.dtype), wanted)


def _costs(options: argparse.Namespace) -> Costs | None:
    return costs_of(options.host, options.scale) if options.dry else None


def _most_tokens(options: argparse.Namespace) -> int:
    return max(*options.batch, options.speculation_batch * (max(options.k) + 1))


def _copy_rate(num_bytes: int, costs: Costs | None) -> float:
    return pinned_copy_rate(num_bytes) if costs is None else paced_copy_rate(num_bytes, costs)


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def _gpu_name() -> str:
    import torch

    return f"torch {torch.__version__} on {torch.cuda.get_device_name()}"


def _say(text: str) -> None:
    print(f"# {text}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="simulate, even if there is a GPU")
    parser.add_argument("--directory", help="the model: taken, or written and kept", type=Path)
    parser.add_argument("--layers", type=int, help="by default as many as fit host memory")
    for name in SHAPE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--device-memory")
    parser.add_argument("--dtype")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--speculation-batch", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.6, 0.8, 0.9])
    parser.add_argument("--host", default="a30", help="whose speeds a dry run has")
    parser.add_argument("--scale", type=float, default=0.0005, help="times those speeds")
    add_json_option(parser)
    dry = "--dry" in sys.argv or not _has_gpu()
    parser.set_defaults(**(DRY if dry else ON_GPU))
    options = parser.parse_args()
    options.dry = dry
    if options.steps < 2:
        parser.error("--steps must be at least 2: a step is timed from begin to begin")
    return options


if __name__ == "__main__":
    main()
