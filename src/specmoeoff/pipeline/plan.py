"""One step's work as a list of ops: what runs where, after what, in which buffers.

A plan is pure data; executors run it, the simulator prices it, the trace draws it. An op starts
when the ops it waits for have ended and its lane is free; of several that could start on a lane,
the one listed first does. Buffers are assigned when the plan is built, so nothing is allocated
while it runs: whoever reuses a buffer waits for the op that released it.

Holds for every plan: an op waits only for ops listed before it, so any order that respects the
waits comes to an end; in each such order a buffer has at most one holder, is held while it is
used, and no pool holds more bytes than its budget. Knows neither tensors nor devices nor times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from specmoeoff.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Lane = Literal["disk", "h2d", "device", "cpu", "d2h"]
LANES: tuple[Lane, ...] = get_args(Lane)

Kind = Literal[
    "read",  # an expert from disk: into a device slot, or a host slot it is then loaded from
    "load",  # an expert from host memory into a device slot
    "embed",  # token ids to hidden states
    "hidden_in",  # hidden states to the device, where a schedule parks them on the host
    "pre_attention",  # norm, Q, K and V, rotary embedding
    "qkv_out",  # queries, keys and values to the host (keys and values, if attention is not there)
    "kv_in",  # keys and values of the past to the device
    "store_kv",  # new keys and values into the KV cache
    "attend",
    "attention_in",  # the result of attention to the device
    "post_attention",  # output projection, residual, norm, router
    "experts",  # the feed-forward of some experts over the rows routed to them
    "hidden_out",  # hidden states to the host
    "head",  # the wanted rows' hidden states, and what is made of them
    "draft",  # propose tokens of this step
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Op:
    """One piece of work. Its number is its position in the plan."""

    kind: Kind
    lane: Lane
    layer: int | None = None
    micro_batches: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    num_bytes: int = 0
    """Bytes it moves, or reads from its own memory while it computes."""
    flops: int = 0
    waits: tuple[int, ...] = ()
    """Numbers of the ops that must have ended."""
    acquires: tuple[str, ...] = ()
    """Buffers that are its own from its start on, until an op releases them."""
    uses: tuple[str, ...] = ()
    """Buffers that another op acquired, or that were held when the step began."""
    releases: tuple[str, ...] = ()
    """Buffers given back when it ends."""
    ahead: bool = False
    """Whether it is for the next step: the step may end before it does."""

    @property
    def name(self) -> str:
        """What people read: ``experts L3 M0-1 E4``."""
        parts: list[str] = [self.kind]
        if self.layer is not None:
            parts.append(f"L{self.layer}")
        if self.micro_batches:
            parts.append(f"M{_ranges(self.micro_batches)}")
        if self.experts:
            parts.append(f"E{_ranges(self.experts)}")
        return " ".join(parts)

    @property
    def touches(self) -> tuple[str, ...]:
        """Every buffer it has to do with."""
        return (*self.acquires, *self.uses, *self.releases)


@dataclass(frozen=True)
class Buffer:
    """A piece of a pool's memory."""

    pool: str
    num_bytes: int


@dataclass(frozen=True)
class Held:
    """A buffer that keeps an expert from one step to the next."""

    buffer: str
    layer: int
    expert: int


@dataclass(frozen=True)
class Plan:
    """The ops of a step and the buffers they share.

    Raises:
        PlanError: The plan breaks one of the promises above; the message names the op.
    """

    schedule: str
    ops: tuple[Op, ...]
    buffers: Mapping[str, Buffer] = field(default_factory=dict)
    budgets: Mapping[str, int] = field(default_factory=dict)
    """Bytes that each pool may hold."""
    held_at_start: tuple[Held, ...] = ()
    held_at_end: tuple[Held, ...] = ()

    def __post_init__(self) -> None:
        check(self)

    def label(self, number: int) -> str:
        """Return how errors name an op: ``op 12 (attend L3 M1)``."""
        return _label(number, self.ops[number])


def check(plan: Plan) -> None:
    """Refuse a plan that could run in an order that breaks its promises.

    Raises:
        PlanError: Of the first op found at fault.
    """
    _check_budgets(plan)
    before = _ancestors(plan.ops)
    holder: dict[str, int | None] = {held.buffer: None for held in plan.held_at_start}
    if unknown := holder.keys() - plan.buffers.keys():
        raise PlanError(f"the plan begins with buffer {min(unknown)!r}, which it does not have")
    last_release: dict[str, int] = {}
    users: dict[str, list[int]] = {name: [] for name in plan.buffers}
    for number, op in enumerate(plan.ops):
        _check_op(plan, number)
        for name in op.acquires:
            if name in holder:
                raise PlanError(f"{_label(number, op)} acquires buffer {name!r}, which is held")
            freed = last_release.get(name)
            if freed is not None and not before[number] >> freed & 1:
                raise PlanError(
                    f"{_label(number, op)} acquires buffer {name!r} without waiting for "
                    f"{plan.label(freed)}, which releases it"
                )
            holder[name] = number
            users[name] = [number]
        for name in dict.fromkeys((*op.uses, *op.releases)):
            if name not in holder:
                raise PlanError(f"{_label(number, op)} uses buffer {name!r}, which is not held")
            owner = holder[name]
            if owner is not None and owner != number and not before[number] >> owner & 1:
                raise PlanError(
                    f"{_label(number, op)} uses buffer {name!r} without waiting for "
                    f"{plan.label(owner)}, which acquires it"
                )
            users[name].append(number)
        for name in op.releases:
            late = [u for u in users[name] if u != number and not before[number] >> u & 1]
            if late:
                raise PlanError(
                    f"{_label(number, op)} releases buffer {name!r} without waiting for "
                    f"{plan.label(late[0])}, which uses it"
                )
            del holder[name]
            last_release[name] = number
            users[name] = []
    _check_end(plan, holder)


def _check_budgets(plan: Plan) -> None:
    totals: dict[str, int] = {}
    for buffer in plan.buffers.values():
        totals[buffer.pool] = totals.get(buffer.pool, 0) + buffer.num_bytes
    for pool, total in totals.items():
        if total > plan.budgets.get(pool, 0):
            raise PlanError(
                f"the buffers of pool {pool!r} take {total} bytes; "
                f"its budget is {plan.budgets.get(pool, 0)}"
            )


def _check_op(plan: Plan, number: int) -> None:
    op = plan.ops[number]
    if op.kind not in KINDS or op.lane not in LANES:
        raise PlanError(f"{_label(number, op)} has kind {op.kind!r} on lane {op.lane!r}")
    if op.num_bytes < 0 or op.flops < 0:
        raise PlanError(f"{_label(number, op)} has {op.num_bytes} bytes and {op.flops} flops")
    for name in op.touches:
        if name not in plan.buffers:
            raise PlanError(f"{_label(number, op)} names buffer {name!r}, which does not exist")
    if not op.ahead and any(plan.ops[wait].ahead for wait in op.waits):
        raise PlanError(f"{_label(number, op)} is of this step but waits for one of the next")


def _check_end(plan: Plan, holder: Mapping[str, int | None]) -> None:
    kept = {held.buffer for held in plan.held_at_end}
    for name, owner in holder.items():
        if name not in kept:
            by = "the step before" if owner is None else plan.label(owner)
            raise PlanError(f"buffer {name!r}, acquired by {by}, is never released")
    if lost := kept - holder.keys():
        raise PlanError(f"the plan ends with buffer {min(lost)!r}, which nothing holds")


def _ancestors(ops: Iterable[Op]) -> list[int]:
    """Return for each op the set of ops that end before it starts, as bits."""
    before: list[int] = []
    for number, op in enumerate(ops):
        bits = 0
        for wait in op.waits:
            if not 0 <= wait < number:
                raise PlanError(
                    f"{_label(number, op)} waits for op {wait}; an op waits only for ops listed "
                    "before it"
                )
            bits |= before[wait] | 1 << wait
        before.append(bits)
    return before


def _label(number: int, op: Op) -> str:
    return f"op {number} ({op.name})"


def _ranges(numbers: tuple[int, ...]) -> str:
    """Write 0, 1, 2, 5 as ``0-2,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
