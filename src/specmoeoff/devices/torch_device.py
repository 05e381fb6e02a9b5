"""A GPU, or whatever torch computes on, as a device: a stream for each lane that moves or computes.

An op's work is put on its lane's stream; leaving ``on`` waits for an event on it, asleep, so that
an op has ended when its executor says so and whoever waited for it may run on any lane. Memory
that crosses the link is pinned. On torch's own ``cpu`` device there are no streams and nothing is
pinned, and everything else is the same code.

Imported only where a torch device is wanted: all else runs without torch.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specmoeoff.devices import torch_maths as maths
from specmoeoff.devices.base import F32, I32, Pages, Places, Routed
from specmoeoff.devices.torch_memory import (
    as_tensor,
    pin,
    register,
    torch_dtype,
    unregister,
)
from specmoeoff.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from specmoeoff.models.base import Model, Weights
    from specmoeoff.pipeline.plan import Lane

MIB = 1 << 20
WORKSPACE_BYTES = 512 * MIB
"""What torch, cuBLAS and attention take beside the activations that are counted."""
HEAD_ROWS = 512
"""Rows of logits that exist at once while only the best are wanted."""
STREAM_LANES: tuple[Lane, ...] = ("h2d", "device", "d2h")


class TorchDevice:
    """Tensors and torch's operations; see ``Device``."""

    def __init__(
        self, model: Model, weights: Weights, layers: Sequence[Weights], device: torch.device
    ) -> None:
        self._model = model
        self._config = model.config
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._weights = {name: self._load(name, w) for name, w in weights.items()}
        self._layers = [{name: self._load(name, w) for name, w in ws.items()} for ws in layers]
        self._streams: dict[Lane, torch.cuda.Stream] = {}
        if self._is_cuda:
            for lane in STREAM_LANES:
                self._streams[lane] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pages: dict[int, Pages] = {}
        self._pinned: list[int] = []

    # -- lanes and memory --------------------------------------------------------------------------

    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        """Run what is inside on the lane's stream, and wait for it."""
        stream = self._streams.get(lane)
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            try:
                yield
            finally:
                # After a failure too: nothing may be let go of that the stream still uses.
                self._wait()

    def limit(self, num_bytes: int) -> None:
        """Let torch's allocator take no more than this of a GPU's memory."""
        if self._is_cuda:
            total = torch.cuda.get_device_properties(self._device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(num_bytes / total, 1.0), self._device)

    def pin(self, memory: NDArray[np.uint8], slot_bytes: int) -> None:
        """Pin host memory that experts are loaded from; it stays so until ``close``."""
        if self._is_cuda:
            self._pinned += pin(memory, slot_bytes, register)

    def peak_bytes(self) -> int | None:
        """Return what torch's allocator held at most on a GPU."""
        return torch.cuda.max_memory_allocated(self._device) if self._is_cuda else None

    def close(self) -> None:
        """Unpin; no lane may be at work any more."""
        while self._pinned:
            unregister(self._pinned.pop())

    def empty(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Tensor:
        """Return a tensor of anything."""
        return torch.empty(shape, dtype=torch_dtype(np.dtype(dtype)), device=self._device)

    def upload(self, array: NDArray[np.generic]) -> Tensor:
        """Return a copy on the device."""
        return as_tensor(np.ascontiguousarray(array)).to(self._device, copy=True, non_blocking=True)

    def upload_pages(self, pages: NDArray[np.generic], wanted: I32) -> Tensor:
        """Return a copy of some pages on the device, gathered on the host first."""
        gathered = self._host_tensor((len(wanted), *pages.shape[1:]), torch_dtype(pages.dtype))
        whole = gathered.view(torch.int16) if pages.dtype == np.uint16 else gathered
        np.take(pages, wanted, axis=0, out=whole.numpy().view(pages.dtype))
        return gathered.to(self._device, copy=True, non_blocking=True)

    def download(self, array: Tensor) -> NDArray[Any]:
        """Return a copy on the host, there when this returns."""
        copy = self._host_tensor(tuple(array.shape), array.dtype)
        copy.copy_(array, non_blocking=True)
        self._wait()
        found: NDArray[Any] = copy.numpy()
        return found

    def stage(self, array: F32) -> F32:
        """Return a copy in pinned memory, if the device is one that reads it by itself."""
        if not self._is_cuda:
            return array
        copy = self._host_tensor(array.shape, torch.float32)
        copy.numpy()[...] = array
        staged: F32 = copy.numpy()
        return staged

    # -- the maths ---------------------------------------------------------------------------------

    def embed(self, token_ids: I32) -> Tensor:
        """Return embeddings [T, hidden]."""
        return self._weights["embed"][self.upload(token_ids)].float()

    def pre_attention(
        self, layer: int, x: Tensor, rope: tuple[F32, F32]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, project, rotate."""
        config, weights = self._config, self._layers[layer]
        normed = maths.rms_norm(x, weights["attn_norm"], config.rms_norm_eps)
        q, k, v = (
            self._linear(normed, weights, name).view(len(x), -1, config.head_dim)
            for name in ("q", "k", "v")
        )
        cos, sin = map(self.upload, rope)
        maths.rope(q, cos, sin)
        maths.rope(k, cos, sin)
        return q, k, v

    def post_attention(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """Add the O projection to x IN PLACE; return the FFN's input."""
        weights = self._layers[layer]
        x += self._linear(attended.reshape(len(x), -1), weights, "o")
        return maths.rms_norm(x, weights["ffn_norm"], self._config.rms_norm_eps)

    def router(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts."""
        if not self._config.is_moe:
            ids = torch.zeros((len(h), 1), dtype=torch.int32, device=self._device)
            return ids, torch.ones((len(h), 1), device=self._device)
        logits = self._linear(h, self._layers[layer], "router")
        return maths.route(logits, self._config.num_experts_per_tok)

    def sort_by_expert(
        self, expert_ids: Tensor, expert_weights: Tensor, num_experts: int
    ) -> Routed:
        """Sort rows by expert; only how many each has goes to the host."""
        flat = expert_ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        experts = torch.arange(num_experts, device=self._device)
        counts = (flat[:, None] == experts).sum(0)
        return Routed(
            order // expert_ids.shape[1],
            expert_weights.reshape(-1)[order],
            self.download(counts),
        )

    def run_experts(
        self,
        h: Tensor,
        experts: Sequence[Mapping[str, Any]],
        offsets: Sequence[int],
        rows: Tensor,
        weights: Tensor,
        x: Tensor,
    ) -> None:
        """Add what experts make of their rows to x, in the order given."""
        for i, t in enumerate(experts):
            part = slice(offsets[i], offsets[i + 1])
            y = maths.expert_ffn(
                h[rows[part]], t["gate"], t["up"], t["down"], self._model.activations
            )
            # A row comes once per expert, so nothing is added in an order of chance.
            x.index_add_(0, rows[part], y * weights[part, None])

    def head(self, hidden: F32) -> F32:
        """Return logits [R, V]."""
        with self.on("device"):
            return self.download(self._logits(self.upload(hidden)))

    def head_best(self, hidden: F32) -> tuple[F32, I32]:
        """Return the largest logit and its token, [R] each."""
        with self.on("device"):
            rows = torch.split(self.upload(hidden), HEAD_ROWS)
            parts = [maths.best(self._logits(x)) for x in rows]
            values, tokens = (torch.cat(found) for found in zip(*parts, strict=True))
            return self.download(values), self.download(tokens)

    # -- attention on the device -------------------------------------------------------------------

    def kv_pages(self, layer: int, host: Pages) -> Pages:
        """Return a layer's cache on the device, made when it is first asked for."""
        if layer not in self._pages:
            made = [None if p is None else self._like(p) for p in vars(host).values()]
            self._pages[layer] = Pages(*made)
        return self._pages[layer]

    def store_kv(self, k: Tensor, v: Tensor, pages: Pages, slots: I32) -> None:
        """Write new keys and values into pages."""
        size = pages.v.shape[2]
        page, at = self.upload(slots // size).long(), self.upload(slots % size).long()
        if pages.k_scales is not None and pages.v_scales is not None:
            k, pages.k_scales[page, :, at] = maths.to_int8(k)
            v, pages.v_scales[page, :, at] = maths.to_int8(v)
        pages.k[page, :, :, at] = k.to(pages.k.dtype)
        pages.v[page, :, at, :] = v.to(pages.v.dtype)

    def attend(self, q: Tensor, pages: Pages, places: Places) -> Tensor:
        """Attend to pages; sequences are padded to the longest of them."""
        table = self.upload(places.page_table).long()
        k, v = pages.k[table].float(), pages.v[table].float()
        if pages.k_scales is not None and pages.v_scales is not None:
            k *= pages.k_scales[table][:, :, :, None, :]
            v *= pages.v_scales[table][..., None]
        # [B, W, G, D, P] and [B, W, G, P, D] -> [B, G, W * P, D]
        k = k.permute(0, 2, 1, 4, 3).flatten(2, 3)
        v = v.permute(0, 2, 1, 3, 4).flatten(2, 3)
        counts = np.diff(places.q_offsets)
        sequence = np.repeat(np.arange(len(counts)), counts)
        row = np.arange(len(sequence)) - places.q_offsets[sequence]
        b, i = self.upload(sequence), self.upload(row)
        queries = q.new_zeros((len(counts), int(counts.max(initial=1)), *q.shape[1:]))
        queries[b, i] = q
        seen = self._seen(places, counts, queries.shape[1], k.shape[2])
        out = maths.attention(queries.transpose(1, 2), k, v, seen)
        return out.transpose(1, 2)[b, i]

    def _seen(
        self, places: Places, counts: NDArray[np.int32], num_queries: int, length: int
    ) -> Tensor:
        """Return which positions each query sees, bool [B, n, L]; padding sees the first one."""
        first = self.upload((places.kv_lens - counts).astype(np.int64))
        rows = torch.arange(num_queries, device=self._device)
        position = torch.arange(length, device=self._device)
        own = first[:, None] + rows
        seen = position <= own[..., None]
        if places.sliding_window:
            seen &= position > own[..., None] - places.sliding_window
        is_padding = rows >= self.upload(counts)[:, None]
        return torch.where(is_padding[..., None], position == 0, seen)

    # -- inside ------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Sleep until what this thread has put on its stream is done."""
        if self._is_cuda:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
            event.synchronize()

    def _load(self, name: str, weight: Any) -> Tensor:
        if not isinstance(weight, np.ndarray):
            raise CheckpointError(
                f"weight {name!r} is a {type(weight).__name__}, which a torch device cannot use; "
                "use device 'cpu' or 'sim'"
            )
        return as_tensor(weight).to(self._device, copy=True)

    def _linear(self, x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
        bias = weights.get(f"{name}_bias")
        return maths.linear(x, weights[name], bias, self._model.activations)

    def _logits(self, x: Tensor) -> Tensor:
        normed = maths.rms_norm(x, self._weights["norm"], self._config.rms_norm_eps)
        table = "embed" if self._config.tie_word_embeddings else "head"
        return maths.linear(normed, self._weights[table], None, self._model.activations)

    def _like(self, pages: NDArray[np.generic]) -> Tensor:
        return torch.zeros(pages.shape, dtype=torch_dtype(pages.dtype), device=self._device)

    def _host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._is_cuda)
