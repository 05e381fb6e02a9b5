"""Thousands of steps of random work leave nothing behind; benchmarks/soak.py does it for hours."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from budgets import (
    MIB,
    few_slots,
    forget_this_process,
    less_than_all_experts,
    smallest_budget,
)
from harness.soak import Sample, Soak, grown, thirds
from specmoeoff.config import EngineConfig, SpeculativeConfig
from specmoeoff.engine import planned_memory
from specmoeoff.engine.build import build_engine
from specmoeoff.engine.expected_output import ExpectedOutput
from specmoeoff.engine.planned_policy import planned_config
from tiny import BYTE_VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 1500
BUSY_STEPS = 25
SLACK_BYTES = MIB // 2
"""Of resident memory: some 700 bytes for each step between the medians."""


@pytest.fixture
def config(
    wide_target: Path, wide_draft: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> EngineConfig:
    """At the smallest budget, and with so little expected that too many are admitted."""
    forget_this_process(monkeypatch)
    monkeypatch.setattr(ExpectedOutput, "of", lambda self, num_tokens: num_tokens)
    speculative = SpeculativeConfig(
        method,  # type: ignore[arg-type]
        str(wide_draft) if method == "draft_model" else None,
        num_speculative_tokens=3,
        prompt_lookup_min=1,
    )
    options: dict[str, Any] = {"max_model_len": 192, "max_num_seqs": 8, "num_threads": 1}
    memory = smallest_budget(wide_target, speculative, **options)
    return EngineConfig(str(wide_target), memory=memory, speculative=speculative, **options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_nothing_grows(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, device: str, method: str
) -> None:
    """``cpu`` reacts to routing; ``sim`` runs plans, with experts from disk through the host."""
    if device == "sim":
        monkeypatch.setattr(planned_memory, "_reserve_slots", few_slots(6))
        monkeypatch.setattr(planned_memory, "_pages", lambda *_: 12)
        config = replace(config, device="sim", device_memory=64 * MIB, memory=None)
        config = replace(config, memory=less_than_all_experts(config, planned_config(config)))
    engine = build_engine(config)
    soak = Soak(engine, BYTE_VOCABULARY, longest=60)
    samples = []
    while soak.num_steps < STEPS:
        samples.append(soak.round(BUSY_STEPS))
    stats = engine.stats()
    engine.close()
    assert grown(thirds(samples), SLACK_BYTES) == {}
    # All of it happened: else little was tried.
    assert min(soak.num_aborted, stats.preemptions, stats.accepted_tokens) > 0
    assert stats.fetched_experts > stats.expert_slots
    assert stats.kv_pages == 0
    if method == "draft_model":
        assert engine._drafter._contexts._kv.num_used == 0  # type: ignore[union-attr]


SAMPLE = Sample(
    resident_bytes=100 * MIB,
    descriptors=9,
    threads=5,
    reserved_bytes=80 * MIB,
    kv_pages=0,
    missing_slots=0,
)


@pytest.mark.parametrize("name", vars(SAMPLE))
def test_what_leaks_slowly_is_found(name: str) -> None:
    step = 64 << 10 if name == "resident_bytes" else 1
    leaks = [replace(SAMPLE, **{name: getattr(SAMPLE, name) + step * i}) for i in range(40)]
    assert list(grown(thirds(leaks), SLACK_BYTES)) == [name]
    # What comes and goes, and what was only needed once, is no leak.
    waves = [replace(SAMPLE, **{name: getattr(SAMPLE, name) + step * (i % 3)}) for i in range(40)]
    once = [leaks[min(i, 5)] for i in range(40)]
    for samples in (waves, once):
        assert grown(thirds(samples), SLACK_BYTES) == {}


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="2 samples are too few"):
        thirds([SAMPLE] * 2)
