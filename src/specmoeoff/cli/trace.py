"""``specmoeoff trace``: steps by a plan, measured or simulated, as a trace and a picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specmoeoff.cli.console import say
from specmoeoff.cli.figures import held
from specmoeoff.errors import InvalidInputError
from specmoeoff.memory_size import parse_memory_size

if TYPE_CHECKING:
    from specmoeoff.cli.options import TraceOptions
    from specmoeoff.engine.planned_memory import PlannedConfig
    from specmoeoff.offload.tiers import TierUse
    from specmoeoff.pipeline.schedules.shape import StepShape
    from specmoeoff.pipeline.timeline import Timeline

MAX_PROMPT_TOKENS = 256
"""Tokens of a pass while prompts are read; more would take memory from the experts."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """Steps, where their times are from, and what the simulator says of the last one."""

    timelines: tuple[Timeline, ...]
    shape: StepShape
    times: str
    predicted_s: float
    """A step among others, simulated at the speeds that were set or, elsewhere, measured."""
    tiers: dict[str, TierUse] = dataclasses.field(default_factory=dict)
    """What each tier of memory held, where steps were run."""


def run(options: TraceOptions) -> int:
    """Run the command and return its exit code; DoesNotFitError leaves with 3."""
    _check(options)
    traced = _simulate(options) if options.simulate else _measure(options)
    _write(options, traced)
    if options.json:
        say(json.dumps(_as_dict(options, traced)))
    else:
        _show(options, traced)
    return 0


def _check(options: TraceOptions) -> None:
    from specmoeoff.pipeline.schedules import SCHEDULES

    if options.schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise InvalidInputError(f"--schedule {options.schedule!r} is unknown; use one of {known}")
    if options.device not in ("cpu", "sim", "cuda"):
        raise InvalidInputError(f"--device {options.device!r} is unknown; use cpu, sim or cuda")
    if options.device == "sim" and options.device_memory is None:
        raise InvalidInputError("--device sim has a memory of its own; give --device-memory")
    if options.device != "sim" and options.simulate:
        raise InvalidInputError("--simulate needs speeds that are set; add --device sim")
    for name in ("batch", "micro_batches", "context", "steps"):
        field = {"batch": "num_seqs", "micro_batches": "num_micro_batches", "steps": "num_steps"}
        value = getattr(options, field.get(name, name))
        if value < 1:
            raise InvalidInputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not options.scale > 0:
        raise InvalidInputError(f"--scale is {options.scale}; it must be above 0")


def _wanted(options: TraceOptions) -> PlannedConfig:
    from specmoeoff.engine.planned_memory import PlannedConfig
    from specmoeoff.engine.record import longest
    from specmoeoff.pipeline.hosts import costs_of

    is_sim = options.device == "sim"
    return PlannedConfig(
        schedule=options.schedule,
        device=options.device,  # type: ignore[arg-type]  # _check refuses what is unknown
        num_micro_batches=options.num_micro_batches,
        num_seqs=options.num_seqs,
        max_len=longest(options.context, options.num_steps),
        max_tokens=_pass_tokens(options),
        device_memory=parse_memory_size(options.device_memory) if options.device_memory else 0,
        costs=costs_of(options.host, options.scale) if is_sim else None,
    )


def _pass_tokens(options: TraceOptions) -> int:
    """Return the tokens of the largest pass."""
    return max(options.num_seqs, MAX_PROMPT_TOKENS)


def _measure(options: TraceOptions) -> Traced:
    from specmoeoff.engine.memory_plan import peak_resident_bytes
    from specmoeoff.engine.planned_build import open_planned
    from specmoeoff.engine.record import record
    from specmoeoff.pipeline.tune import steady_step_s

    wanted = _wanted(options)
    planned = open_planned(options.engine.engine(), wanted)
    try:
        recording = record(
            planned.forward,
            options.num_seqs,
            options.context,
            options.num_steps,
            _pass_tokens(options),
            options.engine.seed,
        )
        tiers = planned.uses(peak_resident_bytes())
    finally:
        planned.close()
    costs = wanted.costs or recording.costs
    predicted = steady_step_s(options.schedule, recording.shape, costs)
    times = "measured on this machine"
    if wanted.costs is not None:
        times = f"measured on a simulated device at {options.scale:g} times the speeds of a host "
        times += f"with {options.host}"
    return Traced(recording.timelines, recording.shape, times, predicted, tiers)


def _simulate(options: TraceOptions) -> Traced:
    from specmoeoff.engine.planned_build import decoding_shape
    from specmoeoff.pipeline.simulator import simulate_steps
    from specmoeoff.pipeline.tune import steps_of, tuned

    wanted = _wanted(options)
    assert wanted.costs is not None
    shape = decoding_shape(options.engine.engine(), wanted)
    if options.schedule == "specmoeoff":
        shape = tuned(shape, wanted.costs)
    # The first step begins with an empty ring and is not shown.
    plans = steps_of(options.schedule, shape, options.num_steps + 1)
    timelines = simulate_steps(plans, wanted.costs)[1:]
    times = f"simulated at {options.scale:g} times the peak speeds of a host with {options.host}"
    return Traced(tuple(timelines), shape, times, timelines[-1].step_s)


def _write(options: TraceOptions, traced: Traced) -> None:
    from specmoeoff.pipeline.trace import to_chrome

    about = {"model": options.engine.model, "times": traced.times}
    about |= {f"{name} memory": held(dataclasses.asdict(u)) for name, u in traced.tiers.items()}
    path = Path(options.output)
    try:
        path.write_text(to_chrome(traced.timelines, about), encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be written: {error.strerror}") from None
    if options.png is not None:
        from specmoeoff.pipeline.picture import draw

        title = f"{options.schedule}, {traced.times}"
        draw([(title, timeline) for timeline in traced.timelines], Path(options.png))


def _as_dict(options: TraceOptions, traced: Traced) -> dict[str, Any]:
    from specmoeoff.pipeline.timeline import lane_shares

    last = traced.timelines[-1]
    return {
        "schedule": options.schedule,
        "times": traced.times,
        "step_s": [timeline.step_s for timeline in traced.timelines],
        "predicted_step_s": traced.predicted_s,
        "lane_shares": {k: v for k, v in lane_shares(traced.timelines).items() if v},
        "ops": len(last.plan.ops),
        "waves": traced.shape.waves,
        "ring_slots": traced.shape.ring_slots,
        "num_slots": traced.shape.num_slots,
        "tiers": {name: dataclasses.asdict(use) for name, use in traced.tiers.items()},
        "critical_path_s": _critical(last),
        "output": options.output,
        "png": options.png,
    }


def _critical(timeline: Timeline) -> dict[str, float]:
    """Return the seconds that each kind of op has on the critical path, most first."""
    seconds: dict[str, float] = {}
    for number in timeline.critical_path():
        kind = timeline.plan.ops[number].kind
        seconds[kind] = seconds.get(kind, 0.0) + timeline.ran[number].duration_s
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _show(options: TraceOptions, traced: Traced) -> None:
    found = _as_dict(options, traced)
    steps = ", ".join(f"{step_s * 1e3:.4g} ms" for step_s in found["step_s"])
    say(f"{options.schedule}: {steps} per step, {traced.times}")
    if not options.simulate:
        at = "speeds that were set" if options.device == "sim" else "speeds measured here"
        say(f"simulated at the {at}: {traced.predicted_s * 1e3:.4g} ms")
    shares = (f"{lane} {share:.0%}" for lane, share in found["lane_shares"].items())
    say(f"lanes busy: {', '.join(shares)}")
    for name, use in found["tiers"].items():
        say(f"{name} memory: {held(use)}")
    critical = list(found["critical_path_s"].items())[:3]
    named = ", ".join(f"{kind} {seconds * 1e3:.4g} ms" for kind, seconds in critical)
    say(f"critical path of the last step: {named}")
    say(f"wrote {options.output} (open it at ui.perfetto.dev)")
    if options.png is not None:
        say(f"wrote {options.png}")
