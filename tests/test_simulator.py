from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from random_plans import plans, shapes
from specmoeoff.errors import InvalidInputError
from specmoeoff.pipeline.chain import chain
from specmoeoff.pipeline.costs import Costs, Rate
from specmoeoff.pipeline.picture import draw
from specmoeoff.pipeline.plan import LANES, Op, Plan
from specmoeoff.pipeline.simulator import simulate, simulate_steps
from specmoeoff.pipeline.timeline import Ran, Timeline, lane_shares, overlap_s
from specmoeoff.pipeline.trace import to_chrome
from specmoeoff.pipeline.tune import steps_of

if TYPE_CHECKING:
    from pathlib import Path

    from specmoeoff.pipeline.schedules.shape import StepShape

A_SECOND_A_BYTE = Costs(lanes=dict.fromkeys(LANES, Rate(bytes_per_s=1.0)))


def plan(*ops: Op) -> Plan:
    return Plan("test", ops)


def test_a_rate_is_a_roofline() -> None:
    rate = Rate(bytes_per_s=10.0, flops_per_s=100.0, latency_s=1.0)
    assert rate.seconds(50, 100) == 6.0
    assert rate.seconds(50, 1000) == 11.0
    assert rate.seconds(0, 0) == 1.0
    assert Rate().seconds(1 << 40, 1 << 40) == 0.0
    for wrong in ({"bytes_per_s": 0.0}, {"flops_per_s": -1.0}, {"latency_s": -1.0}):
        with pytest.raises(InvalidInputError, match="must have rates above 0"):
            Rate(**wrong)
    with pytest.raises(InvalidInputError):
        Rate(bytes_per_s=math.nan)


def test_a_kind_of_op_may_have_a_rate_of_its_own() -> None:
    costs = Costs({"cpu": Rate(1.0)}, {("cpu", "attend"): Rate(2.0)})
    attend, store = Op("attend", "cpu", num_bytes=8), Op("store_kv", "cpu", num_bytes=8)
    assert [costs.seconds(op) for op in (attend, store, replace(attend, lane="device"))] == [
        4,
        8,
        0,
    ]


def test_lanes_run_side_by_side_and_one_op_at_a_time() -> None:
    """Two loads in a row; what needs the first runs beside the second."""
    timeline = simulate(
        plan(
            Op("load", "h2d", num_bytes=3),
            Op("load", "h2d", num_bytes=4),
            Op("experts", "device", num_bytes=2, waits=(0,)),
            Op("experts", "device", num_bytes=2, waits=(1, 2)),
        ),
        A_SECOND_A_BYTE,
    )
    assert timeline.ran == {0: Ran(0, 3), 1: Ran(3, 7), 2: Ran(3, 5), 3: Ran(7, 9)}
    assert timeline.step_s == 9
    assert timeline.busy_s() == dict.fromkeys(LANES, 0.0) | {"h2d": 7, "device": 4}
    assert timeline.busy_s(4, 8)["h2d"] == 3
    assert timeline.critical_path() == [0, 1, 3]


def test_a_free_lane_takes_the_first_listed_of_what_is_ready() -> None:
    """The activation (op 1) is not ready at once; when it is, it goes before a later load."""
    timeline = simulate(
        plan(
            Op("attend", "cpu", num_bytes=1),
            Op("attention_in", "h2d", num_bytes=1, waits=(0,)),
            Op("load", "h2d", num_bytes=2),
            Op("load", "h2d", num_bytes=2),
        ),
        A_SECOND_A_BYTE,
    )
    assert [timeline.ran[n].start_s for n in range(4)] == [0, 2, 0, 3]


def test_what_is_done_ahead_is_no_part_of_the_step() -> None:
    timeline = simulate(
        plan(Op("head", "device", num_bytes=2), Op("load", "h2d", num_bytes=5, ahead=True)),
        A_SECOND_A_BYTE,
    )
    assert timeline.step_s == 2
    assert timeline.busy_s()["h2d"] == 2
    assert timeline.busy_s(end_s=9)["h2d"] == 5


@given(plans())
def test_a_simulated_step_keeps_the_promises(made: Plan) -> None:
    timeline = simulate(made, A_SECOND_A_BYTE)
    assert set(timeline.ran) == set(range(len(made.ops)))
    for number, op in enumerate(made.ops):
        assert timeline.ran[number].duration_s == op.num_bytes
        assert all(timeline.ran[w].end_s <= timeline.ran[number].start_s for w in op.waits)
    for lane in LANES:
        times = sorted(
            (ran.start_s, ran.end_s)
            for number, ran in timeline.ran.items()
            if made.ops[number].lane == lane
        )
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(times))
    # No faster than the busiest lane or the longest chain of waits, no slower than all in a row.
    longest = [0.0] * len(made.ops)
    for number, op in enumerate(made.ops):
        longest[number] = op.num_bytes + max((longest[w] for w in op.waits), default=0.0)
    assert timeline.step_s >= max([*timeline.busy_s().values(), *longest])
    assert timeline.step_s <= sum(op.num_bytes for op in made.ops)


@given(plans())
def test_the_critical_path_explains_the_whole_step(made: Plan) -> None:
    timeline = simulate(made, A_SECOND_A_BYTE)
    path = timeline.critical_path()
    assert sum(made.ops[number].num_bytes for number in path) == timeline.step_s
    ends = [timeline.ran[number].end_s for number in path]
    assert [timeline.ran[number].start_s for number in path] == [0.0, *ends[:-1]]


def test_shares_of_lanes_count_the_time_between_steps() -> None:
    """Two steps of 5 s with 1 s between: the link loads for 4 s of each, 8 of 11 in all."""
    shares = lane_shares(two_steps())
    assert shares["h2d"] == pytest.approx(8 / 11)
    assert shares["device"] == pytest.approx(4 / 11)
    assert lane_shares([]) == dict.fromkeys(LANES, 0.0)
    assert lane_shares([Timeline(plan(), {})]) == dict.fromkeys(LANES, 0.0)


def test_the_overlap_of_lanes_is_the_time_in_which_all_are_busy() -> None:
    """The device runs from 3 to 5 of each step, the link from 0 to 4, the processor from 4 to 6."""
    busy = Op("attend", "cpu", num_bytes=2, waits=(2,), ahead=True)
    made = plan(*two_steps()[0].plan.ops, busy)
    steps = [replace(simulate(made, A_SECOND_A_BYTE), begin_s=begin) for begin in (0.0, 6.0)]
    assert overlap_s(steps, "h2d", "device") == 2
    assert overlap_s(steps, "device", "cpu") == 2
    assert overlap_s(steps, "device", "cpu", "h2d") == 0
    assert overlap_s(steps, "h2d") == 8
    assert overlap_s([], "h2d", "cpu") == 0


def test_an_empty_step_takes_no_time() -> None:
    timeline = Timeline(plan(), {})
    assert (timeline.step_s, timeline.critical_path()) == (0.0, [])


@settings(max_examples=25)
@given(shape=shapes(), name=st.sampled_from(["specmoeoff", "flexgen", "zero_inference"]))
def test_steps_in_a_row_add_up(shape: StepShape, name: str) -> None:
    made = steps_of(name, shape)
    costs = Costs({"h2d": Rate(1e6), "disk": Rate(1e6), "cpu": Rate(1e7), "device": Rate(1e7)})
    steps = simulate_steps(made, costs)
    whole = simulate(chain(made), costs)
    own = [op for step in steps for op in step.plan.ops]
    assert own == [op for step in made for op in step.ops]
    ends = [whole.ran[n].end_s for n, op in enumerate(own) if not op.ahead]
    assert sum(step.step_s for step in steps) == pytest.approx(max(ends))


def test_costs_are_measured_from_timelines() -> None:
    """Two loads of 3 and 5 bytes in 4 s: 2 bytes/s; what has no size is a time per op."""
    made = plan(
        Op("load", "h2d", num_bytes=3),
        Op("load", "h2d", num_bytes=5),
        Op("experts", "device", flops=6),
        Op("embed", "device"),
        Op("embed", "device"),
    )
    ran = {0: Ran(0, 1), 1: Ran(1, 4), 2: Ran(0, 2), 3: Ran(2, 3), 4: Ran(3, 5)}
    costs = Costs.measured([Timeline(made, ran)])
    assert [costs.seconds(op) for op in made.ops] == [1.5, 2.5, 2.0, 1.5, 1.5]
    assert Costs.measured([Timeline(made, dict.fromkeys(ran, Ran(1, 1)))]).seconds(made.ops[0]) == 0


# The trace and the picture ------------------------------------------------------------------------


def two_steps() -> list[Timeline]:
    made = plan(
        Op("load", "h2d", layer=1, experts=(2,), num_bytes=3),
        Op("experts", "device", layer=1, experts=(2,), num_bytes=2, waits=(0,)),
        Op("load", "h2d", layer=0, experts=(0,), num_bytes=1, ahead=True, waits=(0,)),
    )
    first = simulate(made, A_SECOND_A_BYTE)
    return [first, replace(first, begin_s=6.0)]


def test_a_trace_has_a_named_track_for_each_lane() -> None:
    trace = json.loads(to_chrome(two_steps(), {"times": "simulated"}))
    assert trace["otherData"] == {"schedule": "test", "times": "simulated"}
    tracks = {
        e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"
    }
    assert tracks == {0: "h2d", 1: "device"}
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    shown = [(tracks[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events]
    assert shown[:3] == [
        ("h2d", "load L1 E2", 0, 3e6),
        ("device", "experts L1 E2", 3e6, 2e6),
        ("h2d", "load L0 E0", 3e6, 1e6),
    ]
    assert [ts for _, _, ts, _ in shown[3:]] == [6e6, 9e6, 9e6]
    assert [e["args"]["on the critical path"] for e in events[:3]] == [True, True, False]
    assert events[2]["args"]["for the next step"] is True
    assert events[1]["args"]["waits for ops"] == [0]


def test_a_trace_of_nothing_is_a_trace() -> None:
    assert json.loads(to_chrome([]))["otherData"] == {"schedule": "no steps"}


def test_a_picture_is_a_png(tmp_path: Path) -> None:
    draw([("one", two_steps()[0]), ("two", two_steps()[1])], tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(InvalidInputError, match=r"install 'specmoeoff\[plots\]'"):
        draw([("one", two_steps()[0])], tmp_path / "steps.png")
