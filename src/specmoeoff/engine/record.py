"""Runs decoding steps over random tokens and keeps when each op ran: what traces are made of.

Times do not depend on what the tokens say, except through routing, which random tokens make about
uniform. Our own schedule is tuned on the costs of the first steps before the others are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.engine.forward import Span
from specmoeoff.errors import DoesNotFitError
from specmoeoff.offload.kv_cache import KvSequence
from specmoeoff.pipeline.costs import Costs
from specmoeoff.pipeline.tune import tuned

if TYPE_CHECKING:
    from specmoeoff.engine.planned_forward import PlannedForward
    from specmoeoff.pipeline.schedules.shape import StepShape
    from specmoeoff.pipeline.timeline import Timeline

WARM_STEPS = 3
"""The first fills the ring and meets cold caches, the second is measured to tune on, and after that
the ring is filled again."""


def longest(context: int, num_steps: int) -> int:
    """Return the tokens that a sequence has when ``record`` is done."""
    return context + WARM_STEPS + num_steps


@dataclass(frozen=True)
class Recording:
    """Steps that followed one another."""

    shape: StepShape
    """Of the last one."""
    timelines: tuple[Timeline, ...]
    costs: Costs
    """The speeds that they ran at, by kind of op."""


class _Batch:
    """Sequences that grow by a token a step, the likeliest."""

    def __init__(self, forward: PlannedForward, num_seqs: int, seed: int) -> None:
        self.forward = forward
        self.sequences = [KvSequence() for _ in range(num_seqs)]
        self.rng = np.random.default_rng(seed)
        self.next = self._random(1)

    def read(self, num_tokens: int) -> None:
        """Let each sequence read so many random tokens."""
        self._run(self._random(num_tokens))

    def step(self) -> None:
        """Add each sequence's next token."""
        self.next = [[token] for token in self._run(self.next)]

    def spans(self, token_ids: list[list[int]]) -> list[Span]:
        """Return the tokens as a pass takes them."""
        return [Span(s, ids, 1) for s, ids in zip(self.sequences, token_ids, strict=True)]

    def _run(self, token_ids: list[list[int]]) -> list[int]:
        kv = self.forward.kv
        for sequence, ids in zip(self.sequences, token_ids, strict=True):
            if not kv.reserve(sequence, sequence.length + len(ids)):
                raise DoesNotFitError(
                    f"the KV cache has {kv.max_pages * kv.page_size} tokens of room; "
                    "take fewer sequences, a shorter context or fewer steps"
                )
        found: dict[int, list[int]] = {}

        def choose(
            micro_batch: int, hidden: np.ndarray[tuple[int, int], np.dtype[np.float32]]
        ) -> None:
            found[micro_batch] = [int(token) for token in self.forward.best(hidden)[1]]

        self.forward.run(self.spans(token_ids), choose)
        return [token for m in sorted(found) for token in found[m]]

    def _random(self, num_tokens: int) -> list[list[int]]:
        vocabulary = self.forward.model.config.vocab_size
        shape = (len(self.sequences), num_tokens)
        return [list(map(int, row)) for row in self.rng.integers(0, vocabulary, shape)]


def record(
    forward: PlannedForward,
    num_seqs: int,
    context: int,
    num_steps: int,
    max_tokens: int,
    seed: int = 0,
) -> Recording:
    """Read prompts as fast as it goes, warm up, and keep the steps that follow.

    Args:
        forward: The model; its KV cache must have room for ``longest`` tokens of each sequence.
        num_seqs: Sequences that decode together.
        context: Tokens that each has read before.
        num_steps: Steps to keep.
        max_tokens: Tokens of the largest pass while prompts are read.
        seed: Of the random prompts.

    Raises:
        DoesNotFitError: The KV cache is too small.
        StreamError: Weights could not be read.
    """
    batch = _Batch(forward, num_seqs, seed)
    chunk = max(1, max_tokens // num_seqs)
    set_speeds, forward.machine = forward.machine, replace(forward.machine, costs=None)
    for start in range(0, context, chunk):
        batch.read(min(chunk, context - start))
    forward.machine = set_speeds
    for _ in range(WARM_STEPS - 1):
        batch.step()
    machine = forward.machine
    machine.executor.settle()
    shape = forward.shape_of(batch.spans(batch.next))
    if machine.schedule == "specmoeoff":
        costs = machine.costs or Costs.measured([step.timeline() for step in forward.steps])
        forward.tune(tuned(shape, costs))
    batch.step()
    forward.keeps_steps, forward.steps = True, []
    for _ in range(num_steps):
        batch.step()
    machine.executor.settle()
    forward.keeps_steps = False
    timelines = tuple(step.timeline() for step in forward.steps)
    shape = forward.shape_of(batch.spans(batch.next))
    return Recording(shape, timelines, Costs.measured(timelines))
