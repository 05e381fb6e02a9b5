"""A request, and the sequences that answer it: one per sample."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from specmoeoff.offload.kv_cache import KvSequence

if TYPE_CHECKING:
    from collections.abc import Callable

    from specmoeoff.outputs import FinishReason, Logprob
    from specmoeoff.sampling import SequenceSampler
    from specmoeoff.sampling_params import SamplingParams
    from specmoeoff.text import Detokenizer

_keys = itertools.count()


@dataclass(eq=False)
class Sequence:
    """One sample of a request: its tokens, its place in the KV cache, and why it ended."""

    request: Request
    index: int
    sampler: SequenceSampler
    detokenizer: Detokenizer | None
    token_ids: list[int]
    """Prompt and output."""
    key: int = field(default_factory=lambda: next(_keys))
    kv: KvSequence = field(default_factory=KvSequence)
    text: str = ""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[len(self.request.prompt_token_ids) :]

    @property
    def num_unread(self) -> int:
        """Tokens that the target has not read yet: 1 while decoding, more in prefill."""
        return len(self.token_ids) - self.kv.length

    @property
    def is_decoding(self) -> bool:
        """Whether a step can draft for it: its prompt is read and one token waits."""
        return self.num_unread == 1 and self.num_output_tokens > 0

    @property
    def room(self) -> int:
        """Tokens it may still produce."""
        return self.request.max_output_tokens - self.num_output_tokens


@dataclass(eq=False)
class Request:
    """What was asked, and the sequences working on it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_output_tokens: int
    """``max_tokens``, or less where the model's length limit comes first."""
    token_text: Callable[[int], str] | None = None
    """Gives the text of a token in log-probabilities, where there is a tokenizer."""
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sequence.finish_reason for sequence in self.sequences)
