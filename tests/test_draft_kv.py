"""Which drafts may read the target's KV cache: those that compute the very same keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from specmoeoff.config import ModelConfig, RopeConfig
from specmoeoff.engine.draft_kv import shared_layers
from specmoeoff.engine.weights import ModelWeights
from tiny import write_draft, write_tiny

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = ModelConfig("llama", 10, 8, 16, 4, 2, 1, 4, 1e-5, 64, RopeConfig())


def weights_of(num_layers: int) -> ModelWeights:
    rng = np.random.default_rng(3)
    layers: list[dict[str, Any]] = [
        {
            "k": rng.standard_normal((4, 8)),
            "v": rng.standard_normal((4, 8)),
            "q": rng.standard_normal((8, 8)),
            "attn_norm": rng.standard_normal(8),
        }
        for _ in range(num_layers)
    ]
    return ModelWeights({}, layers)


TARGET = weights_of(4)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [0, 2, 3], [1], [3], []])
def test_layers_are_found_where_they_are(layers: list[int]) -> None:
    draft = ModelWeights({}, [{**TARGET.layers[layer]} for layer in layers])
    assert shared_layers(CONFIG, draft, CONFIG, TARGET) == layers


def test_what_does_not_touch_keys_and_values_may_differ() -> None:
    draft = ModelWeights({}, [{**layer, "q": np.zeros((8, 8))} for layer in TARGET.layers])
    assert shared_layers(CONFIG, draft, CONFIG, TARGET) == [0, 1, 2, 3]


def test_vectors_are_compared_and_matrices_recognised() -> None:
    draft = ModelWeights({}, [{**t, "attn_norm": t["attn_norm"].copy()} for t in TARGET.layers])  # type: ignore[union-attr]
    assert shared_layers(CONFIG, draft, CONFIG, TARGET) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"k": np.ones((4, 8))},
        {"v": np.ones((4, 8))},
        {"attn_norm": np.ones(8)},
        {"k_bias": np.ones(4)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_one_other_projection_is_enough_to_refuse(change: dict[str, Any]) -> None:
    layers = [dict(layer) for layer in TARGET.layers]
    layers[2] |= change
    assert shared_layers(CONFIG, ModelWeights({}, layers), CONFIG, TARGET) is None


def test_layers_in_another_order_are_refused() -> None:
    draft = ModelWeights({}, [TARGET.layers[2], TARGET.layers[1]])
    assert shared_layers(CONFIG, draft, CONFIG, TARGET) is None


@pytest.mark.parametrize(
    "change",
    [
        {"num_kv_heads": 2},
        {"head_dim": 8},
        {"rope": RopeConfig(theta=5e5)},
        {"sliding_window": 8},
        {"rms_norm_eps": 1e-6},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_shape_or_rotation_is_refused(change: dict[str, Any]) -> None:
    assert shared_layers(replace(CONFIG, **change), TARGET, CONFIG, TARGET) is None


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, True),
        ({"share_kv": False}, False),
        ({"draft_weight_dtype": "auto"}, True),
    ],
)
def test_an_engine_whose_draft_shares_has_one_cache(
    tmp_path: Path, options: dict[str, Any], shares: bool
) -> None:
    target = write_tiny(tmp_path / "target", seed=5, expert_spread=0.1)
    draft = write_draft(target, tmp_path / "draft", same_attention=True)
    speculative = SpeculativeConfig("draft_model", str(draft), 3, **options)
    prompts = [{"prompt_token_ids": list(range(1, n))} for n in (4, 30, 70)]
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    with LLM(str(target), memory="1GiB") as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
    with LLM(str(target), memory="1GiB", speculative_config=speculative) as llm:
        got = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
        assert len(llm._engine._target._elastic._caches) == (1 if shares else 2)
        assert llm.stats().accepted_tokens > 0
    assert got == wanted
