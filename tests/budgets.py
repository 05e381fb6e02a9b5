"""Budgets for tests: the smallest that works, as the refusal itself names it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from specmoeoff.config import EngineConfig, SpeculativeConfig
from specmoeoff.engine import memory_plan
from specmoeoff.errors import DoesNotFitError

if TYPE_CHECKING:
    from pathlib import Path

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


def forget_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as a fresh process would: what the tests themselves hold does not count."""
    monkeypatch.setattr(memory_plan, "resident_bytes", lambda: 0)
