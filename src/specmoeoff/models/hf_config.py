"""config.json -> ModelConfig, in the dialects of Transformers 4 and 5.

What is absent gets the value Transformers would give it; what cannot be computed as stated is
refused by name. generation_config.json, where there is one, has the last word on eos ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specmoeoff.config import ModelConfig
from specmoeoff.errors import CheckpointError
from specmoeoff.models.config_fields import Fields
from specmoeoff.models.hf_rope import parse_rope

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class _Family:
    """What Transformers assumes of one model_type when config.json does not say."""

    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None = None
    is_moe: bool = False


_FAMILIES = {
    "llama": _Family(rms_norm_eps=1e-6, rope_theta=10000.0),
    "mistral": _Family(rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=4096),
    "mixtral": _Family(rms_norm_eps=1e-5, rope_theta=1e6, is_moe=True),
}


def parse_config(directory: Path) -> ModelConfig:
    """Read a model's shapes from ``config.json`` in its directory.

    Raises:
        CheckpointError: The file is missing or no JSON, its architecture is not supported, or a
            field is missing, invalid or asks for something that is not computed.
    """
    fields = Fields.load(directory / "config.json")
    model_type = fields.text("model_type")
    family = _FAMILIES.get(model_type)
    if family is None:
        raise fields.invalid("model_type", f"is unknown; supported: {', '.join(_FAMILIES)}")
    _refuse_unsupported(fields)
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    head_dim = _head_dim(fields, hidden_size, num_heads)
    max_positions = fields.integer("max_position_embeddings")
    num_experts, num_experts_per_tok = _experts(fields) if family.is_moe else (0, 0)
    windowed = model_type != "llama"
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(fields, num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", family.rms_norm_eps),
        max_position_embeddings=max_positions,
        rope=parse_rope(fields, family.rope_theta, max_positions, head_dim),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=False,
        sliding_window=_sliding_window(fields, family) if windowed else None,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        bos_token_id=_bos_token_id(fields),
        eos_token_ids=_eos_token_ids(directory, fields),
    )


def _refuse_unsupported(fields: Fields) -> None:
    """Refuse what would silently change the maths."""
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.invalid("hidden_act", "is not supported; it must be 'silu'")
    if fields.boolean("mlp_bias", False):
        raise fields.invalid("mlp_bias", "is not supported; feed-forwards must have no bias")
    if fields.get("quantization_config"):
        raise CheckpointError(
            f"{fields.file}: field 'quantization_config' says that the weights are quantised; "
            "only plain bfloat16, float16 or float32 checkpoints can be used"
        )


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    head_dim = fields.optional_integer("head_dim")
    if head_dim is None:
        if hidden_size % num_heads:
            raise fields.invalid(
                "num_attention_heads", f"does not divide hidden_size {hidden_size}"
            )
        head_dim = hidden_size // num_heads
    return head_dim


def _num_kv_heads(fields: Fields, num_heads: int) -> int:
    num_kv_heads = fields.optional_integer("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise fields.invalid(
            "num_key_value_heads", f"does not divide num_attention_heads {num_heads}"
        )
    return num_kv_heads


def _experts(fields: Fields) -> tuple[int, int]:
    """Return the numbers of experts per layer and per token."""
    name = "num_local_experts" if "num_local_experts" in fields.values else "num_experts"
    if name not in fields.values:
        name = "num_local_experts"
    num_experts = fields.integer(name)
    per_token = fields.integer("num_experts_per_tok")
    if per_token > num_experts:
        raise fields.invalid("num_experts_per_tok", f"is more than {name} {num_experts}")
    return num_experts, per_token


def _sliding_window(fields: Fields, family: _Family) -> int | None:
    if "sliding_window" not in fields.values:
        return family.sliding_window
    return fields.optional_integer("sliding_window")


def _bos_token_id(fields: Fields) -> int | None:
    if "bos_token_id" not in fields.values:
        return 1
    return fields.optional_integer("bos_token_id", minimum=0)


def _eos_token_ids(directory: Path, fields: Fields) -> tuple[int, ...]:
    """Return the eos ids of generation_config.json, or of config.json (absent there: 2)."""
    generation_file = directory / "generation_config.json"
    if generation_file.exists():
        generation = Fields.load(generation_file)
        if generation.get("eos_token_id") is not None:
            return _token_ids(generation)
    if "eos_token_id" not in fields.values:
        return (2,)
    return _token_ids(fields)


def _token_ids(fields: Fields) -> tuple[int, ...]:
    value: Any = fields.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise fields.invalid("eos_token_id", "must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))
