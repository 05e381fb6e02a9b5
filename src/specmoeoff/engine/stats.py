"""What the engine counted since its start, and the rates that follow from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


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
    """Bytes read from disk for experts."""
    streamed_s: float = 0.0
    """Seconds with at least one read in flight."""
    step_s: float = 0.0
    stalled_s: float = 0.0
    """Seconds the compute waited for bytes."""
    wanted_experts: int = 0
    fetched_experts: int = 0
    peak_memory_bytes: int = 0
    shared_bytes: int = 0
    """Bytes saved because draft and target hold equal tensors."""
    expert_slots: int = 0
    num_threads: int = 0
    cpu_target: str = ""
    lane_busy_s: dict[str, float] = field(default_factory=dict)

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
