"""Opens a torch device for planned passes; the only place from which torch is imported.

It is imported when it is called, so that everything else runs where torch is not installed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING

from specmoeoff.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.devices.torch_device import TorchDevice
    from specmoeoff.devices.torch_memory import TorchSlots
    from specmoeoff.engine.planned_memory import PlannedConfig
    from specmoeoff.engine.weights import ModelWeights
    from specmoeoff.models.base import Model
    from specmoeoff.offload.expert_layout import ExpertLayout


def with_device_memory(wanted: PlannedConfig) -> PlannedConfig:
    """Return what is wanted with the bytes that a GPU has free, where it is one and none were said.

    Raises:
        InvalidInputError: There is no torch, or no GPU that it can use, or torch's device is not
            a GPU and no memory was said.
    """
    if wanted.device != "cuda":
        return wanted
    if importlib.util.find_spec("torch") is None:
        raise InvalidInputError(
            "device 'cuda' needs torch with a GPU: torch is not installed (pip install "
            "'specmoeoff[cuda]')"
        )
    from specmoeoff.devices.torch_memory import open_device, usable_memory

    device = open_device(wanted.torch_device)
    if wanted.device_memory:
        return wanted
    if device.type != "cuda":
        raise InvalidInputError(f"say how much memory torch's device {wanted.torch_device!r} has")
    return replace(wanted, device_memory=usable_memory(device))


def workspace_bytes(wanted: PlannedConfig) -> int:
    """Return what a GPU's libraries take beside what is counted by name."""
    from specmoeoff.devices.torch_device import WORKSPACE_BYTES
    from specmoeoff.devices.torch_memory import open_device

    return WORKSPACE_BYTES if open_device(wanted.torch_device).type == "cuda" else 0


def open_torch(
    model: Model,
    weights: ModelWeights,
    layouts: Sequence[Sequence[ExpertLayout]],
    num_slots: int,
    wanted: PlannedConfig,
) -> tuple[TorchDevice, TorchSlots]:
    """Copy dense weights to the device and make its slots.

    Raises:
        CheckpointError: A weight is of a form that torch does not have.
    """
    if any(view.packed_bytes for view in layouts[0][0].tensors.values()):
        raise InvalidInputError(
            "device 'cuda' computes with plain bfloat16, but this checkpoint is packed; give it "
            "the checkpoint that 'specmoeoff pack' was given"
        )
    from specmoeoff.devices.torch_device import TorchDevice
    from specmoeoff.devices.torch_memory import TorchSlots, open_device

    where = open_device(wanted.torch_device)
    device = TorchDevice(model, weights.globals, weights.layers, where)
    device.limit(wanted.device_memory)
    return device, TorchSlots(layouts, num_slots, where)
