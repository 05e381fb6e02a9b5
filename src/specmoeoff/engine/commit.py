"""What a step adds to its sequences: all of it or, where the step fails, nothing.

``Before`` is a sequence as it was when a step began. Restored, it is as if the step had not been:
the next one draws the same numbers, sees the same penalties and drafts from the same tokens. The
parts that a pass writes to are replaced rather than reset, so that an op that was told to stop and
still runs cannot reach what is restored.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from specmoeoff.offload.kv_cache import KvSequence
from specmoeoff.speculative.verify import truncate_at_stop

if TYPE_CHECKING:
    from collections.abc import Iterable

    from specmoeoff.engine.sequence import Sequence
    from specmoeoff.outputs import FinishReason
    from specmoeoff.speculative.verify import Verification
    from specmoeoff.text import Detokenizer


@dataclass(frozen=True)
class Update:
    """What a step added to one sequence."""

    sequence: Sequence
    token_ids: list[int]
    text: str
    ends_request: bool = False
    """Whether this was the last sample of its request to end."""


@dataclass(frozen=True)
class Before:
    """A sequence as it was when a step began."""

    sequence: Sequence
    num_tokens: int
    text: str
    num_logprobs: int
    detokenizer: Detokenizer | None
    kv_length: int
    rng_state: Any
    """Of the sampler's generator; None where nothing is ever drawn."""

    @classmethod
    def of(cls, sequence: Sequence) -> Before:
        """Note a sequence, at a cost that does not grow with it."""
        sampler = sequence.sampler
        return cls(
            sequence,
            len(sequence.token_ids),
            sequence.text,
            len(sequence.logprobs),
            sequence.detokenizer,
            sequence.kv.length,
            None if sampler.greedy else sampler.rng.bit_generator.state,
        )

    def restore(self) -> None:
        """Make the sequence what it was; it keeps the pages that it has."""
        sequence = self.sequence
        del sequence.token_ids[self.num_tokens :]
        del sequence.logprobs[self.num_logprobs :]
        sequence.text, sequence.detokenizer = self.text, self.detokenizer
        sequence.finish_reason = sequence.stop_reason = None
        sequence.kv = KvSequence(sequence.kv.pages, self.kv_length)
        output = sequence.output_token_ids
        sampler = sequence.sampler
        context = replace(
            sampler.context, output_counts=dict(Counter(output)), num_output_tokens=len(output)
        )
        sequence.sampler = replace(sampler, rng=self._generator(), context=context)

    def _generator(self) -> np.random.Generator:
        if self.rng_state is None:
            return self.sequence.sampler.rng
        generator = np.random.Generator(np.random.PCG64())
        generator.bit_generator.state = self.rng_state
        return generator


def extend(sequence: Sequence, verification: Verification, eos_token_ids: Iterable[int]) -> Update:
    """Add verified tokens to a sequence, up to where it stops, and note why it does.

    Its KV cache then counts all tokens but the last, which the next pass reads.
    """
    request = sequence.request
    stop_reason: int | str | None
    kept, finish_reason, stop_reason = truncate_at_stop(
        verification.token_ids,
        request.params,
        eos_token_ids,
        sequence.num_output_tokens,
        request.max_output_tokens,
    )
    text = ""
    if sequence.detokenizer is not None:
        sequence.detokenizer = sequence.detokenizer.fork()
        kept, text, stop_string = _decode(sequence.detokenizer, kept, finish_reason)
        if stop_string is not None:
            finish_reason, stop_reason = "stop", stop_string
    if verification.logprobs is not None:
        sequence.logprobs.extend(verification.logprobs[: len(kept)])
    sequence.token_ids.extend(kept)
    sequence.text += text
    sequence.finish_reason, sequence.stop_reason = finish_reason, stop_reason
    return Update(sequence, kept, text, request.is_finished)


def _decode(
    detokenizer: Detokenizer, kept: list[int], finish_reason: FinishReason | None
) -> tuple[list[int], str, str | None]:
    """Decode new tokens; a stop string ends the sequence at the token that completes it.

    Returns:
        The tokens that stay, their text, and the stop string that was found.
    """
    # The token that ends a sequence is returned, but it is no part of the text.
    shown = kept[:-1] if finish_reason == "stop" else kept
    text, consumed, stop_string = detokenizer.append(shown)
    if stop_string is not None:
        return kept[:consumed], text, stop_string
    if finish_reason is not None:
        text += detokenizer.flush()
    return kept, text, None
