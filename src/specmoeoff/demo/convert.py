"""Turns a GGUF of the llama architecture into a Hugging Face checkpoint, weights in bfloat16.

Knows how llama.cpp names and permutes what Hugging Face stores, and how the two describe a
byte-level BPE tokenizer. ``dropped_layers`` leaves layers out, which gives a weaker, cheaper draft.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from specmoeoff.demo.safetensors_file import TensorPlan, in_file_order, write_tensors
from specmoeoff.errors import CheckpointError, InvalidInputError
from specmoeoff.kernels import to_bfloat16

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from specmoeoff.demo.gguf import GgufFile

U16 = NDArray[np.uint16]

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# GGUF token types of tokens that the BPE must not split.
_CONTROL, _USER_DEFINED = 3, 4


def convert(source: GgufFile, directory: Path, dropped_layers: Collection[int] = ()) -> str:
    """Write the checkpoint into an existing directory and return the SHA-256 of its weights.

    Raises:
        CheckpointError: The file has another architecture or tokenizer, or lacks something.
        InvalidInputError: A dropped layer does not exist, or none would be left.
    """
    config = dense_config(source)
    layers = kept_layers(config["num_hidden_layers"], dropped_layers)
    config["num_hidden_layers"] = len(layers)
    write_json(directory / "config.json", config)
    _write_tokenizer(source, directory)

    origins = _tensor_origins(source, layers)
    plans = in_file_order(
        TensorPlan(name, source.tensors[origin].shape) for name, origin in origins.items()
    )
    values = (_read_bfloat16(source, origins[plan.name], config) for plan in plans)
    return write_tensors(directory / "model.safetensors", plans, values)


def kept_layers(num_layers: int, dropped: Collection[int]) -> list[int]:
    """Return the layers that stay, in order; InvalidInputError if that makes no sense."""
    unknown = sorted(set(dropped) - set(range(num_layers)))
    if unknown:
        raise InvalidInputError(
            f"drop_layers names layer {unknown[0]}; the model has layers 0 to {num_layers - 1}"
        )
    kept = [layer for layer in range(num_layers) if layer not in set(dropped)]
    if not kept:
        raise InvalidInputError("drop_layers names every layer; keep at least one")
    return kept


def dense_config(source: GgufFile) -> dict[str, Any]:
    """Return the config.json of the dense model in a GGUF file."""
    architecture = _require(source, "general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{source.path} has architecture {architecture!r}; only 'llama' can be converted"
        )
    hidden_size = _require(source, "llama.embedding_length")
    num_heads = _require(source, "llama.attention.head_count")
    eps = np.float32(_require(source, "llama.attention.layer_norm_rms_epsilon"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": source.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": _require(source, "llama.feed_forward_length"),
        "num_hidden_layers": _require(source, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": source.metadata.get("llama.attention.head_count_kv", num_heads),
        "head_dim": source.metadata.get("llama.attention.key_length", hidden_size // num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": _require(source, "llama.context_length"),
        # The shortest decimal that is this float32: 1e-05, not 9.99999974e-06.
        "rms_norm_eps": float(str(eps)),
        "rope_theta": float(source.metadata.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        **_special_token_ids(source),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def write_json(path: Path, content: Any) -> None:
    """Write JSON as Hugging Face does: indented, not escaped."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _require(source: GgufFile, key: str) -> Any:
    if key not in source.metadata:
        raise CheckpointError(f"{source.path} has no metadata {key!r}")
    return source.metadata[key]


def _special_token_ids(source: GgufFile) -> dict[str, int | None]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {
        name: source.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()
    }


def _tensor_origins(source: GgufFile, layers: list[int]) -> dict[str, str]:
    """Map each tensor's Hugging Face name to its GGUF name; layers are renumbered from 0."""
    origins = {ours: theirs for ours, theirs in _GLOBAL_NAMES.items() if theirs in source.tensors}
    for new, old in enumerate(layers):
        for ours, theirs in _LAYER_NAMES.items():
            origins[f"model.layers.{new}.{ours}.weight"] = f"blk.{old}.{theirs}.weight"
    missing = [name for name in origins.values() if name not in source.tensors]
    if missing:
        raise CheckpointError(f"{source.path} has no tensor {missing[0]!r}")
    return origins


def _read_bfloat16(source: GgufFile, name: str, config: dict[str, Any]) -> U16:
    value = np.concatenate([to_bfloat16(part) for part in source.rows(name)])
    if ".attn_q." in name:
        return _split_rope_pairs(value, config["num_attention_heads"])
    if ".attn_k." in name:
        return _split_rope_pairs(value, config["num_key_value_heads"])
    return value


def _split_rope_pairs(weight: U16, num_heads: int) -> U16:
    """Undo llama.cpp's row order: it puts the two rows that RoPE rotates side by side.

    Hugging Face rotates a head's first half with its second half.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(rows, columns)


def _write_tokenizer(source: GgufFile, directory: Path) -> None:
    tokens = _require(source, "tokenizer.ggml.tokens")
    special_ids = [
        token_id
        for token_id, kind in enumerate(_require(source, "tokenizer.ggml.token_type"))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    write_json(directory / "tokenizer.json", _tokenizer(source, tokens, special_ids))
    template = source.metadata.get("tokenizer.chat_template")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    ids = _special_token_ids(source)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _require(source, "llama.context_length"),
        "added_tokens_decoder": {str(i): _added_token(tokens[i]) for i in special_ids},
    }
    unknown_id = source.metadata.get("tokenizer.ggml.unknown_token_id")
    for name, token_id in (*ids.items(), ("unk_token_id", unknown_id)):
        if token_id is not None:
            settings[name.removesuffix("_id")] = tokens[token_id]
    if template is not None:
        settings["chat_template"] = template
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "generation_config.json", {"_from_model_config": False, **ids})


def _added_token(content: str) -> dict[str, Any]:
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _tokenizer(source: GgufFile, tokens: list[str], special_ids: list[int]) -> dict[str, Any]:
    """Return tokenizer.json's content, written out here so that no library version changes it."""
    kind = source.metadata.get("tokenizer.ggml.model")
    split = source.metadata.get("tokenizer.ggml.pre")
    if (kind, split) != ("gpt2", "smollm"):
        raise CheckpointError(
            f"{source.path} has tokenizer {kind!r} with pre-tokenizer {split!r}; "
            "only 'gpt2' with 'smollm' can be converted"
        )
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_added_token(tokens[i])} for i in special_ids],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in _require(source, "tokenizer.ggml.merges")],
        },
    }
