"""The maths of a Llama or a Mixtral in torch: what ``kernels`` does, in torch's own order.

Sums are torch's, and on a GPU cuBLAS's: a row's last bits may depend on how many rows it comes
with. Nothing here promises the bits of ``kernels``, nor the same bits for another batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from specmoeoff.kernels import Activations


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activations: Activations) -> Tensor:
    """Return x [T, K] times weight [N, K], float32 [T, N].

    With bfloat16 activations and weights it is one bfloat16 product, whose result is rounded as
    well; with float32 the weight is widened first.
    """
    if activations == "bfloat16" and weight.dtype == torch.bfloat16:
        y = (x.to(torch.bfloat16) @ weight.T).float()
    else:
        rounded = x.to(torch.bfloat16).float() if activations == "bfloat16" else x
        y = rounded @ weight.float().T
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` along rows."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [T, heads, D] in place, first half with second half; cos and sin [T, R / 2]."""
    half = cos.shape[1]
    a, b = x[:, :, :half].clone(), x[:, :, half : 2 * half].clone()
    x[:, :, :half] = a * cos[:, None] - b * sin[:, None]
    x[:, :, half : 2 * half] = b * cos[:, None] + a * sin[:, None]


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax over E, the top_k likeliest, renormalised; the lower id first among equals."""
    p = torch.softmax(logits, dim=1)
    ids = torch.argsort(p, dim=1, descending=True, stable=True)[:, :top_k]
    weights = p.gather(1, ids)
    return ids.int(), weights / weights.sum(1, keepdim=True)


def expert_ffn(
    h: Tensor, gate: Tensor, up: Tensor, down: Tensor, activations: Activations
) -> Tensor:
    """Return ``down(silu(gate h) * up h)``, float32 [T, hidden]."""
    g = linear(h, gate, None, activations)
    u = linear(h, up, None, activations)
    return linear(functional.silu(g) * u, down, None, activations)


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit and its token, the lowest among equals: [R] each."""
    values = logits.max(dim=1).values
    tokens = torch.arange(logits.shape[1], device=logits.device)
    found = torch.where(logits == values[:, None], tokens, logits.shape[1]).min(dim=1).values
    return values, found.int()


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round heads of x [T, G, D] to int8 with a scale [T, G] each, the largest magnitude / 127.

    As ``kernels.append_kv``, but for heads that are not finite: their scale is NaN, which is all
    that matters of them.
    """
    scales = x.abs().amax(dim=2) / 127
    rounded = torch.where(scales[:, :, None] > 0, x / scales[:, :, None], 0.0).round()
    return rounded.clamp(-127, 127).to(torch.int8), torch.where(
        scales.isfinite(), scales, torch.nan
    )


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v over the positions each query may see.

    q [B, H, n, D], k and v [B, G, L, D], seen bool [B, n, L] -> [B, H, n, D]; H is a multiple of G.
    """
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen[:, None], enable_gqa=True
    )
