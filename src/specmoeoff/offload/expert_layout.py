"""Where each expert lies on disk and how it sits in a slot.

An expert is read as few aligned runs: tensors that are neighbours in a file come in one read. The
tensors are then views into the slot, at whatever offset the file gave them; nothing is moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.kernels import PackedBfloat16
from specmoeoff.offload.direct_read import ALIGNMENT
from specmoeoff.offload.reader import Segment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from specmoeoff.kernels import Weight
    from specmoeoff.offload.checkpoint import TensorRef

MAX_GAP_BYTES = 64 << 10
"""Neighbours this close are read through the gap: a second request costs more than the bytes."""


@dataclass(frozen=True)
class TensorView:
    """One tensor of an expert inside its slot."""

    offset: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    packed_bytes: int = 0
    """Bytes it takes as ``kernels.PackedBfloat16``; 0 for one that is not packed."""

    def of(self, memory: NDArray[np.uint8], slot_start: int = 0) -> Weight:
        """Return the tensor as a view of memory (uint8), in which its slot begins somewhere."""
        if self.packed_bytes:
            begin = slot_start + self.offset
            n, k = self.shape
            return PackedBfloat16(memory[begin : begin + self.packed_bytes], (n, k))
        return np.ndarray(self.shape, self.dtype, memory.data, slot_start + self.offset)


@dataclass(frozen=True)
class ExpertLayout:
    """The reads that bring one expert in, and its tensors afterwards."""

    name: str
    segments: tuple[Segment, ...]
    starts: tuple[int, ...]
    """Slot offset of each segment."""
    tensors: Mapping[str, TensorView]
    num_bytes: int
    """Slot bytes it needs, alignment included."""


def lay_out(name: str, refs: Mapping[str, TensorRef]) -> ExpertLayout:
    """Plan the reads of one expert's tensors (canonical name -> where it lies)."""
    order = sorted(refs.items(), key=lambda item: (item[1].file, item[1].offset))
    runs: list[list[tuple[str, TensorRef]]] = []
    for item in order:
        last = runs[-1][-1][1] if runs else None
        ref = item[1]
        if last and last.file == ref.file and ref.offset - _end(last) <= MAX_GAP_BYTES:
            runs[-1].append(item)
        else:
            runs.append([item])
    segments: list[Segment] = []
    starts: list[int] = []
    tensors: dict[str, TensorView] = {}
    at = 0
    for run in runs:
        segment = _segment(run)
        for canonical, ref in run:
            tensors[canonical] = TensorView(
                at + ref.offset - segment.offset,
                ref.numpy_dtype,
                tuple(ref.shape),
                ref.nbytes if ref.is_packed else 0,
            )
        segments.append(segment)
        starts.append(at)
        at += segment.num_bytes
    return ExpertLayout(name, tuple(segments), tuple(starts), tensors, at)


def _segment(run: Sequence[tuple[str, TensorRef]]) -> Segment:
    first = run[0][1]
    start = first.offset // ALIGNMENT * ALIGNMENT
    stop = max(_end(ref) for _, ref in run)
    num_bytes = -(-(stop - start) // ALIGNMENT) * ALIGNMENT
    return Segment(first.file, start, num_bytes, stop - start)


def _end(ref: TensorRef) -> int:
    return ref.offset + ref.nbytes
