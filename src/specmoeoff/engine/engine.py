"""The engine: each step schedules, runs one pass in which drafts are proposed, verifies, commits.

Everything a step needs was sized when the engine was built, within the memory plan. Knows requests
and tokens; text comes in and goes out through llm.py.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specmoeoff import kernels
from specmoeoff.engine.commit import Before, Update, extend
from specmoeoff.engine.drafting import Drafting
from specmoeoff.engine.memory_plan import peak_resident_bytes
from specmoeoff.engine.scheduler import Scheduled, Scheduler
from specmoeoff.engine.sequence import Request, Sequence
from specmoeoff.engine.stats import EngineStats, StepFigures
from specmoeoff.engine.verification import needs_logits, verify_batch
from specmoeoff.errors import InvalidInputError, StreamError
from specmoeoff.sampling import SequenceSampler

if TYPE_CHECKING:
    from collections.abc import Callable

    from specmoeoff.config import ModelConfig, Policy
    from specmoeoff.engine.memory_plan import MemoryPlan
    from specmoeoff.engine.target import Target
    from specmoeoff.sampling_params import SamplingParams
    from specmoeoff.speculative.budget import AdaptiveBudget, FixedBudget
    from specmoeoff.speculative.drafter import Drafter, Proposal
    from specmoeoff.speculative.verify import Verification
    from specmoeoff.text import Detokenizer


@dataclass(frozen=True)
class Parts:
    """What an engine is built from; see build.py."""

    config: ModelConfig
    plan: MemoryPlan
    target: Target
    drafter: Drafter | None
    budget: AdaptiveBudget | FixedBudget
    shared_bytes: int
    seed: int


class Engine:
    """Continuous batching over one target, with or without a drafter."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._stats = EngineStats(shared_bytes=parts.shared_bytes)
        self._target = parts.target
        self._drafter = parts.drafter
        self._scheduler = Scheduler(
            parts.target.kv,
            parts.plan.policy.max_num_seqs,
            parts.plan.policy.max_num_batched_tokens,
            self._release_draft,
        )
        self._num_requests = 0
        self._updates: list[Update] = []
        """What a step made, until it is returned."""
        self._is_closed = False

    # -- requests -------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
        make_detokenizer: Callable[[], Detokenizer | None] = lambda: None,
        token_text: Callable[[int], str] | None = None,
    ) -> Request:
        """Queue a request.

        Raises:
            InvalidInputError: The prompt is empty, too long, or has a token that does not exist.
        """
        config, limit = self._parts.config, self.policy.max_model_len
        _check_prompt(prompt_token_ids, config.vocab_size, limit)
        left = limit - len(prompt_token_ids)
        max_output = left if params.max_tokens is None else min(params.max_tokens, left)
        request = Request(request_id, prompt, prompt_token_ids, params, max_output, token_text)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        for index in range(params.n):
            sampler = SequenceSampler.create(
                params,
                prompt_token_ids,
                eos_token_ids=config.eos_token_ids,
                default_seed=(self._parts.seed, self._num_requests),
                sample_index=index,
            )
            sequence = Sequence(request, index, sampler, make_detokenizer(), list(prompt_token_ids))
            request.sequences.append(sequence)
            self._scheduler.add(sequence)
        self._num_requests += 1
        return request

    def abort(self, request: Request) -> None:
        """End a request's unfinished samples now."""
        unfinished = [each for each in request.sequences if each.finish_reason is None]
        for sequence in unfinished:
            sequence.finish_reason = "abort"
        self._updates = [each for each in self._updates if each.sequence.request is not request]
        self._retire(unfinished)

    @property
    def policy(self) -> Policy:
        """The memory split and limits that were chosen."""
        return self._parts.plan.policy

    @property
    def wants_more(self) -> bool:
        """Whether another request would not wait behind a whole batch of others."""
        return len(self._scheduler.waiting) < self.policy.max_num_seqs

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, or what it gained not yet told."""
        return self._scheduler.has_work or bool(self._updates)

    # -- the step -------------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Run one step over everything that can run.

        A step that fails changes no sequence: the next one does what it would have done. Where
        only letting go of those that ended has failed, the next one returns what it had made.

        Raises:
            StreamError: Weights could not be read.
        """
        if self._is_closed:
            raise StreamError("this engine was closed; make a new one")
        updates = self._updates = self._updates or self._run()
        self._retire([each.sequence for each in updates if each.sequence.finish_reason is not None])
        self._updates = []
        return updates

    def _run(self) -> list[Update]:
        """Schedule, propose, run the pass, verify and commit, or leave all as it was."""
        start = time.perf_counter()
        num_decoding = sum(sequence.is_decoding for sequence in self._scheduler.running)
        num_drafts = 0
        if self._drafter is not None:
            num_drafts = self._parts.budget.num_drafts(num_decoding)
        batch = self._scheduler.schedule(num_drafts)
        if not batch:
            raise RuntimeError("no sequence can run: the KV cache is smaller than its plan")
        self._lend_spare_memory(batch)
        drafting = Drafting(batch, self._drafter)
        proposals = drafting.proposals
        propose = drafting.with_drafts if self._drafter is not None else None
        begun = [Before.of(work.sequence) for work in batch]
        try:
            # Tokens are proposed within the pass, so that a plan can draft some while others run.
            hidden = self._target.run(drafting.spans(), propose)
            verifications = verify_batch(self._target, batch, proposals, hidden)
            updates = self._commit(batch, verifications)
        except BaseException:
            for before in begun:
                before.restore()
            for work in batch:
                self._release_draft(work.sequence)
            raise
        self._stats.draft_s += drafting.draft_s
        figures = StepFigures.of(batch, proposals, verifications, time.perf_counter() - start)
        self._count(figures, batch, proposals, verifications, updates)
        if self._drafter is not None and figures.prompt_rows == 0:
            self._parts.budget.observe(
                num_decoding, num_drafts, figures.step_s, figures.judged, figures.accepted
            )
        return updates

    def _lend_spare_memory(self, batch: list[Scheduled]) -> None:
        """Let the expert slots have what this step does not need of its share."""
        num_tokens = sum(work.num_tokens + work.num_drafts for work in batch)
        samples = any(work.num_drafts and not work.sequence.sampler.greedy for work in batch)
        spare = self._parts.plan.spare_step_bytes(num_tokens, samples, needs_logits(batch))
        self._target.lend(spare)

    def _commit(
        self, batch: list[Scheduled], verifications: list[Verification | None]
    ) -> list[Update]:
        """Add the verified tokens to their sequences, up to where each one stops."""
        updates = []
        for work, verification in zip(batch, verifications, strict=True):
            if verification is not None:
                sequence = work.sequence
                updates.append(extend(sequence, verification, self._parts.config.eos_token_ids))
                # What was rejected, and what came after a stop, is cut off by length alone.
                self._target.kv.truncate(sequence.kv, len(sequence.token_ids) - 1)
        return updates

    def _retire(self, sequences: list[Sequence]) -> None:
        """Let go of sequences that have ended: of all of them, whatever fails with one."""
        if not sequences:
            return
        now = time.monotonic()
        # The last one entered is called first.
        with contextlib.ExitStack() as stack:
            stack.callback(self._target.rebalance)
            for sequence in reversed(sequences):
                if sequence.request.is_finished:
                    sequence.request.finished_time = now
                stack.callback(self._release_draft, sequence)
                stack.callback(self._scheduler.remove, sequence)

    def _release_draft(self, sequence: Sequence) -> None:
        if self._drafter is not None:
            self._drafter.release(sequence.key)

    # -- figures --------------------------------------------------------------------------------

    def _count(
        self,
        figures: StepFigures,
        batch: list[Scheduled],
        proposals: list[Proposal],
        verifications: list[Verification | None],
        updates: list[Update],
    ) -> None:
        """Count a step that has succeeded, for the engine and for each request."""
        now = time.monotonic()
        self._stats.add(figures)
        for work, proposal, verification in zip(batch, proposals, verifications, strict=True):
            request = work.sequence.request
            request.first_scheduled_time = request.first_scheduled_time or now
            if verification is not None:
                request.first_token_time = request.first_token_time or now
                request.num_drafted_tokens += len(proposal.token_ids)
                request.num_accepted_tokens += verification.num_accepted
        decoding = {work.sequence for work in batch if work.decodes}
        for update in updates:
            self._stats.generated_tokens += len(update.token_ids)
            if update.sequence in decoding:
                self._stats.decode_tokens += len(update.token_ids)

    def stats(self) -> EngineStats:
        """Return the counters up to now."""
        stats = self._stats
        stats.peak_memory_bytes = peak_resident_bytes()
        self._target.count(stats)
        stats.kv_pages = self._target.kv.num_used
        stats.num_threads = kernels.num_threads()
        stats.cpu_target = kernels.cpu_target()
        stats.preemptions = self._scheduler.num_preemptions
        return stats

    def close(self) -> None:
        """End the target's reading within two seconds; the engine cannot step afterwards."""
        self._is_closed = True
        self._target.close()


def _check_prompt(token_ids: list[int], vocab_size: int, max_model_len: int) -> None:
    if not token_ids:
        raise InvalidInputError("the prompt is empty: it needs at least one token")
    if len(token_ids) >= max_model_len:
        raise InvalidInputError(
            f"the prompt has {len(token_ids)} tokens; with at least one of output it must fit "
            f"max_model_len {max_model_len} (raise memory or max_model_len, or shorten it)"
        )
    for position, token_id in enumerate(token_ids):
        if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise InvalidInputError(
                f"prompt token {position} is {token_id!r}; the vocabulary has 0 to {vocab_size - 1}"
            )
