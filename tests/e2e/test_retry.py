"""A step that fails is as if it had not been: the next one gives what it would have given.

Sampling with drafts included, which a sequence that starts over would not: it is not drafted for
while it reads its tokens again, so it draws other numbers.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from specmoeoff.engine import commit, verification
from specmoeoff.engine.pass_ops import PassOps
from specmoeoff.errors import OpError
from specmoeoff.offload.kv_cache import KvCache
from specmoeoff.sampling import SequenceSampler
from specmoeoff.text import Detokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from specmoeoff.engine.commit import Update
    from specmoeoff.engine.engine import Engine
    from specmoeoff.engine.sequence import Request
    from specmoeoff.pipeline.plan import Op

TEXTS = ("abcabcabcabcabc", "the same the same the", "x", "one two one two one", "a b " * 12, "zz")
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=9, logprobs=2),
    SamplingParams(temperature=0.9, max_tokens=8, prompt_logprobs=1, min_tokens=5, stop=["e", "q"]),
    SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=8, frequency_penalty=0.8),
    SamplingParams(temperature=0.0, max_tokens=12, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(temperature=0.0, max_tokens=11, min_tokens=6, frequency_penalty=1.5),
)
SPECULATION: dict[str, dict[str, Any]] = {
    "off": {},
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1},
    "draft": {"num_speculative_tokens": 3},
}
TARGETS: dict[str, dict[str, Any]] = {
    "reactive": {},
    "cpu": {"schedule": "specmoeoff"},
    "sim": {"schedule": "flexgen", "device": "sim", "device_memory": 1 << 22},
}
PLACES = {
    "sampling": (SequenceSampler, "choose"),
    "judging a draft": (verification, "verify_sequence"),
    "the best token": (SequenceSampler, "take_best"),
    "stopping": (commit, "truncate_at_stop"),
    "decoding text": (Detokenizer, "append"),
    "truncating": (KvCache, "truncate"),
}
"""What is called once or more for each sequence of a step, while it is verified or committed."""


class Fails:
    """Lets one call of a function do its work and then fail."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
        real, self.left, self.seen = getattr(owner, name), call, False

        def failing(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("a bug")
            return result

        patch.setattr(owner, name, failing)


@pytest.fixture(params=[(t, s) for t in TARGETS for s in SPECULATION], ids="-".join)
def llm(request: pytest.FixtureRequest, tiny_mixtral: Path, tiny_draft: Path) -> Iterator[LLM]:
    target, drafts = request.param
    speculative = None
    if drafts != "off":
        model = str(tiny_draft) if drafts == "draft" else None
        speculative = SpeculativeConfig(model=model, **SPECULATION[drafts])
    with LLM(
        str(tiny_mixtral), memory="4GiB", speculative_config=speculative, **TARGETS[target]
    ) as made:
        yield made


def begin(llm: LLM) -> list[Request]:
    # Seeds that a request does not set are counted from here, so that two runs are alike.
    llm._engine._num_requests = 0
    pairs = enumerate(zip(TEXTS, PARAMS, strict=True))
    return [llm._add(str(i), *pair) for i, pair in pairs]  # type: ignore[misc]  # none is refused


def answers(requests: list[Request]) -> list[Any]:
    return [
        (r.prompt_logprobs, [(s.token_ids, s.text, s.logprobs, s.stop_reason) for s in r.sequences])
        for r in requests
    ]


def told(requests: list[Request], updates: list[Update]) -> list[Any]:
    """Return what one gets who only listens: tokens and text, piece by piece."""
    found = []
    for request in requests:
        for sequence in request.sequences:
            own = [update for update in updates if update.sequence is sequence]
            token_ids = [token_id for update in own for token_id in update.token_ids]
            found.append((token_ids, "".join(update.text for update in own)))
    return found


def run(engine: Engine, fails: Fails | None = None) -> list[Update]:
    """Step to the end, past one failure."""
    updates: list[Update] = []
    while engine.has_work:
        try:
            updates += engine.step()
        except RuntimeError:
            if fails is None or fails.left > 0 or fails.seen:
                raise
            fails.seen = True
    return updates


@pytest.mark.parametrize("place", PLACES)
def test_a_failure_of_one_sequence_changes_no_token(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Of one of the first, middle or last that a step verifies, in one of the first steps."""
    engine = llm._engine
    requests = begin(llm)
    wanted = told(requests, run(engine)), answers(requests)
    for call in (1, 2, 5, 9, 14):
        requests = begin(llm)
        with monkeypatch.context() as patch:
            fails = Fails(patch, *PLACES[place], call)
            updates = run(engine, fails)
        assert fails.seen
        assert (told(requests, updates), answers(requests)) == wanted
        assert all(request.is_finished for request in requests)
        assert engine._target.kv.num_used == 0


@pytest.mark.parametrize("call", [1, 3, 7])
def test_what_was_committed_is_told_even_if_letting_go_fails(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    engine = llm._engine
    requests = begin(llm)
    wanted = told(requests, run(engine)), answers(requests)
    requests = begin(llm)
    fails = Fails(monkeypatch, KvCache, "free", call)
    updates = run(engine, fails)
    assert fails.seen
    assert (told(requests, updates), answers(requests)) == wanted
    assert all(request.finished_time for request in requests)
    assert engine._target.kv.num_used == 0


def test_an_abort_after_that_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._engine
    requests = begin(llm)
    Fails(monkeypatch, KvCache, "free", 1)
    with pytest.raises(RuntimeError, match="a bug"):
        all(engine.step() is not None for _ in range(1000))
    for request in requests:
        engine.abort(request)
    assert not engine.has_work
    assert engine._target.kv.num_used == 0


class Held:
    """A drafter that holds one of its calls until it is released."""

    def __init__(self, drafter: Any, call: int) -> None:
        self.started, self.gate, self.ended = (threading.Event() for _ in range(3))
        self._drafter, self._left = drafter, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def propose(self, requests: Any, held_bytes: int = 0) -> Any:
        self._left -= 1
        if self._left == 0:
            self.started.set()
            assert self.gate.wait(60)
        made = self._drafter.propose(requests, held_bytes)
        if self._left == 0:
            self.ended.set()
        return made


def test_an_op_that_was_left_behind_cannot_reach_what_is_restored(
    tiny_mixtral: Path, tiny_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It draws tokens and counts them into the KV cache after the step was given up."""
    monkeypatch.setattr("specmoeoff.pipeline.overlapped.GRACE_S", 0.05)
    speculative = SpeculativeConfig(model=str(tiny_draft), num_speculative_tokens=3)
    options = {"schedule": "specmoeoff", "device": "sim", "device_memory": 1 << 22}
    with LLM(str(tiny_mixtral), memory="4GiB", speculative_config=speculative, **options) as llm:  # type: ignore[arg-type]
        engine = llm._engine
        requests = begin(llm)
        wanted = told(requests, run(engine)), answers(requests)
        requests = begin(llm)
        updates = [*engine.step(), *engine.step()]
        # The second micro-batch's drafts, on the device, while the first one is in attention.
        held = Held(engine._drafter, 2)
        engine._drafter = held
        with monkeypatch.context() as patch:
            perform = PassOps.perform

            def failing(work: PassOps, op: Op, stop: threading.Event) -> None:
                if op.kind == "attend":
                    assert held.started.wait(30)
                    raise RuntimeError("a bug")
                perform(work, op, stop)

            patch.setattr(PassOps, "perform", failing)
            with pytest.raises(OpError, match=r"attend L0 M0.*a bug"):
                engine.step()
        with pytest.raises(OpError, match=r"draft M1\) of an earlier step .* still runs"):
            engine.step()
        held.gate.set()
        assert held.ended.wait(30)
        updates += run(engine)
        assert (told(requests, updates), answers(requests)) == wanted
