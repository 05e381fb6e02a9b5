"""A torch device and its memory: host memory that it reads by itself, slots for experts.

Pinned (page-locked) memory is what a GPU copies from at full rate and while others work. Some
platforms cap how much may be pinned at once or in all, so an arena is pinned in blocks of whole
slots, and what is refused stays pageable, with a warning.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specmoeoff.errors import InvalidInputError
from specmoeoff.memory_size import format_memory_size
from specmoeoff.offload.arena import round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from specmoeoff.offload.expert_layout import ExpertLayout

    Register = Callable[[int, int], bool]
    """Pins a range (address, bytes) and says whether it could."""

BLOCK_BYTES = 1 << 30
"""Pinned at once; a cap that one call would run into may be met by several."""
ALIGNMENT = 256
"""Of a tensor in a slot: products of a GPU read aligned matrices faster."""

_DTYPES = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.uint16): torch.bfloat16,
    np.dtype(np.int8): torch.int8,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
}
"""uint16 is how numpy holds the bits of bfloat16."""


def open_device(name: str) -> torch.device:
    """Return torch's device of a name.

    Raises:
        InvalidInputError: It is a GPU and there is none that torch can use.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(
            f"device 'cuda' needs torch with a GPU: torch {torch.__version__} finds no CUDA "
            "device; use device 'cpu' or 'sim'"
        )
    return device


def usable_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that are free now."""
    return torch.cuda.mem_get_info(device)[0]


def torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """Return what torch calls a dtype of ours.

    Raises:
        TypeError: It has none.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"dtype {dtype} has no counterpart on a torch device")
    return _DTYPES[dtype]


def as_tensor(array: NDArray[np.generic]) -> Tensor:
    """Return an array as a tensor that shares its memory."""
    wanted = torch_dtype(array.dtype)
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(wanted)
    return torch.from_numpy(array)


def register(address: int, num_bytes: int) -> bool:
    """Pin a range of this process's memory for CUDA; False where the platform refuses."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(cudart.cudaHostRegister(address, num_bytes, 0)) == 0:
        return True
    # The refusal stays behind as CUDA's last error, which the next launch would report as its own.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False


def unregister(address: int) -> None:
    """Undo ``register``."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cudart.cudaHostUnregister(address)


def pin(memory: NDArray[np.uint8], slot_bytes: int, try_register: Register) -> list[int]:
    """Pin memory in blocks of whole slots; warn of what must stay pageable.

    Args:
        memory: Page-aligned, a number of slots.
        slot_bytes: No copy may span two blocks, and none spans two slots.
        try_register: Pins a range.

    Returns:
        Addresses of the blocks that were pinned.
    """
    block = max(BLOCK_BYTES // slot_bytes, 1) * slot_bytes
    pinned: list[int] = []
    refused = 0
    for start in range(0, len(memory), block):
        num_bytes = min(block, len(memory) - start)
        # After a refusal others would be refused too, and each attempt touches all pages.
        if refused or not try_register(memory.ctypes.data + start, num_bytes):
            refused += num_bytes
        else:
            pinned.append(memory.ctypes.data + start)
    if refused:
        warnings.warn(
            f"{format_memory_size(refused)} of {format_memory_size(len(memory))} of host memory "
            "could not be pinned; experts there are copied to the device more slowly",
            RuntimeWarning,
            stacklevel=2,
        )
    return pinned


class TorchSlots:
    """Slots for experts in the device's memory, each tensor aligned; see ``ExpertSlots``."""

    def __init__(
        self, layouts: Sequence[Sequence[ExpertLayout]], num_slots: int, device: torch.device
    ) -> None:
        largest = max(_aligned_bytes(layout) for layer in layouts for layout in layer)
        self._memory = torch.empty((num_slots, largest), dtype=torch.uint8, device=device)

    def fill(self, slot: int, layout: ExpertLayout, source: NDArray[np.uint8]) -> None:
        """Copy an expert from a slot of the host's; asynchronous where that is pinned."""
        at = 0
        for view in layout.tensors.values():
            num_bytes = _num_bytes(view.shape, view.dtype)
            part = torch.from_numpy(source[view.offset : view.offset + num_bytes])
            self._memory[slot, at : at + num_bytes].copy_(part, non_blocking=True)
            at += round_up(num_bytes, ALIGNMENT)

    def tensors(self, slot: int, layout: ExpertLayout) -> Mapping[str, Tensor]:
        """Return the tensors of the expert that a slot was filled with."""
        found, at = {}, 0
        for name, view in layout.tensors.items():
            num_bytes = _num_bytes(view.shape, view.dtype)
            part = self._memory[slot, at : at + num_bytes]
            found[name] = part.view(torch_dtype(view.dtype)).view(view.shape)
            at += round_up(num_bytes, ALIGNMENT)
        return found


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> int:
    return int(np.prod(shape)) * dtype.itemsize


def _aligned_bytes(layout: ExpertLayout) -> int:
    """Return the bytes of an expert in a slot, rounded so that the next one is aligned too."""
    sizes = (_num_bytes(view.shape, view.dtype) for view in layout.tensors.values())
    return sum(round_up(size, ALIGNMENT) for size in sizes)
