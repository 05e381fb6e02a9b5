"""Decides before anything is loaded whether a draft model could pay for the memory it takes.

Only asked when the draft length is free to be zero (``adaptive``). A draft's weights are that many
expert slots less, in every step, whether tokens are drafted or not; so where no draft length can
gain, the draft is best left on disk.

The estimate is of the link alone, which is what bounds a model that does not fit. A step over t
tokens wants 1 - (1 - p)^t of the experts, p = experts per token / experts, and finds a share of
them in memory. Drafting k tokens for each of b sequences makes t = b (k + 1) of b, and yields
1 + a + ... + a^k tokens instead of one (Leviathan et al. 2023, arXiv 2211.17192, equation 1).
"""

from __future__ import annotations

from dataclasses import dataclass

USUAL_ACCEPTANCE = 0.8
"""What a good draft reaches; before anything was measured nothing better is known."""


@dataclass(frozen=True)
class Streaming:
    """What decides how many experts a step must stream."""

    num_experts: int
    """Experts of a layer."""
    experts_per_token: int
    total: int
    """Experts of all layers."""
    slots_without: int
    """Experts that memory holds without the draft."""
    slots_with: int
    """And with it."""


def can_pay(streaming: Streaming, num_seqs: int, most_drafts: int) -> bool:
    """Whether some draft length of 1 to ``most_drafts`` streams fewer bytes per token than none.

    True as well where everything fits without the draft: then it costs no stream that is needed.
    """
    if streaming.slots_without >= streaming.total:
        return True
    plain = _wanted(streaming, num_seqs) * _missing(streaming, streaming.slots_without)
    missing = _missing(streaming, streaming.slots_with)
    for k in range(1, most_drafts + 1):
        tokens = sum(USUAL_ACCEPTANCE**i for i in range(k + 1))
        if _wanted(streaming, num_seqs * (k + 1)) * missing / tokens < plain:
            return True
    return False


def _wanted(streaming: Streaming, num_tokens: int) -> float:
    """Return the share of the experts that a step over so many tokens wants."""
    return 1.0 - (1.0 - streaming.experts_per_token / streaming.num_experts) ** num_tokens


def _missing(streaming: Streaming, slots: int) -> float:
    """Return the share of wanted experts that is not in memory."""
    return max(0.0, 1.0 - slots / streaming.total)
