from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from specmoeoff.kernels.weights import F32, I32, U64, Array, Int8DotWeight, Weight

def linear(x: F32, weight: Weight, bias: F32 | None, out: F32, bfloat16: bool = False) -> None: ...
def linear_many(
    x: F32,
    weights: Sequence[Weight],
    biases: Sequence[F32 | None],
    outs: Sequence[F32],
    bfloat16: bool = False,
) -> None: ...
def linear_top(
    x: F32,
    weight: Weight,
    bias: F32 | None,
    values: F32,
    ids: I32,
    bfloat16: bool = False,
) -> None: ...
def embedding(token_ids: I32, weight: Weight, out: F32) -> None: ...
def rms_norm(x: F32, weight: F32, eps: float, out: F32) -> None: ...
def rope(x: F32, cos: F32, sin: F32) -> None: ...
def route(logits: F32, expert_ids: I32, expert_weights: F32) -> None: ...
def expert_ffn(
    x: F32,
    gate: Weight,
    up: Weight,
    down: Weight,
    out: F32,
    rows: I32 | None = None,
    row_weights: F32 | None = None,
    bfloat16: bool = False,
) -> None: ...
def expert_ffn_many(
    x: F32,
    experts: Sequence[tuple[Weight, Weight, Weight]],
    offsets: I32,
    rows: I32,
    row_weights: F32,
    out: F32,
    bfloat16: bool = False,
) -> None: ...
def int8_dot_linear(x: F32, weight: Int8DotWeight, bias: F32 | None, out: F32) -> None: ...
def int8_dot_linear_top(
    x: F32, weight: Int8DotWeight, bias: F32 | None, values: F32, ids: I32
) -> None: ...
def int8_dot_embedding(token_ids: I32, weight: Int8DotWeight, out: F32) -> None: ...
def int8_dot_expert_ffn(
    x: F32,
    gate: Weight,
    up: Weight,
    down: Weight,
    out: F32,
    rows: I32 | None = None,
    row_weights: F32 | None = None,
) -> None: ...
def int8_dot_expert_ffn_many(
    x: F32,
    experts: Sequence[tuple[Weight, Weight, Weight]],
    offsets: I32,
    rows: I32,
    row_weights: F32,
    out: F32,
) -> None: ...
def int8_dot_widen(weight: Int8DotWeight, out: F32) -> None: ...
def pack_int8_dot(weight: Weight, packed: NDArray[Any], scales: F32) -> None: ...
def widen(weight: Weight, out: F32) -> None: ...
def quantize_int8(weight: Weight, values: NDArray[Any], scales: F32) -> None: ...
def quantize_int4(weight: Weight, values: NDArray[Any], scales: F32) -> None: ...
def to_bfloat16(x: F32, out: NDArray[Any]) -> None: ...
def append_kv(
    keys: F32,
    values: F32,
    k_pages: Array,
    v_pages: Array,
    slots: I32,
    k_scales: F32 | None,
    v_scales: F32 | None,
) -> None: ...
def chunked_attention(
    q: F32,
    k_pages: Array,
    v_pages: Array,
    page_tables: I32,
    q_offsets: I32,
    kv_lens: I32,
    scale: float,
    sliding_window: int,
    softcap: float,
    sinks: F32 | None,
    tree_mask: U64 | None,
    k_scales: F32 | None,
    v_scales: F32 | None,
    out: F32,
) -> None: ...
def cpu_targets() -> list[str]: ...
def cpu_target() -> str: ...
def use_cpu_target(name: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def measure_read_bandwidth(data: F32, repeats: int = 5) -> float: ...
def measure_fma(repeats: int = 5) -> float: ...

class Decoder:
    def __init__(
        self,
        *,
        layers: Sequence[Mapping[str, Weight]],
        pages: Sequence[tuple[Array, Array, F32 | None, F32 | None]],
        hidden: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_experts: int,
        top_k: int,
        eps: float,
        scale: float,
        sliding_window: int,
        bfloat16: bool,
    ) -> None: ...
    @property
    def row_floats(self) -> int: ...
    def set_experts(
        self, experts: Sequence[Sequence[tuple[Weight, Weight, Weight]]] | None
    ) -> None: ...

class DecoderPass:
    def __init__(
        self,
        decoder: Decoder,
        x: F32,
        cos: F32,
        sin: F32,
        slots: I32,
        page_tables: I32,
        q_offsets: I32,
        kv_lens: I32,
        workspace: F32,
        h: F32,
        rows: I32,
        row_weights: F32,
        offsets: I32,
    ) -> None: ...
    def attend(self, layer: int) -> None: ...
    def experts(self, layer: int) -> None: ...
