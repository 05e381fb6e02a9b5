"""An arena is resident exactly where it is held, huge pages or not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff.offload.arena import HUGE_PAGE_BYTES, PAGE_BYTES, Arena, round_up

ARENA_BYTES = 3 * HUGE_PAGE_BYTES + 5 * PAGE_BYTES


def resident_bytes(arena: Arena) -> int:
    """Return the resident bytes of the mappings that lie in the arena (Linux)."""
    begin = arena.bytes.ctypes.data
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and ":" not in words[0]:
            start, stop = (int(word, 16) for word in words[0].split("-"))
            inside = start < begin + arena.num_bytes and stop > begin
        elif inside and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, ARENA_BYTES), min_size=1, max_size=6))
def test_what_is_held_is_resident_and_nothing_else(sizes: list[int]) -> None:
    # A neighbour that the system might merge with the arena's mapping would be counted too.
    arena = Arena(ARENA_BYTES)
    others = resident_bytes(arena)
    kept = 0
    for size in sizes:
        arena.hold(size)
        held = round_up(size)
        kept = min(kept, held)
        assert (arena.bytes[:kept] == 7).all()
        assert not arena.bytes[kept:held].any()
        arena.bytes[:held] = 7
        kept = held
        assert resident_bytes(arena) - others == held


@pytest.mark.parametrize("first", [0, 1, PAGE_BYTES, HUGE_PAGE_BYTES, 2 * HUGE_PAGE_BYTES + 1])
def test_a_byte_at_the_end_of_what_is_held_costs_no_more_than_is_held(first: int) -> None:
    arena = Arena(ARENA_BYTES)
    others = resident_bytes(arena)
    arena.hold(first + 1)
    arena.bytes[first] = 1
    assert resident_bytes(arena) - others <= round_up(first + 1)
