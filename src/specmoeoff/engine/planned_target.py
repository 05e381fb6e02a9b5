"""The target that runs plans: what the engine asks for, answered by ``PlannedForward``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specmoeoff.pipeline.plan import LANES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from specmoeoff.engine.forward import Span
    from specmoeoff.engine.planned_build import Planned
    from specmoeoff.engine.stats import EngineStats
    from specmoeoff.engine.target import WithDrafts


class PlannedTarget:
    """See ``engine.target.Target``. What a step needs was put aside for good, so none is lent."""

    def __init__(self, planned: Planned) -> None:
        self.kv = planned.forward.kv
        self.model = planned.forward.model
        self.planned = planned

    def run(
        self, spans: Sequence[Span], with_drafts: WithDrafts | None = None
    ) -> NDArray[np.float32]:
        """Run one pass by the schedule's plan; drafts are ops of it."""
        return self.planned.forward.run(spans, with_drafts=with_drafts)

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of hidden states: [R, hidden] -> [R, V]."""
        return self.planned.forward.logits(hidden)

    def best(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the largest logit and its token of each hidden state, [R] each."""
        return self.planned.forward.best(hidden)

    def lend(self, num_bytes: int) -> None:
        """Have none of it: a plan's activations are put aside for the largest step there is."""

    def rebalance(self) -> None:
        """Give experts what the KV cache no longer holds, where the two share a tier."""
        if self.planned.elastic is not None:
            self.planned.elastic.rebalance()

    def count(self, stats: EngineStats) -> None:
        """Enter what lanes did and tiers held; experts come to their slots on the link."""
        forward = self.planned.forward
        placement, busy = forward.machine.placement, forward.busy
        link = placement.weights[-1]
        stats.streamed_bytes = busy.weights_bytes[link]
        stats.streamed_s = busy.weights_s[link]
        stats.fetched_experts = busy.num_weights[link]
        stats.wanted_experts = busy.wanted_experts
        stats.stalled_s = max(0.0, busy.run_s - busy.lane_s[placement.compute])
        stats.expert_slots = self.planned.experts.num_slots
        stats.tiers = self.planned.uses(stats.peak_memory_bytes)
        stats.lane_busy_s = {lane: busy.lane_s[lane] for lane in LANES} | {"draft": stats.draft_s}

    def close(self) -> None:
        """End the lanes and the reader."""
        self.planned.close()
