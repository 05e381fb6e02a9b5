"""Budgets for tests: the smallest that works, as the refusal itself names it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from specmoeoff.config import EngineConfig, SpeculativeConfig
from specmoeoff.engine import memory_plan, planned_build
from specmoeoff.engine.model_files import ModelFiles
from specmoeoff.engine.planned_memory import PlannedConfig, split_memory
from specmoeoff.errors import DoesNotFitError
from specmoeoff.offload.planned_experts import slot_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from specmoeoff.offload.tiers import Tier

MIB = 1 << 20


def smallest_budget(
    model: Path | str, speculative: SpeculativeConfig | None = None, **options: Any
) -> int:
    """Return the bytes that the refusal of one byte names."""
    config = EngineConfig(model=str(model), memory=1, speculative=speculative, **options)
    with pytest.raises(DoesNotFitError) as refusal:
        memory_plan.plan_memory(config)
    found = re.search(r"smallest budget that works is (\d+)MiB", str(refusal.value))
    assert found is not None
    return int(found[1]) * MIB


def less_than_all_experts(config: EngineConfig, wanted: PlannedConfig) -> int:
    """Return the bytes of a host's memory that is too small for all experts by one."""
    files = ModelFiles.open(config.model)
    host, _ = split_memory(replace(config, memory=None), wanted, files).tiers
    return host.reserved - 1


def few_slots(number: int) -> Callable[[ModelFiles, Tier], int]:
    """Return what gives a tier so many expert slots, whatever is left (``_reserve_slots``)."""

    def reserve(files: ModelFiles, tier: Tier) -> int:
        tier.reserve("expert slots", number * slot_bytes(files.expert_layouts()))
        return number

    return reserve


def trade_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no expert borrow what the KV cache does not need, so that all steps stream alike."""
    monkeypatch.setattr(planned_build, "ElasticMemory", lambda *_: None)


def forget_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as a fresh process would: what the tests themselves hold does not count."""
    monkeypatch.setattr(memory_plan, "resident_bytes", lambda: 0)
