"""One row of the comparison: an engine at a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.measured_process import Finished


@dataclass(frozen=True)
class PeerResult:
    """What one engine did at one batch; without figures, ``note`` says why."""

    engine: str
    batch: int
    process: Finished
    decode_tok_s: float | None = None
    """Tokens per second over all sequences, from all prompts read to the last token."""
    prefill_tok_s: float | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    """What only this engine tells, for the record."""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {
            "engine": self.engine,
            "batch": self.batch,
            "decode_tok_s": self.decode_tok_s,
            "prefill_tok_s": self.prefill_tok_s,
            "read_bytes": self.process.read_bytes,
            "peak_rss_bytes": self.process.peak_rss_bytes,
            "cgroup_peak_bytes": self.process.cgroup_peak_bytes,
            "wall_s": self.process.wall_s,
            "other_cores": self.process.other_cores,
            "note": self.note,
            "details": self.details,
        }
