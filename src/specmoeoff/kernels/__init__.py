"""The functions every model calls: native ones, specified by ``reference``."""

from specmoeoff.kernels.native import (
    append_kv,
    chunked_attention,
    cpu_target,
    cpu_targets,
    embedding,
    expert_ffn,
    expert_ffn_many,
    linear,
    num_threads,
    quantize_int8,
    rms_norm,
    rope,
    route,
    set_num_threads,
    to_bfloat16,
    use_cpu_target,
    widen,
)
from specmoeoff.kernels.reference import Int8Weight, Weight

__all__ = [
    "Int8Weight",
    "Weight",
    "append_kv",
    "chunked_attention",
    "cpu_target",
    "cpu_targets",
    "embedding",
    "expert_ffn",
    "expert_ffn_many",
    "linear",
    "num_threads",
    "quantize_int8",
    "rms_norm",
    "rope",
    "route",
    "set_num_threads",
    "to_bfloat16",
    "use_cpu_target",
    "widen",
]
