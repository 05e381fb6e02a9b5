"""Runs decoding steps over random tokens and keeps when each op ran: what traces are made of.

Times do not depend on what the tokens say, except through routing, which random tokens make about
uniform. Our own schedule is tuned before: by simulating at speeds that are set, or on the costs of
the first steps, and then what that found is tried.
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
TRIAL_STEPS = 3
"""Steps in which a choice of waves and ring is tried; the fastest counts."""


def longest(context: int, num_steps: int, verified: int = 1) -> int:
    """Return the most tokens that a sequence has while ``record`` runs."""
    return context + WARM_STEPS + max(num_steps, TRIAL_STEPS) + verified - 1


@dataclass(frozen=True)
class Recording:
    """Steps that followed one another."""

    shape: StepShape
    """Of the last one."""
    timelines: tuple[Timeline, ...]
    costs: Costs
    """The speeds that they ran at, by kind of op."""


class _Batch:
    """Sequences that grow by a token a step, the likeliest; drafts on top are all rejected."""

    def __init__(self, forward: PlannedForward, num_seqs: int, verified: int, seed: int) -> None:
        self.forward = forward
        self.verified = verified
        self.sequences = [KvSequence() for _ in range(num_seqs)]
        self.rng = np.random.default_rng(seed)
        self.next = self._random(1)

    def read(self, num_tokens: int) -> None:
        """Let each sequence read so many random tokens."""
        self._run(self._random(num_tokens), 1)

    def step(self) -> None:
        """Verify each sequence's next token and random drafts, of which none is kept."""
        self.next = [[token] for token in self._run(self._verified(), self.verified)]
        for sequence in self.sequences:
            self.forward.kv.truncate(sequence, sequence.length - self.verified + 1)

    def tried(self, choice: StepShape) -> float:
        """Return the seconds of a step with these waves and this ring; no token of it stays."""
        lengths, following = [s.length for s in self.sequences], self.next
        self.forward.tune(choice)
        steps_s = []
        for _ in range(1 + TRIAL_STEPS):
            self.step()
            steps_s.append(self.forward.steps[-1].timeline().step_s)
        for sequence, length in zip(self.sequences, lengths, strict=True):
            self.forward.kv.truncate(sequence, length)
        self.next = following
        return min(steps_s[1:])

    def free(self) -> None:
        """Give back the pages of all sequences."""
        for sequence in self.sequences:
            self.forward.kv.free(sequence)

    def spans(self) -> list[Span]:
        """Return what the next step's pass takes."""
        return self._spans(self._verified(), self.verified)

    def _verified(self) -> list[list[int]]:
        drafts = self._random(self.verified - 1)
        return [[*token, *draft] for token, draft in zip(self.next, drafts, strict=True)]

    def _spans(self, token_ids: list[list[int]], num_outputs: int) -> list[Span]:
        return [Span(s, ids, num_outputs) for s, ids in zip(self.sequences, token_ids, strict=True)]

    def _run(self, token_ids: list[list[int]], num_outputs: int) -> list[int]:
        """Run a pass; return the token after the first of each sequence's ``num_outputs``."""
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
            best = self.forward.best(hidden)[1][::num_outputs]
            found[micro_batch] = [int(token) for token in best]

        self.forward.run(self._spans(token_ids, num_outputs), choose)
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
    verified: int = 1,
    *,
    tunes: bool = True,
) -> Recording:
    """Read prompts as fast as it goes, warm up, and keep the steps that follow.

    The sequences give their pages back at the end, so that others can follow on the same model.

    Args:
        forward: The model; its KV cache must have room for ``longest`` tokens of each sequence.
        num_seqs: Sequences that decode together.
        context: Tokens that each has read before.
        num_steps: Steps to keep.
        max_tokens: Tokens of the largest pass while prompts are read.
        seed: Of the random prompts.
        verified: Tokens of each sequence in a step: one, and drafts that are all rejected.
        tunes: Whether our own schedule chooses anew; else it keeps what it runs with.

    Raises:
        DoesNotFitError: The KV cache is too small.
        StreamError: Weights could not be read.
    """
    batch = _Batch(forward, num_seqs, verified, seed)
    chunk = max(1, max_tokens // num_seqs)
    set_speeds, forward.machine = forward.machine, replace(forward.machine, costs=None)
    for start in range(0, context, chunk):
        batch.read(min(chunk, context - start))
    forward.machine = set_speeds
    for _ in range(WARM_STEPS - 1):
        batch.step()
    forward.machine.executor.settle()
    if tunes and forward.machine.schedule == "specmoeoff":
        forward.tune(_chosen(batch))
    batch.step()
    forward.keeps_steps, forward.steps = True, []
    for _ in range(num_steps):
        batch.step()
    forward.machine.executor.settle()
    forward.keeps_steps = False
    timelines = tuple(step.timeline() for step in forward.steps)
    shape = forward.shape_of(batch.spans())
    batch.free()
    return Recording(shape, timelines, Costs.measured(timelines))


def _chosen(batch: _Batch) -> StepShape:
    """Return the waves and the ring that make our schedule's step shortest.

    Measured costs say what each read took, not what it takes when fewer slots wait for one. So what
    is simulated as the best has to be faster than the schedule's own choice when both are tried.
    """
    forward = batch.forward
    shape = forward.shape_of(batch.spans())
    if forward.machine.costs:
        return tuned(shape, forward.machine.costs)
    own = replace(shape, waves=1, ring_slots=None)
    best = tuned(shape, Costs.measured([step.timeline() for step in forward.steps]))
    return min((own, best), key=batch.tried) if best != own else own
