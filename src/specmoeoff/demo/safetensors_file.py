"""Writes and maps bfloat16 safetensors files, one tensor in memory at a time.

Laid out for direct reads: data starts at a multiple of ``ALIGNMENT``, and a file's tensors whose
size is no multiple of that (norms, routers) come last, so that every other one starts at one.
Beyond that tensors keep the order they are given in.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from specmoeoff.errors import CheckpointError
from specmoeoff.offload.direct_read import ALIGNMENT
from specmoeoff.offload.safetensors_header import header_bytes, header_entry, read_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

U16 = NDArray[np.uint16]


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
    """Map a file written by ``write_tensors``: name -> bits, read from disk when touched.

    Raises:
        CheckpointError: The file is no such file.
    """
    header = read_header(path)
    dtypes = {name: ref.dtype for name, ref in header.tensors.items()} | header.unsupported
    for name, dtype in dtypes.items():
        if dtype != "BF16":
            raise CheckpointError(f"{path}: tensor {name!r} is {dtype}, not BF16")
    data = np.memmap(path, np.uint8, mode="r")
    return {
        name: data[ref.offset : ref.offset + ref.nbytes].view("<u2").reshape(ref.shape)
        for name, ref in header.tensors.items()
    }


def _header(plans: Sequence[TensorPlan]) -> bytes:
    entries: dict[str, object] = {}
    offset = 0
    for plan in plans:
        entries[plan.name] = header_entry("BF16", plan.shape, offset, plan.nbytes)
        offset += plan.nbytes
    return header_bytes(entries, {})
