"""The engine's stops: wherever an accepted run crosses one, the output ends there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from specmoeoff.config import KV_DTYPES
from specmoeoff.speculative.drafter import DraftRequest, Proposal
from tiny import EOS_TOKEN_ID, write_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from specmoeoff.outputs import CompletionOutput

PROMPT = "the quick brown fox"
LENGTH = 48
FREE = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)


class Oracle:
    """Drafts what it is told, which a test takes from a run without speculation."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self.wrong_every = 0
        self.released: list[int] = []

    def prefill(self, requests: list[DraftRequest], num_tokens: list[int]) -> None:
        pass

    def propose(self, requests: list[DraftRequest], held_bytes: int = 0) -> list[Proposal]:
        return [self._propose(request) for request in requests]

    def release(self, key: int) -> None:
        self.released.append(key)

    def _propose(self, request: DraftRequest) -> Proposal:
        at = len(request.token_ids)
        token_ids = [
            (token + 1) % 250 if self.wrong_every and (at + i) % self.wrong_every == 0 else token
            for i, token in enumerate(self.script[at : at + request.num_tokens])
        ]
        return Proposal(token_ids, [None] * len(token_ids))


@pytest.fixture(scope="module")
def plain(tiny_mixtral: Path) -> Iterator[LLM]:
    with LLM(str(tiny_mixtral), memory="4GiB") as llm:
        yield llm


@pytest.fixture(scope="module")
def free(plain: LLM) -> CompletionOutput:
    """The output that nothing stops."""
    return plain.generate(PROMPT, FREE)[0].outputs[0]


@pytest.fixture(scope="module", params=[1, 4, 8], ids=lambda k: f"k{k}")
def scripted(
    request: pytest.FixtureRequest, plain: LLM, free: CompletionOutput, tiny_mixtral: Path
) -> Iterator[tuple[LLM, Oracle]]:
    """An engine whose drafter knows the answer."""
    speculative = SpeculativeConfig("ngram", num_speculative_tokens=request.param)
    with LLM(str(tiny_mixtral), memory="4GiB", speculative_config=speculative) as llm:
        oracle = Oracle()
        assert plain.tokenizer is not None
        oracle.script = plain.tokenizer.encode(PROMPT) + free.token_ids
        llm._engine._drafter = oracle
        yield llm, oracle


def same(a: CompletionOutput, b: CompletionOutput) -> None:
    assert a.token_ids == b.token_ids
    assert a.text == b.text
    assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
    assert a.logprobs == b.logprobs


@given(data=st.data())
@settings(max_examples=60)
def test_stops_are_where_they_are_without_drafts(
    plain: LLM, scripted: tuple[LLM, Oracle], free: CompletionOutput, data: st.DataObject
) -> None:
    llm, oracle = scripted
    oracle.wrong_every = data.draw(st.sampled_from([0, 0, 3, 7]))
    max_tokens = data.draw(st.integers(1, LENGTH))
    place = data.draw(st.integers(0, len(free.text) - 1))
    stop = free.text[place : place + data.draw(st.integers(1, 4))]
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        min_tokens=data.draw(st.integers(0, max_tokens)),
        stop=data.draw(st.sampled_from([None, stop, [stop, "\x00never"]])),
        stop_token_ids=data.draw(st.none() | st.lists(st.sampled_from(free.token_ids), max_size=2)),
        include_stop_str_in_output=data.draw(st.booleans()),
        ignore_eos=data.draw(st.booleans()),
        logprobs=data.draw(st.sampled_from([None, 1])),
    )
    same(
        llm.generate(PROMPT, params)[0].outputs[0],
        plain.generate(PROMPT, params)[0].outputs[0],
    )


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_only_returned_tokens_count(
    scripted: tuple[LLM, Oracle], free: CompletionOutput, max_tokens: int
) -> None:
    llm, oracle = scripted
    oracle.wrong_every = 0
    before = llm.stats().generated_tokens
    (output,) = llm.generate(PROMPT, FREE.replace(max_tokens=max_tokens))
    completion = output.outputs[0]
    assert completion.token_ids == free.token_ids[:max_tokens]
    assert completion.finish_reason == "length"
    assert llm.stats().generated_tokens - before == max_tokens
    # No draft past the end was even asked for.
    assert output.metrics.num_drafted_tokens <= max(0, max_tokens - 2)


def test_perfect_drafts_take_few_steps(scripted: tuple[LLM, Oracle]) -> None:
    llm, oracle = scripted
    oracle.wrong_every = 0
    k = llm.config.speculative.num_speculative_tokens  # type: ignore[union-attr]
    before = llm.stats().steps
    (output,) = llm.generate(PROMPT, FREE)
    assert llm.stats().steps - before == 1 + -(-(LENGTH - 1) // (k + 1))
    assert output.metrics.num_accepted_tokens == output.metrics.num_drafted_tokens


def test_a_stop_token_inside_an_accepted_run(
    scripted: tuple[LLM, Oracle], free: CompletionOutput
) -> None:
    llm, oracle = scripted
    oracle.wrong_every = 0
    for place in range(1, 14):
        token = free.token_ids[place]
        first = free.token_ids.index(token)
        completion = llm.generate(PROMPT, FREE.replace(stop_token_ids=[token]))[0].outputs[0]
        assert completion.token_ids == free.token_ids[: first + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", token)


def test_min_tokens_come_before_a_stop_token(
    scripted: tuple[LLM, Oracle], free: CompletionOutput
) -> None:
    llm, oracle = scripted
    oracle.wrong_every = 0
    params = FREE.replace(min_tokens=10, stop_token_ids=sorted(set(free.token_ids)))
    completion = llm.generate(PROMPT, params)[0].outputs[0]
    assert len(completion.token_ids) == 11
    assert not set(completion.token_ids[:10]) & set(free.token_ids)


def test_a_stop_string_across_tokens(plain: LLM, scripted: tuple[LLM, Oracle]) -> None:
    llm, _ = scripted
    assert plain.tokenizer is not None
    whole = plain.generate(PROMPT, FREE)[0].outputs[0]
    # Bytes are tokens, so two whole characters are two tokens at least.
    pairs = [whole.text[i : i + 2] for i in range(4, len(whole.text) - 1)]
    stop = next(pair for pair in pairs if "\ufffd" not in pair)
    completion = llm.generate(PROMPT, FREE.replace(stop=stop))[0].outputs[0]
    assert completion.finish_reason == "stop"
    assert completion.stop_reason == stop
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert stop in plain.tokenizer.decode(completion.token_ids)
    assert stop not in plain.tokenizer.decode(completion.token_ids[:-1])


def test_the_drafter_forgets_who_ended(scripted: tuple[LLM, Oracle]) -> None:
    llm, oracle = scripted
    oracle.released.clear()
    llm.generate([PROMPT] * 5, FREE.replace(max_tokens=3))
    assert len(set(oracle.released)) == len(oracle.released) == 5


def test_eos_among_the_drafts(tmp_path: Path, tiny_mixtral: Path) -> None:
    # A vocabulary whose last row wins now and then: eos comes within a few dozen tokens.
    directory = write_tiny(tmp_path / "m", seed=31, vocab_size=EOS_TOKEN_ID + 1)
    prompts = [{"prompt_token_ids": [i, i + 1]} for i in range(60)]
    params = SamplingParams(temperature=0, max_tokens=60)
    with LLM(str(directory), memory="4GiB") as llm:
        wanted = [output.outputs[0] for output in llm.generate(prompts, params)]
    assert {completion.finish_reason for completion in wanted} == {"stop", "length"}
    speculative = SpeculativeConfig("ngram", num_speculative_tokens=6, prompt_lookup_min=1)
    with LLM(str(directory), memory="4GiB", speculative_config=speculative) as llm:
        for output, other in zip(llm.generate(prompts, params), wanted, strict=True):
            same(output.outputs[0], other)


NAN = {"u": 0x7FC0, "i": 127}
"""What poisons a page of bfloat16, and of int8 with its scales; floats take NaN itself."""


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_stale_keys_and_values_are_never_read(tiny_mixtral: Path, kv_dtype: str) -> None:
    """What rejected drafts and ended sequences left in a page must not matter, NaN included."""
    prompts = [{"prompt_token_ids": list(range(i, 2 * i + 1))} for i in (1, 31, 40, 70)]
    with LLM(str(tiny_mixtral), memory="4GiB", kv_dtype=kv_dtype) as llm:  # type: ignore[arg-type]
        wanted = [output.outputs[0].token_ids for output in llm.generate(prompts, FREE)]
        kv = llm._engine._target.kv
        for layer in range(2):
            for field in (*kv.layer(layer), *kv.scales(layer)):
                if field is not None:
                    field[:64] = NAN.get(field.dtype.kind, np.nan)
        got = [output.outputs[0].token_ids for output in llm.generate(prompts, FREE)]
    assert got == wanted
