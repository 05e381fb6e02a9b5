"""Runs a plan on a clock of its own: each op takes what the cost table says, one at a time a lane.

It starts ops exactly as the overlapped executor does: as soon as what they wait for has ended and
the lane is free, the first listed first. So its timelines are comparable with measured ones.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from specmoeoff.pipeline.chain import chain
from specmoeoff.pipeline.plan import LANES, Lane, Plan
from specmoeoff.pipeline.timeline import Ran, Timeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.pipeline.costs import Costs


def simulate(plan: Plan, costs: Costs) -> Timeline:
    """Return when each op of a plan would run; those for the next step are run to their end."""
    waiting = [len(set(op.waits)) for op in plan.ops]
    after: list[list[int]] = [[] for _ in plan.ops]
    ready: dict[Lane, list[int]] = {lane: [] for lane in LANES}
    for number, op in enumerate(plan.ops):
        for wait in set(op.waits):
            after[wait].append(number)
        if not waiting[number]:
            heapq.heappush(ready[op.lane], number)
    ran: dict[int, Ran] = {}
    running: list[tuple[float, int]] = []
    free = set(LANES)
    now = 0.0
    while True:
        for lane in LANES:
            if lane in free and ready[lane]:
                number = heapq.heappop(ready[lane])
                ran[number] = Ran(now, now + costs.seconds(plan.ops[number]))
                heapq.heappush(running, (ran[number].end_s, number))
                free.discard(lane)
        if not running:
            return Timeline(plan, ran)
        now = running[0][0]
        # What ends at the same moment ends together, before anything starts.
        while running and running[0][0] == now:
            _, number = heapq.heappop(running)
            free.add(plan.ops[number].lane)
            for follower in after[number]:
                waiting[follower] -= 1
                if not waiting[follower]:
                    heapq.heappush(ready[plan.ops[follower].lane], follower)


def simulate_steps(plans: Sequence[Plan], costs: Costs) -> list[Timeline]:
    """Return the timelines of steps that follow one another, each counted from its own start.

    A step starts when the one before has ended; what that one does ahead for it runs on meanwhile.
    """
    whole = simulate(chain(plans), costs)
    timelines: list[Timeline] = []
    first, start_s = 0, 0.0
    for plan in plans:
        ran = {
            number: Ran(whole.ran[first + number].start_s, whole.ran[first + number].end_s)
            for number in range(len(plan.ops))
        }
        timeline = Timeline(plan, ran)
        end_s = timeline.step_s
        shifted = {n: Ran(r.start_s - start_s, r.end_s - start_s) for n, r in ran.items()}
        timelines.append(Timeline(plan, shifted, start_s))
        first, start_s = first + len(plan.ops), end_s
    return timelines
