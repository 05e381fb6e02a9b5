"""How the memory of planned passes is split: who gets what is left, and what does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from budgets import MIB, forget_this_process
from specmoeoff.config import EngineConfig
from specmoeoff.engine.memory_plan import open_models
from specmoeoff.engine.planned_memory import MemorySplit, split_memory
from specmoeoff.engine.planned_policy import planned_config
from specmoeoff.offload.planned_experts import slot_bytes
from specmoeoff.pipeline.schedules.shape import DEVICE
from tiny import write_tiny

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with 14 MB of experts whose sequences may be long."""
    return write_tiny(
        tmp_path_factory.mktemp("split") / "target",
        seed=3,
        expert_spread=0.1,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        num_attention_heads=4,
        head_dim=64,
        vocab_size=1000,
        max_position_embeddings=2048,
    )


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_this_process(monkeypatch)


def split_of(model: Path, memory: int, **options: Any) -> MemorySplit:
    options = {"device": "sim", "device_memory": 32 * MIB, "num_threads": 1} | options
    config = EngineConfig(str(model), memory=memory, max_num_batched_tokens=24, **options)
    files, draft = open_models(config)
    return split_memory(config, planned_config(config), files, draft)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_the_cache_leaves_host_memory_to_experts_that_fit_there(
    target: Path, kv_dtype: str
) -> None:
    files, _ = open_models(EngineConfig(str(target)))
    experts = files.total_experts * slot_bytes(files.expert_layouts())
    placements = []
    for memory in range(70 * MIB, 110 * MIB, MIB):
        split = split_of(target, memory, kv_dtype=kv_dtype)
        host = split.tiers[0].as_dict()
        page = host["KV cache"] // split.num_pages
        free = memory - host["runtime"] - host["activations"]
        # 256 tokens are the least that there must be room for.
        assert split.num_pages >= 8
        assert (split.placement is DEVICE) == (free >= experts + 8 * page)
        placements.append(split.placement)
    assert len(set(placements)) == 2
