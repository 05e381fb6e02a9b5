"""Turns one pass's hidden states into verdicts: the LM head, then each sequence's verification.

Logits of a large vocabulary are the biggest activation there is, so they exist for a bounded number
of rows at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.engine.memory_plan import LOGIT_ROWS
from specmoeoff.sampling import logprobs
from specmoeoff.speculative.verify import Verification, verify_best, verify_sequence

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from specmoeoff.engine.scheduler import Scheduled
    from specmoeoff.engine.target import Target
    from specmoeoff.speculative.drafter import Proposal

    Hidden = NDArray[np.float32]


def num_outputs(work: Scheduled, proposal: Proposal) -> int:
    """Return of how many of its last tokens a pass must give hidden states."""
    if _wants_prompt_logprobs(work):
        return work.num_tokens
    return _num_verified(work, proposal)


def verify_batch(
    target: Target, batch: Sequence[Scheduled], proposals: Sequence[Proposal], hidden: Hidden
) -> list[Verification | None]:
    """Judge each sequence's drafts and choose its next token.

    Args:
        target: Gives the logits.
        batch: The step's work.
        proposals: The drafts that went through the pass after each sequence's own tokens.
        hidden: Hidden states of the last ``num_outputs`` tokens of each sequence, [R, hidden].

    Returns:
        A verification per sequence; None where the prompt is not read to its end.
    """
    parts = []
    # Counted first: noting one sample's prompt changes what the request's other samples want.
    sizes = [num_outputs(work, p) for work, p in zip(batch, proposals, strict=True)]
    at = 0
    for work, proposal, size in zip(batch, proposals, sizes, strict=True):
        rows = hidden[at : at + size]
        at += size
        if _wants_prompt_logprobs(work):
            _note_prompt_logprobs(target, work, rows)
        parts.append(rows[len(rows) - _num_verified(work, proposal) :])
    results: list[Verification | None] = [None] * len(batch)
    judged = [i for i, rows in enumerate(parts) if len(rows)]
    best = [i for i in judged if takes_best(batch[i])]
    verified = verify_best(
        [parts[i] for i in best],
        [proposals[i].token_ids for i in best],
        [batch[i].sequence.sampler for i in best],
        target.best,
    )
    for i, verification in zip(best, verified, strict=True):
        results[i] = verification
    others = [i for i in judged if i not in best]
    for start, stop in _groups([len(parts[i]) for i in others]):
        logits = target.logits(np.concatenate([parts[i] for i in others[start:stop]]))
        for i in others[start:stop]:
            results[i] = _verify(batch[i], proposals[i], logits[: len(parts[i])])
            logits = logits[len(parts[i]) :]
    return results


def needs_logits(batch: Sequence[Scheduled]) -> bool:
    """Whether a step looks at more than the best token anywhere."""
    return any(_wants_prompt_logprobs(work) or not takes_best(work) for work in batch)


def takes_best(work: Scheduled) -> bool:
    """Whether the best token of each row is all that a sequence needs."""
    return work.sequence.sampler.takes_best


def _verify(work: Scheduled, proposal: Proposal, logits: Hidden) -> Verification:
    sequence = work.sequence
    return verify_sequence(
        logits,
        proposal.token_ids,
        proposal.distributions,
        sequence.sampler,
        sequence.request.token_text,
    )


def _num_verified(work: Scheduled, proposal: Proposal) -> int:
    return 1 + len(proposal.token_ids) if work.completes else 0


def _wants_prompt_logprobs(work: Scheduled) -> bool:
    request = work.sequence.request
    known = request.prompt_logprobs
    return known is not None and len(known) < len(request.prompt_token_ids)


def _note_prompt_logprobs(target: Target, work: Scheduled, rows: Hidden) -> None:
    """Append the log-probabilities of the prompt tokens that follow the rows' positions."""
    request = work.sequence.request
    assert request.prompt_logprobs is not None
    assert request.params.prompt_logprobs is not None
    first = work.sequence.kv.length - work.num_tokens
    for at in range(0, len(rows), LOGIT_ROWS):
        for offset, logits in enumerate(target.logits(rows[at : at + LOGIT_ROWS])):
            position = first + at + offset + 1
            # Another sample of the request, or an earlier reading, may have been here before.
            if position == len(request.prompt_logprobs) < len(request.prompt_token_ids):
                token_id = request.prompt_token_ids[position]
                request.prompt_logprobs.append(
                    logprobs(logits, token_id, request.params.prompt_logprobs, request.token_text)
                )


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield runs of neighbours with at most LOGIT_ROWS rows (or a single one with more)."""
    start, rows = 0, 0
    for i, size in enumerate(sizes):
        if rows and rows + size > LOGIT_ROWS:
            yield start, i
            start, rows = i, 0
        rows += size
    if sizes:
        yield start, len(sizes)
