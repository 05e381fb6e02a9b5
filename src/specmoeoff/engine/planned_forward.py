"""Passes of a model driven by plans: the twin of ``Forward``, for any schedule and executor.

Each pass builds the plan of its step, hands it to the executor with what its ops do, and keeps what
the belt has loaded ahead for the next one. The tokens are those of ``Forward``, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from specmoeoff.engine.micro_batch import Slice, cut, slice_of
from specmoeoff.engine.pass_ops import PassOps
from specmoeoff.errors import OpError, StreamError
from specmoeoff.pipeline.pace import paced
from specmoeoff.pipeline.schedules import build_plan
from specmoeoff.pipeline.schedules.shape import MicroBatch, Placement, StepShape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from specmoeoff.engine.forward import Span
    from specmoeoff.engine.weights import ModelWeights
    from specmoeoff.models.base import Model
    from specmoeoff.offload.kv_cache import KvCache
    from specmoeoff.offload.planned_experts import PlannedExperts
    from specmoeoff.offload.tiers import Tier
    from specmoeoff.pipeline.costs import Costs
    from specmoeoff.pipeline.executor import Executor, Step
    from specmoeoff.pipeline.plan import Held, Plan

RESIDENT = "resident experts"


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
    ) -> None:
        self.model = model
        self.kv = kv
        self.machine = machine
        self.steps: list[Step] = []
        """The last pass, or all of them while ``keeps_steps``."""
        self.keeps_steps = False
        self._weights = weights
        self._experts = experts
        self._device = device
        self._held: tuple[Held, ...] = ()

    def run(
        self,
        spans: Sequence[Span],
        on_outputs: Callable[[int, NDArray[np.float32]], None] | None = None,
    ) -> NDArray[np.float32]:
        """Run one pass; room for the new tokens must have been reserved in the KV cache.

        Args:
            spans: New tokens, sequence by sequence.
            on_outputs: Told of each micro-batch's hidden states as the last op of its pass.

        Returns:
            Hidden states of the wanted tokens, span after span, [R, hidden].

        Raises:
            DoesNotFitError: The device has no room for the activations of so many tokens.
            StreamError: Weights could not be read. The next pass begins with an empty belt.
            OpError: Any other failure of an op.
        """
        batches = cut(spans, self.machine.num_micro_batches)
        shape = self._shape(batches)
        plan = build_plan(self.machine.schedule, shape, self._held)
        self._reserve(plan, shape)
        self._experts.keep(_staying(plan, shape))
        slices: list[Slice] = []
        for batch in batches:
            first = slices[-1].rows.stop if slices else 0
            slices.append(slice_of(self.model, self.kv, batch, first))
        work = PassOps(
            self.model,
            self._weights,
            self.kv,
            self._experts,
            slices,
            self.machine.placement.has_link,
            on_outputs,
        )
        costs = self.machine.costs
        perform = work.perform if costs is None else paced(work.perform, costs)
        # What a failed step has loaded may be half there, so the next one must not count on it.
        self._held = ()
        try:
            step = self.machine.executor.run(plan, perform)
        except OpError as error:
            if isinstance(error.__cause__, StreamError):
                raise StreamError(str(error)) from error
            raise
        self._held = plan.held_at_end
        self.steps = [*self.steps, step] if self.keeps_steps else [step]
        return work.outputs()

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of hidden states: [R, hidden] -> [R, V]."""
        return self.model.head(self._weights.globals, hidden)

    def best(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the largest logit and its token of each hidden state, [R] each."""
        return self.model.head_best(self._weights.globals, hidden)

    def shape_of(self, spans: Sequence[Span]) -> StepShape:
        """Return what schedules are told of a pass over these spans."""
        return self._shape(cut(spans, self.machine.num_micro_batches))

    def tune(self, chosen: StepShape) -> None:
        """Take over the waves and the ring of a shape; the next pass begins with an empty belt."""
        self.machine.executor.settle()
        self.machine = replace(self.machine, waves=chosen.waves, ring_slots=chosen.ring_slots)
        self._held = ()

    def close(self) -> None:
        """End the lanes."""
        self.machine.executor.close()

    def _shape(self, batches: Sequence[Sequence[Span]]) -> StepShape:
        return StepShape(
            config=self.model.config,
            micro_batches=tuple(_micro_batch(batch) for batch in batches),
            placement=self.machine.placement,
            num_slots=self._experts.num_slots,
            expert_bytes=self._experts.slot_bytes,
            kv_item_bytes=self.kv.layer(0)[0].itemsize,
            host_slots=self.machine.host_slots,
            waves=self.machine.waves,
            ring_slots=self.machine.ring_slots,
        )

    def _reserve(self, plan: Plan, shape: StepShape) -> None:
        if self._device is None:
            return
        pools = ("activations", "kv")
        staged = sum(b.num_bytes for b in plan.buffers.values() if b.pool in pools)
        hidden = sum(shape.hidden(m) for m in range(len(shape.micro_batches)))
        # The residual stream and its norm.
        self._device.reserve("activations", staged + 2 * hidden)


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


def _micro_batch(batch: Sequence[Span]) -> MicroBatch:
    num_tokens = sum(len(span.token_ids) for span in batch)
    return MicroBatch(
        num_tokens=num_tokens,
        num_seqs=len(batch),
        kv_tokens=num_tokens + sum(span.kv.length for span in batch),
        num_outputs=sum(span.num_outputs for span in batch),
    )
