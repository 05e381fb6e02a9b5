"""What the engine counted since its start, and the rates that follow from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.engine.scheduler import Scheduled
    from specmoeoff.offload.tiers import TierUse
    from specmoeoff.speculative.drafter import Proposal
    from specmoeoff.speculative.verify import Verification


@dataclass(frozen=True)
class StepFigures:
    """What one step did."""

    step_s: float
    prompt_rows: int
    """Tokens of prompts that went through the pass."""
    decode_rows: int
    """Last tokens and draft tokens that went through the pass."""
    verified: int
    """Sequences with at least one draft token."""
    drafted: int
    judged: int
    """Draft tokens that were accepted, and the first rejected one of each sequence."""
    accepted: int

    @classmethod
    def of(
        cls,
        batch: Sequence[Scheduled],
        proposals: Sequence[Proposal],
        verifications: Sequence[Verification | None],
        step_s: float,
    ) -> StepFigures:
        """Count a step's work, its drafts and their verdicts."""
        drafts = [len(proposal.token_ids) for proposal in proposals]
        verdicts = [
            (length, verification.num_accepted)
            for length, verification in zip(drafts, verifications, strict=True)
            if verification is not None and length
        ]
        return cls(
            step_s=step_s,
            prompt_rows=sum(work.num_tokens for work in batch if not work.decodes),
            decode_rows=sum(
                work.num_tokens + length
                for work, length in zip(batch, drafts, strict=True)
                if work.decodes
            ),
            verified=len(verdicts),
            drafted=sum(length for length, _ in verdicts),
            judged=sum(min(length, accepted + 1) for length, accepted in verdicts),
            accepted=sum(accepted for _, accepted in verdicts),
        )


@dataclass
class EngineStats:
    """Counters and seconds since the start; bytes, seconds and bytes/s throughout."""

    prefill_tokens: int = 0
    """Prompt tokens read by the target."""
    decode_tokens: int = 0
    """Tokens returned by steps past the prompt; a prompt's own first token is not among them."""
    generated_tokens: int = 0
    """All tokens returned to requests."""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    """Seconds of steps, shared between prefill and decode by the rows each had in a step."""
    steps: int = 0
    verified_sequences: int = 0
    """Verifications of at least one draft token, counted per sequence."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    draft_s: float = 0.0
    preemptions: int = 0
    streamed_bytes: int = 0
    """Bytes of experts brought to where they are used: from disk, or by a plan to a device."""
    streamed_s: float = 0.0
    """Seconds in which at least one was on its way."""
    step_s: float = 0.0
    stalled_s: float = 0.0
    """Seconds the compute waited for bytes; in a plan, for any other lane."""
    wanted_experts: int = 0
    fetched_experts: int = 0
    peak_memory_bytes: int = 0
    """Most that the process held."""
    tiers: dict[str, TierUse] = field(default_factory=dict)
    """By tier of memory: ``main``, or ``host`` and ``device``."""
    shared_bytes: int = 0
    """Bytes saved because draft and target hold equal tensors."""
    expert_slots: int = 0
    kv_pages: int = 0
    """Pages of the target's KV cache that sequences hold now."""
    num_threads: int = 0
    cpu_target: str = ""
    lane_busy_s: dict[str, float] = field(default_factory=dict)
    """By lane; ``draft`` is time that one of the others spent on drafts."""

    @property
    def decode_tokens_per_s(self) -> float:
        """Returned tokens per second of decoding."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second of prefill."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Accepted drafts per verified sequence and step, plus one; 1 without speculation."""
        if not self.verified_sequences:
            return 1.0
        return 1.0 + self.accepted_tokens / self.verified_sequences

    @property
    def link_bandwidth(self) -> float:
        """Bytes per second while at least one read was in flight."""
        return self.streamed_bytes / self.streamed_s if self.streamed_s else 0.0

    @property
    def link_utilisation(self) -> float:
        """Share of the steps' time in which the link was busy."""
        return min(1.0, self.streamed_s / self.step_s) if self.step_s else 0.0

    def add(self, step: StepFigures) -> None:
        """Count one step."""
        share = step.prompt_rows / max(step.prompt_rows + step.decode_rows, 1)
        self.steps += 1
        self.step_s += step.step_s
        self.prefill_s += share * step.step_s
        self.decode_s += (1 - share) * step.step_s
        self.prefill_tokens += step.prompt_rows
        self.verified_sequences += step.verified
        self.drafted_tokens += step.drafted
        self.accepted_tokens += step.accepted

    def as_dict(self) -> dict[str, Any]:
        """Return counters and rates as plain data."""
        rates = (
            "decode_tokens_per_s",
            "prefill_tokens_per_s",
            "mean_acceptance_length",
            "link_bandwidth",
            "link_utilisation",
        )
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in rates}
