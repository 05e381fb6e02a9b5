"""The kernels as Python calls them: results are allocated here, everything else is native.

Names, shapes, dtypes and meaning are those of ``reference``; a wrong dtype is a TypeError and a
wrong shape, layout or value a ValueError, both naming the argument. The GIL is released while a
kernel runs. Calls from several threads are safe and take turns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.kernels import _native
from specmoeoff.kernels.weights import Int4Weight, Int8DotWeight, Int8Weight, PackedBfloat16

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from specmoeoff.kernels.weights import F32, I32, U64, Activations, Array, Weight

_BFLOAT16_TARGETS = ("avx512bf16", "amx")
_MOST_OPERANDS = 8
_INT4_GROUPS = (32, 64, 128)
_INT8_DOT_MOST_K = 1 << 17  # sums of 2^17 products of int8 fit 32 bits


def linear(
    x: F32,
    weight: Weight,
    bias: F32 | None = None,
    out: F32 | None = None,
    *,
    activations: Activations = "float32",
) -> F32:
    """Return ``x @ weight.T + bias``: x [T, K], weight [N, K], bias [N] -> [T, N]."""
    bfloat16 = _is_bfloat16(activations)
    if out is None:
        out = np.empty((x.shape[0], _shape(weight, "weight")[0]), np.float32)
    if isinstance(weight, Int8DotWeight):
        _native.int8_dot_linear(x, weight, bias, out)
    else:
        _native.linear(x, weight, bias, out, bfloat16)
    return out


def linear_many(
    x: F32,
    weights: Sequence[Weight],
    biases: Sequence[F32 | None],
    *,
    activations: Activations = "float32",
) -> list[F32]:
    """Return ``linear`` of one x with several weights (Q, K and V, say), in one native call."""
    bfloat16 = _is_bfloat16(activations)
    dtypes = {weight.dtype if isinstance(weight, np.ndarray) else None for weight in weights}
    if len(weights) > _MOST_OPERANDS or len(dtypes) > 1 or None in dtypes:
        pairs = zip(weights, biases, strict=True)
        return [linear(x, weight, bias, activations=activations) for weight, bias in pairs]
    outs = [np.empty((x.shape[0], _shape(w, "weights")[0]), np.float32) for w in weights]
    _native.linear_many(x, weights, biases, outs, bfloat16)
    return outs


def linear_top(
    x: F32,
    weight: Weight,
    top: int,
    bias: F32 | None = None,
    *,
    activations: Activations = "float32",
) -> tuple[F32, I32]:
    """Return the ``top`` largest outputs of ``linear`` per row, without ever having the others.

    Returns:
        values float32 and columns int32, [T, top], largest first, the lower column among equals.
        NaN counts as larger than everything.

    Raises:
        ValueError: top is below 1, or above 64 or N.
    """
    if top < 1:
        raise ValueError(f"top is {top}; it must be at least 1")
    bfloat16 = _is_bfloat16(activations)
    values = np.empty((x.shape[0], top), np.float32)
    ids = np.empty(values.shape, np.int32)
    if isinstance(weight, Int8DotWeight):
        _native.int8_dot_linear_top(x, weight, bias, values, ids)
    else:
        _native.linear_top(x, weight, bias, values, ids, bfloat16)
    return values, ids


def embedding(token_ids: I32, weight: Weight) -> F32:
    """Return rows of an embedding table: token_ids [T], weight [V, K] -> [T, K]."""
    out = np.empty((token_ids.shape[0], _shape(weight, "weight")[1]), np.float32)
    if isinstance(weight, Int8DotWeight):
        _native.int8_dot_embedding(token_ids, weight, out)
    else:
        _native.embedding(token_ids, weight, out)
    return out


def rms_norm(x: F32, weight: F32, eps: float, out: F32 | None = None) -> F32:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` over each row: x [T, K], weight [K]."""
    if out is None:
        out = np.empty(x.shape, np.float32)
    _native.rms_norm(x, weight, eps, out)
    return out


def rope(x: F32, cos: F32, sin: F32) -> None:
    """Rotate heads in place, first half with second half: x [T, heads, D], cos and sin [T, R/2]."""
    _native.rope(x, cos, sin)


def route(logits: F32, top_k: int) -> tuple[I32, F32]:
    """Choose experts: logits [T, E] -> expert_ids int32 [T, top_k] and weights that sum to 1."""
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    expert_ids = np.empty((logits.shape[0], top_k), np.int32)
    expert_weights = np.empty((logits.shape[0], top_k), np.float32)
    _native.route(logits, expert_ids, expert_weights)
    return expert_ids, expert_weights


def expert_ffn(
    x: F32,
    gate: Weight,
    up: Weight,
    down: Weight,
    out: F32,
    rows: I32 | None = None,
    row_weights: F32 | None = None,
    *,
    activations: Activations = "float32",
) -> None:
    """Add an expert's output: ``out[rows] += row_weights * down(silu(gate x) * up x)``.

    The engine hands over runs of experts, which is cheaper. This is for others who take experts one
    by one as weights arrive, and the one way to call a dense feed-forward (no rows, no weights)
    outside a decoder, which the tests do.
    """
    bfloat16 = _is_bfloat16(activations)
    if isinstance(gate, Int8DotWeight):
        _native.int8_dot_expert_ffn(x, gate, up, down, out, rows, row_weights)
    else:
        _native.expert_ffn(x, gate, up, down, out, rows, row_weights, bfloat16)


def expert_ffn_many(
    x: F32,
    experts: Sequence[tuple[Weight, Weight, Weight]],
    offsets: I32,
    rows: I32,
    row_weights: F32,
    out: F32,
    *,
    activations: Activations = "float32",
) -> None:
    """``expert_ffn`` for several experts of equal shapes, in order, in one native call."""
    bfloat16 = _is_bfloat16(activations)
    if experts and isinstance(experts[0][0], Int8DotWeight):
        _native.int8_dot_expert_ffn_many(x, experts, offsets, rows, row_weights, out)
    else:
        _native.expert_ffn_many(x, experts, offsets, rows, row_weights, out, bfloat16)


def widen(weight: Weight) -> F32:
    """Return the float32 values of a weight; a matrix [N, K], or an array of any shape."""
    if isinstance(weight, Int8Weight | Int4Weight | PackedBfloat16):
        out = np.empty(_shape(weight, "weight"), np.float32)
        _native.widen(weight, out)
        return out
    if isinstance(weight, Int8DotWeight):
        out = np.empty(weight.shape, np.float32)
        _native.int8_dot_widen(weight, out)
        return out
    flat = np.ascontiguousarray(weight).reshape(1, -1)
    out = np.empty(flat.shape, np.float32)
    if flat.size:
        _native.widen(flat, out)
    return out.reshape(weight.shape)


def quantize_int8(weight: Weight, group: int | None = None) -> Int8Weight:
    """Quantise a matrix [N, K] to int8 by its largest magnitude per run of ``group`` (None: K)."""
    n, k = _shape(weight, "weight")
    if group is not None and (group < 1 or k % group):
        raise ValueError(f"group is {group}; it must divide the {k} columns of weight")
    values = np.empty((n, k), np.int8)
    scales = np.empty((n, k // (group or k)), np.float32)
    _native.quantize_int8(weight, values, scales)
    return Int8Weight(values, scales)


def quantize_int4(weight: Weight, group: int = 32) -> Int4Weight:
    """Quantise a matrix [N, K] to int4 by its largest magnitude per run of 32, 64 or 128.

    K is a multiple of ``group``.
    """
    n, k = _shape(weight, "weight")
    if group not in _INT4_GROUPS:
        raise ValueError(f"group is {group}; it must be 32, 64 or 128")
    if k == 0 or k % group:
        raise ValueError(f"group is {group}; it must divide the {k} columns of weight")
    values = np.empty((n, k // 2), np.uint8)
    scales = np.empty((n, k // group), np.float32)
    _native.quantize_int4(weight, values, scales)
    return Int4Weight(values, scales)


def pack_int8_dot(weight: Weight) -> Int8DotWeight:
    """Quantise a matrix [N, K] to int8 with one scale per row, for products of int8 with int8.

    K is at most 131072.
    """
    if isinstance(weight, Int8DotWeight):
        return weight
    n, k = _shape(weight, "weight")
    if not 1 <= k <= _INT8_DOT_MOST_K:
        raise ValueError(f"weight has rows of length {k}; it must be 1 to {_INT8_DOT_MOST_K}")
    packed = _aligned_int8((-(-n // 16), -(-k // 4), 16, 4))
    scales = np.empty(n, np.float32)
    _native.pack_int8_dot(weight, packed, scales)
    return Int8DotWeight(packed, scales, (n, k))


def to_bfloat16(x: F32) -> NDArray[np.uint16]:
    """Round float32 of any shape to bfloat16 bits, to nearest even; NaN stays NaN."""
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    out = np.empty(flat.shape, np.uint16)
    _native.to_bfloat16(flat, out)
    return out.reshape(x.shape)


def append_kv(
    keys: F32,
    values: F32,
    k_pages: Array,
    v_pages: Array,
    slots: I32,
    k_scales: F32 | None = None,
    v_scales: F32 | None = None,
) -> None:
    """Write keys and values [T, G, D] into their pages; slots int32 [T] is page * P + offset.

    Pages of int8 take ``k_scales`` and ``v_scales``, float32 [num_pages, G, P].
    """
    _native.append_kv(keys, values, k_pages, v_pages, slots, k_scales, v_scales)


def chunked_attention(
    q: F32,
    k_pages: Array,
    v_pages: Array,
    page_tables: I32,
    q_offsets: I32,
    kv_lens: I32,
    scale: float,
    *,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: F32 | None = None,
    tree_mask: U64 | None = None,
    k_scales: F32 | None = None,
    v_scales: F32 | None = None,
    out: F32 | None = None,
) -> F32:
    """Attend n new tokens of each sequence to its whole paged KV: q [T, H, D] -> [T, H, D]."""
    if out is None:
        out = np.empty(q.shape, np.float32)
    _native.chunked_attention(
        q,
        k_pages,
        v_pages,
        page_tables,
        q_offsets,
        kv_lens,
        scale,
        sliding_window,
        softcap,
        sinks,
        tree_mask,
        k_scales,
        v_scales,
        out,
    )
    return out


def cpu_targets() -> list[str]:
    """Return the kernel targets this CPU supports, the best one last."""
    return _native.cpu_targets()


def cpu_target() -> str:
    """Return the target that runs: ``SPECMOEOFF_CPU_TARGET``, or the best unless one was chosen."""
    return _native.cpu_target()


def use_cpu_target(name: str) -> None:
    """Make a target run from now on; ValueError if this CPU does not support it."""
    _native.use_cpu_target(name)


def multiplies_bfloat16() -> bool:
    """Whether the target that runs has instructions for products of bfloat16 with bfloat16."""
    return _native.cpu_target() in _BFLOAT16_TARGETS


def num_threads() -> int:
    """Return the number of compute threads, the caller included."""
    return _native.num_threads()


def set_num_threads(n: int) -> None:
    """Set the number of compute threads; at first it is the number of CPUs this process may use."""
    _native.set_num_threads(n)


def _is_bfloat16(activations: Activations) -> bool:
    if activations not in ("float32", "bfloat16"):
        raise ValueError(f"activations is {activations!r}; it must be 'float32' or 'bfloat16'")
    return activations == "bfloat16"


def _aligned_int8(shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Return int8 memory that begins with a cache line, so that no 64-byte load crosses one."""
    size = int(np.prod(shape))
    memory = np.empty(size + 63, np.int8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(shape)


def _shape(weight: Weight, name: str) -> tuple[int, int]:
    shape = weight.values.shape if isinstance(weight, Int8Weight) else weight.shape
    if len(shape) != 2:
        raise ValueError(f"{name} has {len(shape)} dimensions; it must have 2")
    return shape[0], shape[1]
