"""What a drafter is: something that proposes likely next tokens for many sequences at once.

Whatever it proposes, verification keeps the output what the target alone would have produced; a
drafter decides speed only. It may propose fewer tokens than asked for, or none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from specmoeoff.offload.kv_cache import KvSequence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.sampling import Distribution, SequenceSampler


@dataclass(frozen=True)
class DraftRequest:
    """One sequence that may be drafted for."""

    key: int
    """Identifies the sequence for as long as it lives."""
    token_ids: Sequence[int]
    """Prompt and output so far."""
    num_tokens: int
    """Most tokens to propose, 0 or more."""
    sampler: SequenceSampler
    """The sequence's filters; the draft's distribution goes through the same ones."""
    kv: KvSequence = field(default_factory=KvSequence)
    """Where the target keeps what it has read of the sequence, with room for the drafts."""


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens of one sequence, a chain."""

    token_ids: list[int] = field(default_factory=list)
    distributions: list[Distribution | None] = field(default_factory=list)
    """What each token was drawn from; None says that it was proposed with certainty."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the distributions take until they are verified."""
        return sum(d.nbytes for d in self.distributions if d is not None)


class Drafter(Protocol):
    """Proposes chains of tokens and keeps whatever state that takes."""

    def prefill(self, requests: Sequence[DraftRequest], num_tokens: Sequence[int]) -> None:
        """Read the first ``num_tokens[i]`` tokens of each prompt (the target is doing the same)."""

    def propose(self, requests: Sequence[DraftRequest], held_bytes: int = 0) -> list[Proposal]:
        """Return a proposal per request, where earlier ones of the step hold so many bytes."""

    def release(self, key: int) -> None:
        """Forget a sequence that ended or lost its memory."""
