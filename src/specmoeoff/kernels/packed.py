"""Packs bfloat16 matrices into 12 bits an element and unpacks them: nothing is lost.

A trained matrix's exponents have two or three bits of entropy in their eight, so its sixteen
commonest get codes of four bits; the few elements with another one are kept whole, as patches.
``PackedBfloat16`` has the layout. Products read it as it is; this is for the disk's side of it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.kernels.weights import PackedBfloat16

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUN = 32
"""Elements of a row that are kept together."""
RUN_BYTES = 48
HEADER_BYTES = 64
MOST_COLUMNS = 16384
_ALIGNMENT = 64
_NUM_CODES = 16
_NO_CODE = 255


def can_pack_bfloat16(shape: tuple[int, ...]) -> bool:
    """Return whether a matrix of that shape can be packed."""
    return len(shape) == 2 and shape[1] % RUN == 0 and RUN <= shape[1] <= MOST_COLUMNS


def packed_bfloat16_bytes(n: int, k: int, num_patches: int = 0) -> int:
    """Return the bytes of a packed matrix, its end padded to a multiple of 64."""
    num_bytes = HEADER_BYTES + n * (k // RUN) * RUN_BYTES + 4 * (n + 1 + num_patches)
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def pack_bfloat16(bits: NDArray[np.uint16]) -> PackedBfloat16:
    """Pack a matrix of bfloat16 bits, uint16 [N, K].

    Raises:
        ValueError: It is no matrix, or K is no multiple of 32 or above 16384.
    """
    if not can_pack_bfloat16(bits.shape):
        raise ValueError(
            f"bits has shape {list(bits.shape)}; it must be [N, K], K a multiple of {RUN} up to "
            f"{MOST_COLUMNS}"
        )
    n, k = bits.shape
    exponents = ((bits >> 7) & 0xFF).astype(np.uint8)
    commonest = np.argsort(-np.bincount(exponents.reshape(-1), minlength=256), kind="stable")
    chosen = commonest[:_NUM_CODES].astype(np.uint8)
    code_of = np.full(256, _NO_CODE, np.uint8)
    code_of[chosen] = np.arange(_NUM_CODES)
    codes = code_of[exponents]
    rows, columns = np.nonzero(codes == _NO_CODE)
    runs = np.empty((n, k // RUN, RUN_BYTES), np.uint8)
    halves = (codes & 15).reshape(n, k // RUN, 2, RUN // 2)
    runs[..., : RUN // 2] = halves[:, :, 0] | halves[:, :, 1] << 4
    signs = (bits >> 8 & 0x80).astype(np.uint8) | (bits & 0x7F).astype(np.uint8)
    runs[..., RUN // 2 :] = signs.reshape(n, k // RUN, RUN)
    starts = np.searchsorted(rows, np.arange(n + 1)).astype("<u4")
    patches = (columns.astype("<u4") << np.uint32(16)) | bits[rows, columns]
    header = chosen.tobytes() + struct.pack("<I", len(rows))
    blob = b"".join(
        [header.ljust(HEADER_BYTES, b"\0"), runs.data, starts.data, patches.astype("<u4").data]
    )
    blob = blob.ljust(packed_bfloat16_bytes(n, k, len(rows)), b"\0")
    return PackedBfloat16(np.frombuffer(blob, np.uint8), (n, k))


def unpack_bfloat16(packed: PackedBfloat16) -> NDArray[np.uint16]:
    """Return the matrix as bfloat16 bits, uint16 [N, K]: what ``pack_bfloat16`` was given.

    Raises:
        ValueError: The blob contradicts itself or the shape.
    """
    n, k = packed.shape
    blob = np.ascontiguousarray(packed.blob)
    after = HEADER_BYTES + n * (k // RUN) * RUN_BYTES
    count = int(blob[16:20].copy().view("<u4")[0]) if len(blob) >= HEADER_BYTES else 0
    if not can_pack_bfloat16((n, k)) or len(blob) != packed_bfloat16_bytes(n, k, count):
        raise ValueError(f"blob has {len(blob)} bytes, which is no packed matrix of {[n, k]}")
    runs = blob[HEADER_BYTES:after].reshape(n, k // RUN, RUN_BYTES)
    codes = np.concatenate([runs[..., : RUN // 2] & 15, runs[..., : RUN // 2] >> 4], axis=-1)
    exponents = blob[:_NUM_CODES].astype(np.uint16)[codes]
    rest = runs[..., RUN // 2 :].astype(np.uint16)
    bits: NDArray[np.uint16] = ((rest & 0x80) << 8 | exponents << 7 | rest & 0x7F).reshape(n, k)
    words = blob[after : after + 4 * (n + 1 + count)].copy().view("<u4")
    starts, patches = words[: n + 1].astype(np.int64), words[n + 1 :]
    columns = patches >> 16
    if starts[0] != 0 or starts[-1] != count or (np.diff(starts) < 0).any():
        raise ValueError("blob has patches in no order")
    if (columns >= k).any():
        raise ValueError(f"blob has patches beyond its {k} columns")
    bits[np.repeat(np.arange(n), np.diff(starts)), columns] = patches.astype(np.uint16)
    return bits
