"""A timeline as a trace that Perfetto and chrome://tracing open: a named track for each lane."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from specmoeoff.pipeline.plan import LANES, Op

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from specmoeoff.pipeline.timeline import Timeline

MICROSECONDS = 1e6


def to_chrome(steps: Sequence[Timeline], about: Mapping[str, str] | None = None) -> str:
    """Return steps that follow one another in the Trace Event Format.

    Args:
        steps: Timelines on one clock.
        about: Facts that go with the trace, such as whether it was measured or simulated.
    """
    lanes = [lane for lane in LANES if any(op.lane == lane for s in steps for op in s.plan.ops)]
    name = steps[0].plan.schedule if steps else "no steps"
    events: list[dict[str, Any]] = [_metadata("process_name", 0, name=name)]
    for track, lane in enumerate(lanes):
        events.append(_metadata("thread_name", track, name=lane))
        events.append(_metadata("thread_sort_index", track, sort_index=track))
    for step in steps:
        begin = step.begin_s - steps[0].begin_s
        critical = set(step.critical_path())
        for number, ran in sorted(step.ran.items()):
            op = step.plan.ops[number]
            events.append(
                {
                    "ph": "X",
                    "pid": 0,
                    "tid": lanes.index(op.lane),
                    "name": op.name,
                    "cat": op.kind,
                    "ts": (begin + ran.start_s) * MICROSECONDS,
                    "dur": ran.duration_s * MICROSECONDS,
                    "args": _facts(number, op, number in critical),
                }
            )
    other = {"schedule": name, **(about or {})}
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": other})


def _metadata(kind: str, track: int, **facts: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": 0, "tid": track, "name": kind, "args": facts}


def _facts(number: int, op: Op, critical: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"op": number, "bytes": op.num_bytes, "flops": op.flops}
    facts |= {"waits for ops": list(op.waits), "on the critical path": critical}
    if op.ahead:
        facts["for the next step"] = True
    if op.acquires:
        facts["acquires"] = list(op.acquires)
    if op.releases:
        facts["releases"] = list(op.releases)
    return facts
