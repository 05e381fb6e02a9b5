"""Writes random little checkpoints of odd shapes, as a hub would have them, without transformers.

Weights are scaled so that a layer changes the residual stream about as much as it carries, which
keeps greedy text varied. ``write_draft`` derives a dense model that agrees with a target often,
``write_tiny`` with another seed one that hardly ever does.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from specmoeoff.kernels.reference import to_bfloat16, widen
from specmoeoff.offload.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

Array = NDArray[np.generic]

BOS_TOKEN_ID, EOS_TOKEN_ID = 256, 257
BYTE_VOCABULARY = 261
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|eos|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HEAVY: dict[str, Any] = {
    "seed": 3,
    "expert_spread": 0.1,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
"""Options of ``write_tiny`` for experts of 1.2 MB each, and sequences that may be long."""
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]

STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def tiny_config(model_type: str = "mixtral", **overrides: Any) -> dict[str, Any]:
    """Return config.json as Transformers 4 writes it, of odd shapes; overrides name its fields."""
    config: dict[str, Any] = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": BYTE_VOCABULARY,
        "hidden_size": 60,
        "intermediate_size": 84,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "torch_dtype": "bfloat16",
    }
    if model_type != "llama":
        config["sliding_window"] = None
    if model_type == "mixtral":
        config |= {"num_local_experts": 5, "num_experts_per_tok": 3}
    return config | overrides


def write_tiny(
    directory: Path,
    model_type: str = "mixtral",
    seed: int = 0,
    dtype: str = "bfloat16",
    *,
    sharded: bool = False,
    tokenizer: bool = False,
    expert_spread: float = 1.0,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint and return its directory.

    Args:
        directory: Created where it is missing.
        model_type: ``mixtral``, ``llama`` or ``mistral``.
        seed: Same seed and shapes, same weights.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        sharded: Write three shards and an index instead of one file.
        tokenizer: Add a byte-level tokenizer.json with a chat template; its 261 tokens are the
            256 bytes, then ``SPECIAL_TOKENS``.
        expert_spread: How far experts are from their common mean: 1 independent, 0 all alike.
        overrides: Fields of config.json.
    """
    config = tiny_config(model_type, torch_dtype=dtype, **overrides)
    weights = random_weights(config, seed, expert_spread)
    return _write(directory, config, weights, dtype, sharded=sharded, tokenizer=tokenizer)


def write_draft(
    target: Path,
    directory: Path,
    noise: float = 0.02,
    seed: int = 1,
    *,
    tokenizer: bool = False,
    same_attention: bool = False,
) -> Path:
    """Write a dense Llama with the target's vocabulary that often agrees with it.

    It takes the target's weights plus noise (relative to each matrix's spread); of a Mixtral's
    experts the mean, so how often it agrees is up to the target's ``expert_spread``: with the
    default noise about 0.8 of the tokens at 0.1, 0.6 at 0.2, hardly any at 1. With
    ``same_attention`` only the feed-forward has noise, as in a model that was upcycled.
    """
    config = json.loads((target / "config.json").read_text())
    checkpoint = Checkpoint.open(target)
    read = {name: _float32(checkpoint.read(name)) for name in checkpoint.tensors}
    rng = np.random.default_rng(seed)
    weights: dict[str, NDArray[np.float32]] = {}
    for name, values in _dense_weights(config, read).items():
        is_noisy = values.ndim == 2 and not (same_attention and "self_attn" in name)
        scale = noise * values.std() if is_noisy else 0.0
        weights[name] = values + np.float32(scale) * rng.standard_normal(values.shape, np.float32)
    dropped = ("num_local_experts", "num_experts_per_tok", "sliding_window")
    config = {name: value for name, value in config.items() if name not in dropped}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return _write(directory, config, weights, config["torch_dtype"], tokenizer=tokenizer)


def random_weights(
    config: dict[str, Any], seed: int, expert_spread: float = 1.0
) -> dict[str, NDArray[np.float32]]:
    """Return name -> float32 weights for a config, in the order of a real checkpoint."""
    rng = np.random.default_rng(seed)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    wide, narrow = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    weights: dict[str, NDArray[np.float32]] = {}

    def normal(shape: tuple[int, ...], gain: float) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32) * np.float32(gain)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> NDArray[np.float32]:
        return normal((rows, columns), gain / columns**0.5)

    def norm() -> NDArray[np.float32]:
        return 1 + normal((hidden,), 0.2)

    weights["model.embed_tokens.weight"] = normal((config["vocab_size"], hidden), 0.4)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = norm()
        for name, rows, columns in (
            ("q", wide, hidden),
            ("k", narrow, hidden),
            ("v", narrow, hidden),
            ("o", hidden, wide),
        ):
            # Sharper queries: attention that looks at everything alike says nothing.
            gain = 2.0 if name in "qk" else 1.0
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(rows, columns, gain)
            if config.get("attention_bias"):
                weights[f"{prefix}.self_attn.{name}_proj.bias"] = normal((rows,), 0.3)
        weights[f"{prefix}.post_attention_layernorm.weight"] = norm()
        weights |= _ffn_weights(config, prefix, matrix, expert_spread)
    weights["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden, 3.0)
    return weights


def write_safetensors(path: Path, tensors: dict[str, tuple[str, Array]], pad: int = 8) -> None:
    """Write a safetensors file: name -> (stored dtype, array); bfloat16 as its bits.

    ``pad`` is what the header is padded to; 1 leaves the data at an odd address now and then.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (stored, array) in tensors.items():
        header[name] = {
            "dtype": stored,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write_byte_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: one token per byte, and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content))


def _write(
    directory: Path,
    config: dict[str, Any],
    weights: dict[str, NDArray[np.float32]],
    dtype: str,
    *,
    sharded: bool = False,
    tokenizer: bool = False,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    stored = {name: (STORED[dtype], _stored(values, dtype)) for name, values in weights.items()}
    if sharded:
        _write_shards(directory, stored, 3)
    else:
        write_safetensors(directory / "model.safetensors", stored)
    if tokenizer:
        write_byte_tokenizer(directory)
    return directory


def _write_shards(directory: Path, tensors: dict[str, tuple[str, Array]], count: int) -> None:
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = names[len(names) * shard // count : len(names) * (shard + 1) // count]
        write_safetensors(directory / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.nbytes for _, array in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def _ffn_weights(
    config: dict[str, Any], prefix: str, matrix: Any, expert_spread: float
) -> dict[str, NDArray[np.float32]]:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "gate": (intermediate, hidden),
        "up": (intermediate, hidden),
        "down": (hidden, intermediate),
    }
    gains = {"gate": 2.0, "up": 2.0, "down": 1.5}
    mean = {name: matrix(*shape, gains[name]) for name, shape in shapes.items()}
    if config["model_type"] != "mixtral":
        return {f"{prefix}.mlp.{name}_proj.weight": values for name, values in mean.items()}
    block = f"{prefix}.block_sparse_moe"
    weights = {f"{block}.gate.weight": matrix(config["num_local_experts"], hidden, 2.0)}
    common = np.float32((1 - expert_spread**2) ** 0.5)
    for expert in range(config["num_local_experts"]):
        for name, file_name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            own = matrix(*shapes[name], gains[name]) * np.float32(expert_spread)
            weights[f"{block}.experts.{expert}.{file_name}.weight"] = common * mean[name] + own
    return weights


def _dense_weights(
    config: dict[str, Any], weights: dict[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """Return a Llama's weights out of any target's: experts give way to their mean."""
    dense = {name: values for name, values in weights.items() if "block_sparse_moe" not in name}
    if config["model_type"] != "mixtral":
        return dense
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}.block_sparse_moe.experts"
        for name, file_name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            experts = [
                weights[f"{block}.{expert}.{file_name}.weight"]
                for expert in range(config["num_local_experts"])
            ]
            dense[f"model.layers.{layer}.mlp.{name}_proj.weight"] = np.mean(experts, axis=0)
    return dense


def _stored(values: NDArray[np.float32], dtype: str) -> Array:
    if dtype == "bfloat16":
        return to_bfloat16(values)
    return values.astype(np.float16 if dtype == "float16" else np.float32)


def _float32(array: Array) -> NDArray[np.float32]:
    return widen(array)
