"""The scheduler: within its budgets at every step, and everything finishes, in order of age."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff.engine.scheduler import Scheduled, Scheduler
from specmoeoff.engine.sequence import Request, Sequence
from specmoeoff.offload.kv_cache import KvCache
from specmoeoff.sampling_params import SamplingParams

PAGE = 4


def make_sequence(prompt_length: int, max_output: int, first: int = 0) -> Sequence:
    prompt = list(range(first, first + prompt_length))
    request = Request("r", None, prompt, SamplingParams(max_tokens=max_output), max_output)
    sampler: Any = None
    sequence = Sequence(request, 0, sampler, None, list(prompt))
    request.sequences.append(sequence)
    return sequence


def make_scheduler(
    max_pages: int, max_num_seqs: int = 64, max_tokens: int = 64
) -> tuple[Scheduler, KvCache, list[Sequence]]:
    kv = KvCache(1, 1, 2, max_pages, "float32", PAGE)
    preempted: list[Sequence] = []
    return Scheduler(kv, max_num_seqs, max_tokens, preempted.append), kv, preempted


def run_step(
    scheduler: Scheduler, kv: KvCache, work: list[Scheduled], accepted: Any
) -> list[Sequence]:
    """Do what the engine does with a schedule; return the sequences that ended."""
    ended = []
    for item in work:
        sequence = item.sequence
        assert item.completes == (item.num_tokens == sequence.num_unread)
        kv.append(sequence.kv, item.num_tokens + item.num_drafts)
        if not item.completes:
            continue
        new = min(1 + accepted(item.num_drafts), sequence.room)
        sequence.token_ids += [7] * new
        kv.truncate(sequence.kv, len(sequence.token_ids) - 1)
        if sequence.room == 0:
            sequence.finish_reason = "length"
            scheduler.remove(sequence)
            ended.append(sequence)
    return ended


SIZES = st.lists(st.tuples(st.integers(1, 25), st.integers(1, 20)), min_size=1, max_size=10)


@given(
    sizes=SIZES,
    spare_pages=st.integers(0, 8),
    max_num_seqs=st.integers(1, 6),
    max_tokens=st.integers(1, 30),
    num_drafts=st.integers(0, 5),
    seed=st.integers(0, 1000),
    late=st.integers(0, 5),
)
@settings(max_examples=200)
def test_budgets_hold_and_everything_finishes(
    sizes: list[tuple[int, int]],
    spare_pages: int,
    max_num_seqs: int,
    max_tokens: int,
    num_drafts: int,
    seed: int,
    late: int,
) -> None:
    # As the plan has it: the cache holds the longest sequence there may be.
    pages = -(-max(sum(size) for size in sizes) // PAGE) + spare_pages
    scheduler, kv, preempted = make_scheduler(pages, max_num_seqs, max_tokens)
    rng = np.random.default_rng(seed)
    sequences = [make_sequence(*size) for size in sizes]
    arriving = sequences[: len(sequences) - late] or sequences[:1]
    for sequence in arriving:
        scheduler.add(sequence)
    still_to_come = sequences[len(arriving) :]
    ended: list[Sequence] = []
    # Whatever happens, the oldest makes progress in each step in which nobody was preempted.
    limit = 4 * sum(sum(size) for size in sizes) * len(sizes) + 50
    for _ in range(limit):
        if still_to_come:
            scheduler.add(still_to_come.pop(0))
        if not scheduler.has_work:
            break
        work = scheduler.schedule(num_drafts)
        assert work, "a step must run something"
        assert sum(item.num_tokens + item.num_drafts for item in work) <= max_tokens
        assert len(scheduler.running) <= max_num_seqs
        assert len({item.sequence.key for item in work}) == len(work)
        for item in work:
            sequence = item.sequence
            assert sequence in scheduler.running
            assert sequence not in scheduler.waiting
            assert 1 <= item.num_tokens <= sequence.num_unread
            assert item.num_drafts <= num_drafts
            assert item.num_drafts == 0 or (item.decodes and item.num_drafts < sequence.room)
            assert item.decodes == sequence.is_decoding
            room = len(sequence.kv.pages) * PAGE
            assert room >= sequence.kv.length + item.num_tokens + item.num_drafts
        ended += run_step(scheduler, kv, work, lambda k: int(rng.integers(0, k + 1)))
    assert sorted(s.key for s in ended) == [s.key for s in sequences]
    assert kv.num_used == 0
    assert scheduler.num_preemptions == len(preempted)
    assert sum(s.request.num_preemptions for s in sequences) == len(preempted)
    for sequence, (prompt_length, max_output) in zip(sequences, sizes, strict=True):
        assert len(sequence.token_ids) == prompt_length + max_output


def test_decoding_goes_on_while_a_long_prompt_rides_along() -> None:
    scheduler, kv, _ = make_scheduler(100, max_tokens=8)
    short, long = make_sequence(2, 20), make_sequence(60, 3)
    scheduler.add(short)
    scheduler.add(long)
    run_step(scheduler, kv, scheduler.schedule(0), lambda k: 0)
    for _ in range(5):
        first, second = scheduler.schedule(2)
        assert (first.sequence, first.num_tokens, first.num_drafts) == (short, 1, 2)
        assert (second.sequence, second.num_tokens, second.completes) == (long, 5, False)
        run_step(scheduler, kv, [first, second], lambda k: 0)


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    scheduler, kv, preempted = make_scheduler(21)
    old, young, third = (make_sequence(8, 60) for _ in range(3))
    for sequence in (old, young, third):
        scheduler.add(sequence)
    for _ in range(34):
        assert not preempted
        work = scheduler.schedule(0)
        run_step(scheduler, kv, work, lambda k: 0)
    assert preempted == [young]
    assert list(scheduler.waiting) == [young, third]
    assert young.kv.pages == []
    assert young.num_unread == len(young.token_ids) > 8, "its tokens are kept"


def test_who_preempts_itself_when_alone_starts_over_in_the_same_step() -> None:
    scheduler, kv, preempted = make_scheduler(20)
    alone = make_sequence(8, 60)
    scheduler.add(alone)
    run_step(scheduler, kv, scheduler.schedule(0), lambda k: 0)
    refusals = [False, True]
    kv.may_grow = lambda pages: refusals.pop(0) if refusals else True
    grown = len(alone.kv.pages) * PAGE + 1
    while len(alone.token_ids) < grown:
        run_step(scheduler, kv, scheduler.schedule(0), lambda k: 0)
    (work,) = scheduler.schedule(0)
    assert preempted == [alone]
    assert work.sequence is alone
    assert work.num_tokens == len(alone.token_ids)
    assert work.completes


def test_drafts_are_given_up_before_anyone_is_preempted() -> None:
    scheduler, kv, preempted = make_scheduler(4)
    sequence = make_sequence(12, 4)
    scheduler.add(sequence)
    run_step(scheduler, kv, scheduler.schedule(0), lambda k: 0)
    sequence.request.max_output_tokens = 40  # more than the cache could ever hold
    (work,) = scheduler.schedule(8)
    assert work.num_drafts == 0
    assert not preempted
