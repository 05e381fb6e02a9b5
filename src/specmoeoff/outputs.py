"""What a request gives back: its tokens, its text and how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability at one position."""

    logprob: float
    """Natural logarithm of the probability under the model's raw distribution."""
    rank: int
    """1 for the likeliest token."""
    decoded_token: str | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """Where a request's time went; times are seconds of ``time.monotonic``."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True)
class CompletionOutput:
    """One sample of a request."""

    index: int
    """Which of the request's ``n`` samples this is."""
    text: str
    """Decoded text; empty without a tokenizer. Cut before a stop string."""
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    """Per token: the chosen token and the ``logprobs`` likeliest ones."""
    finish_reason: FinishReason | None = None
    """``stop`` (eos, stop token or stop string), ``length``, ``abort``, or None while running."""
    stop_reason: int | str | None = None
    """The stop token id or string that ended it; None for eos."""


@dataclass(frozen=True)
class RequestOutput:
    """A request's samples: complete from ``generate``, increments from ``generate_stream``."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token; the first is None because nothing precedes it."""
    error: str | None = field(default=None)
    """Why the request could not be run; ``outputs`` is empty then."""
