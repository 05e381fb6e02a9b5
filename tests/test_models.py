"""Our models give Transformers' float32 logits, for every family, rope rule and config dialect."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plain_forward import PlainForward
from specmoeoff.config import ModelConfig, RopeConfig
from specmoeoff.errors import CheckpointError
from specmoeoff.models import build_model, check_layout, check_router, parse_config
from specmoeoff.models.rope import ROPE_TYPES, Rope
from specmoeoff.offload.checkpoint import Checkpoint
from tiny import tiny_config, write_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# Logits have a spread of about 3; both sides sum in float32, in different orders.
ATOL = 3e-4

PROMPT = [
    5,
    200,
    17,
    99,
    3,
    3,
    128,
    64,
    31,
    7,
    250,
    2,
    90,
    91,
    92,
    18,
    19,
    20,
    222,
    1,
    44,
    45,
    46,
    8,
]

YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn-mscale": {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn-stated": {"type": "yarn", **YARN, "attention_factor": 1.3, "truncate": False},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def oracle_model(directory: Path, dtype: str = "float32") -> Any:
    """Load a checkpoint with Transformers, weights and activations in ``dtype``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformers' own deprecations are not ours to fix.
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
    return model.eval()


def oracle_logits(
    directory: Path, token_ids: list[int], dtype: str = "float32"
) -> NDArray[np.float32]:
    """Return Transformers' logits [T, V]."""
    import torch

    with torch.no_grad():
        logits = oracle_model(directory, dtype)(torch.tensor([token_ids])).logits
    return logits[0].float().numpy()


def assert_same_logits(directory: Path, token_ids: list[int] = PROMPT) -> None:
    expected = oracle_logits(directory, token_ids)
    ours = PlainForward(directory).logits(token_ids)
    assert expected.std() > 0.3  # a model that says nothing would prove nothing
    np.testing.assert_allclose(ours, expected, rtol=0, atol=ATOL)


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"vocab_size": 1003}),
    "mixtral-one-layer-tied": ("mixtral", {"num_hidden_layers": 1, "tie_word_embeddings": True}),
    "mixtral-window": ("mixtral", {"sliding_window": 7}),
    "mixtral-one-expert-each": ("mixtral", {"num_experts_per_tok": 1}),
    "mixtral-all-experts": ("mixtral", {"num_experts_per_tok": 5}),
    "mixtral-float32-sharded": ("mixtral", {"dtype": "float32", "sharded": True}),
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 6}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-head-dim-null": ("llama", {"head_dim": None}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "llama-tied-float16": ("llama", {"tie_word_embeddings": True, "dtype": "float16"}),
    "llama-theta": ("llama", {"rope_theta": 500000.0, "rms_norm_eps": 1e-2}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 5, "vocab_size": 1003}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    model_type, overrides = SHAPES[case]
    assert_same_logits(write_tiny(tmp_path, model_type, seed=len(case), **overrides))


@pytest.mark.parametrize("case", ["llama", "mistral-window", "mixtral-all-experts"])
def test_bfloat16_is_nearer_to_float32_than_transformers_bfloat16(
    case: str, tmp_path: Path
) -> None:
    # No router that chooses: one that rounding tips over says nothing about the products.
    model_type, overrides = SHAPES[case]
    # torch's grouped products of bfloat16 want rows of whole 16 bytes.
    overrides = {**overrides, "hidden_size": 72, "intermediate_size": 88}
    directory = write_tiny(tmp_path, model_type, seed=len(case), **overrides)
    exact, theirs = (oracle_logits(directory, PROMPT, dtype) for dtype in ("float32", "bfloat16"))
    ours = PlainForward(directory, "bfloat16").logits(PROMPT)

    def distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
        return float(np.sqrt(np.mean((a - b) ** 2)))

    # Transformers rounds results as well, and all that lies between products.
    assert distance(ours, exact) <= distance(theirs, exact) < 0.05 * exact.std()
    # Rounding is there, and of the size of bfloat16's.
    assert distance(ours, exact) > 2**-11 * exact.std()


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling_gives_transformers_logits(rope: str, model_type: str, tmp_path: Path) -> None:
    assert_same_logits(write_tiny(tmp_path, model_type, seed=4, rope_scaling=ROPES[rope]))


def test_head_dim_that_was_never_written(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path, "mistral", head_dim=10)
    config = json.loads((directory / "config.json").read_text())
    del config["head_dim"]
    (directory / "config.json").write_text(json.dumps(config))
    assert_same_logits(directory)


def test_dynamic_rope_beyond_the_limit_is_transformers_decode(tmp_path: Path) -> None:
    import torch
    import transformers

    rope = {"rope_type": "dynamic", "factor": 2.0}
    directory = write_tiny(tmp_path, "llama", rope_scaling=rope, max_position_embeddings=9)
    model, expected = oracle_model(directory), []
    # Transformers 5.24 calls it ``cache``, those before it ``past_key_values``.
    takes_cache = "cache" in inspect.signature(model.forward).parameters
    cache = {"cache" if takes_cache else "past_key_values": transformers.DynamicCache()}
    with torch.no_grad():
        for token in PROMPT:
            step = model(torch.tensor([[token]]), use_cache=True, **cache)
            expected.append(step.logits[0, 0].numpy())
    ours = PlainForward(directory).logits(PROMPT)
    np.testing.assert_allclose(ours, np.stack(expected), rtol=0, atol=ATOL)


@pytest.mark.parametrize("model_type", ["mixtral", "llama", "mistral"])
def test_saved_by_transformers_5(model_type: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "4", model_type, rope_scaling=ROPES["llama3"], sharded=True)
    oracle_model(source).save_pretrained(tmp_path / "5")
    written = json.loads((tmp_path / "5" / "config.json").read_text())
    assert "rope_parameters" in written
    assert "rope_theta" not in written
    assert parse_config(tmp_path / "5") == parse_config(source)
    np.testing.assert_array_equal(
        PlainForward(tmp_path / "5").logits(PROMPT), PlainForward(source).logits(PROMPT)
    )


def test_greedy_tokens_are_those_of_transformers(tiny_mixtral: Path) -> None:
    import torch

    prompt = torch.tensor([PROMPT])
    expected = oracle_model(tiny_mixtral).generate(
        prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = PlainForward(tiny_mixtral).greedy(PROMPT, 24)
    assert ours == expected[0, len(PROMPT) :].tolist()
    assert len(set(ours)) > 8


def test_token_by_token_is_the_whole_prompt(tiny_mistral: Path) -> None:
    forward = PlainForward(tiny_mistral)
    whole = forward.logits(PROMPT)
    forward.reset()
    one_by_one = np.concatenate([forward.logits([token]) for token in PROMPT])
    np.testing.assert_allclose(one_by_one, whole, rtol=0, atol=ATOL)


@pytest.mark.parametrize("model_type", ["mixtral", "llama", "mistral"])
def test_every_tensor_of_a_checkpoint_is_named_once(model_type: str, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path, model_type, attention_bias=True)
    checkpoint, model = Checkpoint.open(directory), build_model(parse_config(directory))
    named = [spec.name for spec in model.global_tensors().values()]
    for layer in range(model.config.num_layers):
        named += [spec.name for spec in model.layer_tensors(layer).values()]
        for expert in range(model.num_ffn_experts):
            named += [spec.name for spec in model.expert_tensors(layer, expert).values()]
    assert sorted(named) == sorted(checkpoint.tensors)


def test_dense_router_is_expert_0_with_weight_1(tmp_path: Path) -> None:
    model = build_model(parse_config(write_tiny(tmp_path, "llama")))
    ids, weights = model.router({}, np.ones((3, 60), np.float32))
    assert (ids.tolist(), weights.tolist()) == ([[0]] * 3, [[1.0]] * 3)
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)


def test_unknown_model_type_is_refused_by_the_registry() -> None:
    config = ModelConfig("gpt9", 10, 8, 8, 1, 1, 1, 8, 1e-5, 64, RopeConfig())
    with pytest.raises(CheckpointError, match="'gpt9' is unknown; supported: llama, mistral"):
        build_model(config)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_router_that_is_not_finite_is_refused(dtype: Any, value: float) -> None:
    router = np.zeros((4, 6), dtype)
    check_router("gate", router)
    router[2, 5] = value if dtype != np.uint16 else np.float32(value).view(np.uint32) >> 16
    with pytest.raises(CheckpointError, match=r"'gate' holds 1 values .* row of expert 2"):
        check_router("gate", router)


def test_fused_experts_are_refused_with_the_way_out() -> None:
    check_layout(["model.layers.0.block_sparse_moe.experts.0.w1.weight"])
    with pytest.raises(CheckpointError, match="save_pretrained"):
        check_layout(["model.embed_tokens.weight", "model.layers.0.mlp.experts.gate_up_proj"])


def rope_config(rope_type: str, **parameters: Any) -> ModelConfig:
    rope = RopeConfig(10000.0, rope_type, tuple(sorted(parameters.items())))
    return ModelConfig("llama", 10, 48, 8, 1, 2, 2, 24, 1e-5, 64, rope)


ROPE_PARAMETERS = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": YARN,
    "llama3": {name: value for name, value in ROPES["llama3"].items() if name != "rope_type"},
}


@given(
    rope_type=st.sampled_from(ROPE_TYPES),
    positions=st.lists(st.integers(0, 200_000), min_size=1, max_size=40),
)
def test_a_position_turns_the_same_in_any_company(rope_type: str, positions: list[int]) -> None:
    rope = Rope(rope_config(rope_type, **ROPE_PARAMETERS[rope_type]))
    cos, sin = rope.tables(np.array(positions, np.int32))
    for i, position in enumerate(positions):
        alone = rope.tables(np.array([position], np.int32))
        np.testing.assert_array_equal(cos[i], alone[0][0])
        np.testing.assert_array_equal(sin[i], alone[1][0])


def test_partial_rotary_turns_the_first_dimensions_as_if_the_head_were_smaller() -> None:
    partial = rope_config("default", partial_rotary_factor=0.5)
    small = replace(rope_config("default"), head_dim=12)
    positions = np.array([0, 3, 50], np.int32)
    for a, b in zip(Rope(partial).tables(positions), Rope(small).tables(positions), strict=True):
        assert a.shape == (3, 6)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rope", ["default", *ROPES])
def test_frequencies_are_transformers_to_the_last_places(rope: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # The limit is short of where dynamic scaling begins: there the rule is tested above.
    written = tiny_config("llama", rope_scaling=ROPES.get(rope), max_position_embeddings=64)
    (tmp_path / "config.json").write_text(json.dumps(written))
    oracle = LlamaRotaryEmbedding(LlamaConfig(**written))
    from specmoeoff.models.rope import attention_factor, inverse_frequencies

    config = parse_config(tmp_path)
    np.testing.assert_allclose(inverse_frequencies(config), oracle.inv_freq.numpy(), rtol=5e-7)
    assert attention_factor(config.rope) == pytest.approx(oracle.attention_scaling, rel=1e-12)
