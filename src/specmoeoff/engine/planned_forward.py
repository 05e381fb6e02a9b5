"""Passes of a model driven by plans: the twin of ``Forward``, for any schedule and executor.

Each pass builds the plan of its step, hands it to the executor with what its ops do, and keeps what
the belt has loaded ahead for the next one. The tokens are those of ``Forward``, bit for bit.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from specmoeoff.devices.host import HostDevice
from specmoeoff.engine.micro_batch import Slice, cut, slice_of
from specmoeoff.engine.pass_ops import PassOps
from specmoeoff.errors import OpError, StreamError
from specmoeoff.pipeline import overlapped
from specmoeoff.pipeline.pace import paced
from specmoeoff.pipeline.schedules import build_plan
from specmoeoff.pipeline.schedules.belt import KEPT
from specmoeoff.pipeline.schedules.shape import Draft, MicroBatch, Placement, StepShape

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from specmoeoff.devices.base import Device
    from specmoeoff.engine.forward import Span
    from specmoeoff.engine.target import WithDrafts
    from specmoeoff.engine.weights import ModelWeights
    from specmoeoff.models.base import Model
    from specmoeoff.offload.kv_cache import KvCache
    from specmoeoff.offload.planned_experts import PlannedExperts
    from specmoeoff.offload.tiers import Tier
    from specmoeoff.pipeline.costs import Costs
    from specmoeoff.pipeline.executor import Executor, Perform, Step
    from specmoeoff.pipeline.plan import Held, Op, Plan

NO_WEIGHTS = Draft(0, 0, 0)
"""What drafts by n-grams."""


@dataclass(frozen=True)
class Machine:
    """What runs the plans."""

    schedule: str
    placement: Placement
    executor: Executor
    num_micro_batches: int = 1
    waves: int = 1
    ring_slots: int | None = None
    host_slots: int = 2
    costs: Costs | None = None
    """The speed that links and processors are held to; None lets them be as fast as they are."""
    draft: Draft = NO_WEIGHTS
    """What a drafter weighs."""


@dataclass
class Busy:
    """What was done since the start; a lane runs one op at a time and adds to its own place."""

    lane_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds that each lane was taken, ops done ahead included once they are over."""
    weights_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds of them in which a lane brought experts."""
    weights_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    num_weights: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Experts that each lane brought."""
    run_s: float = 0.0
    wanted_experts: int = 0

    def timed(self, perform: Perform) -> Perform:
        """Return ``perform``, counted."""

        def perform_timed(op: Op, stop: threading.Event) -> None:
            start = time.perf_counter()
            perform(op, stop)
            taken = time.perf_counter() - start
            self.lane_s[op.lane] += taken
            if op.kind in ("read", "load"):
                self.weights_s[op.lane] += taken
                self.weights_bytes[op.lane] += op.num_bytes
                self.num_weights[op.lane] += 1

        return perform_timed


class PlannedForward:
    """A model, its dense weights, its experts and its KV cache, ready to run planned passes."""

    def __init__(
        self,
        model: Model,
        weights: ModelWeights,
        experts: PlannedExperts,
        kv: KvCache,
        machine: Machine,
        device: Tier | None = None,
        compute: Device | None = None,
    ) -> None:
        self.model = model
        self.kv = kv
        self.machine = machine
        self.steps: list[Step] = []
        """The last pass, or all of them while ``keeps_steps``."""
        self.keeps_steps = False
        self.busy = Busy()
        self.weights = weights
        self.compute = compute or HostDevice(model, weights.globals, weights.layers)
        self._experts = experts
        self._device = device
        self._held: tuple[Held, ...] = ()

    def run(
        self,
        spans: Sequence[Span],
        on_outputs: Callable[[int, NDArray[np.float32]], None] | None = None,
        with_drafts: WithDrafts | None = None,
    ) -> NDArray[np.float32]:
        """Run one pass; room for the new tokens must have been reserved in the KV cache.

        Args:
            spans: New tokens, sequence by sequence.
            on_outputs: Told of each micro-batch's hidden states as the last op of its pass.
            with_drafts: Asked for each micro-batch's drafts as an op of the plan, see ``Target``.

        Returns:
            Hidden states of the wanted tokens, span after span, [R, hidden].

        Raises:
            DoesNotFitError: The device has no room for the activations of so many tokens.
            StreamError: Weights could not be read, or a read that an earlier pass gave up still
                runs. The next pass begins with an empty belt.
            OpError: Any other failure of an op.
        """
        start = time.perf_counter()
        self._experts.let_land(overlapped.GRACE_S)
        batches = cut(spans, self.machine.num_micro_batches)
        drafts = max(span.num_drafts for span in spans) if with_drafts is not None else None
        shape = self._shape(batches, drafts)
        plan = build_plan(self.machine.schedule, shape, self._held)
        self._take(plan, shape)
        with self.compute.on("h2d"):
            self._experts.keep(_staying(plan, shape))
        work = PassOps(
            self.model,
            self.compute,
            self.kv,
            self._experts,
            [] if with_drafts is not None else self._slices(batches),
            sum(batch.num_tokens for batch in shape.micro_batches),
            self.machine.placement.has_link,
            None if with_drafts is None else self._drafted(batches, with_drafts),
            on_outputs,
        )
        costs = self.machine.costs
        perform = work.perform if costs is None else paced(work.perform, costs)
        perform = self.busy.timed(perform)
        # What a failed step has loaded may be half there, so the next one must not count on it.
        self._held = tuple(held for held in plan.held_at_start if held.buffer.startswith(KEPT))
        try:
            step = self.machine.executor.run(plan, perform, work.begin)
        except BaseException as error:
            self._experts.give_up_reads()
            if isinstance(error, OpError) and isinstance(error.__cause__, StreamError):
                raise StreamError(str(error)) from error
            raise
        self._held = plan.held_at_end
        self.steps = [*self.steps, step] if self.keeps_steps else [step]
        self.busy.run_s += time.perf_counter() - start
        self.busy.wanted_experts += work.wanted_experts
        return work.outputs()

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of hidden states: [R, hidden] -> [R, V]."""
        return self.compute.head(hidden)

    def best(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the largest logit and its token of each hidden state, [R] each."""
        return self.compute.head_best(hidden)

    def shape_of(self, spans: Sequence[Span]) -> StepShape:
        """Return what schedules are told of a pass over these spans."""
        return self._shape(cut(spans, self.machine.num_micro_batches))

    def tune(self, chosen: StepShape) -> None:
        """Take over the waves and the ring of a shape; the next pass begins with an empty belt."""
        try:
            self.machine.executor.settle()
        except BaseException:
            self._experts.give_up_reads()
            raise
        self.machine = replace(self.machine, waves=chosen.waves, ring_slots=chosen.ring_slots)
        self._held = ()

    def close(self) -> None:
        """End the lanes."""
        self.machine.executor.close()
        self.compute.close()

    def _slices(self, batches: Sequence[Sequence[Span]]) -> list[Slice]:
        slices: list[Slice] = []
        for batch in batches:
            first = slices[-1].rows.stop if slices else 0
            slices.append(slice_of(self.model, self.kv, batch, first))
        return slices

    def _drafted(
        self, batches: Sequence[Sequence[Span]], with_drafts: WithDrafts
    ) -> Callable[[int, int], Slice]:
        """Return what drafts for a micro-batch and then takes its place from a row on."""
        ends = list(itertools.accumulate(len(batch) for batch in batches))

        def draft(m: int, first_row: int) -> Slice:
            places = range(ends[m] - len(batches[m]), ends[m])
            return slice_of(self.model, self.kv, with_drafts(places), first_row)

        return draft

    def _shape(self, batches: Sequence[Sequence[Span]], num_drafts: int | None = None) -> StepShape:
        """Return a pass's shape, all drafts counted that there is room for."""
        draft = self.machine.draft
        scales, _ = self.kv.scales(0)
        return StepShape(
            config=self.model.config,
            micro_batches=tuple(_micro_batch(batch, self.kv) for batch in batches),
            placement=self.machine.placement,
            num_slots=self._experts.fixed_slots,
            expert_bytes=self._experts.slot_bytes,
            extra_slots=self._experts.num_slots - self._experts.fixed_slots,
            kv_item_bytes=self.kv.layer(0)[0].itemsize,
            kv_scale_bytes=0 if scales is None else scales.itemsize,
            host_slots=self.machine.host_slots,
            waves=self.machine.waves,
            ring_slots=self.machine.ring_slots,
            draft=None if num_drafts is None else replace(draft, num_tokens=num_drafts),
        )

    def _take(self, plan: Plan, shape: StepShape) -> None:
        if self._device is None:
            return
        pools = ("activations", "kv")
        staged = sum(b.num_bytes for b in plan.buffers.values() if b.pool in pools)
        hidden = sum(shape.hidden(m) for m in range(len(shape.micro_batches)))
        # The residual stream and its norm.
        self._device.take("activations", staged + 2 * hidden)


def _staying(plan: Plan, shape: StepShape) -> set[tuple[int, int]]:
    """Return the experts that a plan takes for granted."""
    moved = {
        (op.layer, e)
        for op in plan.ops
        if op.kind in ("read", "load") and op.layer is not None
        for e in op.experts
    }
    moved |= {(held.layer, held.expert) for held in plan.held_at_start}
    layers, experts = range(shape.config.num_layers), range(shape.num_experts)
    return {(layer, e) for layer in layers for e in experts} - moved


def _micro_batch(batch: Sequence[Span], kv: KvCache) -> MicroBatch:
    num_drafts = sum(span.num_drafts for span in batch)
    num_tokens = sum(len(span.token_ids) for span in batch) + num_drafts
    lengths = [span.kv.length + len(span.token_ids) + span.num_drafts for span in batch]
    return MicroBatch(
        num_tokens=num_tokens,
        num_seqs=len(batch),
        kv_tokens=sum(lengths),
        num_outputs=sum(span.num_outputs for span in batch) + num_drafts,
        paged_tokens=kv.page_size * sum(kv.pages_for(length) for length in lengths),
    )
