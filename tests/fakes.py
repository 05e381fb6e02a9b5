"""FakeLLM: the contract of ``LLM`` without a model. It answers with the prompt turned around."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

from specmoeoff.config import Policy
from specmoeoff.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from specmoeoff.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

STATS: dict[str, Any] = {
    "prefill_tokens": 10,
    "decode_tokens": 20,
    "decode_s": 2.0,
    "decode_tokens_per_s": 10.0,
    "steps": 5,
    "drafted_tokens": 0,
    "accepted_tokens": 0,
    "mean_acceptance_length": 1.0,
    "streamed_bytes": 3_000_000_000,
    "streamed_s": 1.5,
    "link_bandwidth": 2e9,
    "link_utilisation": 0.9,
    "peak_memory_bytes": 2**30,
    "tiers": {"main": {"budget": 2**31, "planned": 2**31, "reserved": 2**31, "peak": 2**30}},
    "lane_busy_s": {"disk": 1.5},
}


@dataclass(frozen=True)
class FakeStats:
    """Figures that a test can recognise."""

    def as_dict(self) -> dict[str, Any]:
        return dict(STATS)


class FakeLLM:
    """Runs ``batch_size`` requests at once and finishes the youngest first, so order is mixed."""

    policy = Policy(memory=2**30)
    tokenizer = None

    def __init__(
        self, model: str = "fake", *, batch_size: int = 3, delay_s: float = 0.0, **options: Any
    ) -> None:
        self.model = model
        self.options = options
        self.batch_size = batch_size
        self.delay_s = delay_s
        self.taken = 0
        """Prompts drawn so far."""
        self.seen: list[tuple[dict[str, Any], SamplingParams]] = []

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        pass

    def stats(self) -> FakeStats:
        return FakeStats()

    def generate(
        self, prompts: Iterable[Any], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        outputs = self.iter_completed(prompts, sampling_params)
        return sorted(outputs, key=lambda output: int(output.request_id))

    def iter_completed(
        self,
        prompts: Iterable[Any],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        params = sampling_params or SamplingParams()
        each = repeat(params) if isinstance(params, SamplingParams) else params
        running: list[RequestOutput] = []
        for position, (prompt, own) in enumerate(zip(prompts, each, strict=False)):
            self.taken += 1
            self.seen.append((prompt, own))
            running.append(answer(position, prompt, own))
            if len(running) == self.batch_size:
                time.sleep(self.delay_s)
                yield running.pop()
        yield from reversed(running)

    def generate_stream(
        self, prompts: Iterable[Any], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yield the answer a character at a time."""
        for position, prompt in enumerate(prompts):
            whole = answer(position, prompt, sampling_params or SamplingParams())
            if whole.error is not None:
                yield whole
                continue
            text = whole.outputs[0].text
            for place, char in enumerate(text):
                time.sleep(self.delay_s)
                piece = CompletionOutput(index=0, text=char, token_ids=[ord(char)])
                last = place == len(text) - 1
                yield RequestOutput(str(position), None, [], [piece], last, whole.metrics)


def answer(position: int, prompt: str | Mapping[str, Any], params: SamplingParams) -> RequestOutput:
    """Return what FakeLLM says: the text backwards; "unrunnable" has an error of its own."""
    text = _text(prompt)
    metrics = RequestMetrics(arrival_time=0.0)
    prompt_ids = [ord(char) for char in text]
    if text == "unrunnable":
        error = "the prompt has 10 tokens, more than max_model_len 5"
        return RequestOutput(str(position), text, prompt_ids, [], True, metrics, error=error)
    said = text[::-1][: params.max_tokens]
    outputs = [
        CompletionOutput(
            index=index,
            text=said if index == 0 else f"{said}{index}",
            token_ids=[ord(char) for char in said],
            logprobs=_logprobs(said) if params.logprobs is not None else None,
            finish_reason="stop",
        )
        for index in range(params.n)
    ]
    return RequestOutput(str(position), text, prompt_ids, outputs, True, metrics)


def _logprobs(said: str) -> list[dict[int, Logprob]]:
    return [{ord(char): Logprob(float("-inf"), 1, char)} for char in said]


def _text(prompt: str | Mapping[str, Any]) -> str:
    if isinstance(prompt, str):
        return prompt
    if "prompt" in prompt:
        return str(prompt["prompt"])
    if "messages" in prompt:
        return str(prompt["messages"][-1]["content"])
    return "".join(map(chr, prompt["prompt_token_ids"]))
