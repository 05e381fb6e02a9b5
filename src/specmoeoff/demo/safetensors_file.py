"""Writes and maps bfloat16 safetensors files, one tensor in memory at a time.

Laid out for direct reads: data starts at a multiple of 4096 bytes, and a file's tensors whose
size is no multiple of that (norms, routers) come last, so that every other one starts at one.
Beyond that tensors keep the order they are given in.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from specmoeoff.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

U16 = NDArray[np.uint16]

ALIGNMENT = 4096
"""Bytes; what O_DIRECT asks for on every common file system."""


@dataclass(frozen=True)
class TensorPlan:
    """A bfloat16 tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return 2 * math.prod(self.shape)


def in_file_order(plans: Iterable[TensorPlan]) -> list[TensorPlan]:
    """Return the plans in the order in which ``write_tensors`` wants their values."""
    return sorted(plans, key=lambda plan: plan.nbytes % ALIGNMENT != 0)


def write_tensors(path: Path, plans: Sequence[TensorPlan], values: Iterable[U16]) -> str:
    """Write one file and return its SHA-256.

    Args:
        path: The file to create.
        plans: What it holds, ``in_file_order``.
        values: The bits of each, in the same order; taken one by one.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(part: bytes | memoryview) -> None:
            file.write(part)
            digest.update(part)

        write(_header(plans))
        for plan, value in zip(plans, values, strict=True):
            if value.shape != plan.shape or value.dtype != np.uint16:
                raise ValueError(f"{plan.name}: got {value.dtype} {value.shape}, want {plan.shape}")
            write(np.ascontiguousarray(value, "<u2").data.cast("B"))
    return digest.hexdigest()


def map_tensors(path: Path) -> dict[str, U16]:
    """Map a file written by ``write_tensors``: name -> bits, read from disk when touched."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    data = np.memmap(path, "<u2", mode="r", offset=8 + header_bytes)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise CheckpointError(f"{path}: tensor {name!r} is {entry['dtype']}, not BF16")
        begin, end = entry["data_offsets"]
        tensors[name] = data[begin // 2 : end // 2].reshape(entry["shape"])
    return tensors


def _header(plans: Sequence[TensorPlan]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        entries[plan.name] = {
            "dtype": "BF16",
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.nbytes],
        }
        offset += plan.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The format allows spaces after the JSON.
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
