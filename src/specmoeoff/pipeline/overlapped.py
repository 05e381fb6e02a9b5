"""Runs a plan with a thread for each lane: an op starts once what it waits for has ended.

All threads share one lock and sleep until there is something to do: an op that ends wakes the
lanes of those that were waiting for it. What a plan does ahead runs on after its step has ended;
the next plan's ops wait for it where they share a buffer.

The first failure ends a step: nothing new starts, what is running is told to stop and waited for,
the op is named. What outlasts ``GRACE_S`` is left behind and keeps the next step from starting.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from typing import TYPE_CHECKING

from specmoeoff.errors import OpError
from specmoeoff.pipeline.executor import op_error
from specmoeoff.pipeline.plan import LANES, Lane, Op, Plan
from specmoeoff.pipeline.timeline import Ran, Timeline

if TYPE_CHECKING:
    from specmoeoff.pipeline.executor import Begin, Perform

GRACE_S = 1.5
"""How long what was told to stop is waited for; close() promises two seconds."""
LOOK_S = 0.5
"""Longest wait of who runs a step: Ctrl-C that comes just before a wait is seen when it ends."""


class _Task:
    """One op of a step that was started."""

    def __init__(self, step: OverlappedStep, number: int, op: Op) -> None:
        self.step = step
        self.number = number
        self.op = op
        self.waiting = 0
        """Ops that must end before it starts."""
        self.followers: list[_Task] = []
        self.has_ended = False

    def wait_for(self, other: _Task) -> None:
        if not other.has_ended:
            other.followers.append(self)
            self.waiting += 1

    def __lt__(self, other: _Task) -> bool:
        """Whether it is listed first, which decides if both could start."""
        return (self.step.index, self.number) < (other.step.index, other.number)


class OverlappedStep:
    """A step that runs or has run."""

    def __init__(
        self, index: int, plan: Plan, perform: Perform, begins: Begin | None, lock: threading.Lock
    ) -> None:
        self.index = index
        self.plan = plan
        self.perform = perform
        self.begins = begins
        self.stop = threading.Event()
        self.begin = time.perf_counter()
        self.left = sum(not op.ahead for op in plan.ops)
        self.ran: dict[int, Ran] = {}
        self._lock = lock

    def timeline(self) -> Timeline:
        """Return when the ops that have ended ran."""
        with self._lock:
            return Timeline(self.plan, dict(self.ran), self.begin)


class OverlappedExecutor:
    """Lanes as threads; plans one at a time, each running on into the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        """Told when a step has ended, failed, or nothing runs any more."""
        self._work = {lane: threading.Condition(self._lock) for lane in LANES}
        self._ready: dict[Lane, list[_Task]] = {lane: [] for lane in LANES}
        self._running: dict[Lane, _Task] = {}
        self._ahead: dict[str, _Task] = {}
        """For each buffer, the op of the last step that handles it ahead."""
        self._unfinished = 0
        """Ops that were handed over and have neither ended nor been given up."""
        self._error: tuple[_Task, BaseException] | None = None
        self._num_steps = 0
        self._grace_ends = 0.0
        """When what was told to stop is waited for no longer, on the monotonic clock."""
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, args=(lane,), name=f"lane {lane}", daemon=True)
            for lane in LANES
        ]
        for thread in self._threads:
            thread.start()

    # -- what the engine calls ---------------------------------------------------------------------

    def run(self, plan: Plan, perform: Perform, begin: Begin | None = None) -> OverlappedStep:
        """Run a step and return when its own ops have ended; those for the next one may run on.

        Raises:
            OpError: An op failed, now or while it was done ahead, or one that was told to stop
                in an earlier step still runs.
        """
        with self._lock:
            if self._closed:
                raise OpError("the executor was closed; no step can run any more")
            self._check_left_behind()
            step = OverlappedStep(self._num_steps, plan, perform, begin, self._lock)
            self._num_steps += 1
            try:
                if self._error is None:
                    self._begin(step)
                while step.left and self._error is None and not self._closed:
                    self._changed.wait(LOOK_S)
            except BaseException:
                # Ctrl-C while waiting.
                self._give_up()
                raise
            if self._error is not None:
                self._fail()
            if step.left:
                raise OpError("the executor was closed while a step ran")
            return step

    def settle(self) -> None:
        """Wait for what was done ahead.

        Raises:
            OpError: One of those ops failed, or one of an earlier step still runs.
        """
        with self._lock:
            self._check_left_behind()
            while self._unfinished and self._error is None:
                self._changed.wait(LOOK_S)
            if self._error is not None:
                self._fail()

    def close(self) -> None:
        """Give up what is running and end all threads, within two seconds."""
        with self._lock:
            self._closed = True
            self._give_up()
            for work in self._work.values():
                work.notify_all()
            # Those that still run something had their time; the others only have to wake up.
            idle = [lane not in self._running for lane in LANES]
        for thread in itertools.compress(self._threads, idle):
            thread.join()

    # -- with the lock held ------------------------------------------------------------------------

    def _begin(self, step: OverlappedStep) -> None:
        tasks = [_Task(step, number, op) for number, op in enumerate(step.plan.ops)]
        for task in tasks:
            for wait in set(task.op.waits):
                task.wait_for(tasks[wait])
            for earlier in {self._ahead[name] for name in task.op.touches if name in self._ahead}:
                task.wait_for(earlier)
        self._ahead = {name: task for task in tasks if task.op.ahead for name in task.op.touches}
        self._unfinished += len(tasks)
        for task in tasks:
            if not task.waiting:
                self._push(task)

    def _push(self, task: _Task) -> None:
        if task.step.begins is not None:
            task.step.begins(task.op)
        heapq.heappush(self._ready[task.op.lane], task)
        self._work[task.op.lane].notify()

    def _end(self, task: _Task, ran: Ran, error: BaseException | None) -> None:
        task.has_ended = True
        if self._error is None and error is not None and not task.step.stop.is_set():
            self._error = (task, error)
            self._cancel()
        if task.step.stop.is_set():
            self._changed.notify_all()
            return
        task.step.ran[task.number] = ran
        self._unfinished -= 1
        for follower in task.followers:
            follower.waiting -= 1
            if not follower.waiting:
                self._push(follower)
        if not task.op.ahead:
            task.step.left -= 1
        if not task.step.left:
            self._changed.notify_all()

    def _cancel(self) -> None:
        """Let nothing more start, and tell what runs to stop."""
        if any(not task.step.stop.is_set() for task in self._running.values()):
            self._grace_ends = time.monotonic() + GRACE_S
        for queue in self._ready.values():
            for task in queue:
                task.step.stop.set()
            queue.clear()
        for task in self._running.values():
            task.step.stop.set()
        if self._error is not None:
            self._error[0].step.stop.set()
        for task in self._ahead.values():
            task.step.stop.set()
        self._ahead = {}
        self._unfinished = 0

    def _give_up(self) -> None:
        """Stop everything and wait for what is running, ``GRACE_S`` after it was told at most."""
        self._cancel()
        self._changed.notify_all()
        while self._running and (left := self._grace_ends - time.monotonic()) > 0:
            self._changed.wait(left)

    def _fail(self) -> None:
        assert self._error is not None
        task, cause = self._error
        try:
            self._give_up()
        finally:
            self._error = None
        raise op_error(task.step.plan, task.number, cause) from cause

    def _check_left_behind(self) -> None:
        """Wait for ops of a step that was given up; running beside them could mix up buffers."""
        given_up = [task for task in self._running.values() if task.step.stop.is_set()]
        if given_up:
            self._grace_ends = time.monotonic() + GRACE_S
            self._give_up()
        if given_up and self._running:
            task = next(iter(self._running.values()))
            raise OpError(
                f"{task.step.plan.label(task.number)} of an earlier step was told to stop and "
                "still runs; no step can start beside it"
            )

    # -- the lanes ---------------------------------------------------------------------------------

    def _serve(self, lane: Lane) -> None:
        while True:
            with self._lock:
                while not self._ready[lane] and not self._closed:
                    self._work[lane].wait()
                if self._closed:
                    return
                task = heapq.heappop(self._ready[lane])
                self._running[lane] = task
            start_s = time.perf_counter() - task.step.begin
            error: BaseException | None = None
            try:
                task.step.perform(task.op, task.step.stop)
            except BaseException as caught:  # whatever it is, the step reports it
                error = caught
            ran = Ran(start_s, time.perf_counter() - task.step.begin)
            with self._lock:
                del self._running[lane]
                self._end(task, ran, error)
            # Nothing of a step may be kept alive by a lane that waits for the next.
            del task, error
