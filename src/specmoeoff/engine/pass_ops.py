"""What the ops of a plan do to a pass: each is one piece of ``Forward``'s maths, for its rows.

Tokens of all micro-batches form one block of rows [T], each micro-batch a run of them; a row's
result depends on its own sequence alone, so the cut changes nothing. With a link, what one side
computes reaches the other only through the ops that copy: host and device share no array but the
weights that stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from specmoeoff import kernels
from specmoeoff.devices.base import DeviceArray, Pages, Places, Routed
from specmoeoff.engine.micro_batch import Past, Slice

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from specmoeoff.devices.base import Device
    from specmoeoff.models.base import Model
    from specmoeoff.offload.kv_cache import KvCache
    from specmoeoff.offload.planned_experts import PlannedExperts
    from specmoeoff.pipeline.plan import Op

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
Known = TypeVar("Known")


@dataclass
class PassOps:
    """The state of one pass and the ops on it."""

    model: Model
    device: Device
    kv: KvCache
    experts: PlannedExperts
    slices: list[Slice]
    """Micro-batches whose tokens are known; ``draft`` gives the others, one after the other."""
    num_rows: int
    """Most rows that all micro-batches may have together."""
    has_link: bool
    draft: Callable[[int, int], Slice] | None = None
    """Drafts for a micro-batch and gives it its place from a row on."""
    on_outputs: Callable[[int, F32], None] | None = None
    """Told of each micro-batch's hidden states [R, hidden] once they are final."""
    x: DeviceArray = field(init=False)
    """The residual stream, [T, hidden]."""

    def __post_init__(self) -> None:
        shape = (self.num_rows, self.model.config.hidden_size)
        top_k = max(self.model.config.num_experts_per_tok, 1)
        routed = (shape[0], top_k)
        with self.device.on("device"):
            self.x = self.device.empty(shape, np.float32)
            self._h = self.device.empty(shape, np.float32)
            self._expert_ids = self.device.empty(routed, np.int32)
            self._expert_weights = self.device.empty(routed, np.float32)
        self._routed: dict[tuple[int, ...], tuple[int, slice, Routed]] = {}
        self.wanted_experts = 0
        """Experts that had rows, counted each time they ran."""

    def perform(self, op: Op, stop: threading.Event) -> None:
        """Do what an op says; ops end by themselves soon, so ``stop`` is not asked."""
        with self.device.on(op.lane):
            # What an op is through with is kept until its lane is: see ``Device.on``.
            through = _OPS[op.kind](self, op)
        del through

    def begin(self, op: Op) -> None:
        """Begin a read, so that the disk finds the next one in its queue when one ends."""
        if op.kind == "read":
            self.experts.begin_read((_layer(op), op.experts[0]), op.acquires[0])

    def outputs(self) -> F32:
        """Return the hidden states of the wanted rows, [R, hidden]."""
        return np.concatenate([s.outputs for s in self.slices if s.outputs is not None])

    # -- weights -----------------------------------------------------------------------------------

    def _read(self, op: Op) -> None:
        self.experts.read((_layer(op), op.experts[0]), op.acquires[0])

    def _load(self, op: Op) -> None:
        self.experts.load((_layer(op), op.experts[0]), op.acquires[0])

    # -- a micro-batch -----------------------------------------------------------------------------

    def _draft(self, op: Op) -> None:
        (m,) = op.micro_batches
        assert self.draft is not None
        assert m == len(self.slices), "micro-batches are drafted in their order"
        self.slices.append(self.draft(m, self.slices[-1].rows.stop if m else 0))

    def _embed(self, op: Op) -> None:
        part = self._slice(op)
        self.x[part.rows] = self.device.embed(part.token_ids)

    def _pre_attention(self, op: Op) -> None:
        part = self._slice(op)
        part.qkv = self.device.pre_attention(_layer(op), self.x[part.rows], part.rope)

    def _qkv_out(self, op: Op) -> None:
        part = self._slice(op)
        q, k, v = _known(part.qkv)
        download = self.device.download
        part.host_qkv = (download(q), download(k), download(v))

    def _store_kv(self, op: Op) -> None:
        part = self._slice(op)
        _, k, v = self._qkv_on(op, part)
        pages = self._pages(op)
        if self._is_on_host(op):
            kernels.append_kv(k, v, pages.k, pages.v, part.slots, pages.k_scales, pages.v_scales)
        else:
            self.device.store_kv(k, v, pages, part.slots)

    def _kv_in(self, op: Op) -> None:
        part = self._slice(op)
        size = self.kv.page_size
        # Only pages that hold something, sequence after sequence: the table's rest is padding.
        counts = -(-part.kv_lens // size)
        holds = np.arange(part.page_table.shape[1]) < counts[:, None]
        pages = part.page_table[holds]
        table = np.zeros_like(part.page_table)
        table[holds] = np.arange(len(pages))
        sequence = np.repeat(np.arange(len(part.kv_lens)), np.diff(part.q_offsets))
        first = part.kv_lens[sequence] - np.diff(part.q_offsets)[sequence]
        position = first + np.arange(len(part.slots)) - part.q_offsets[sequence]
        entry = table[sequence, position // size]
        part.past[_layer(op)] = Past(
            self._copied(op, pages),
            (entry * size + position % size).astype(np.int32),
            table,
        )

    def _attend(self, op: Op) -> object:
        part = self._slice(op)
        q, k, v = self._qkv_on(op, part)
        window = self.model.config.sliding_window or 0
        places = Places(part.page_table, part.q_offsets, part.kv_lens, window)
        pages, past = self._pages(op), part.past.pop(_layer(op), None)
        if past is not None:
            pages, places = past.pages, replace(places, page_table=past.page_table)
            self.device.store_kv(k, v, pages, past.slots)
        if not self._is_on_host(op):
            part.attended = self.device.attend(q, pages, places)
            return past
        attended = kernels.chunked_attention(
            q,
            pages.k,
            pages.v,
            places.page_table,
            places.q_offsets,
            places.kv_lens,
            self.model.config.head_dim**-0.5,
            sliding_window=window,
            k_scales=pages.k_scales,
            v_scales=pages.v_scales,
        )
        part.attended = self.device.stage(attended)
        return past

    def _attention_in(self, op: Op) -> object:
        part = self._slice(op)
        staged = _known(part.attended)
        part.attended = self.device.upload(staged)
        return staged

    def _post_attention(self, op: Op) -> object:
        part = self._slice(op)
        layer, rows = _layer(op), part.rows
        attended = _known(part.attended)
        h = self.device.post_attention(layer, self.x[rows], attended)
        self._expert_ids[rows], self._expert_weights[rows] = self.device.router(layer, h)
        self._h[rows] = h
        part.attended = None
        return attended

    def _hidden_out(self, op: Op) -> None:
        part = self._slice(op)
        part.host_hidden = self.device.download(self.x[part.rows])
        # The place may be another's now: whoever reads it without bringing it back must notice.
        self.x[part.rows] = np.nan

    def _hidden_in(self, op: Op) -> None:
        part = self._slice(op)
        self.x[part.rows] = self.device.upload(_known(part.host_hidden))

    def _head(self, op: Op) -> None:
        part = self._slice(op)
        part.outputs = self.device.download(self.x[part.rows][part.output_rows])
        if self.on_outputs is not None:
            self.on_outputs(op.micro_batches[0], part.outputs)

    # -- experts -----------------------------------------------------------------------------------

    def _run_experts(self, op: Op) -> None:
        """Add what some experts make of the rows routed to them, in rising order of the experts."""
        rows, routed = self._route(op)
        wanted = [e for e in op.experts if routed.counts[e]]
        self.wanted_experts += len(wanted)
        if not wanted:
            return
        ends = np.cumsum(routed.counts)
        start = int(ends[wanted[0]] - routed.counts[wanted[0]])
        stops = [int(ends[e]) for e in wanted]
        self.device.run_experts(
            self._h[rows],
            [self.experts.tensors((_layer(op), e)) for e in wanted],
            [0, *(stop - start for stop in stops)],
            routed.rows[start : stops[-1]],
            routed.weights[start : stops[-1]],
            self.x[rows],
        )

    def _route(self, op: Op) -> tuple[slice, Routed]:
        """Return the rows of the op's micro-batches, and those by expert; sorted once a layer."""
        known = self._routed.get(op.micro_batches)
        if known is not None and known[0] == op.layer:
            return known[1:]
        first, last = self.slices[op.micro_batches[0]], self.slices[op.micro_batches[-1]]
        rows = slice(first.rows.start, last.rows.stop)
        routed = self.device.sort_by_expert(
            self._expert_ids[rows], self._expert_weights[rows], self.model.num_ffn_experts
        )
        self._routed[op.micro_batches] = (_layer(op), rows, routed)
        return rows, routed

    # -- where things are --------------------------------------------------------------------------

    def _slice(self, op: Op) -> Slice:
        return self.slices[op.micro_batches[0]]

    def _is_on_host(self, op: Op) -> bool:
        """Whether an op of attention runs on the host's own arrays."""
        return op.lane == "cpu"

    def _qkv_on(self, op: Op, part: Slice) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
        """Return queries, keys and values on the op's side of the link."""
        return _known(part.host_qkv if self.has_link and self._is_on_host(op) else part.qkv)

    def _copied(self, op: Op, wanted: I32) -> Pages:
        """Return copies of some of the cache's pages on the device."""
        arrays = vars(self._host_pages(op)).values()
        upload = self.device.upload_pages
        return Pages(*(None if array is None else upload(array, wanted) for array in arrays))

    def _pages(self, op: Op) -> Pages:
        """Return the cache on the op's side of the link."""
        pages = self._host_pages(op)
        return pages if self._is_on_host(op) else self.device.kv_pages(_layer(op), pages)

    def _host_pages(self, op: Op) -> Pages:
        return Pages(*self.kv.layer(_layer(op)), *self.kv.scales(_layer(op)))


_OPS: dict[str, Callable[[PassOps, Op], object]] = {
    "read": PassOps._read,
    "load": PassOps._load,
    "draft": PassOps._draft,
    "embed": PassOps._embed,
    "hidden_in": PassOps._hidden_in,
    "pre_attention": PassOps._pre_attention,
    "qkv_out": PassOps._qkv_out,
    "kv_in": PassOps._kv_in,
    "store_kv": PassOps._store_kv,
    "attend": PassOps._attend,
    "attention_in": PassOps._attention_in,
    "post_attention": PassOps._post_attention,
    "experts": PassOps._run_experts,
    "hidden_out": PassOps._hidden_out,
    "head": PassOps._head,
}


def _layer(op: Op) -> int:
    assert op.layer is not None
    return op.layer


def _known(value: Known | None) -> Known:
    assert value is not None, "an op ran before what it needs"
    return value
