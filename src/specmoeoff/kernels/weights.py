"""What a weight matrix can be: an array as stored, or one of several packed forms.

Names for the arrays that kernels take, too. What is done with them is in ``reference``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]
Array = NDArray[np.generic]


@dataclass(frozen=True)
class Int8Weight:
    """A matrix quantised to int8, symmetric, with float32 scales along the inner dimension."""

    values: NDArray[np.int8]
    """[N, K]"""
    scales: F32
    """[N, K // group]; a group is a run of the inner dimension, K itself for one scale per row."""

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class Int4Weight:
    """A matrix quantised to int4, symmetric, with float32 scales along the inner dimension."""

    values: NDArray[np.uint8]
    """[N, K // 2]; 16 bytes hold 32 elements of a row: byte j has element j in its low four bits
    and element 16 + j in its high ones, as integers -8 to 7 with 8 added."""
    scales: F32
    """[N, K // group]; a group is a run of 32, 64 or 128 of the inner dimension."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return (*self.values.shape[:-1], 2 * self.values.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class Int8DotWeight:
    """A matrix rounded to int8 whose products round activations to int8 too: for drafts only.

    Made by ``pack_int8_dot``. A row x of activations becomes q = rint(x / s) with s = max|x| / 127.
    A product is the exact integer sum of q and the values, times the weight row's scale, times s.
    K is at most 131072.
    """

    packed: NDArray[np.int8]
    """[ceil(N / 16), ceil(K / 4), 16, 4]: (row, column) is at [row // 16, column // 4, row % 16,
    column % 4]; zeros beyond N and K."""
    scales: F32
    """[N]"""
    shape: tuple[int, int]
    """(N, K)"""

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.packed.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class PackedBfloat16:
    """A bfloat16 matrix in 12 bits an element, without loss. Made by ``pack_bfloat16``.

    K is a multiple of 32 and at most 16384. Little-endian, in this order:

    - 64 bytes: the exponents of codes 0 to 15, uint8; the number of patches, uint32; zeros;
    - for each row K / 32 runs of 48 bytes: 16 bytes of codes, byte j with element j in its low four
      bits and element 16 + j in its high ones; then 32 bytes of sign << 7 | mantissa;
    - the first patch of each row, and the end: uint32 [N + 1];
    - the patches, by row and column: uint32, column << 16 | bits of the element. They are the
      elements whose exponent has no code;
    - zeros up to a multiple of 64 bytes.
    """

    blob: NDArray[np.uint8]
    """One dimension."""
    shape: tuple[int, int]
    """(N, K)"""

    @property
    def nbytes(self) -> int:
        """Bytes of the blob."""
        return self.blob.nbytes


def packed_int8_bytes(n: int, k: int) -> int:
    """Return the ``nbytes`` of an Int8DotWeight of shape (n, k)."""
    return -(-n // 16) * 16 * -(-k // 4) * 4 + 4 * n


Weight = NDArray[np.generic] | Int8Weight | Int4Weight | Int8DotWeight | PackedBfloat16

Activations = Literal["float32", "bfloat16"]
"""What activations are rounded to before a product; an Int8DotWeight rounds them to int8 anyway."""
