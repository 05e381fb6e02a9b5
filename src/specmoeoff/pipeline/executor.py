"""Runs a plan's ops in the order they are listed, one after the other: slow and obviously right.

What an op does is up to the caller; it is handed the op, and an event that says that the step was
given up, for ops that take long and can end early. Knows no tensors and no devices.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from specmoeoff.errors import OpError
from specmoeoff.pipeline.plan import Op
from specmoeoff.pipeline.timeline import Ran, Timeline

if TYPE_CHECKING:
    from specmoeoff.pipeline.plan import Plan

Perform = Callable[[Op, threading.Event], None]
Begin = Callable[[Op], None]
"""Told of an op as soon as all that it waits for has ended, maybe long before its lane gets to it;
returns at once and never fails. What takes no lane's time can begin then, such as a read."""


class Step(Protocol):
    """A step that was run."""

    def timeline(self) -> Timeline:
        """Return when the ops that have ended ran; those for the next step may still run."""


class Executor(Protocol):
    """Runs plans, one at a time; each begins with the buffers that the last one ended with."""

    def run(self, plan: Plan, perform: Perform, begin: Begin | None = None) -> Step:
        """Run a step and return when its own ops have ended.

        Raises:
            OpError: An op failed; none is running any more, or it is named by the next run.
        """

    def settle(self) -> None:
        """Wait for what was done ahead; then no op of any step is running.

        Raises:
            OpError: One of those ops failed, or one of an earlier step still runs.
        """

    def close(self) -> None:
        """Give up what is running and end all threads, within two seconds."""


class FinishedStep:
    """A step of which nothing runs any more."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def timeline(self) -> Timeline:
        """Return when its ops ran."""
        return self._timeline


class SerialExecutor:
    """The slow twin of OverlappedExecutor."""

    def run(self, plan: Plan, perform: Perform, begin: Begin | None = None) -> FinishedStep:
        """Run all ops, those for the next step included; nothing begins before its turn.

        Raises:
            OpError: An op failed; those after it did not run.
        """
        stop = threading.Event()
        begin_s = time.perf_counter()
        ran: dict[int, Ran] = {}
        for number, op in enumerate(plan.ops):
            start_s = time.perf_counter() - begin_s
            try:
                perform(op, stop)
            except Exception as error:
                raise op_error(plan, number, error) from error
            ran[number] = Ran(start_s, time.perf_counter() - begin_s)
        return FinishedStep(Timeline(plan, ran, begin_s))

    def settle(self) -> None:
        """Nothing runs on."""

    def close(self) -> None:
        """Nothing to end."""


def op_error(plan: Plan, number: int, cause: BaseException) -> OpError:
    """Return the error that reports a failed op."""
    reason = str(cause) or type(cause).__name__
    return OpError(f"{plan.label(number)} of the {plan.schedule} step failed: {reason}")
