"""Rewrites a checkpoint with matrices in 12 bits an element: equal weights, fewer bytes.

One tensor is in memory at a time. The result is written beside its final place and renamed when it
is whole, so a directory of that name is always complete. Knows tensors by name only; which of them
are worth it, the caller says.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.errors import CheckpointError, InvalidInputError
from specmoeoff.kernels import can_pack_bfloat16, pack_bfloat16, unpack_bfloat16
from specmoeoff.offload.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from specmoeoff.offload.safetensors_header import PACKED_KEY, header_bytes, header_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from specmoeoff.offload.safetensors_header import TensorRef

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Packed:
    """What became of a checkpoint's tensors."""

    num_tensors: int
    num_packed: int
    source_bytes: int
    """Of all tensors."""
    packed_bytes: int
    """Of all tensors, afterwards."""


def pack_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    names: Collection[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """Write a checkpoint to ``target`` with the named bfloat16 matrices packed.

    Every packed tensor is unpacked again and compared before it is written. One that cannot be
    packed, or would not get smaller, is copied; so is everything else in the directory except
    weights in other formats.

    Args:
        checkpoint: What to pack.
        target: A directory that does not exist yet.
        names: Tensors worth packing.
        progress: Called with the bytes read so far and those of all tensors.

    Raises:
        CheckpointError: A tensor has a dtype that is not read, or is packed already.
        InvalidInputError: The target, or what it is called while it is written, exists.
        StreamError: A tensor could not be read.
        OSError: The target could not be written.
    """
    if target.exists():
        raise InvalidInputError(f"{target} exists; give a directory that does not")
    for name, dtype in checkpoint.unsupported.items():
        raise CheckpointError(f"{checkpoint.directory}: tensor {name!r} is {dtype}; cannot pack it")
    for name, ref in checkpoint.tensors.items():
        if ref.is_packed:
            raise CheckpointError(f"{ref.file}: tensor {name!r} is packed already")
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        raise InvalidInputError(f"{partial} exists, of a run that was killed perhaps; remove it")
    partial.mkdir(parents=True)
    try:
        packed = _Packing(checkpoint, partial, names, progress).run()
        _copy_others(checkpoint.directory, partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return packed


class _Packing:
    """One checkpoint on its way, file by file."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Path,
        names: Collection[str],
        progress: Callable[[int, int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._target = target
        self._names = names
        self._progress = progress
        self._total = sum(ref.nbytes for ref in checkpoint.tensors.values())
        self._read = 0
        self._num_packed = 0
        self._written = 0

    def run(self) -> Packed:
        files: dict[Path, dict[str, TensorRef]] = {}
        for name, ref in self._checkpoint.tensors.items():
            files.setdefault(ref.file, {})[name] = ref
        for file, refs in files.items():
            self._pack_file(file, dict(sorted(refs.items(), key=lambda item: item[1].offset)))
        if set(files) != {self._checkpoint.directory / SINGLE_FILE}:
            weight_map = {name: ref.file.name for name, ref in self._checkpoint.tensors.items()}
            index = {"metadata": {"total_size": self._written}, "weight_map": weight_map}
            (self._target / INDEX_FILE).write_text(json.dumps(index, indent=2))
        return Packed(len(self._checkpoint.tensors), self._num_packed, self._total, self._written)

    def _pack_file(self, file: Path, refs: Mapping[str, TensorRef]) -> None:
        # The header comes first, but says how large the packed tensors got. Room for what it would
        # be if none got smaller is room enough.
        begin = _header_room(refs, self._names)
        entries: dict[str, object] = {}
        shapes: dict[str, Sequence[int]] = {}
        at = 0
        with (self._target / file.name).open("wb") as out:
            out.seek(begin)
            for name, ref in refs.items():
                data = self._data_of(name, ref)
                if data.dtype == np.uint8:
                    shapes[name] = ref.shape
                    entries[name] = header_entry("U8", [data.nbytes], at, data.nbytes)
                else:
                    entries[name] = header_entry(ref.dtype, ref.shape, at, data.nbytes)
                out.write(np.ascontiguousarray(data).data.cast("B"))
                at += data.nbytes
                self._read += ref.nbytes
                self._progress(self._read, self._total)
            out.seek(0)
            out.write(_header(entries, shapes, begin))
        self._written += at

    def _data_of(self, name: str, ref: TensorRef) -> NDArray[np.generic]:
        """Return a tensor's blob, uint8, if it is to be packed, else the tensor."""
        data = self._checkpoint.read(name)
        if name not in self._names or ref.dtype != "BF16" or not can_pack_bfloat16(ref.shape):
            return data
        bits = data.view(np.uint16)
        packed = pack_bfloat16(bits)
        if packed.nbytes >= ref.nbytes:
            return data
        if not np.array_equal(unpack_bfloat16(packed), bits):
            raise AssertionError(f"tensor {name!r} does not unpack to what it was")
        self._num_packed += 1
        return packed.blob


def _header_room(refs: Mapping[str, TensorRef], names: Collection[str]) -> int:
    """Return where the data may begin whatever is packed."""
    most = sum(ref.nbytes for ref in refs.values())
    entries = {
        name: header_entry("BF16", [most] * max(len(ref.shape), 1), most, 0)
        for name, ref in refs.items()
    }
    return len(_header(entries, {name: (most, most) for name in refs if name in names}))


def _header(
    entries: Mapping[str, object], shapes: Mapping[str, Sequence[int]], least: int = 0
) -> bytes:
    metadata = {PACKED_KEY: json.dumps(shapes, separators=(",", ":"))}
    return header_bytes(entries, metadata, least)


def _copy_others(source: Path, target: Path) -> None:
    """Copy config, tokenizer and whatever else belongs to a model but is no weight."""
    for file in sorted(source.iterdir()):
        is_weight = file.name.endswith(WEIGHT_SUFFIXES) or file.name.endswith(".index.json")
        if file.is_file() and not is_weight:
            shutil.copyfile(file, target / file.name)
