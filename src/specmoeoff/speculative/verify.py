"""Verifies a chain of draft tokens against the target's logits, without changing what is sampled.

Greedy: a draft is accepted if the target would have chosen it. Sampling: draft x, drawn from q, is
accepted with probability min(1, p(x) / q(x)); after a rejection the recovered token is drawn from
max(p - q, 0), after none the bonus token from p. Then every token is distributed exactly as p:

    q(x) min(1, p(x) / q(x)) + P(reject) max(p(x) - q(x), 0) / P(reject) = p(x)

where P(reject) = 1 - sum min(p, q) = sum max(p - q, 0). A drafter that proposes with certainty
(n-gram) is q(x) = 1: accept with p(x), recover from p without x.

Pure functions on one sequence. Rows are taken left to right, because penalties and the minimum
length depend on the tokens before. Knows nothing of KV caches or batches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.errors import InvalidInputError
from specmoeoff.sampling import (
    F32,
    F64,
    I32,
    Distribution,
    SequenceSampler,
    draw_index,
    logprobs,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from specmoeoff.outputs import FinishReason, Logprob
    from specmoeoff.sampling_params import SamplingParams


FEW_ROWS = 16
"""So many rows of a product cost little more than one: the weights have to be read anyway."""


@dataclass(frozen=True)
class Verification:
    """What one verification adds to a sequence."""

    token_ids: list[int]
    """The accepted drafts and one more: the recovered token, or the bonus token if all were."""
    num_accepted: int
    """Accepted drafts; always ``len(token_ids) - 1``."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Per token of ``token_ids``, if the request wants them."""


def verify_sequence(
    logits: F32,
    draft_ids: Sequence[int],
    draft_distributions: Sequence[Distribution | None] | None,
    sampler: SequenceSampler,
    decode: Callable[[int], str] | None = None,
) -> Verification:
    """Accept drafts from the left and add one token of the target's own.

    Args:
        logits: The target's logits after the last token and after each draft, [K + 1, V].
        draft_ids: Proposed tokens, [K]; K = 0 is plain decoding.
        draft_distributions: What each draft was drawn from, [K]. None, as a whole or for one
            draft, means that it was proposed with certainty. Not looked at when greedy.
        sampler: The sequence's sampler; it has observed the returned tokens afterwards.
        decode: Gives the text of tokens in the log-probabilities.

    Raises:
        InvalidInputError: A draft token is outside the vocabulary, or impossible under the
            distribution it is said to come from, or the numbers of rows do not match.
        CheckpointError: The logits are NaN or infinite.
    """
    distributions = draft_distributions or [None] * len(draft_ids)
    _check_drafts(logits, draft_ids, distributions)
    wanted = sampler.params.logprobs
    token_ids: list[int] = []
    records: list[dict[int, Logprob]] = []
    num_accepted = 0
    for position, row in enumerate(logits):
        is_bonus = position == len(draft_ids)
        if is_bonus:
            token_id, accepted = sampler.choose(row), False
        else:
            token_id, accepted = judge(row, draft_ids[position], distributions[position], sampler)
        token_ids.append(token_id)
        sampler.observe(token_id)
        if wanted is not None:
            records.append(logprobs(row, token_id, wanted, decode))
        if not accepted:
            break
        num_accepted += 1
    return Verification(token_ids, num_accepted, None if wanted is None else records)


def verify_best(
    hidden: Sequence[F32],
    draft_ids: Sequence[Sequence[int]],
    samplers: Sequence[SequenceSampler],
    best: Callable[[F32], tuple[F32, I32]],
) -> list[Verification]:
    """Do what verify_sequence does, for sequences that take the best token, without all logits.

    Goes from left to right through all sequences at once. What lies behind a rejection is never
    asked for, unless there are so few rows that asking later would cost more.

    Args:
        hidden: Per sequence the hidden states after the last token and each draft, [K + 1, hidden].
        draft_ids: Per sequence the proposed tokens, [K].
        samplers: The sequences' samplers, for which ``takes_best`` holds; they have observed the
            returned tokens afterwards.
        best: Gives the largest logit and its token of each of several hidden states.

    Raises:
        CheckpointError: The logits are NaN or infinite.
    """
    chosen: list[list[int]] = [[] for _ in hidden]
    live = list(range(len(hidden)))
    while live:
        depth = -(-FEW_ROWS // len(live))
        asked = [hidden[i][len(chosen[i]) : len(chosen[i]) + depth] for i in live]
        logits, token_ids = best(np.concatenate(asked))
        answers = iter(zip(logits.tolist(), token_ids.tolist(), strict=True))
        going = []
        for i, rows in zip(live, asked, strict=True):
            accepted = True
            for logit, token_id in itertools.islice(answers, len(rows)):
                if not accepted:
                    continue
                position = len(chosen[i])
                chosen[i].append(samplers[i].take_best(logit, token_id))
                samplers[i].observe(token_id)
                accepted = list(draft_ids[i][position : position + 1]) == [token_id]
            if accepted:
                going.append(i)
        live = going
    return [Verification(token_ids, len(token_ids) - 1) for token_ids in chosen]


def judge(
    logits: F32, draft_id: int, drafted_from: Distribution | None, sampler: SequenceSampler
) -> tuple[int, bool]:
    """Accept one draft token or recover another in its place.

    Args:
        logits: The target's row, [V].
        draft_id: The proposed token.
        drafted_from: The distribution it was drawn from; None if proposed with certainty.
        sampler: Gives the target's choice or distribution, and the random numbers.

    Returns:
        The token for this position, and whether it is the accepted draft.
    """
    if sampler.greedy:
        token_id = sampler.choose(logits)
        return token_id, token_id == draft_id
    target = sampler.distribution(logits)
    draft_probability = 1.0 if drafted_from is None else drafted_from.probability(draft_id)
    # u < p / q without dividing; certain acceptance needs no special case because u < 1.
    if sampler.rng.random() * draft_probability < target.probability(draft_id):
        return draft_id, True
    index = draw_index(_residual(target, draft_id, drafted_from, len(logits)), sampler.rng)
    return (index if target.token_ids is None else int(target.token_ids[index])), False


def _residual(
    target: Distribution, draft_id: int, drafted_from: Distribution | None, vocab_size: int
) -> F64:
    """Return max(p - q, 0) over the tokens of the target's distribution, [M], not normalised."""
    residual = target.probabilities()
    if drafted_from is None:
        where = draft_id
        if target.token_ids is not None:
            where = int(np.searchsorted(target.token_ids, draft_id))
        if target.probability(draft_id) > 0.0:
            residual[where] = 0.0
    else:
        proposed = drafted_from.dense(vocab_size)
        residual -= proposed if target.token_ids is None else proposed[target.token_ids]
        np.maximum(residual, 0.0, out=residual)
    # p == q up to rounding rejects with probability zero up to rounding; p is then as good.
    return residual if residual.any() else target.probabilities()


def _check_drafts(
    logits: F32, draft_ids: Sequence[int], distributions: Sequence[Distribution | None]
) -> None:
    num_drafts, vocab_size = len(draft_ids), logits.shape[-1]
    if logits.ndim != 2 or len(logits) != num_drafts + 1 or len(distributions) != num_drafts:
        raise InvalidInputError(
            f"{num_drafts} draft tokens need {num_drafts + 1} rows of logits and {num_drafts} "
            f"distributions; got logits of shape {logits.shape} and {len(distributions)}"
        )
    for position, (draft_id, distribution) in enumerate(zip(draft_ids, distributions, strict=True)):
        if not 0 <= draft_id < vocab_size:
            raise InvalidInputError(
                f"draft token {position} is {draft_id}; the vocabulary has 0 to {vocab_size - 1}"
            )
        if distribution is not None and distribution.probability(draft_id) <= 0.0:
            raise InvalidInputError(
                f"draft token {position} is {draft_id}, which is impossible under the "
                f"distribution it is said to be drawn from"
            )


def truncate_at_stop(
    token_ids: Sequence[int],
    params: SamplingParams,
    eos_token_ids: Iterable[int],
    num_output_tokens: int,
    max_output_tokens: int | None = None,
) -> tuple[list[int], FinishReason | None, int | None]:
    """Keep the tokens up to the one that ends the output, it included.

    Only tokens that are kept count toward ``max_tokens``, so speculation never changes where an
    output ends. eos and stop tokens count as such once ``min_tokens`` came before them.

    Args:
        token_ids: Tokens that one verification adds.
        params: When the request ends.
        eos_token_ids: The model's end-of-sequence tokens.
        num_output_tokens: Tokens of output before these.
        max_output_tokens: What the model's limit leaves for the whole output.

    Returns:
        The tokens kept, why the output ends (None: it goes on), and the stop token that ended it
        (None for eos).
    """
    eos_ids = set() if params.ignore_eos else set(eos_token_ids)
    stop_ids = set(params.stop_token_ids or ())
    limits = [limit for limit in (params.max_tokens, max_output_tokens) if limit is not None]
    for index, token_id in enumerate(token_ids):
        kept = list(token_ids[: index + 1])
        if num_output_tokens + index >= params.min_tokens:
            if token_id in eos_ids:
                return kept, "stop", None
            if token_id in stop_ids:
                return kept, "stop", token_id
        if any(num_output_tokens + len(kept) >= limit for limit in limits):
            return kept, "length", None
    return list(token_ids), None, None
