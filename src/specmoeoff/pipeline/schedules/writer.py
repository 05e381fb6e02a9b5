"""Writes a plan op by op: adds the waits that buffers ask for, and knows what an op moves.

A schedule says what follows what; who acquires a buffer waits for its last release, who uses it for
its acquisition, who releases it for its users. Attention on the host and attention on the device
are written here once, for all schedules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specmoeoff.pipeline.plan import Buffer, Held, Kind, Lane, Op, Plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from specmoeoff.pipeline.schedules.shape import StepShape


class PlanWriter:
    """A plan in the making."""

    def __init__(self, schedule: str, shape: StepShape) -> None:
        self.shape = shape
        self.schedule = schedule
        self.compute: Lane = shape.placement.compute
        self._ops: list[Op] = []
        self._buffers: dict[str, Buffer] = {}
        self._users: dict[str, list[int]] = {}
        self._released: dict[str, int] = {}
        self._drafts: dict[int, int] = {}
        """By micro-batch, in the order they are made."""

    # -- any op ------------------------------------------------------------------------------------

    def add(
        self,
        kind: Kind,
        lane: Lane,
        after: Iterable[int],
        size: tuple[int, int] = (0, 0),
        **fields: Any,
    ) -> int:
        """Append an op and return its number.

        Args:
            kind: What it does.
            lane: Where.
            after: Ops whose results it needs; buffers add theirs.
            size: Bytes and flops.
            fields: Other fields of Op.
        """
        number = len(self._ops)
        waits = set(after)
        for name in fields.get("acquires", ()):
            if name in self._released:
                waits.add(self._released[name])
            self._users[name] = [number]
        for name in fields.get("uses", ()):
            users = self._users.setdefault(name, [])
            waits |= set(users[:1])
            users.append(number)
        for name in fields.get("releases", ()):
            waits |= set(self._users.pop(name, ()))
            self._released[name] = number
        waits.discard(number)
        op = Op(kind, lane, num_bytes=size[0], flops=size[1], waits=tuple(sorted(waits)), **fields)
        self._ops.append(op)
        return number

    def buffer(self, name: str, pool: str, num_bytes: int) -> str:
        """Name a buffer of a pool; one that is there already may only grow."""
        known = self._buffers.get(name)
        if known is None or known.num_bytes < num_bytes:
            self._buffers[name] = Buffer(pool, num_bytes)
        return name

    def finish(self, held_at_start: tuple[Held, ...], held_at_end: tuple[Held, ...]) -> Plan:
        """Return the plan, checked. Expert slots have a budget, other pools what they take."""
        budgets: dict[str, int] = {}
        for buffer in self._buffers.values():
            budgets[buffer.pool] = budgets.get(buffer.pool, 0) + buffer.num_bytes
        slots = self.shape.num_slots + self.shape.extra_slots
        budgets["experts"] = slots * self.shape.expert_bytes
        return Plan(
            self.schedule, tuple(self._ops), self._buffers, budgets, held_at_start, held_at_end
        )

    @property
    def num_ops(self) -> int:
        """The number that the next op will have."""
        return len(self._ops)

    def is_kind(self, number: int, kind: Kind) -> bool:
        """Whether an op is of a kind."""
        return self._ops[number].kind == kind

    # -- the ops of a layer ------------------------------------------------------------------------

    def embed(self, m: int, after: Iterable[int] = ()) -> int:
        """Token ids to hidden states; those that are still to be drafted are drafted first."""
        if self.shape.draft is not None:
            after = [*after, self._drafts[m] if m in self._drafts else self.draft(m, after)]
        size = (self.shape.hidden(m), 0)
        return self.add("embed", self.compute, after, size, micro_batches=(m,))

    def draft(self, m: int, after: Iterable[int] = ()) -> int:
        """Propose tokens of a micro-batch, which settles how many it has: one after the other."""
        after = [*after, *list(self._drafts.values())[-1:]]
        size = self.shape.drafting(m)
        self._drafts[m] = self.add("draft", self.compute, after, size, micro_batches=(m,))
        return self._drafts[m]

    def hidden_in(self, m: int, after: Iterable[int]) -> int | None:
        """Hidden states to the device; nothing, where they are there."""
        if not self.shape.placement.has_link:
            return None
        return self.add("hidden_in", "h2d", after, (self.shape.hidden(m), 0), micro_batches=(m,))

    def hidden_out(self, m: int, after: Iterable[int]) -> int | None:
        """Hidden states to the host; nothing, where that is the same memory."""
        if not self.shape.placement.has_link:
            return None
        return self.add("hidden_out", "d2h", after, (self.shape.hidden(m), 0), micro_batches=(m,))

    def pre_attention(self, layer: int, m: int, after: Iterable[int]) -> int:
        """Norm, Q, K, V; its result waits in a buffer for attention."""
        qkv = self.buffer(f"qkv M{m}", "activations", self.shape.qkv(m))
        size = self.shape.pre_attention(m)
        where = {"layer": layer, "micro_batches": (m,)}
        return self.add("pre_attention", self.compute, after, size, acquires=(qkv,), **where)

    def attend_on_host(self, layer: int, m: int, pre: int) -> int:
        """Keys and values to the host's cache, attention there, its result back."""
        shape, where = self.shape, {"layer": layer, "micro_batches": (m,)}
        qkv = f"qkv M{m}"
        result = self.buffer(f"attention M{m}", "activations", shape.attention(m))
        if shape.placement.has_link:
            pre = self.add("qkv_out", "d2h", [pre], (shape.qkv(m), 0), uses=(qkv,), **where)
        stored = self._store_kv("cpu", layer, m, [pre])
        attended = self.add(
            "attend",
            "cpu",
            [stored],
            shape.attend(m),
            acquires=(result,),
            releases=(qkv,),
            **where,
        )
        if not shape.placement.has_link:
            return attended
        size = (shape.attention(m), 0)
        return self.add("attention_in", "h2d", [attended], size, uses=(result,), **where)

    def attend_on_device(self, layer: int, m: int, pre: int) -> int:
        """Attention where the projections are, over a cache that is there too."""
        result = self.buffer(f"attention M{m}", "activations", self.shape.attention(m))
        stored = self._store_kv(self.compute, layer, m, [pre])
        return self.add(
            "attend",
            self.compute,
            [stored],
            self.shape.attend(m),
            layer=layer,
            micro_batches=(m,),
            acquires=(result,),
            releases=(f"qkv M{m}",),
        )

    def bring_kv(self, layer: int, m: int, buffer: int, after: Iterable[int] = ()) -> int | None:
        """Copy a micro-batch's past to the device, where the cache is not there already."""
        if not self.shape.placement.has_link:
            return None
        # Which pages those are is known when the tokens are.
        after = [*after, *(n for drafted, n in self._drafts.items() if drafted == m)]
        name = self.buffer(f"kv {buffer}", "kv", self.shape.kv(m))
        where = {"layer": layer, "micro_batches": (m,)}
        return self.add("kv_in", "h2d", after, (self.shape.kv(m), 0), acquires=(name,), **where)

    def attend_with_kv(self, layer: int, m: int, pre: int, past: int | None) -> int:
        """Attention on the device over a past that bring_kv copied; new ones go to the host."""
        if past is None:
            return self.attend_on_device(layer, m, pre)
        shape, where = self.shape, {"layer": layer, "micro_batches": (m,)}
        qkv = f"qkv M{m}"
        size = (shape.qkv(m, queries=False), 0)
        out = self.add("qkv_out", "d2h", [pre], size, uses=(qkv,), **where)
        result = self.buffer(f"attention M{m}", "activations", shape.attention(m))
        # The copy takes the new keys and values too, so attention does not wait for the host's.
        attended = self.add(
            "attend",
            self.compute,
            [pre, past],
            shape.attend(m),
            acquires=(result,),
            uses=(qkv,),
            releases=self._ops[past].acquires,
            **where,
        )
        self._store_kv("cpu", layer, m, [out, attended], releases=(qkv,))
        return attended

    def post_attention(self, layer: int, m: int, attended: int) -> int:
        """Output projection, residual, norm and router."""
        return self.add(
            "post_attention",
            self.compute,
            [attended],
            self.shape.post_attention(m),
            layer=layer,
            micro_batches=(m,),
            releases=(f"attention M{m}",),
        )

    def head(self, m: int, after: Iterable[int]) -> int:
        """Logits of the wanted rows, and what is made of them."""
        return self.add("head", self.compute, after, self.shape.head(m), micro_batches=(m,))

    def _store_kv(
        self, lane: Lane, layer: int, m: int, after: Iterable[int], **buffers: Any
    ) -> int:
        size = (self.shape.qkv(m, queries=False), 0)
        if not buffers:
            buffers = {"uses": (f"qkv M{m}",)}
        where = {"layer": layer, "micro_batches": (m,)}
        return self.add("store_kv", lane, after, size, **buffers, **where)
