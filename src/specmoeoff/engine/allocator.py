"""Makes the C allocator give large blocks back, so that a peak of one step is not kept for good.

glibc raises its mmap threshold each time a large block is freed, up to 32 MiB; later blocks of that
size then stay in the heap. Activations come and go, and what they leave free is lent to experts.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
LARGEST_HEAP_BLOCK = 2 << 20
"""Bytes; larger blocks are mapped on their own and returned when freed."""


def return_large_blocks() -> None:
    """Fix the thresholds for this process; without glibc nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, 2 * LARGEST_HEAP_BLOCK)
