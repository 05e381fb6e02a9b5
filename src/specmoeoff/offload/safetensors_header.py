"""The header of one safetensors file: what lies where, and whether that can be true.

A file is an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, offsets
relative to the end of the JSON), then the data. Only the first two are read and written here.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from specmoeoff.errors import CheckpointError
from specmoeoff.kernels import can_pack_bfloat16, packed_bfloat16_bytes
from specmoeoff.offload.arena import round_up
from specmoeoff.offload.direct_read import ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

DType = Literal["BF16", "F16", "F32"]

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
"""Stored dtype -> numpy dtype; bfloat16 stays as its bits."""

PACKED_KEY = "specmoeoff.packed_bfloat16"
"""Field of a file's metadata: JSON, name -> [N, K] of each tensor that is U8 to others and a
``kernels.PackedBfloat16`` to us."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies."""

    file: Path
    offset: int
    """First byte, from the start of the file."""
    nbytes: int
    dtype: DType
    shape: tuple[int, ...]
    is_packed: bool = False
    """Whether it is bfloat16 in 12 bits an element, see ``kernels.PackedBfloat16``."""

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The dtype of its array: uint16 (bfloat16 bits), float16 or float32."""
        return NUMPY_DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """What one file holds."""

    tensors: dict[str, TensorRef]
    unsupported: dict[str, str]
    """Tensors of a dtype that cannot be computed with, name -> dtype. Harmless until asked for."""


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file, leaving its data alone.

    Raises:
        CheckpointError: The file cannot be opened, is cut short, or contradicts itself.
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            data_begin, entries = _read_json(file, size, stream.read(8), stream.read)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    packed = _packed_shapes(file, entries.get("__metadata__"))
    tensors: dict[str, TensorRef] = {}
    unsupported: dict[str, str] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _parse_entry(file, name, entry)
        spans.append((begin, end, name))
        if data_begin + end > size:
            raise CheckpointError(
                f"{file} is truncated: tensor {name!r} ends at byte {data_begin + end} "
                f"and the file has {size}; fetch the file again"
            )
        if name in packed:
            tensors[name] = _packed_ref(
                file, name, dtype, packed[name], data_begin + begin, end - begin
            )
            continue
        if dtype not in NUMPY_DTYPES:
            unsupported[name] = dtype
            continue
        expected = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        if end - begin != expected:
            raise CheckpointError(
                f"{file}: tensor {name!r} has {end - begin} bytes, "
                f"but {dtype} of shape {list(shape)} takes {expected}"
            )
        tensors[name] = TensorRef(file, data_begin + begin, expected, cast("DType", dtype), shape)
    _check_overlap(file, spans)
    return Header(tensors, unsupported)


def header_entry(dtype: str, shape: Sequence[int], begin: int, num_bytes: int) -> dict[str, object]:
    """Return what a header says of one tensor; ``begin`` counts from the end of the header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + num_bytes]}


def header_bytes(
    entries: Mapping[str, object], metadata: Mapping[str, str], least: int = 0
) -> bytes:
    """Return a file's first bytes: ``least`` or more, a multiple of ``ALIGNMENT``.

    Args:
        entries: Name -> ``header_entry``, in the order of the data.
        metadata: What the file says of itself beside ``format``.
        least: Bytes that have been left for it.
    """
    content = {"__metadata__": {"format": "pt", **metadata}, **entries}
    text = json.dumps(content, separators=(",", ":")).encode()
    # The format allows spaces after the JSON.
    text = text.ljust(round_up(max(8 + len(text), least), ALIGNMENT) - 8)
    return struct.pack("<Q", len(text)) + text


def _read_json(file: Path, size: int, prefix: bytes, read: Any) -> tuple[int, dict[str, Any]]:
    """Return where the data begins and the parsed header."""
    if len(prefix) < 8:
        raise CheckpointError(f"{file} is truncated: {size} bytes cannot be a safetensors file")
    length = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} is not a safetensors file: its header would be {length} bytes long"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{file} is truncated: its header ends at byte {8 + length} and the file has {size}; "
            "fetch the file again"
        )
    try:
        entries = json.loads(read(length))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a header that is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file} has a header that is not a JSON object")
    return 8 + length, entries


def _parse_entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, begin and end of one entry; offsets count from the end of the header."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{file}: the header entry of tensor {name!r} is not an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise CheckpointError(f"{file}: tensor {name!r} has no dtype in the header")
    if not _is_sizes(shape):
        raise CheckpointError(f"{file}: tensor {name!r} has the impossible shape {shape!r}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{file}: tensor {name!r} has impossible data_offsets {offsets!r}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _packed_shapes(file: Path, metadata: Any) -> dict[str, Any]:
    """Return the shapes that a file's metadata gives for packed tensors."""
    text = metadata.get(PACKED_KEY) if isinstance(metadata, dict) else None
    if text is None:
        return {}
    try:
        shapes = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        shapes = None
    if not isinstance(shapes, dict):
        raise CheckpointError(f"{file}: its metadata field {PACKED_KEY!r} is no JSON object")
    return shapes


def _packed_ref(
    file: Path, name: str, dtype: str, shape: Any, offset: int, num_bytes: int
) -> TensorRef:
    """Return where a packed tensor lies, having checked that its size can be true."""
    if dtype != "U8" or not _is_sizes(shape) or not can_pack_bfloat16(tuple(shape)):
        raise CheckpointError(
            f"{file}: tensor {name!r} is said to be packed bfloat16 of shape {shape!r}, but it is "
            f"{dtype} or cannot have that shape"
        )
    n, k = shape
    if num_bytes < packed_bfloat16_bytes(n, k):
        raise CheckpointError(
            f"{file}: tensor {name!r} has {num_bytes} bytes, but packed bfloat16 of shape "
            f"{[n, k]} takes {packed_bfloat16_bytes(n, k)} or more"
        )
    return TensorRef(file, offset, num_bytes, "BF16", (n, k), is_packed=True)


def _is_sizes(value: Any) -> bool:
    """Whether the value is a list of integers that are not negative (and not booleans)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_overlap(file: Path, spans: list[tuple[int, int, str]]) -> None:
    """Refuse two tensors that share bytes."""
    last_end, last_name = 0, ""
    for begin, end, name in sorted(spans):
        if begin < last_end and begin != end:
            raise CheckpointError(f"{file}: tensors {last_name!r} and {name!r} overlap")
        if end > last_end:
            last_end, last_name = end, name
