"""A Hugging Face checkpoint, used in place: tensor name -> file, offset, dtype, shape.

Opening reads headers only, so it costs the same for 1 GB and 100 GB. Knows safetensors, one file or
shards with an index; knows no model and no tensor name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specmoeoff.errors import CheckpointError, StreamError
from specmoeoff.kernels import PackedBfloat16, unpack_bfloat16
from specmoeoff.offload.direct_read import read_range
from specmoeoff.offload.safetensors_header import NUMPY_DTYPES, Header, TensorRef, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Checkpoint", "TensorRef"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds and where. Opens each file anew for each read; keeps nothing open."""

    directory: Path
    tensors: Mapping[str, TensorRef]
    unsupported: Mapping[str, str]
    """Tensors of a dtype that is not read, name -> dtype."""

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read the headers of ``model.safetensors``, or of the shards that the index names.

        Raises:
            CheckpointError: There are no weights, they are not safetensors, a shard is missing or
                cut short, or a header contradicts itself, the index or the file's size.
        """
        if (directory / SINGLE_FILE).exists():
            header = read_header(directory / SINGLE_FILE)
        elif (directory / INDEX_FILE).exists():
            header = _read_shards(directory)
        else:
            raise _no_weights(directory)
        return cls(directory, header.tensors, header.unsupported)

    def require(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        """Return a tensor's place, having checked that it exists in the expected shape.

        Raises:
            CheckpointError: It does not exist, or its shape or dtype is another one.
        """
        ref = self._find(name)
        if ref.shape != tuple(shape):
            raise CheckpointError(
                f"{ref.file}: tensor {name!r} has shape {list(ref.shape)}, "
                f"but config.json implies {list(shape)}"
            )
        return ref

    def read(self, name: str) -> NDArray[np.generic]:
        """Read one tensor: float32, float16, or uint16 for bfloat16 bits, unpacked if it is packed.

        Memory rises by the tensor (and at most a page at each end); the page cache is not filled.
        Unpacking takes some times its size for a moment.

        Raises:
            CheckpointError: There is no such tensor, or its dtype is not read.
            StreamError: The file has been cut short or removed since it was opened.
        """
        ref = self._find(name)
        try:
            alignment = 1 if ref.is_packed else ref.numpy_dtype.itemsize
            data = read_range(ref.file, ref.offset, ref.nbytes, alignment)
        except EOFError:
            raise StreamError(
                f"{ref.file} has become shorter: tensor {name!r} should end at byte "
                f"{ref.offset + ref.nbytes}"
            ) from None
        except OSError as error:
            raise StreamError(
                f"{ref.file}: reading tensor {name!r} failed: {error.strerror or error}"
            ) from error
        if ref.is_packed:
            return _unpack(ref, name, data)
        return data.view(ref.numpy_dtype).reshape(ref.shape)

    def _find(self, name: str) -> TensorRef:
        ref = self.tensors.get(name)
        if ref is not None:
            return ref
        if name in self.unsupported:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is stored as {self.unsupported[name]}; "
                f"only {', '.join(NUMPY_DTYPES)} can be used"
            )
        raise CheckpointError(f"{self.directory}: the checkpoint has no tensor {name!r}")


def _unpack(ref: TensorRef, name: str, data: NDArray[np.uint8]) -> NDArray[np.uint16]:
    n, k = ref.shape
    try:
        return unpack_bfloat16(PackedBfloat16(data, (n, k)))
    except ValueError as error:
        raise CheckpointError(f"{ref.file}: tensor {name!r} is damaged: {error}") from error


def _read_shards(directory: Path) -> Header:
    """Read the headers of all shards and keep what the index names, from where it says."""
    index = directory / INDEX_FILE
    weight_map = _read_weight_map(index)
    headers: dict[str, Header] = {}
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).exists():
            raise CheckpointError(
                f"{directory / shard} is missing, but {INDEX_FILE} names it; fetch the shard"
            )
        headers[shard] = read_header(directory / shard)
    merged = Header({}, {})
    for name, shard in weight_map.items():
        header = headers[shard]
        if name in header.tensors:
            merged.tensors[name] = header.tensors[name]
        elif name in header.unsupported:
            merged.unsupported[name] = header.unsupported[name]
        else:
            raise CheckpointError(
                f"{directory / shard} has no tensor {name!r}, but {INDEX_FILE} says it is there"
            )
    return merged


def _read_weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> shard file name, checked to be names inside the directory."""
    try:
        content: Any = json.loads(index.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not JSON: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no field 'weight_map' that names tensors")
    for name, shard in weight_map.items():
        # An index comes from elsewhere; it must not lead out of its directory.
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\0" in shard:
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to lie in {shard!r}, which is no file name"
            )
    return weight_map


def _no_weights(directory: Path) -> CheckpointError:
    """Say what is there instead of safetensors."""
    if not directory.is_dir():
        return CheckpointError(f"{directory} is not a directory")
    for pattern in ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.bin"):
        pickled = sorted(path.name for path in directory.glob(pattern))
        if pickled:
            return CheckpointError(
                f"{directory} has only pickled weights ({pickled[0]}), which can run code when "
                "loaded; convert them once with transformers: AutoModelForCausalLM"
                ".from_pretrained(SOURCE).save_pretrained(TARGET)"
            )
    return CheckpointError(
        f"{directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there"
    )
