"""Whether a draft could pay for its memory is decided by what it makes the target stream."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoeoff.engine.draft_worth import Streaming, can_pay

DEMO = Streaming(8, 2, 240, 163, 146)
"""The demo model in 1 GiB."""
WIDE = Streaming(64, 2, 1920, 740, 722)
"""The same with 64 experts, in 4 GiB."""


@pytest.mark.parametrize(
    ("streaming", "num_seqs", "pays"),
    [
        (DEMO, 1, False),
        (DEMO, 16, True),
        (WIDE, 1, False),
        (WIDE, 16, True),
        (WIDE, 64, True),
        # Every token wants every expert: more of them are free.
        (Streaming(1, 1, 32, 16, 15), 1, True),
        # The draft would take nearly all there is.
        (Streaming(8, 2, 240, 200, 10), 16, False),
        # Nothing is streamed without the draft, so there is nothing to lose by the estimate.
        (Streaming(8, 2, 240, 240, 200), 1, True),
    ],
)
def test_by_hand(streaming: Streaming, num_seqs: int, pays: bool) -> None:
    assert can_pay(streaming, num_seqs, 4) is pays


@given(
    st.integers(1, 64),
    st.integers(1, 8),
    st.integers(0, 100),
    st.integers(0, 100),
    st.integers(1, 64),
    st.integers(1, 8),
)
def test_a_lighter_draft_and_a_longer_chain_never_pay_less(
    num_experts: int, top_k: int, without: int, taken: int, num_seqs: int, k: int
) -> None:
    total = 3 * num_experts
    slots = min(without, total)
    heavy = Streaming(num_experts, min(top_k, num_experts), total, slots, max(0, slots - taken))
    if can_pay(heavy, num_seqs, k):
        assert can_pay(replace(heavy, slots_with=min(slots, heavy.slots_with + 1)), num_seqs, k)
        assert can_pay(heavy, num_seqs, k + 1)
