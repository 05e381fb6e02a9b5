"""The experts of a step on their way through a ring of slots, in the order they are wanted.

Experts are wanted in the same order in every pass. Those that stay are spread evenly over that
order, so that the link has something to do at any time. The others take turns in the ring: each
takes the slot that was given back the longest ago. Loads stand in the plan just before their first
use: lanes start what is ready and listed first, so a load goes ahead of its time whenever the link
is free, and behind every activation that is wanted sooner.

Extra slots are there for as long as nothing else needs their memory. Each has an expert of its own,
of those that do not stay, so that the first few of the slots always keep the same ones, spread over
the order of use whatever their number. Where it is not there yet the load that the step has to make
anyway brings it there, and it is held from then on: that slots come and go costs no load.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specmoeoff.errors import InvalidInputError
from specmoeoff.pipeline.plan import Held

if TYPE_CHECKING:
    from collections.abc import Iterable

    from specmoeoff.pipeline.schedules.shape import StepShape
    from specmoeoff.pipeline.schedules.writer import PlanWriter

KEPT = "kept slot"
"""What the buffers of extra slots are called, with their number."""


@dataclass(frozen=True)
class Split:
    """Which experts stay, and how many slots the others share."""

    resident: frozenset[tuple[int, int]]
    """(layer, expert)."""
    ring_slots: int

    def streamed(self, layer: int, num_experts: int) -> tuple[int, ...]:
        """Return a layer's experts that do not stay, rising."""
        return tuple(e for e in range(num_experts) if (layer, e) not in self.resident)


def split(shape: StepShape, layers_ahead: float, extra: int = 0) -> Split:
    """Divide the slots: enough for the ring, the rest for experts that stay.

    Args:
        shape: The step.
        layers_ahead: Layers whose streamed experts the ring holds at once.
        extra: Slots on top of those.
    """
    total = shape.total_experts
    if shape.num_slots >= total:
        everything = frozenset(
            (layer, e) for layer in range(shape.config.num_layers) for e in range(shape.num_experts)
        )
        return Split(everything, 0)
    # The more slots the ring has the fewer experts stay, and the more of a layer is streamed.
    ring = 1
    while True:
        found = _spread(shape, shape.num_slots - ring)
        per_layer = max(
            len(Split(found, ring).streamed(layer, shape.num_experts))
            for layer in range(shape.config.num_layers)
        )
        wanted = int(per_layer * layers_ahead) + extra
        if ring >= min(wanted, shape.num_slots):
            return Split(found, ring)
        ring += 1


def _spread(shape: StepShape, num_resident: int) -> frozenset[tuple[int, int]]:
    """Choose experts at even distances along the order of use."""
    total = shape.total_experts
    chosen = (
        index
        for index in range(total)
        if (index + 1) * num_resident // total > index * num_resident // total
    )
    return frozenset(divmod(index, shape.num_experts) for index in chosen)


def _to_keep(shape: StepShape, parts: Split) -> list[tuple[int, int]]:
    """Return the experts that do not stay so that the first few are spread over all of them."""
    streamed = [
        (layer, e)
        for layer in range(shape.config.num_layers)
        for e in parts.streamed(layer, shape.num_experts)
    ]
    # By the number whose bits are those of the index in reverse: halves, then quarters, ...
    bits = len(streamed).bit_length()
    order = sorted(range(len(streamed)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return [streamed[i] for i in order]


class Belt:
    """Writes the loads of a plan and keeps account of the ring."""

    def __init__(self, writer: PlanWriter, parts: Split, held: Iterable[Held]) -> None:
        self._writer = writer
        self._shape = writer.shape
        self._parts = parts
        size = self._shape.expert_bytes
        stay = len(parts.resident)
        if stay:
            writer.buffer("resident experts", "experts", stay * size)
        slots = [writer.buffer(f"slot {i}", "experts", size) for i in range(parts.ring_slots)]
        self._ring = frozenset(slots)
        self._kept_in = {
            expert: writer.buffer(f"{KEPT} {i}", "experts", size)
            for i, expert in enumerate(_to_keep(self._shape, parts)[: self._shape.extra_slots])
        }
        """Where an expert is to be kept."""
        if len(self._shape.placement.weights) == 2:
            self._host: deque[str] = deque(
                writer.buffer(f"host slot {i}", "host", size) for i in range(self._shape.host_slots)
            )
        self._kept = {
            (h.layer, h.expert) for h in held if h.buffer == self._kept_in.get((h.layer, h.expert))
        }
        late = self._late({(h.layer, h.expert) for h in held if h.buffer in self._ring})
        self.held = tuple(
            h
            for h in held
            if (h.layer, h.expert) in self._kept
            or (h.buffer in self._ring and (h.layer, h.expert) not in late)
        )
        self._slot_of = {(h.layer, h.expert): h.buffer for h in self.held}
        self._free = deque(slot for slot in slots if slot not in self._slot_of.values())

    def _late(self, in_ring: set[tuple[int, int]]) -> set[tuple[int, int]]:
        """Return the experts of which one that is wanted sooner is not in the ring.

        So it is for some where extra slots have gone. They would wait for their turn in the slots
        that others need before.
        """
        order = [
            (layer, e)
            for layer in range(self._shape.config.num_layers)
            for e in self.streamed(layer)
            if (layer, e) not in self._kept_in
        ]
        return set(itertools.dropwhile(in_ring.__contains__, order))

    def streamed(self, layer: int) -> tuple[int, ...]:
        """Return a layer's experts that are to be loaded in this step, rising."""
        streamed = self._parts.streamed(layer, self._shape.num_experts)
        return tuple(e for e in streamed if (layer, e) not in self._kept)

    @property
    def room(self) -> int:
        """How many slots are free after the ops written so far."""
        return len(self._free)

    def load(self, layer: int, expert: int, after: Iterable[int] = (), ahead: bool = False) -> None:
        """Write what brings an expert into a slot, unless it is there.

        Raises:
            InvalidInputError: The schedule needs more slots at once than there are.
        """
        if (layer, expert) in self._slot_of:
            return
        slot = self._kept_in.get((layer, expert)) or self._next_slot()
        self._slot_of[layer, expert] = slot
        size = (self._shape.expert_bytes, 0)
        what = {"layer": layer, "experts": (expert,), "ahead": ahead}
        path = self._shape.placement.weights
        add = self._writer.add
        if path == ("disk",):
            add("read", "disk", after, size, acquires=(slot,), **what)
        elif path == ("h2d",):
            add("load", "h2d", after, size, acquires=(slot,), **what)
        else:
            host = self._host[0]
            self._host.rotate(-1)
            add("read", "disk", after, size, acquires=(host,), **what)
            add("load", "h2d", [], size, acquires=(slot,), releases=(host,), **what)

    def _next_slot(self) -> str:
        if not self._free:
            raise InvalidInputError(
                f"schedule {self._writer.schedule!r} needs more than {self._shape.num_slots} "
                "expert slots at once: give it more memory or use schedule 'specmoeoff'"
            )
        return self._free.popleft()

    def run(
        self,
        layer: int,
        experts: Iterable[int],
        batch: tuple[int, ...],
        after: Iterable[int],
        release: bool,
    ) -> int:
        """Write the op that runs some experts over the rows of some micro-batches.

        Args:
            layer: Their layer.
            experts: Rising; all loaded or staying.
            batch: The micro-batches whose rows they take.
            after: Ops whose results they need, the run of lower experts over these rows included.
            release: Whether their slots are given back.
        """
        experts = tuple(experts)
        found = [self._slot_of[layer, e] for e in experts if (layer, e) in self._slot_of]
        slots = tuple(slot for slot in found if slot in self._ring)
        kept = tuple(slot for slot in found if slot not in self._ring)
        number = self._writer.add(
            "experts",
            self._writer.compute,
            after,
            self._shape.experts(batch, len(experts)),
            layer=layer,
            micro_batches=batch,
            experts=experts,
            uses=kept if release else (*slots, *kept),
            releases=slots if release else (),
        )
        if release:
            for e in experts:
                if self._slot_of.get((layer, e)) in self._ring:
                    del self._slot_of[layer, e]
            self._free.extend(slots)
        return number

    def run_on(self) -> tuple[Held, ...]:
        """Load the next step's first experts into whatever slots are free; return what is held."""
        for layer in range(self._shape.config.num_layers):
            for expert in self.streamed(layer):
                if not self._free:
                    break
                # One that is to be kept is loaded where it will be, by a step that has the slot.
                if (layer, expert) not in self._kept_in:
                    self.load(layer, expert, ahead=True)
        return self.holding()

    def holding(self) -> tuple[Held, ...]:
        """Return what the slots hold after the ops written so far."""
        return tuple(Held(slot, *where) for where, slot in self._slot_of.items())
