"""Page-aligned memory that is reserved at once and paid for when touched.

An arena's address range never moves, so views into it stay valid. Its owner holds the first so many
bytes; what lies above is given back to the system and costs nothing. That is how the KV cache and
the expert slots trade memory.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 << 20
# Python names it from 3.13 on; Linux has the same value on x86-64 and aarch64.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def round_up(num_bytes: int, multiple: int = PAGE_BYTES) -> int:
    """Return ``num_bytes`` rounded up to a multiple."""
    return -(-num_bytes // multiple) * multiple


class Arena:
    """``num_bytes`` of zeroed, page-aligned memory, of which the first are held: none at first."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = round_up(max(num_bytes, 1))
        self._map = mmap.mmap(
            -1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        )
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        """The whole range, uint8 [num_bytes]; only what is held may be written."""
        self._held = 0
        self._allow_huge(0, self.num_bytes, False)

    def hold(self, num_bytes: int) -> None:
        """Hold the first ``num_bytes`` in whole pages; what lies above is given back, and is zero.

        With huge pages, direct reads from disk cost the processor a fraction (it pins each page and
        describes it to the device), but the first byte touched makes a whole one resident. So they
        are allowed only where all of one is held.
        """
        held = min(round_up(num_bytes), self.num_bytes)
        old, new = (size // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES for size in (self._held, held))
        if new > old:
            self._allow_huge(old, new, True)
        elif new < old:
            self._allow_huge(new, old, False)
        if held < self._held:
            self._map.madvise(mmap.MADV_DONTNEED, held, self._held - held)
        self._held = held

    def _allow_huge(self, start: int, stop: int, allowed: bool) -> None:
        advice = mmap.MADV_HUGEPAGE if allowed else mmap.MADV_NOHUGEPAGE
        # A kernel built without huge pages refuses the advice, and needs none.
        with contextlib.suppress(OSError):
            self._map.madvise(advice, start, stop - start)
