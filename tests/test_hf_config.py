"""config.json in both dialects, and every field that can be wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from specmoeoff.config import ModelConfig, RopeConfig
from specmoeoff.errors import CheckpointError
from specmoeoff.models import build_model, parse_config
from tiny import tiny_config

if TYPE_CHECKING:
    from pathlib import Path

ABSENT = object()


def parse(
    directory: Path, kind: str = "mixtral", generation: Any = None, **overrides: Any
) -> ModelConfig:
    """Write a tiny config with some fields changed (``ABSENT``: removed) and parse it."""
    config = tiny_config(kind) | overrides
    config = {name: value for name, value in config.items() if value is not ABSENT}
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return parse_config(directory)


def test_a_mixtral(tmp_path: Path) -> None:
    assert parse(tmp_path) == ModelConfig(
        model_type="mixtral",
        vocab_size=261,
        hidden_size=60,
        intermediate_size=84,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=24,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        rope=RopeConfig(theta=10000.0),
        num_experts=5,
        num_experts_per_tok=3,
        bos_token_id=256,
        eos_token_ids=(257,),
    )


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral"])
def test_what_is_absent_is_what_transformers_assumes(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    optional = (
        "head_dim",
        "num_key_value_heads" if model_type == "llama" else "architectures",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "sliding_window",
        "hidden_act",
    )
    ours = parse(tmp_path, model_type, **dict.fromkeys(optional, ABSENT))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ours.head_dim == (theirs.head_dim or 10)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "attention_factor": 1.5},
        LLAMA3,
    ],
)
def test_both_dialects_say_the_same(scaling: Any, tmp_path: Path) -> None:
    old = parse(tmp_path, "llama", rope_theta=5e5, rope_scaling=scaling)
    new = parse(
        tmp_path,
        "llama",
        rope_theta=ABSENT,
        torch_dtype=ABSENT,
        dtype="bfloat16",
        rope_parameters={"rope_type": "default", "rope_theta": 5e5} | (scaling or {}),
    )
    assert old == new
    assert old.rope.theta == 5e5
    assert old.rope.rope_type == (scaling or {}).get("rope_type", "default")


def test_rope_kind_by_its_old_name(tmp_path: Path) -> None:
    rope = parse(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}).rope
    assert rope == RopeConfig(10000.0, "linear", (("factor", 2.0),))


def test_original_length_falls_back_to_the_limit_and_outside_wins(tmp_path: Path) -> None:
    scaling = {name: LLAMA3[name] for name in LLAMA3 if not name.startswith("original")}
    name = "original_max_position_embeddings"
    assert parse(tmp_path, rope_scaling=scaling).rope.parameter(name) == 512
    assert parse(tmp_path, rope_scaling=LLAMA3).rope.parameter(name) == 64
    assert parse(tmp_path, rope_scaling=LLAMA3, **{name: 32}).rope.parameter(name) == 32


def test_yarn_without_a_factor_stretches_to_the_limit(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}
    assert parse(tmp_path, rope_scaling=scaling).rope.parameter("factor") == 4.0


@pytest.mark.parametrize("where", ["rope_parameters", "top"])
def test_partial_rotary(where: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"partial_rotary_factor": 0.5}
    if where == "rope_parameters":
        fields = {"rope_parameters": {"rope_type": "default", **fields}}
    assert parse(tmp_path, **fields).rope.parameter("partial_rotary_factor") == 0.5


@pytest.mark.parametrize(
    ("in_config", "generation", "expected"),
    [
        (7, None, (7,)),
        ([7, 8], None, (7, 8)),
        (7, {"eos_token_id": [9, 7, 9]}, (9, 7)),
        (7, {"eos_token_id": 3}, (3,)),
        (7, {"eos_token_id": None}, (7,)),
        (7, {"temperature": 0.6}, (7,)),
        (None, None, ()),
        (ABSENT, None, (2,)),
    ],
)
def test_eos_ids(in_config: Any, generation: Any, expected: Any, tmp_path: Path) -> None:
    assert parse(tmp_path, generation=generation, eos_token_id=in_config).eos_token_ids == expected


def test_windows(tmp_path: Path) -> None:
    assert parse(tmp_path, "mistral", sliding_window=8).sliding_window == 8
    assert parse(tmp_path, "mistral", sliding_window=None).sliding_window is None
    assert parse(tmp_path, "mixtral", sliding_window=8).sliding_window == 8
    # Llama has none in Transformers, whatever its file says.
    assert parse(tmp_path, "llama", sliding_window=8).sliding_window is None


def test_llama_without_kv_heads_is_mha(tmp_path: Path) -> None:
    assert parse(tmp_path, "llama", num_key_value_heads=None).num_kv_heads == 6


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({"model_type": ABSENT}, "'model_type' is missing"),
    "type": ({"model_type": "gpt2"}, "'model_type' is 'gpt2'.*supported: llama, mistral, mixtral"),
    "activation": ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'.*silu"),
    "mlp bias": ({"mlp_bias": True}, "'mlp_bias' is True"),
    "quantised": ({"quantization_config": {"bits": 4}}, "'quantization_config'.*quantised"),
    "no layers": ({"num_hidden_layers": ABSENT}, "'num_hidden_layers' is missing"),
    "null": ({"vocab_size": None}, "'vocab_size' is missing"),
    "zero": ({"hidden_size": 0}, "'hidden_size' is 0"),
    "text": ({"intermediate_size": "84"}, "'intermediate_size' is '84'"),
    "boolean": ({"num_hidden_layers": True}, "'num_hidden_layers' is True"),
    "float": ({"max_position_embeddings": 512.5}, "'max_position_embeddings' is 512.5"),
    "epsilon": ({"rms_norm_eps": -1e-5}, "'rms_norm_eps' is -1e-05"),
    "tied": ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' is 'yes'"),
    "heads": ({"num_attention_heads": 7, "head_dim": None}, "'num_attention_heads' is 7"),
    "kv heads": ({"num_key_value_heads": 4}, "'num_key_value_heads' is 4.*divide"),
    "odd head": ({"head_dim": 25}, "'head_dim' is 25.*even"),
    "too many experts": ({"num_experts_per_tok": 6}, "'num_experts_per_tok' is 6.*more than"),
    "no experts": ({"num_local_experts": ABSENT}, "'num_local_experts' is missing"),
    "window": ({"sliding_window": 0}, "'sliding_window' is 0"),
    "eos": ({"eos_token_id": "x"}, "'eos_token_id' is 'x'"),
    "theta": ({"rope_theta": "big"}, "'rope_theta' is 'big'"),
    "theta 1": ({"rope_theta": 1}, "'rope_theta' is 1.*above 1"),
    "rope": ({"rope_scaling": 2.0}, "'rope_scaling' is 2.0"),
    "rope kind": ({"rope_scaling": {"type": "su"}}, "'rope_scaling.type' is 'su'.*yarn, llama3"),
    "rope kind 5": (
        {"rope_parameters": {"rope_type": "longrope"}},
        "'rope_parameters.rope_type' is 'longrope'",
    ),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "'rope_scaling.factor' is missing"),
    "factor": ({"rope_scaling": {"type": "linear", "factor": "2"}}, "'rope_scaling.factor' is '2'"),
    "llama3": (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        "'rope_scaling.high_freq_factor' is 1.0.*above",
    ),
    "no low": (
        {"rope_scaling": LLAMA3 | {"low_freq_factor": None}},
        "'rope_scaling.low_freq_factor' is missing",
    ),
    "nested": ({"rope_parameters": {"full_attention": {}}}, "different rules for different layers"),
    "partial": ({"partial_rotary_factor": 1.5}, "turn 36 of 24"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    overrides, message = WRONG[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(tmp_path, **overrides)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: field '")


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "not JSON"), (b"\xff", "not JSON"), (b"[]", "no JSON object")]
)
def test_config_that_is_something_else(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        parse_config(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        parse_config(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral"])
def test_every_type_that_parses_can_be_built(model_type: str, tmp_path: Path) -> None:
    config = parse(tmp_path, model_type)
    model = build_model(config)
    assert model.config == config
    assert model.num_ffn_experts == (5 if model_type == "mixtral" else 1)
