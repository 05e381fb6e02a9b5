"""The functions every model calls. The native module does the work; ``reference`` says what it is."""

from specmoeoff.kernels.reference import (
    Int8Weight,
    Weight,
    append_kv,
    chunked_attention,
    embedding,
    expert_ffn,
    expert_ffn_many,
    linear,
    quantize_int8,
    rms_norm,
    rope,
    route,
    to_bfloat16,
    widen,
)

__all__ = [
    "Int8Weight",
    "Weight",
    "append_kv",
    "chunked_attention",
    "embedding",
    "expert_ffn",
    "expert_ffn_many",
    "linear",
    "quantize_int8",
    "rms_norm",
    "rope",
    "route",
    "to_bfloat16",
    "widen",
]
