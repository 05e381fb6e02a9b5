"""The scheduler: within its budgets at every step, and everything finishes, in order of age."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff.engine.expected_output import PRIOR_TOKENS, WINDOW, ExpectedOutput
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
    """Two are expected to say 128 tokens and say 200."""
    scheduler, kv, preempted = make_scheduler(2 * (8 + 128) // PAGE)
    old, young, third = (make_sequence(8, 200) for _ in range(3))
    for sequence in (old, young, third):
        scheduler.add(sequence)
    while len(old.token_ids) < 8 + 130:
        assert not preempted
        run_step(scheduler, kv, scheduler.schedule(0), lambda k: 0)
    assert preempted == [young]
    assert list(scheduler.waiting) == [young, third]
    assert young.kv.pages == []
    assert young.num_unread == len(young.token_ids) > 8, "its tokens are kept"


def test_those_that_decode_go_before_an_older_prompt() -> None:
    scheduler, kv, _ = make_scheduler(100, max_tokens=8)
    old, young = make_sequence(4, 9), make_sequence(2, 20)
    scheduler.add(old)
    scheduler.add(young)
    run_step(scheduler, kv, scheduler.schedule(0), lambda k: 0)
    # As if it started over with much to read again, older than the other still.
    kv.free(old.kv)
    old.token_ids[:0] = [7] * 40
    first, second = scheduler.schedule(2)
    assert (first.sequence, first.num_tokens, first.num_drafts) == (young, 1, 2)
    assert (second.sequence, second.num_tokens) == (old, 5)


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


# Admission ----------------------------------------------------------------------------------------


def expected_pages(kv: KvCache, sequences: list[Sequence], output: ExpectedOutput) -> int:
    """Return the pages that sequences are expected to fill, from the definition."""
    lengths = [
        len(s.request.prompt_token_ids)
        + min(output.of(s.num_output_tokens), s.request.max_output_tokens)
        for s in sequences
    ]
    return sum(
        max(kv.pages_for(n), len(s.kv.pages)) for n, s in zip(lengths, sequences, strict=True)
    )


LONG = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 400)), min_size=2, max_size=14)


@given(sizes=LONG, spare_pages=st.integers(0, 60), max_tokens=st.integers(8, 80), data=st.data())
@settings(max_examples=60)
def test_admitted_is_what_is_expected_to_fit_and_nobody_comes_back_at_once(
    sizes: list[tuple[int, int]], spare_pages: int, max_tokens: int, data: st.DataObject
) -> None:
    """Outputs end early at random, sequences are aborted: the expectation is wrong all the time."""
    pages = -(-max(sum(size) for size in sizes) // PAGE) + spare_pages
    scheduler, kv, preempted = make_scheduler(pages, max_tokens=max_tokens)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sequences = [make_sequence(*size) for size in sizes]
    for sequence in sequences:
        scheduler.add(sequence)
    barred: dict[int, Sequence] = {}
    finished: list[Sequence] = []
    for _ in range(20 * sum(sum(size) for size in sizes) * len(sizes)):
        if not scheduler.has_work:
            break
        before = list(scheduler.running)
        num_preempted = len(preempted)
        work = scheduler.schedule(0)
        assert work
        new = [s for s in scheduler.running if s not in before]
        thrown_out = preempted[num_preempted:]
        assert not (new and thrown_out), "nobody is admitted while somebody gives way"
        if new and len(scheduler.running) > 1:
            assert expected_pages(kv, scheduler.running, scheduler._expected) <= pages
        for sequence in new:
            assert sequence.key not in barred, "the shortage is still there"
        # Only the oldest run, and they stay in their order.
        waiting_and_running = [*scheduler.running, *scheduler.waiting]
        assert [s.key for s in waiting_and_running] == sorted(s.key for s in waiting_and_running)
        ended = run_step(scheduler, kv, work, lambda k: 0)
        for item in work:
            sequence = item.sequence
            if sequence.finish_reason is None and item.completes and rng.random() < 0.01:
                sequence.finish_reason = "stop" if rng.random() < 0.7 else "abort"
                scheduler.remove(sequence)
                ended.append(sequence)
        finished += ended
        if ended or thrown_out:
            barred.clear()
        # Whoever gave way last found the rest holding what it lacked.
        barred |= {s.key: s for s in thrown_out}
    assert len(finished) == len(sequences)
    assert (kv.num_used, kv.high_water) == (0, 0)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 500), st.booleans()), max_size=300),
    sizes=st.lists(st.integers(0, 1200), min_size=2, max_size=20),
)
def test_what_is_expected_grows_with_what_was_said(
    lengths: list[tuple[int, bool]], sizes: list[int]
) -> None:
    expected = ExpectedOutput()
    assert expected.of(0) == PRIOR_TOKENS
    for length, was_cut in lengths:
        expected.learn(length, was_cut)
    found = [expected.of(n) for n in sorted(sizes)]
    assert found == sorted(found)
    assert all(f > n for f, n in zip(found, sorted(sizes), strict=True))


def test_the_expectation_is_the_mean_of_those_that_said_more() -> None:
    expected = ExpectedOutput()
    for _ in range(WINDOW):
        expected.learn(10, False)
        expected.learn(50, False)
    assert expected.of(0) == 30
    assert expected.of(10) == 50
    assert expected.of(50) == 50 + PRIOR_TOKENS
    # Cut at 20, it would have said 50.
    for _ in range(WINDOW):
        expected.learn(20, True)
    assert expected.of(0) == 50


def test_more_are_admitted_once_outputs_are_known_to_be_short() -> None:
    scheduler, kv, _ = make_scheduler(300 // PAGE)
    for _ in range(80):
        scheduler.add(make_sequence(8, 280))
    admitted = []
    while scheduler.has_work:
        run_step(scheduler, kv, scheduler.schedule(0), lambda k: 0)
        admitted.append(len(scheduler.running))
        for sequence in list(scheduler.running):
            if sequence.num_output_tokens == 5:
                sequence.finish_reason = "stop"
                scheduler.remove(sequence)
    assert admitted[0] == 2
    assert max(admitted) > 4
