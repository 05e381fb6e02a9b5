"""Which ids a job has used so far, in about 12 bytes each: jobs may have millions of lines.

Holds 64-bit hashes, not the ids. Two of a million different ids share one with a probability of
3e-8, and then the later line is refused although it need not be.
"""

from __future__ import annotations

from array import array

_EMPTY = 0


class SeenIds:
    """A set of strings that only grows: open addressing over one flat array."""

    def __init__(self) -> None:
        self._slots = array("q", [_EMPTY]) * 1024
        self._count = 0

    def add(self, text: str) -> bool:
        """Remember ``text``; return whether it was new."""
        key = hash(text) or 1
        slot = _find(self._slots, key)
        if self._slots[slot] == key:
            return False
        self._slots[slot] = key
        self._count += 1
        if self._count * 4 > len(self._slots) * 3:
            self._grow()
        return True

    def _grow(self) -> None:
        slots = array("q", [_EMPTY]) * (2 * len(self._slots))
        for key in self._slots:
            if key != _EMPTY:
                slots[_find(slots, key)] = key
        self._slots = slots


def _find(slots: array[int], key: int) -> int:
    """Return the slot that holds ``key``, or the empty one where it belongs."""
    mask = len(slots) - 1
    slot = key & mask
    while slots[slot] not in (_EMPTY, key):
        slot = (slot + 1) & mask
    return slot
