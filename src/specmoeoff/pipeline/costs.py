"""What an op costs: a rate for each lane, and rates of its own for a kind of op.

An op takes its latency, then as long as the slower of its bytes and its arithmetic: the roofline.
Rates are set (a link of 25 GB/s) or measured (``Costs.measured`` from a timeline).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from specmoeoff.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from specmoeoff.pipeline.plan import Kind, Lane, Op
    from specmoeoff.pipeline.timeline import Timeline


@dataclass(frozen=True)
class Rate:
    """How fast something goes; what is infinite costs nothing."""

    bytes_per_s: float = math.inf
    flops_per_s: float = math.inf
    latency_s: float = 0.0
    """Seconds that every op takes, however small."""

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and self.flops_per_s > 0 and self.latency_s >= 0):
            raise InvalidInputError(f"{self} must have rates above 0 and a latency of at least 0")

    def seconds(self, num_bytes: int, flops: int) -> float:
        """Return what work of this size takes."""
        return self.latency_s + max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True)
class Costs:
    """A cost table."""

    lanes: Mapping[Lane, Rate] = field(default_factory=dict)
    kinds: Mapping[tuple[Lane, Kind], Rate] = field(default_factory=dict)
    """Takes precedence over ``lanes``. What neither names is free."""

    def seconds(self, op: Op) -> float:
        """Return what an op takes on its lane."""
        rate = self.kinds.get((op.lane, op.kind)) or self.lanes.get(op.lane) or Rate()
        return rate.seconds(op.num_bytes, op.flops)

    @classmethod
    def measured(cls, timelines: Iterable[Timeline]) -> Costs:
        """Return the rates at which the ops of each kind ran, all of their work over all time.

        Where a kind moves or reads bytes its rate is one of bytes, else one of arithmetic, and
        where it has neither it is a time per op.
        """
        totals: dict[tuple[Lane, Kind], list[float]] = {}
        for timeline in timelines:
            for number, ran in timeline.ran.items():
                op = timeline.plan.ops[number]
                total = totals.setdefault((op.lane, op.kind), [0.0, 0.0, 0.0, 0.0])
                for i, value in enumerate((1, op.num_bytes, op.flops, ran.duration_s)):
                    total[i] += value
        return cls(kinds={key: _rate(*total) for key, total in totals.items()})


def _rate(count: float, num_bytes: float, flops: float, seconds: float) -> Rate:
    if seconds <= 0:
        return Rate()
    if num_bytes:
        return Rate(bytes_per_s=num_bytes / seconds)
    if flops:
        return Rate(flops_per_s=flops / seconds)
    return Rate(latency_s=seconds / count)
