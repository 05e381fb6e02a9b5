"""LLM: prompts of every kind in, outputs and errors out, streams, several runs at once."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from specmoeoff.errors import CheckpointError, DoesNotFitError, InvalidInputError
from tiny import EOS_TOKEN_ID, write_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from specmoeoff.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_mixtral: Path, tiny_draft: Path) -> Iterator[LLM]:
    speculative = SpeculativeConfig(model=str(tiny_draft), num_speculative_tokens=3)
    with LLM(str(tiny_mixtral), memory="4GiB", speculative_config=speculative) as made:
        yield made


def tokens(output: RequestOutput) -> list[int]:
    assert output.error is None
    return output.outputs[0].token_ids


def test_every_kind_of_prompt(llm: LLM) -> None:
    assert llm.tokenizer is not None
    message = [{"role": "user", "content": "hi"}]
    outputs = llm.generate(
        [
            "hello",
            {"prompt": "hello"},
            {"prompt_token_ids": llm.tokenizer.encode("hello")},
            {"prompt_token_ids": np.array(llm.tokenizer.encode("hello"))},
            {"messages": message},
        ],
        GREEDY,
    )
    assert len({tuple(tokens(output)) for output in outputs[:4]}) == 1
    assert [output.prompt for output in outputs] == ["hello", "hello", None, None, None]
    assert outputs[4].prompt_token_ids == llm.tokenizer.apply_chat_template(message)
    assert tokens(llm.chat(message, GREEDY)[0]) == tokens(outputs[4])
    assert [tokens(o) for o in llm.chat([message, message], GREEDY)] == [tokens(outputs[4])] * 2
    for output in outputs:
        completion = output.outputs[0]
        assert output.finished
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert all(type(token) is int for token in output.prompt_token_ids)


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    (one,) = llm.generate("abc", GREEDY)
    (two,) = llm.generate({"prompt": "abc"}, GREEDY)
    assert tokens(one) == tokens(two)
    assert llm.generate([], GREEDY) == []


BAD_PROMPTS: dict[str, tuple[object, str]] = {
    "no text": ("", "the prompt is empty"),
    "no tokens": ({"prompt_token_ids": []}, "the prompt is empty"),
    "two kinds": ({"prompt": "a", "messages": []}, "exactly one of"),
    "no kind": ({"text": "a"}, "this one has text"),
    "nothing": ({}, "this one has nothing"),
    "token too large": ({"prompt_token_ids": [1, 999]}, "prompt token 1 is 999"),
    "token negative": ({"prompt_token_ids": [-1]}, "prompt token 0 is -1"),
    "tokens as text": ({"prompt_token_ids": "abc"}, "must be a list of token ids"),
    "tokens as numbers": ({"prompt_token_ids": [1.5]}, "must be a list of token ids"),
    "one token": ({"prompt_token_ids": 5}, "must be a list of token ids"),
    "a list": ([1, 2], "it must be text, or a mapping"),
    "a number": (7, "it must be text, or a mapping"),
    "prompt of bytes": ({"prompt": b"abc"}, "it must be text"),
    "too long": ({"prompt_token_ids": [1] * 512}, "must fit max_model_len 512"),
    "messages of text": ({"messages": "hello"}, "messages"),
    "messages of a number": ({"messages": 5}, "messages"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_prompt_that_cannot_run_has_its_error_and_the_rest_go_on(llm: LLM, name: str) -> None:
    prompt, message = BAD_PROMPTS[name]
    bad, good = llm.generate([prompt, "fine"], GREEDY)  # type: ignore[list-item]
    assert bad.finished
    assert bad.outputs == []
    assert message in (bad.error or "")
    assert "\n" not in (bad.error or "")
    assert len(tokens(good)) == 12


def test_parameters_are_counted(llm: LLM) -> None:
    with pytest.raises(InvalidInputError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])
    outputs = llm.generate(["a", "a"], [GREEDY, GREEDY.replace(max_tokens=5)])
    assert [len(tokens(output)) for output in outputs] == [12, 5]


def test_the_models_limit_ends_an_output(llm: LLM) -> None:
    (output,) = llm.generate({"prompt_token_ids": [1] * 505}, GREEDY.replace(max_tokens=None))
    assert len(tokens(output)) == 512 - 505
    assert output.outputs[0].finish_reason == "length"


def test_max_model_len(tiny_mixtral: Path) -> None:
    with LLM(str(tiny_mixtral), memory="4GiB", max_model_len=40) as llm:
        assert llm.policy.max_model_len == 40
        good, bad = llm.generate(
            [{"prompt_token_ids": [1] * 39}, {"prompt_token_ids": [1] * 40}],
            GREEDY.replace(max_tokens=None),
        )
        assert len(tokens(good)) == 1
        assert "max_model_len 40" in (bad.error or "")


def test_completed_requests_come_as_they_finish_from_an_endless_feed(llm: LLM) -> None:
    taken = []

    def feed() -> Iterator[str]:
        number = 0
        while True:
            taken.append(number)
            yield f"prompt {number}"
            number += 1

    params = [GREEDY.replace(max_tokens=1 + 5 * (i % 2)) for i in range(10_000)]
    run = llm.iter_completed(feed(), params)
    first = [next(run) for _ in range(20)]
    run.close()
    assert len(taken) < 1000
    assert {int(output.request_id) for output in first} <= set(taken)
    for output in first:
        assert len(tokens(output)) == 1 + 5 * (int(output.request_id) % 2)
    assert not llm._engine.has_work


@pytest.mark.parametrize("max_tokens", [1, 13])
def test_a_stream_adds_up_to_the_whole(llm: LLM, max_tokens: int) -> None:
    prompts = ["one", "", "three", {"prompt_token_ids": [300]}, "five"]
    params = SamplingParams(
        temperature=1.0, seed=3, n=2, max_tokens=max_tokens, logprobs=1, ignore_eos=True
    )
    whole = llm.generate(prompts, params)
    streamed: dict[tuple[int, int], tuple[list[int], str, int]] = {}
    finished: list[int] = []
    for output in llm.generate_stream(prompts, params):
        number = int(output.request_id)
        assert number not in finished
        if output.finished:
            finished.append(number)
        for part in output.outputs:
            ids, text, scored = streamed.get((number, part.index), ([], "", 0))
            assert part.token_ids
            assert part.logprobs is not None
            both = (ids + part.token_ids, text + part.text, scored + len(part.logprobs))
            streamed[number, part.index] = both
    assert sorted(finished) == [0, 1, 2, 3, 4]
    for number, output in enumerate(whole):
        assert (output.error is not None) == (number in (1, 3))
        for completion in output.outputs:
            ids, text, scored = streamed[number, completion.index]
            assert ids == completion.token_ids
            assert text == completion.text
            assert scored == len(ids)
    assert len(streamed) == 6


def test_an_abandoned_stream_leaves_the_engine_free(llm: LLM) -> None:
    wanted = tokens(llm.generate("abc", GREEDY)[0])
    stream = llm.generate_stream(["abc", "def", "ghi"], GREEDY)
    next(stream)
    stream.close()
    assert not llm._engine.has_work
    assert llm._inboxes == {}
    assert tokens(llm.generate("abc", GREEDY)[0]) == wanted
    # Not closed, only forgotten.
    for _ in llm.generate_stream(["abc", "def"], GREEDY):
        break
    assert tokens(llm.generate("abc", GREEDY)[0]) == wanted


def test_two_streams_in_turns(llm: LLM) -> None:
    wanted = [tokens(output) for output in llm.generate(["abc", "def"], GREEDY)]
    got: list[list[int]] = [[], []]
    streams = [llm.generate_stream("abc", GREEDY), llm.generate_stream("def", GREEDY)]
    open_streams = [0, 1]
    while open_streams:
        for which in list(open_streams):
            output = next(streams[which], None)
            if output is None:
                open_streams.remove(which)
            else:
                got[which] += output.outputs[0].token_ids
    assert got == wanted


def test_metrics_and_stats(llm: LLM) -> None:
    before = llm.stats().as_dict()
    outputs = llm.generate(["abc", "some other text"], GREEDY)
    after = llm.stats().as_dict()
    assert after["generated_tokens"] - before["generated_tokens"] == 24
    assert after["decode_tokens"] - before["decode_tokens"] == 22
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    assert after["prefill_tokens"] - before["prefill_tokens"] == prompt_tokens
    drafted = after["drafted_tokens"] - before["drafted_tokens"]
    accepted = after["accepted_tokens"] - before["accepted_tokens"]
    assert sum(output.metrics.num_drafted_tokens for output in outputs) == drafted > 0
    assert sum(output.metrics.num_accepted_tokens for output in outputs) == accepted > 0
    assert after["peak_memory_bytes"] > 0
    assert after["kv_pages"] == 0
    budget = after["tiers"]["main"]["budget"]
    assert after["tiers"]["main"] == {
        "budget": budget,
        "planned": budget,
        "reserved": budget,
        "peak": after["peak_memory_bytes"],
    }
    assert 0 <= after["link_utilisation"] <= 1
    for output in outputs:
        metrics = output.metrics
        assert metrics.first_scheduled_time is not None
        assert metrics.first_token_time is not None
        assert metrics.finished_time is not None
        assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_a_closed_llm_says_so(tiny_mixtral: Path) -> None:
    llm = LLM(str(tiny_mixtral), memory="4GiB")
    llm.close()
    llm.close()
    with pytest.raises(InvalidInputError, match="was closed"):
        llm.generate("abc", GREEDY)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "bare")
    with LLM(str(directory), memory="4GiB") as llm:
        assert llm.tokenizer is None
        text, chat, stop, ids = llm.generate(
            ["abc", {"messages": []}, {"prompt_token_ids": [1]}, {"prompt_token_ids": [1]}],
            [GREEDY, GREEDY, GREEDY.replace(stop=["x"]), GREEDY],
        )
    assert "has no tokenizer.json: give prompt_token_ids, not prompt" in (text.error or "")
    assert "not messages" in (chat.error or "")
    assert "needs a tokenizer" in (stop.error or "")
    assert len(tokens(ids)) == 12
    assert ids.outputs[0].text == ""


def test_samples_differ_and_seeds_repeat(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=4, max_tokens=12, seed=5, ignore_eos=True)
    first, second = llm.generate(["abc", "abc"], params)
    samples = [tuple(completion.token_ids) for completion in first.outputs]
    assert len(set(samples)) == 4
    assert [completion.index for completion in first.outputs] == [0, 1, 2, 3]
    assert [tuple(completion.token_ids) for completion in second.outputs] == samples
    (other,) = llm.generate("abc", params.replace(seed=6))
    assert tuple(other.outputs[0].token_ids) != samples[0]


def test_without_a_seed_requests_differ_and_engines_repeat(tiny_mixtral: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)

    def two(seed: int) -> list[list[int]]:
        with LLM(str(tiny_mixtral), memory="4GiB", seed=seed) as llm:
            return [tokens(output) for output in llm.generate(["abc", "abc"], params)]

    first, second = two(0)
    assert first != second
    assert two(0) == [first, second]
    assert two(1)[0] != first


def test_prompt_logprobs_of_several_samples(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=3, seed=1, max_tokens=8, ignore_eos=True)
    (plain,) = llm.generate("hello there", params)
    (scored,) = llm.generate("hello there", params.replace(prompt_logprobs=1))
    assert [o.token_ids for o in scored.outputs] == [o.token_ids for o in plain.outputs]
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == len(scored.prompt_token_ids)
    assert plain.prompt_logprobs is None


REFUSALS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "too little": ({"memory": "10MiB"}, DoesNotFitError, "smallest budget that works is"),
    "no memory": ({"memory": "lots"}, InvalidInputError, "lots"),
    "device": ({"device": "tpu"}, InvalidInputError, "device is 'tpu'"),
    "dtype": ({"dtype": "half"}, InvalidInputError, "dtype is 'half'"),
    "kv": ({"kv_dtype": "int4"}, InvalidInputError, "kv_dtype is 'int4'"),
    "mode": ({"expert_mode": "none"}, InvalidInputError, "expert_mode is 'none'"),
    "threads": ({"num_threads": 0}, InvalidInputError, "num_threads is 0"),
    "seed": ({"seed": -1}, InvalidInputError, "seed is -1"),
    "target": ({"cpu_target": "z80"}, InvalidInputError, "z80"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_options_are_refused_in_a_sentence(tiny_mixtral: Path, name: str) -> None:
    options, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message) as refusal:
        LLM(str(tiny_mixtral), **{"memory": "4GiB", **options})  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_a_draft_with_another_vocabulary(tiny_mixtral: Path, tmp_path: Path) -> None:
    draft = write_tiny(tmp_path / "draft", "llama", vocab_size=300)
    with pytest.raises(CheckpointError, match="the draft's vocab_size is 300, the target's is 261"):
        LLM(
            str(tiny_mixtral), memory="4GiB", speculative_config=SpeculativeConfig(model=str(draft))
        )


def test_eos_ends_an_output(llm: LLM, tiny_mixtral: Path, tmp_path: Path) -> None:
    (free,) = llm.generate("abc", GREEDY)
    ids = tokens(free)
    place = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    directory = tmp_path / "eos"
    shutil.copytree(tiny_mixtral, directory)
    config = directory / "config.json"
    text = config.read_text()
    eos = f'"eos_token_id": {EOS_TOKEN_ID}'
    assert eos in text
    config.write_text(text.replace(eos, f'"eos_token_id": {ids[place]}'))
    with LLM(str(directory), memory="4GiB") as other:
        (output,) = other.generate("abc", GREEDY.replace(ignore_eos=False))
    assert tokens(output) == ids[: place + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)


def test_progress_is_shown_on_standard_error(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    outputs = llm.generate(["a", "b"], GREEDY, progress=True)
    assert len(outputs) == 2
    assert capfd.readouterr().out == ""
