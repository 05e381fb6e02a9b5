"""What the ops of a plan do to a pass: each is one piece of ``Forward``'s maths, for its rows.

Tokens of all micro-batches form one block of rows [T], each micro-batch a run of them; a row's
result depends on its own sequence alone, so the cut changes nothing. With a link, what one side
computes reaches the other only through the ops that copy: host and device share no array but the
weights that stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from specmoeoff import kernels
from specmoeoff.engine.micro_batch import Past, Slice

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from specmoeoff.engine.weights import ModelWeights
    from specmoeoff.models.base import Model
    from specmoeoff.offload.kv_cache import KvCache
    from specmoeoff.offload.planned_experts import PlannedExperts
    from specmoeoff.pipeline.plan import Op

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
Known = TypeVar("Known")


@dataclass
class Routed:
    """Rows of some micro-batches sorted by expert."""

    rows: slice
    order: I32
    weights: F32
    counts: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass
class PassOps:
    """The state of one pass and the ops on it."""

    model: Model
    weights: ModelWeights
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
    x: F32 = field(init=False)
    """The residual stream, [T, hidden]."""

    def __post_init__(self) -> None:
        shape = (self.num_rows, self.model.config.hidden_size)
        top_k = max(self.model.config.num_experts_per_tok, 1)
        self.x = np.empty(shape, np.float32)
        self._h = np.empty(shape, np.float32)
        self._expert_ids = np.empty((shape[0], top_k), np.int32)
        self._expert_weights = np.empty((shape[0], top_k), np.float32)
        self._routed: dict[tuple[int, ...], tuple[int, Routed]] = {}
        self.wanted_experts = 0
        """Experts that had rows, counted each time they ran."""

    def perform(self, op: Op, stop: threading.Event) -> None:
        """Do what an op says; ops end by themselves soon, so ``stop`` is not asked."""
        _OPS[op.kind](self, op)

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
        self.x[part.rows] = self.model.embed(self.weights.globals, part.token_ids)

    def _pre_attention(self, op: Op) -> None:
        part = self._slice(op)
        weights = self.weights.layers[_layer(op)]
        part.qkv = self.model.pre_attention(weights, self.x[part.rows], part.rope)

    def _qkv_out(self, op: Op) -> None:
        part = self._slice(op)
        q, k, v = _known(part.qkv)
        part.host_qkv = (q.copy(), k.copy(), v.copy())

    def _store_kv(self, op: Op) -> None:
        part = self._slice(op)
        _, k, v = self._qkv_on(op, part)
        kernels.append_kv(k, v, *self._pages(op)[:2], part.slots, *self.kv.scales(_layer(op)))

    def _kv_in(self, op: Op) -> None:
        part = self._slice(op)
        width = part.page_table.shape[1]
        # Every page in the order of the table, so that page p of the copy is entry p of it.
        pages = part.page_table.reshape(-1)
        size = self.kv.page_size
        sequence = np.repeat(np.arange(len(part.kv_lens)), np.diff(part.q_offsets))
        first = part.kv_lens[sequence] - np.diff(part.q_offsets)[sequence]
        position = first + np.arange(len(part.slots)) - part.q_offsets[sequence]
        entry = sequence * width + position // size
        part.past[_layer(op)] = Past(
            *self._copied(op, pages),
            (entry * size + position % size).astype(np.int32),
            np.arange(len(pages), dtype=np.int32).reshape(part.page_table.shape),
        )

    def _attend(self, op: Op) -> None:
        part = self._slice(op)
        q, k, v = self._qkv_on(op, part)
        k_pages, v_pages, k_scales, v_scales = self._pages(op)
        table = part.page_table
        past = part.past.pop(_layer(op), None)
        if past is not None:
            k_pages, v_pages, k_scales, v_scales = past.k, past.v, past.k_scales, past.v_scales
            table = past.page_table
            kernels.append_kv(k, v, k_pages, v_pages, past.slots, k_scales, v_scales)
        config = self.model.config
        part.attended = kernels.chunked_attention(
            q,
            k_pages,
            v_pages,
            table,
            part.q_offsets,
            part.kv_lens,
            config.head_dim**-0.5,
            sliding_window=config.sliding_window or 0,
            k_scales=k_scales,
            v_scales=v_scales,
        )

    def _attention_in(self, op: Op) -> None:
        part = self._slice(op)
        part.attended = _known(part.attended).copy()

    def _post_attention(self, op: Op) -> None:
        part = self._slice(op)
        weights, rows = self.weights.layers[_layer(op)], part.rows
        h = self.model.post_attention(weights, self.x[rows], _known(part.attended))
        self._expert_ids[rows], self._expert_weights[rows] = self.model.router(weights, h)
        self._h[rows] = h
        part.attended = None

    def _hidden_out(self, op: Op) -> None:
        part = self._slice(op)
        part.host_hidden = self.x[part.rows].copy()
        # The place may be another's now: whoever reads it without bringing it back must notice.
        self.x[part.rows] = np.nan

    def _hidden_in(self, op: Op) -> None:
        part = self._slice(op)
        self.x[part.rows] = _known(part.host_hidden)

    def _head(self, op: Op) -> None:
        part = self._slice(op)
        part.outputs = self.x[part.rows][part.output_rows]
        if self.on_outputs is not None:
            self.on_outputs(op.micro_batches[0], part.outputs)

    # -- experts -----------------------------------------------------------------------------------

    def _run_experts(self, op: Op) -> None:
        """Add what some experts make of the rows routed to them, in rising order of the experts."""
        routed = self._route(op)
        wanted = [e for e in op.experts if routed.counts[e]]
        self.wanted_experts += len(wanted)
        if not wanted:
            return
        start = int(routed.ends[wanted[0]] - routed.counts[wanted[0]])
        stops = [int(routed.ends[e]) for e in wanted]
        tensors = [self.experts.tensors((_layer(op), e)) for e in wanted]
        kernels.expert_ffn_many(
            self._h[routed.rows],
            [(t["gate"], t["up"], t["down"]) for t in tensors],
            np.array([0, *(stop - start for stop in stops)], np.int32),
            routed.order[start : stops[-1]],
            routed.weights[start : stops[-1]],
            self.x[routed.rows],
            activations=self.model.activations,
        )

    def _route(self, op: Op) -> Routed:
        """Return the rows of the op's micro-batches by expert; sorted once a layer."""
        known = self._routed.get(op.micro_batches)
        if known is not None and known[0] == op.layer:
            return known[1]
        first, last = self.slices[op.micro_batches[0]], self.slices[op.micro_batches[-1]]
        rows = slice(first.rows.start, last.rows.stop)
        flat = self._expert_ids[rows].reshape(-1)
        order = np.argsort(flat, kind="stable")
        counts = np.bincount(flat, minlength=self.model.num_ffn_experts)
        routed = Routed(
            rows,
            (order // self._expert_ids.shape[1]).astype(np.int32),
            self._expert_weights[rows].reshape(-1)[order],
            counts,
            np.cumsum(counts),
        )
        self._routed[op.micro_batches] = (_layer(op), routed)
        return routed

    # -- where things are --------------------------------------------------------------------------

    def _slice(self, op: Op) -> Slice:
        return self.slices[op.micro_batches[0]]

    def _qkv_on(self, op: Op, part: Slice) -> tuple[F32, F32, F32]:
        """Return queries, keys and values on the op's side of the link."""
        return _known(part.host_qkv if self.has_link and op.lane == "cpu" else part.qkv)

    def _copied(
        self, op: Op, pages: I32
    ) -> tuple[NDArray[np.generic], NDArray[np.generic], F32 | None, F32 | None]:
        k, v, k_scales, v_scales = self._pages(op)
        if k_scales is None or v_scales is None:
            return k[pages], v[pages], None, None
        return k[pages], v[pages], k_scales[pages], v_scales[pages]

    def _pages(
        self, op: Op
    ) -> tuple[NDArray[np.generic], NDArray[np.generic], F32 | None, F32 | None]:
        return (*self.kv.layer(_layer(op)), *self.kv.scales(_layer(op)))


_OPS: dict[str, Callable[[PassOps, Op], None]] = {
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
