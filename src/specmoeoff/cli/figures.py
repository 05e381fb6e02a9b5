"""``LLM.stats()`` in words: the same figures in the progress, the summary and the demo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specmoeoff.memory_size import format_memory_size

if TYPE_CHECKING:
    from collections.abc import Mapping


def rates(stats: Mapping[str, Any]) -> str:
    """Return how fast it goes: tokens, acceptance if there are drafts, the link."""
    parts = [f"{stats['decode_tokens_per_s']:.1f} tok/s"]
    if stats["drafted_tokens"]:
        parts.append(f"acceptance {stats['mean_acceptance_length']:.2f}")
    parts.append(f"link {stats['link_bandwidth'] / 1e9:.2f} GB/s")
    return " · ".join(parts)


def totals(stats: Mapping[str, Any]) -> str:
    """Return what it took: tokens, bytes streamed, peak memory."""
    return (
        f"{stats['prefill_tokens']} prompt and {stats['decode_tokens']} output tokens · "
        f"{stats['streamed_bytes'] / 1e9:.2f} GB streamed · "
        f"peak memory {format_memory_size(stats['peak_memory_bytes'])}{_by_tier(stats['tiers'])}"
    )


def held(use: Mapping[str, int]) -> str:
    """Return what a tier of memory held at its peak, and what it was given."""
    peak, planned, budget = (
        format_memory_size(use[name]) for name in ("peak", "planned", "budget")
    )
    return f"{peak} at most, {planned} planned of {budget}"


def _by_tier(tiers: Mapping[str, Mapping[str, int]]) -> str:
    """Return each tier's peak, where there are several."""
    if len(tiers) < 2:
        return ""
    parts = (f"{name} {format_memory_size(use['peak'])}" for name, use in tiers.items())
    return f" ({', '.join(parts)})"


def duration(seconds: float) -> str:
    """Return "42 s", "3 min 05 s" or "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
