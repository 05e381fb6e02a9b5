"""Makes ops take as long as a cost table says: links and processors of a set speed, on any host.

An op does its work, then its lane stays taken until its time is over. Where the work itself takes
longer than that, the op does.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading

    from specmoeoff.pipeline.costs import Costs
    from specmoeoff.pipeline.executor import Perform
    from specmoeoff.pipeline.plan import Op


def paced(perform: Perform, costs: Costs) -> Perform:
    """Return ``perform`` at the pace of a cost table; it ends early when the step is given up."""

    def perform_at_pace(op: Op, stop: threading.Event) -> None:
        end = time.perf_counter() + costs.seconds(op)
        perform(op, stop)
        left = end - time.perf_counter()
        if left > 0:
            stop.wait(left)

    return perform_at_pace
