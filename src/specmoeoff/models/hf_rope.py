"""The rotary part of config.json -> RopeConfig.

Transformers 4 writes ``rope_theta`` at the top and ``rope_scaling`` (null, or an object whose kind
is ``rope_type``, earlier ``type``); Transformers 5 writes all of it into ``rope_parameters``.
"""

from __future__ import annotations

from typing import Any

from specmoeoff.config import RopeConfig
from specmoeoff.models.config_fields import Fields
from specmoeoff.models.rope import ROPE_TYPES

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "original_max_position_embeddings",
    ),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}


def parse_rope(
    fields: Fields, default_theta: float, max_positions: int, head_dim: int
) -> RopeConfig:
    """Return the rotary embedding that the fields of config.json describe.

    Raises:
        CheckpointError: The rule is unknown, or a parameter of it is missing or invalid.
    """
    stated = _stated(fields)
    rope_type = _rope_type(stated)
    top = fields if "rope_theta" not in stated.values else stated
    theta = top.number("rope_theta", default_theta)
    if theta <= 1:
        raise top.invalid("rope_theta", "must be above 1")
    parameters: dict[str, Any] = {}
    partial = _first(stated, fields, "partial_rotary_factor")
    if partial is not None:
        parameters["partial_rotary_factor"] = partial.number("partial_rotary_factor")
    filled = Fields(fields.file, _fill(stated, fields, rope_type, max_positions), stated.prefix)
    for name in _REQUIRED[rope_type]:
        parameters[name] = filled.number(name)
    for name in _OPTIONAL.get(rope_type, ()):
        if filled.get(name):  # 0 means unstated, as in Transformers
            parameters[name] = filled.number(name)
    if rope_type == "yarn":
        parameters["truncate"] = filled.boolean("truncate", True)
    if rope_type == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise filled.invalid("high_freq_factor", "must be above low_freq_factor")
    _check_rotary_dim(fields, rope_type, head_dim, parameters.get("partial_rotary_factor", 1.0))
    return RopeConfig(theta, rope_type, tuple(sorted(parameters.items())))


def _stated(fields: Fields) -> Fields:
    """Return the object that states the rule; an empty one where there is none."""
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.get(name)
        if not value:
            continue
        if not isinstance(value, dict):
            raise fields.invalid(name, "must be an object or null")
        if any(isinstance(item, dict) for item in value.values()):
            raise fields.invalid(name, "has different rules for different layers; not supported")
        return Fields(fields.file, value, f"{name}.")
    return Fields(fields.file, {}, "rope_parameters.")


def _rope_type(stated: Fields) -> str:
    name = "type" if stated.get("rope_type") is None else "rope_type"
    rope_type = stated.text(name, "default")
    if rope_type not in ROPE_TYPES:
        raise stated.invalid(name, f"is not supported; use one of {', '.join(ROPE_TYPES)}")
    return rope_type


def _first(first: Fields, second: Fields, name: str) -> Fields | None:
    """Return the one of two objects that states the field, the first before the second."""
    return next((fields for fields in (first, second) if fields.get(name) is not None), None)


def _fill(stated: Fields, fields: Fields, rope_type: str, max_positions: int) -> dict[str, Any]:
    """Return the parameters with what Transformers derives where they are silent."""
    values = dict(stated.values)
    if rope_type not in ("yarn", "llama3"):
        return values
    # A length stated at the top of config.json wins over the one beside the rule.
    outer = fields.get("original_max_position_embeddings")
    name = "original_max_position_embeddings"
    if outer is not None:
        values[name] = outer
    elif values.get(name) is None:
        values[name] = max_positions
    if rope_type == "yarn" and values.get("factor") is None and type(values[name]) is int:
        values["factor"] = max_positions / max(values[name], 1)
    return values


def _check_rotary_dim(fields: Fields, rope_type: str, head_dim: int, partial: float) -> None:
    """Refuse head sizes that cannot be rotated in pairs."""
    name = "head_dim" if fields.get("head_dim") is not None else "hidden_size"
    dim = int(head_dim * partial)
    smallest = 4 if rope_type == "dynamic" else 2
    if dim % 2 or not smallest <= dim <= head_dim:
        raise fields.invalid(
            name,
            f"makes rotary embeddings turn {dim} of {head_dim} dimensions of a head; "
            f"that must be an even number, {smallest} to {head_dim}",
        )
