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
