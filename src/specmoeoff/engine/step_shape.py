"""The shape of a planned step from what the memory plan gives it, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specmoeoff.offload.planned_experts import slot_bytes
from specmoeoff.pipeline.schedules.shape import MicroBatch, StepShape

if TYPE_CHECKING:
    from collections.abc import Iterable

    from specmoeoff.config import EngineConfig
    from specmoeoff.engine.model_files import ModelFiles
    from specmoeoff.engine.planned_memory import MemorySplit

HOST_SLOTS = 4
"""Experts on their way from disk to the device; one arrives while another leaves."""
_KV_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}
_KV_SCALE_BYTES = {"bfloat16": 0, "float16": 0, "float32": 0, "int8": 4}


def step_shape(
    config: EngineConfig, files: ModelFiles, split: MemorySplit, batches: Iterable[MicroBatch]
) -> StepShape:
    """Return the shape of a step of these micro-batches."""
    return StepShape(
        files.model.config,
        tuple(batches),
        split.placement,
        split.num_slots,
        slot_bytes(files.expert_layouts()),
        kv_item_bytes=_KV_ITEM_BYTES[config.kv_dtype],
        kv_scale_bytes=_KV_SCALE_BYTES[config.kv_dtype],
        host_slots=HOST_SLOTS,
    )
