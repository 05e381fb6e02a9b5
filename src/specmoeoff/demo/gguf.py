"""Reads a GGUF file: its metadata and its tensors as float32.

Knows the file format and the three element types that the demo's model uses (F32, Q8_0, Q4_1).
Knows nothing of architectures or tokenizers. The file is mapped, so a tensor costs memory only
while it is being dequantised.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from specmoeoff.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# GGUF's value types 0..12: struct letters of the fixed-size ones.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_F32, _Q4_1, _Q8_0 = 0, 3, 8
_TYPE_NAMES = {_F32: "F32", _Q4_1: "Q4_1", _Q8_0: "Q8_0"}
# Elements and bytes of one block.
_BLOCKS = {_F32: (1, 4), _Q4_1: (32, 20), _Q8_0: (32, 34)}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as numpy has it (the file says it the other way round)."""
    type_id: int
    offset: int
    """Absolute, in bytes."""


class GgufFile:
    """An open GGUF file: ``metadata`` by key and ``tensors`` by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def __init__(self, path: Path) -> None:
        """Map the file and read its header.

        Raises:
            CheckpointError: The file is no GGUF file, or is cut off.
        """
        self.path = path
        try:
            self._data: U8 = np.memmap(path, np.uint8, mode="r")
            self.metadata, self.tensors = _read_header(self._data)
        except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}") from error

    def rows(self, name: str, max_rows: int = 4096) -> Iterator[F32]:
        """Yield a tensor as float32, at most ``max_rows`` of its first dimension at a time.

        Raises:
            CheckpointError: The tensor is missing, of another element type, or cut off.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        if tensor.type_id not in _BLOCKS:
            known = ", ".join(_TYPE_NAMES.values())
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has GGUF type {tensor.type_id}; "
                f"only {known} can be read"
            )
        block_size, block_bytes = _BLOCKS[tensor.type_id]
        row_elements = math.prod(tensor.shape[1:])
        if row_elements % block_size:
            max_rows = tensor.shape[0]
        for start in range(0, tensor.shape[0], max_rows):
            count = min(max_rows, tensor.shape[0] - start)
            begin = tensor.offset + start * row_elements // block_size * block_bytes
            num_bytes = count * row_elements // block_size * block_bytes
            raw = self._data[begin : begin + num_bytes]
            if raw.size != num_bytes:
                raise CheckpointError(f"{self.path} is cut off inside tensor {name!r}")
            yield _dequantize(raw, tensor.type_id).reshape(count, *tensor.shape[1:])


def _dequantize(raw: U8, type_id: int) -> F32:
    if type_id == _F32:
        return np.frombuffer(raw.tobytes(), "<f4")
    blocks = raw.reshape(-1, _BLOCKS[type_id][1])
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if type_id == _Q8_0:
        return scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    minimum = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    # The low nibbles are a block's first 16 values, the high ones its last 16.
    nibbles = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1)
    return scale * nibbles.astype(np.float32) + minimum


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: U8) -> None:
        self._view = data.data
        self.position = 0

    def take(self, size: int) -> memoryview:
        part = self._view[self.position : self.position + size]
        if len(part) != size:
            raise ValueError("the header is cut off")
        self.position += size
        return part

    def scalar(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def string(self) -> str:
        return str(self.take(self.scalar("Q")), "utf-8")

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            element_type, count = self.scalar("I"), self.scalar("Q")
            return [self.value(element_type) for _ in range(count)]
        if type_id not in _SCALARS:
            raise ValueError(f"unknown metadata type {type_id}")
        return self.scalar(_SCALARS[type_id])


def _read_header(data: U8) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    cursor = _Cursor(data)
    if bytes(cursor.take(4)) != _MAGIC:
        raise ValueError("it does not start with 'GGUF'")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not known (2 and 3 are)")
    num_tensors, num_metadata = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_metadata):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    found = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
        found.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.position // alignment) * alignment
    return metadata, {
        name: GgufTensor(name, shape, type_id, start + offset)
        for name, shape, type_id, offset in found
    }
