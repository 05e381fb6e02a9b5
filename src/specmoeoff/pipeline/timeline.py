"""When each op of a plan ran, measured or simulated, and what follows from that.

Knows plans and seconds only. A step that ran on has ops for the next step that were not over when
it ended; they count as soon as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from specmoeoff.pipeline.plan import LANES, Lane, Plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Ran:
    """One op's time on its lane, in seconds since the step began."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """How long the lane was taken."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Timeline:
    """Op number to when it ran; an op that has not ended is absent."""

    plan: Plan
    ran: Mapping[int, Ran]
    begin_s: float = 0.0
    """When the step began, on the clock that it shares with steps before and after it."""

    @property
    def step_s(self) -> float:
        """From the start to the end of the last op that belongs to this step."""
        own = (r.end_s for number, r in self.ran.items() if not self.plan.ops[number].ahead)
        return max(own, default=0.0)

    def busy_s(self, start_s: float = 0.0, end_s: float | None = None) -> dict[Lane, float]:
        """Seconds that each lane was taken between two times, by default the step's."""
        end_s = self.step_s if end_s is None else end_s
        busy = dict.fromkeys(LANES, 0.0)
        for number, ran in self.ran.items():
            within = min(ran.end_s, end_s) - max(ran.start_s, start_s)
            busy[self.plan.ops[number].lane] += max(within, 0.0)
        return busy

    def critical_path(self) -> list[int]:
        """Return the ops that made the step as long as it is, first to last.

        Walks back from the op that ended last: to whichever ended latest of what it waited for and
        what its lane did before.
        """
        plan = self.plan
        own = [number for number in self.ran if not plan.ops[number].ahead]
        if not own:
            return []
        lane_before = self._lane_before()
        number: int | None = max(own, key=lambda n: (self.ran[n].end_s, n))
        path = []
        while number is not None:
            path.append(number)
            candidates = [w for w in plan.ops[number].waits if w in self.ran]
            if (earlier := lane_before.get(number)) is not None:
                candidates.append(earlier)
            number = max(candidates, key=lambda n: (self.ran[n].end_s, n), default=None)
        return path[::-1]

    def _lane_before(self) -> dict[int, int]:
        before: dict[int, int] = {}
        last: dict[Lane, int] = {}
        for number in sorted(self.ran, key=lambda n: (self.ran[n].start_s, self.ran[n].end_s, n)):
            lane = self.plan.ops[number].lane
            if lane in last:
                before[number] = last[lane]
            last[lane] = number
        return before


def lane_shares(steps: Sequence[Timeline]) -> dict[Lane, float]:
    """Return each lane's share of the time from the first step's begin to the last one's end.

    The time between steps counts, and what is done ahead counts when it runs.
    """
    if not steps:
        return dict.fromkeys(LANES, 0.0)
    first, last = steps[0].begin_s, steps[-1].begin_s + steps[-1].step_s
    shares = dict.fromkeys(LANES, 0.0)
    for step in steps:
        for lane, seconds in step.busy_s(first - step.begin_s, last - step.begin_s).items():
            shares[lane] += seconds / (last - first) if last > first else 0.0
    return shares


def overlap_s(steps: Sequence[Timeline], *lanes: Lane) -> float:
    """Return the seconds in which all of these lanes were taken at once, over all the steps.

    A lane runs one op at a time, so its spans do not overlap each other.
    """
    together = _spans(steps, lanes[0])
    for lane in lanes[1:]:
        together = _both(together, _spans(steps, lane))
    return sum(end_s - start_s for start_s, end_s in together)


def _spans(steps: Sequence[Timeline], lane: Lane) -> list[tuple[float, float]]:
    """Return when a lane was taken, rising."""
    return sorted(
        (step.begin_s + ran.start_s, step.begin_s + ran.end_s)
        for step in steps
        for number, ran in step.ran.items()
        if step.plan.ops[number].lane == lane
    )


def _both(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> list[tuple[float, float]]:
    both: list[tuple[float, float]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start_s, end_s = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start_s < end_s:
            both.append((start_s, end_s))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return both
