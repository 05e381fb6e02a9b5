"""What the tokens before a position do to its logits: penalties and the minimum length.

vLLM's rules: repetition looks at prompt and output, presence and frequency at the output alone.
Knows one sequence and one row of logits at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from specmoeoff.sampling_params import SamplingParams

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass
class TokenContext:
    """What penalties and the minimum length need of the tokens before a position."""

    prompt_ids: I32
    """Distinct tokens of the prompt."""
    end_ids: I32
    """Tokens that must not come before ``min_tokens`` of output: eos and the stop tokens."""
    output_counts: dict[int, int] = field(default_factory=dict)
    """How often each token is in the output."""
    num_output_tokens: int = 0

    def observe(self, token_id: int) -> None:
        """Append one token to the output."""
        self.output_counts[token_id] = self.output_counts.get(token_id, 0) + 1
        self.num_output_tokens += 1


def adjust(logits: F32, params: SamplingParams, context: TokenContext) -> F32:
    """Apply minimum length and penalties to a row of logits, [V].

    Returns the row itself when there is nothing to apply, a changed copy otherwise.
    """
    too_short = context.num_output_tokens < params.min_tokens
    if not too_short and not params.has_penalties:
        return logits
    row = logits.astype(np.float32)
    if too_short:
        row[context.end_ids[context.end_ids < len(row)]] = -np.inf
    if params.has_penalties:
        _penalise(row, params, context)
    return row


def _penalise(row: F32, params: SamplingParams, context: TokenContext) -> None:
    output_ids = np.fromiter(context.output_counts, np.int64, len(context.output_counts))
    if params.repetition_penalty != 1.0:
        penalty = np.float32(params.repetition_penalty)
        # A token in both lists is computed twice from the same old value, so changed once.
        seen = np.concatenate([context.prompt_ids.astype(np.int64), output_ids])
        values = row[seen]
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
    if params.frequency_penalty or params.presence_penalty:
        counts = np.fromiter(context.output_counts.values(), np.float32, len(output_ids))
        row[output_ids] -= np.float32(params.frequency_penalty) * counts
        row[output_ids] -= np.float32(params.presence_penalty)
