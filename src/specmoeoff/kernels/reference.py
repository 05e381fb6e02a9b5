"""The specification of every kernel, in plain numpy: short, slow and obviously right.

The native module must agree with these functions within rounding; tests compare them on every
CPU target. Arrays are C-contiguous unless stated. Weights are ``float32``, ``float16`` or
``uint16`` (the bits of bfloat16); activations are ``float32``.

Shape letters: T tokens, K inner size, N outer size, B sequences, H query heads, G KV heads,
D head size, P tokens in a page, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.kernels.packed import unpack_bfloat16
from specmoeoff.kernels.weights import Int4Weight, Int8DotWeight, Int8Weight, PackedBfloat16

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from specmoeoff.kernels.weights import F32, I32, U64, Activations, Array, Weight


def widen(weight: Weight) -> F32:
    """Return the float32 values of a weight, [N, K]."""
    if isinstance(weight, Int8Weight):
        n, k = weight.values.shape
        groups = weight.scales.shape[1]
        values = weight.values.astype(np.float32).reshape(n, groups, k // groups)
        return (values * weight.scales[:, :, None]).reshape(n, k)
    if isinstance(weight, Int4Weight):
        n, k = weight.shape
        runs = weight.values.reshape(n, k // 32, 1, 16)
        nibbles = np.concatenate([runs & 15, runs >> 4], axis=2).astype(np.float32) - 8
        groups = weight.scales.shape[1]
        scaled = nibbles.reshape(n, groups, k // groups) * weight.scales[:, :, None]
        return scaled.reshape(n, k)
    if isinstance(weight, Int8DotWeight):
        return _unpack(weight) * weight.scales[:, None]
    if isinstance(weight, PackedBfloat16):
        weight = unpack_bfloat16(weight)
    if weight.dtype == np.uint16:
        return (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.astype(np.float32)


def to_bfloat16(x: F32) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def quantize_int8(weight: Weight, group: int | None = None) -> Int8Weight:
    """Quantise a matrix [N, K] to int8 by its largest magnitude per run of ``group`` (None: K)."""
    w = widen(weight)
    n, k = w.shape
    w = w.reshape(n, -1, group or k)
    scales = np.abs(w).max(axis=2) / np.float32(127)
    safe = np.where(scales == 0, np.float32(1), scales)
    values = np.rint(w / safe[:, :, None]).clip(-127, 127).astype(np.int8)
    return Int8Weight(values.reshape(n, k), np.ascontiguousarray(scales, np.float32))


def quantize_int4(weight: Weight, group: int = 32) -> Int4Weight:
    """Quantise a matrix [N, K] to int4 by its largest magnitude per run of 32, 64 or 128.

    Integers are -7 to 7, a scale is the largest magnitude of its run / 7; K is a multiple of
    ``group``.
    """
    w = widen(weight)
    n, k = w.shape
    w = w.reshape(n, -1, group)
    scales = np.abs(w).max(axis=2) / np.float32(7)
    safe = np.where(scales == 0, np.float32(1), scales)
    values = np.rint(w / safe[:, :, None]).clip(-7, 7) + 8
    runs = values.astype(np.uint8).reshape(n, k // 32, 2, 16)
    packed = (runs[:, :, 0] + 16 * runs[:, :, 1]).astype(np.uint8).reshape(n, k // 2)
    return Int4Weight(packed, np.ascontiguousarray(scales, np.float32))


def pack_int8_dot(weight: Weight) -> Int8DotWeight:
    """Quantise a matrix [N, K] to int8 with one scale per row, for products of int8 with int8."""
    rounded = quantize_int8(weight)
    n, k = rounded.values.shape
    padded = np.pad(rounded.values, ((0, -n % 16), (0, -k % 4)))
    blocks = padded.reshape(-(-n // 16), 16, -(-k // 4), 4).transpose(0, 2, 1, 3)
    return Int8DotWeight(np.ascontiguousarray(blocks), rounded.scales[:, 0].copy(), (n, k))


def _unpack(weight: Int8DotWeight) -> F32:
    """Return the integers of a packed matrix as float32 [N, K]."""
    n, k = weight.shape
    blocks = weight.packed.transpose(0, 2, 1, 3)
    rows, columns = 16 * blocks.shape[0], 4 * blocks.shape[2]
    return blocks.reshape(rows, columns)[:n, :k].astype(np.float32)


def round_rows(x: F32) -> tuple[F32, F32]:
    """Round rows [T, K] to the integers -127 to 127: (integers as float32 [T, K], scales [T]).

    A row's scale is its largest magnitude / 127, or NaN if the row has a NaN or an infinity.
    """
    finite = np.isfinite(x)
    scales = np.abs(np.where(finite, x, 0)).max(axis=1) / np.float32(127)
    safe = np.where(scales == 0, np.float32(1), scales)
    values = np.rint(np.where(finite, x, 0) / safe[:, None]).clip(-127, 127)
    return values, np.where(finite.all(axis=1), scales, np.float32(np.nan))


def _int8_dot(x: F32, weight: Int8DotWeight) -> F32:
    values, scales = round_rows(x)
    # Whole numbers below 2^53: the sums are exact in any order.
    sums = values.astype(np.float64) @ _unpack(weight).astype(np.float64).T
    return sums.astype(np.float32) * weight.scales * scales[:, None]


def linear(
    x: F32,
    weight: Weight,
    bias: F32 | None = None,
    out: F32 | None = None,
    *,
    activations: Activations = "float32",
) -> F32:
    """Return ``x @ weight.T + bias``: x [T, K], weight [N, K], bias [N] -> [T, N].

    With an ``Int8DotWeight`` x is rounded first, whatever ``activations`` says; results are
    specified to the last bit. Otherwise "bfloat16" rounds x to nearest even first. With weights of
    bfloat16, int8 or int4 a target that multiplies pairs of bfloat16 may take denormals (of
    operands, products and sums) as zero.
    """
    if isinstance(weight, Int8DotWeight):
        y = _int8_dot(x, weight)
    else:
        if activations == "bfloat16":
            x = widen(to_bfloat16(x))
        y = (x.astype(np.float64) @ widen(weight).astype(np.float64).T).astype(np.float32)
    if bias is not None:
        y += bias
    if out is None:
        return y
    out[...] = y
    return out


def linear_many(
    x: F32,
    weights: Sequence[Weight],
    biases: Sequence[F32 | None],
    *,
    activations: Activations = "float32",
) -> list[F32]:
    """Return ``linear`` of one x with several weights: x [T, K], weights [N, K] -> [T, N] each."""
    pairs = zip(weights, biases, strict=True)
    return [linear(x, weight, bias, activations=activations) for weight, bias in pairs]


def linear_top(
    x: F32,
    weight: Weight,
    top: int,
    bias: F32 | None = None,
    *,
    activations: Activations = "float32",
) -> tuple[F32, I32]:
    """Return the ``top`` largest outputs of ``linear`` per row and their columns, [T, top].

    Largest first, the lower column among equals; NaN counts as larger than everything.
    """
    y = linear(x, weight, bias, activations=activations)
    # -(-0.0) sorts like 0.0, and sorting puts NaN last: as the largest it belongs to the front.
    key = np.where(np.isnan(y), -np.inf, -y)
    # An infinite output and NaN would tie: NaN comes before it.
    order = np.lexsort((np.broadcast_to(np.arange(y.shape[1]), y.shape), key, ~np.isnan(y)), axis=1)
    ids = order[:, :top].astype(np.int32)
    return np.take_along_axis(y, ids, axis=1), ids


def embedding(token_ids: I32, weight: Weight) -> F32:
    """Return rows of an embedding table: token_ids [T], weight [V, K] -> [T, K]."""
    return widen(weight)[token_ids]


def rms_norm(x: F32, weight: F32, eps: float, out: F32 | None = None) -> F32:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` along rows: x [T, K], weight [K]."""
    variance = np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
    y: F32 = (x / np.sqrt(variance + eps) * weight).astype(np.float32)
    if out is None:
        return y
    out[...] = y
    return out


def rope(x: F32, cos: F32, sin: F32) -> None:
    """Rotate heads in place, Hugging Face layout (first half with second half).

    x [T, heads, D], cos and sin [T, R/2] with R <= D; the last D - R dimensions stay as they are.
    """
    half = cos.shape[1]
    a = x[:, :, :half].copy()
    b = x[:, :, half : 2 * half].copy()
    x[:, :, :half] = a * cos[:, None] - b * sin[:, None]
    x[:, :, half : 2 * half] = b * cos[:, None] + a * sin[:, None]


def route(logits: F32, top_k: int) -> tuple[I32, F32]:
    """Choose experts: softmax over E, the top_k likeliest, weights renormalised to sum 1.

    logits [T, E] -> expert_ids int32 [T, top_k] and weights float32 [T, top_k], likeliest first,
    the lower id first among equals.
    """
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    ids = np.argsort(-p, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    weights = np.take_along_axis(p, ids, axis=1)
    return ids, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


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
    """Add one expert's output to ``out``: ``out[rows] += row_weights * down(silu(gate x) * up x)``.

    x and out [T, K], gate and up [I, K], down [K, I], rows int32 [m] without repeats (None: all
    rows), row_weights float32 [m] (None: ones). gate, up and down may be
    ``Int8DotWeight``, all three; what goes into down is then rounded as x is. So it is with
    ``activations="bfloat16"``.
    """
    picked = x if rows is None else x[rows]
    g = linear(picked, gate, activations=activations)
    u = linear(picked, up, activations=activations)
    hidden = (g / (1 + np.exp(-g.astype(np.float64)))).astype(np.float32) * u
    y = linear(hidden, down, activations=activations)
    if row_weights is not None:
        y = y * row_weights[:, None]
    if rows is None:
        out += y
    else:
        out[rows] += y


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
    """``expert_ffn`` for several experts, in the given order.

    Expert i is a (gate, up, down) triple and works on ``rows[offsets[i]:offsets[i + 1]]``.
    A row may appear under several experts; its additions happen in the order of the experts.
    """
    for i, (gate, up, down) in enumerate(experts):
        part = slice(offsets[i], offsets[i + 1])
        if part.start != part.stop:
            expert_ffn(
                x, gate, up, down, out, rows[part], row_weights[part], activations=activations
            )


def append_kv(
    keys: F32,
    values: F32,
    k_pages: Array,
    v_pages: Array,
    slots: I32,
    k_scales: F32 | None = None,
    v_scales: F32 | None = None,
) -> None:
    """Write new keys and values into their pages, rounded to the cache's dtype.

    keys and values [T, G, D]; k_pages [num_pages, G, D, P] (token-minor) and v_pages
    [num_pages, G, P, D], uint16 (bfloat16), float16, float32 or int8, their first dimension may be
    strided; slots int32 [T], page * P + offset in the page. int8 (and nothing else) takes
    ``k_scales`` and ``v_scales``, float32 [num_pages, G, P], the first dimension maybe strided: an
    element is int8 times its token's and head's scale, which is the head's largest magnitude / 127,
    or NaN if there is a NaN or an infinity in the head (its int8 are zeros then).
    """
    page_size = v_pages.shape[2]
    k, k_scale = _to_kv(keys, k_pages.dtype)
    v, v_scale = _to_kv(values, v_pages.dtype)
    for t, slot in enumerate(slots):
        page, at = divmod(int(slot), page_size)
        k_pages[page, :, :, at] = k[t]
        v_pages[page, :, at, :] = v[t]
        if k_scales is not None and v_scales is not None:
            k_scales[page, :, at] = k_scale[t]
            v_scales[page, :, at] = v_scale[t]


def _to_kv(x: F32, dtype: np.dtype[np.generic]) -> tuple[Array, F32]:
    """Round keys or values [T, G, D] to a cache's dtype; their scales [T, G] are ones but for int8.

    Rounding is to nearest, ties to even.
    """
    if dtype == np.int8:
        finite = np.isfinite(x.sum(axis=2, dtype=np.float64))
        x = np.where(finite[:, :, None], x, np.float32(0))
        scales = np.abs(x).max(axis=2, initial=0) / np.float32(127)
        safe = np.where(scales == 0, np.float32(1), scales)
        values = np.rint(x / safe[:, :, None]).clip(-127, 127).astype(np.int8)
        return values, np.where(finite, scales, np.float32(np.nan))
    with np.errstate(over="ignore"):
        rounded = to_bfloat16(x) if dtype == np.uint16 else x.astype(dtype)
    return rounded, np.ones(x.shape[:2], np.float32)


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
    """Attend n new tokens of each sequence to its whole paged KV, which already holds them.

    q [T, H, D]; sequence b's queries are rows q_offsets[b]:q_offsets[b + 1] (n of them, maybe
    none), its KV is kv_lens[b] tokens long, in pages page_tables[b] (int32 [B, max_pages]);
    its queries are its last n tokens. Query i sees every token before the n new ones, and of the
    new ones those up to itself, or with ``tree_mask`` (uint64 [T], n <= 64) those whose bit is set.
    ``sliding_window`` w > 0 hides tokens w or more positions back. ``softcap`` c > 0 replaces a
    score s by c * tanh(s / c). ``sinks`` float32 [H] adds exp(sink) to each softmax sum.
    Pages and ``k_scales`` and ``v_scales`` are as ``append_kv`` writes them.
    Returns [T, H, D]. Query head h reads KV head h // (H // G).
    """
    result = np.zeros_like(q) if out is None else out
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, page_size = v_pages.shape[1:3]
    group = num_heads // num_kv_heads
    for b, kv_len in enumerate(kv_lens):
        start, stop = int(q_offsets[b]), int(q_offsets[b + 1])
        n, kv_len = stop - start, int(kv_len)
        if n == 0:
            continue
        pages = page_tables[b, : -(-kv_len // page_size)]
        k = widen(k_pages[pages]).transpose(1, 0, 3, 2).reshape(num_kv_heads, -1, head_dim)
        v = widen(v_pages[pages]).transpose(1, 0, 2, 3).reshape(num_kv_heads, -1, head_dim)
        k, v = k[:, :kv_len].astype(np.float64), v[:, :kv_len].astype(np.float64)
        if k_scales is not None and v_scales is not None:
            for x, scales in ((k, k_scales), (v, v_scales)):
                scale_of = scales[pages].transpose(1, 0, 2).reshape(num_kv_heads, -1)
                x *= scale_of[:, :kv_len, None]
        position = kv_len - n + np.arange(n)
        seen = np.arange(kv_len)[None, :] <= position[:, None]
        if tree_mask is not None:
            bits = tree_mask[start:stop, None] >> np.arange(n, dtype=np.uint64)[None, :]
            seen[:, kv_len - n :] = (bits & np.uint64(1)).astype(bool)
        if sliding_window > 0:
            seen &= np.arange(kv_len)[None, :] > position[:, None] - sliding_window
        for h in range(num_heads):
            s = (q[start:stop, h].astype(np.float64) @ k[h // group].T) * scale
            if softcap > 0:
                s = softcap * np.tanh(s / softcap)
            s = np.where(seen, s, -np.inf)
            top = s.max(axis=1, keepdims=True)
            if sinks is not None:
                top = np.maximum(top, sinks[h])
            p = np.exp(s - top)
            total = p.sum(axis=1, keepdims=True)
            if sinks is not None:
                total += np.exp(sinks[h] - top)
            result[start:stop, h] = (p / total) @ v[h // group]
    return result
