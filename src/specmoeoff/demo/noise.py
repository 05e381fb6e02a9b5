"""Random numbers that are the same on every machine and with every numpy.

numpy promises the stream of raw bits of a bit generator, not what its distributions make of them,
and those call the C library's logarithm. Here the bits are only added up, as integers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FIELD = np.uint64(0x0000FFFF0000FFFF)
_SIXTEEN = np.uint64(16)
_MEAN = 4 * 65535 // 2
DEVIATION = math.sqrt(4 * (65536**2 - 1) / 12)
"""Standard deviation of ``centred_sums``."""


def centred_sums(count: int, *key: int) -> NDArray[np.float32]:
    """Return ``count`` near-Gaussian integers of mean 0, at most 131070 in size, as float32.

    Each is the sum of four 16-bit uniform numbers, less the mean: a bell of excess kurtosis -0.3.

    Args:
        count: How many.
        key: Non-negative integers that name the stream; every key has its own.
    """
    bits: NDArray[np.uint64] = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    pairs = bits & _FIELD
    bits >>= _SIXTEEN
    bits &= _FIELD
    pairs += bits
    # Two sums of two lie in the halves of each number; which half is which does not matter.
    halves = pairs.view(np.uint32)
    sums = (halves[0::2] + halves[1::2]).view(np.int32)
    sums -= _MEAN
    return sums.astype(np.float32)
