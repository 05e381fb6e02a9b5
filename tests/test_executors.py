"""Both executors over plans drawn at random, and what happens when an op fails, hangs or is left.

The overlapped executor's slow twin is the serial one: an op's result here is made of the results
of what it waited for and of what lies in its buffers, so whatever starts too early changes it.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from random_plans import plans, shapes
from specmoeoff.errors import OpError
from specmoeoff.pipeline.costs import Costs, Rate
from specmoeoff.pipeline.executor import SerialExecutor
from specmoeoff.pipeline.overlapped import OverlappedExecutor
from specmoeoff.pipeline.pace import paced
from specmoeoff.pipeline.plan import LANES, Buffer, Held, Op, Plan
from specmoeoff.pipeline.schedules import SCHEDULES
from specmoeoff.pipeline.tune import steps_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from specmoeoff.pipeline.executor import Executor
    from specmoeoff.pipeline.schedules.shape import StepShape


class Ledger:
    """Performs ops by writing down what they saw; refuses to share a buffer or a lane."""

    def __init__(self, jitter: random.Random | None = None) -> None:
        self.results: list[dict[int, int]] = []
        """For each step, what each op made of what it saw."""
        self.held: dict[str, int] = {}
        """Buffer to what was written into it."""
        self._places: dict[int, tuple[int, int]] = {}
        self._lanes: set[str] = set()
        self._jitter = jitter
        self._lock = threading.Lock()

    def begin(self, plan: Plan) -> None:
        with self._lock:
            step = len(self.results)
            self.results.append({})
            self._places |= {id(op): (step, number) for number, op in enumerate(plan.ops)}

    def perform(self, op: Op, stop: threading.Event) -> None:
        step, number = self._places[id(op)]
        results = self.results[step]
        with self._lock:
            assert op.lane not in self._lanes, f"two ops at once on {op.lane}"
            self._lanes.add(op.lane)
            for name in op.acquires:
                assert name not in self.held, f"{name} has two holders"
                self.held[name] = 0
            seen = [results[wait] for wait in op.waits]
            seen += [self.held[name] for name in (*op.uses, *op.releases)]
        if self._jitter is not None:
            time.sleep(self._jitter.random() * 1e-4)
        with self._lock:
            results[number] = hash((number, *seen))
            self.held |= dict.fromkeys(op.acquires, results[number])
            for name in op.releases:
                del self.held[name]
            self._lanes.remove(op.lane)


def outcome(executor: Executor, steps: Sequence[Plan], ledger: Ledger) -> list[dict[int, int]]:
    for plan in steps:
        ledger.begin(plan)
        done = executor.run(plan, ledger.perform).timeline()
        assert {n for n, op in enumerate(plan.ops) if not op.ahead} <= set(done.ran)
        for number, ran in done.ran.items():
            assert all(done.ran[wait].end_s <= ran.start_s for wait in plan.ops[number].waits)
    return ledger.results


@pytest.fixture
def executor() -> Iterator[OverlappedExecutor]:
    overlapped = OverlappedExecutor()
    yield overlapped
    overlapped.close()


@given(plan=plans(), seed=st.integers(0, 1000))
def test_overlapped_and_serial_give_the_same_results(
    executor: OverlappedExecutor, plan: Plan, seed: int
) -> None:
    expected = outcome(SerialExecutor(), [plan], Ledger())
    ledger = Ledger(random.Random(seed))
    assert outcome(executor, [plan], ledger) == expected
    assert ledger.held == {}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@settings(max_examples=15)
@given(shape=shapes())
def test_steps_of_every_schedule_run_on_into_each_other(
    executor: OverlappedExecutor, name: str, shape: StepShape
) -> None:
    steps = steps_of(name, shape)
    expected = outcome(SerialExecutor(), steps, Ledger())
    ledger = Ledger(random.Random(0))
    outcome(executor, steps, ledger)
    executor.settle()
    assert ledger.results == expected
    assert set(ledger.held) == {held.buffer for held in steps[-1].held_at_end}


@given(plan=plans(), seed=st.integers(0, 1000))
def test_an_op_begins_once_when_all_that_it_waits_for_has_ended(
    executor: OverlappedExecutor, plan: Plan, seed: int
) -> None:
    ledger = Ledger(random.Random(seed))
    begun: list[int] = []
    too_early: list[Op] = []

    def begin(op: Op) -> None:
        begun.append(id(op))
        if not ledger.held.keys().isdisjoint(op.acquires):
            too_early.append(op)

    def perform(op: Op, stop: threading.Event) -> None:
        assert begun.count(id(op)) == 1
        ledger.perform(op, stop)

    ledger.begin(plan)
    executor.run(plan, perform, begin)
    assert len(begun) == len(plan.ops)
    assert not too_early


# What an overlapped step does ---------------------------------------------------------------------

SLOT = {"slot": Buffer("experts", 1)}
HELD = (Held("slot", 0, 0),)


def test_lanes_work_at_the_same_time(executor: OverlappedExecutor) -> None:
    """Ops on all lanes meet at a barrier, which none could pass alone."""
    barrier = threading.Barrier(len(LANES), timeout=30)
    plan = Plan("test", tuple(Op("load", lane) for lane in LANES))
    executor.run(plan, lambda op, stop: void(barrier.wait()))
    assert barrier.n_waiting == 0


def test_an_op_begins_before_its_lane_gets_to_it(executor: OverlappedExecutor) -> None:
    """The first one ends when the second one has begun; one lane runs both."""
    plan = Plan("test", (Op("read", "disk", layer=0), Op("read", "disk", layer=1)))
    second_begins = threading.Event()

    def perform(op: Op, stop: threading.Event) -> None:
        if op.layer == 0:
            assert second_begins.wait(30)

    executor.run(plan, perform, lambda op: second_begins.set() if op.layer == 1 else None)


def void(_: object) -> None:
    """Forget what a call returned."""


def test_the_step_ends_before_what_it_does_ahead(executor: OverlappedExecutor) -> None:
    """The next step's user of the slot waits for the load; all else goes on."""
    arrived, order = threading.Event(), []

    def perform(op: Op, stop: threading.Event) -> None:
        if op.ahead:
            assert arrived.wait(30)
        if op.kind == "embed":
            arrived.set()
        order.append(op.kind)

    load = Op("load", "h2d", acquires=("slot",), ahead=True)
    first = Plan("test", (Op("head", "cpu"), load), SLOT, {"experts": 1}, held_at_end=HELD)
    use = Op("experts", "device", releases=("slot",))
    second = Plan("test", (use, Op("embed", "cpu")), SLOT, {"experts": 1}, held_at_start=HELD)
    step = executor.run(first, perform)
    assert set(step.timeline().ran) == {0}
    executor.run(second, perform)
    assert order == ["head", "embed", "load", "experts"]
    assert set(step.timeline().ran) == {0, 1}


def test_pacing_takes_the_longer_of_work_and_table() -> None:
    costs = Costs({"h2d": Rate(latency_s=0.02)})
    plan = Plan("test", (Op("load", "h2d"), Op("embed", "cpu")))
    seen: list[str] = []
    timeline = (
        SerialExecutor().run(plan, paced(lambda op, _: seen.append(op.kind), costs)).timeline()
    )
    assert seen == ["load", "embed"]
    assert timeline.ran[0].duration_s >= 0.02


# Failures -----------------------------------------------------------------------------------------


class BadBlockError(Exception):
    pass


def plan_over_all_lanes() -> Plan:
    """Ten rounds over all lanes, each op after the one before it and after its lane's last."""
    num = len(LANES)
    ops = [
        Op(
            "load",
            LANES[n % num],
            layer=n // num,
            waits=tuple(w for w in (n - 1, n - num) if w >= 0),
        )
        for n in range(10 * num)
    ]
    return Plan("test", tuple(ops))


@pytest.mark.parametrize("failing", [0, 11, 23, 34, 49])
@pytest.mark.parametrize("kind", ["serial", "overlapped"])
def test_a_failing_op_is_named_and_nothing_after_it_runs(
    executor: OverlappedExecutor, kind: str, failing: int
) -> None:
    plan = plan_over_all_lanes()
    done: list[int] = []

    def perform(op: Op, stop: threading.Event) -> None:
        number = next(n for n, other in enumerate(plan.ops) if other is op)
        if number == failing:
            raise BadBlockError("the disk has a bad block")
        done.append(number)

    chosen: Executor = executor if kind == "overlapped" else SerialExecutor()
    with pytest.raises(OpError) as caught:
        chosen.run(plan, perform)
    assert f"op {failing} (load L{failing // 5})" in str(caught.value)
    assert str(caught.value).endswith("failed: the disk has a bad block")
    assert isinstance(caught.value.__cause__, BadBlockError)
    assert done == list(range(failing))
    # The executor can be used again.
    outcome(chosen, [plan], Ledger())


def test_what_runs_beside_a_failure_is_told_to_stop_and_waited_for(
    executor: OverlappedExecutor,
) -> None:
    plan = Plan("test", (Op("read", "disk"), Op("attend", "cpu"), Op("head", "cpu", waits=(1,))))
    started, ended = threading.Event(), []

    def perform(op: Op, stop: threading.Event) -> None:
        if op.lane == "disk":
            assert started.wait(30)
            raise BadBlockError
        started.set()
        assert stop.wait(30)
        ended.append(op.kind)

    with pytest.raises(OpError, match=r"op 0 \(read\) of the test step failed: BadBlockError"):
        executor.run(plan, perform)
    assert ended == ["attend"]


LOADS_AHEAD = Plan(
    "test",
    (Op("head", "cpu"), Op("load", "h2d", acquires=("slot",), ahead=True)),
    SLOT,
    {"experts": 1},
    held_at_end=HELD,
)


def run_and_fail_ahead(executor: OverlappedExecutor) -> None:
    """Run a step whose load fails once the step has returned."""
    returned = threading.Event()

    def perform(op: Op, stop: threading.Event) -> None:
        if op.ahead:
            assert returned.wait(30)
            raise BadBlockError("gone")

    executor.run(LOADS_AHEAD, perform)
    returned.set()


def test_what_failed_ahead_fails_the_next_step(executor: OverlappedExecutor) -> None:
    second = Plan(
        "test", (Op("experts", "device", releases=("slot",)),), SLOT, {"experts": 1}, HELD
    )
    run_and_fail_ahead(executor)
    with pytest.raises(OpError, match=r"op 1 \(load\) of the test step failed: gone"):
        executor.run(second, lambda op, stop: None)
    fresh = replace(LOADS_AHEAD, ops=tuple(replace(op, ahead=False) for op in LOADS_AHEAD.ops))
    executor.run(fresh, lambda op, stop: None)


def test_what_failed_ahead_is_found_by_settling(executor: OverlappedExecutor) -> None:
    run_and_fail_ahead(executor)
    with pytest.raises(OpError, match="gone"):
        executor.settle()


def test_an_op_that_will_not_stop_is_left_behind_and_named(
    executor: OverlappedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specmoeoff.pipeline.overlapped.GRACE_S", 0.05)
    plan = Plan("test", (Op("read", "disk"), Op("attend", "cpu")))
    started, release = threading.Event(), threading.Event()

    def perform(op: Op, stop: threading.Event) -> None:
        if op.lane == "cpu":
            assert started.wait(30)
            raise BadBlockError
        started.set()
        assert release.wait(30)

    with pytest.raises(OpError, match="BadBlockError"):
        executor.run(plan, perform)
    for call in (lambda: executor.run(plan, perform), executor.settle):
        # Whoever moves buffers settles first, and must not take this for settled.
        with pytest.raises(OpError, match=r"op 0 \(read\) of an earlier step .* still runs"):
            call()
    release.set()
    monkeypatch.setattr("specmoeoff.pipeline.overlapped.GRACE_S", 30.0)
    outcome(executor, [plan], Ledger())


def test_closing_ends_a_step_that_waits_for_ever() -> None:
    """An op that listens is stopped; the caller of run() is told; no thread is left."""
    executor = OverlappedExecutor()
    started = threading.Event()
    told: list[str] = []

    def perform(op: Op, stop: threading.Event) -> None:
        started.set()
        assert stop.wait(30)

    def run() -> None:
        with pytest.raises(OpError) as caught:
            executor.run(Plan("test", (Op("read", "disk"),)), perform)
        told.append(str(caught.value))

    runner = threading.Thread(target=run)
    runner.start()
    assert started.wait(30)
    executor.close()
    runner.join(30)
    assert told == ["the executor was closed while a step ran"]
    assert not [t.name for t in threading.enumerate() if t in executor._threads]
    with pytest.raises(OpError, match="was closed; no step can run"):
        executor.run(Plan("test", ()), perform)
    executor.close()


def test_closing_leaves_an_op_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specmoeoff.pipeline.overlapped.GRACE_S", 0.05)
    executor = OverlappedExecutor()
    started, release = threading.Event(), threading.Event()

    def perform(op: Op, stop: threading.Event) -> None:
        started.set()
        assert release.wait(30)

    load = Op("load", "h2d", acquires=("slot",), ahead=True)
    executor.run(Plan("test", (load,), SLOT, {"experts": 1}, held_at_end=HELD), perform)
    assert started.wait(30)
    executor.close()
    alive = [thread for thread in executor._threads if thread.is_alive()]
    assert [thread.name for thread in alive] == ["lane h2d"]
    assert alive[0].daemon
    release.set()
    alive[0].join(30)
    assert not alive[0].is_alive()


def test_an_interrupt_stops_the_step(
    executor: OverlappedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches the caller while it waits; the ops are told to stop before it goes on."""
    started, stopped = threading.Event(), threading.Event()
    wait, pressed = executor._changed.wait, threading.Event()

    def interrupted(timeout: float) -> bool:
        if not pressed.is_set():
            pressed.set()
            executor._lock.release()
            try:
                assert started.wait(30)
            finally:
                executor._lock.acquire()
            raise KeyboardInterrupt
        return wait(timeout)

    def perform(op: Op, stop: threading.Event) -> None:
        started.set()
        assert stop.wait(30)
        stopped.set()

    monkeypatch.setattr(executor._changed, "wait", interrupted)
    plan = Plan("test", (Op("attend", "cpu"), Op("head", "cpu", waits=(0,))))
    with pytest.raises(KeyboardInterrupt):
        executor.run(plan, perform)
    assert stopped.is_set()
    monkeypatch.undo()
    outcome(executor, [plan], Ledger())
