"""Page-aligned memory that is reserved at once and paid for when touched.

An arena's address range never moves, so views into it stay valid; what a range holds can be given
back to the system with discard(), after which it costs nothing until it is written again. That is
how the KV cache and the expert slots trade memory without copying.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_BYTES = mmap.PAGESIZE
# Python names it from 3.13 on; Linux has the same value on x86-64 and aarch64.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def round_up(num_bytes: int, multiple: int = PAGE_BYTES) -> int:
    """Return ``num_bytes`` rounded up to a multiple."""
    return -(-num_bytes // multiple) * multiple


class Arena:
    """``num_bytes`` of zeroed, page-aligned memory; resident only where it was touched."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = round_up(max(num_bytes, 1))
        self._map = mmap.mmap(
            -1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        )
        # A huge page would make 2 MiB resident for the first byte touched: the budget counts pages.
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        """The whole range, uint8 [num_bytes]."""

    def discard(self, offset: int, num_bytes: int) -> None:
        """Give the whole pages inside a range back to the system; they read as zeros afterwards."""
        start = round_up(offset)
        stop = (offset + num_bytes) // PAGE_BYTES * PAGE_BYTES
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
