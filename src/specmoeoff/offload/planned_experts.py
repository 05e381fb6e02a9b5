"""Experts where a plan puts them: slots that stay, a ring that is refilled, copies in between.

The expert of a buffer is what the plan last brought there; that nobody overwrites what is in use is
the plan's promise, not kept again here. With a device of its own memory, ``load`` copies from the
host: from where all experts lie, or from a slot that ``read`` filled.

Knows bytes, slots and names of buffers. Knows nothing of tokens, models or time.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from specmoeoff.errors import StreamError
from specmoeoff.offload.arena import Arena, round_up
from specmoeoff.offload.reader import LOOK_S, Read
from specmoeoff.pipeline.schedules.belt import KEPT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from specmoeoff.kernels import Weight
    from specmoeoff.offload.expert_layout import ExpertLayout
    from specmoeoff.offload.reader import Reader

Expert = tuple[int, int]
"""(layer, expert)."""


class ExpertSlots(Protocol):
    """Slots where experts are used, in whatever memory that is."""

    def fill(self, slot: int, layout: ExpertLayout, source: NDArray[np.uint8]) -> None:
        """Copy an expert from a slot of the host's, whose bytes are as the layout says."""

    def tensors(self, slot: int, layout: ExpertLayout) -> Mapping[str, Any]:
        """Return the tensors of the expert that a slot holds, where they are."""


class PlannedExperts:
    """The experts of one model in ``num_slots`` slots where they are used.

    ``slots`` are that many in a device's memory, which is reached from the host's only; without
    them the slots are the host's own, and up to ``max_slots`` may be had for a while (``resize``).
    """

    def __init__(
        self,
        layouts: Sequence[Sequence[ExpertLayout]],
        num_slots: int,
        reader: Reader,
        slots: ExpertSlots | None = None,
        max_slots: int = 0,
    ) -> None:
        self.slot_bytes = slot_bytes(layouts)
        self.num_slots = num_slots
        """Slots that there are now."""
        self.fixed_slots = num_slots
        """Slots that there always are; the others are extra ones."""
        self._max_slots = max(max_slots, num_slots)
        self._layouts = layouts
        self._reader = reader
        self._own: _Slots | None = None
        if slots is None:
            slots = self._own = _Slots(num_slots, self.slot_bytes, self._max_slots)
        self._slots = slots
        self._host: _Slots | None = None
        self._home: dict[Expert, int] = {}
        """Host slot of each expert that stays on the host."""
        self._resident: dict[Expert, int] = {}
        self._streamed: dict[Expert, int] = {}
        self._staged: dict[Expert, int] = {}
        self._begun: dict[tuple[Expert, str], Read] = {}
        """Reads into a buffer that were begun before their turn."""
        self._left_behind: list[Read] = []
        """Reads of a fetch that failed, or that nobody waits for any more."""

    # -- before the first step ---------------------------------------------------------------------

    def keep_all_on_host(self) -> None:
        """Read every expert into host memory, from where ``load`` takes it.

        Raises:
            StreamError: One could not be read.
        """
        everything = [
            (layer, e) for layer, experts in enumerate(self._layouts) for e in range(len(experts))
        ]
        self._host = _Slots(len(everything), self.slot_bytes)
        self._home = {expert: slot for slot, expert in enumerate(everything)}
        self._fetch(self._host, self._home)

    def stage_on_host(self, num_slots: int) -> None:
        """Have ``read`` bring experts into host slots, from where ``load`` takes them."""
        self._host = _Slots(num_slots, self.slot_bytes)

    @property
    def host_memory(self) -> NDArray[np.uint8]:
        """The slots from which ``load`` takes experts, page-aligned, ``slot_bytes`` each."""
        assert self._host is not None
        return self._host.memory

    def resize(self, num_slots: int) -> None:
        """Have so many slots of the host's own from now on, as far as that is possible.

        Call between steps: what the slots beyond them hold is gone.
        """
        assert self._own is not None
        self.num_slots = min(max(num_slots, self.fixed_slots), self._max_slots)
        self._own.hold(self.num_slots)
        self._streamed = {e: slot for e, slot in self._streamed.items() if slot < self.num_slots}

    def keep(self, experts: Iterable[Expert]) -> None:
        """Make these the experts that stay, in the slots before the ring's.

        Where they are others than before, the ring moves: nothing may be on its way there, and
        nothing in it counts any more. Schedules choose what stays by the slots alone, so between
        two steps this is so only after ``PlannedForward.tune``, which settles the lanes.

        Raises:
            StreamError: One could not be read.
        """
        wanted = {expert: slot for slot, expert in enumerate(sorted(experts))}
        if wanted == self._resident:
            return
        # Until all are there none counts, so that a failure leaves nothing half-read behind.
        self._resident = {}
        self._streamed.clear()
        if self._home:
            for expert, slot in wanted.items():
                self._fill(slot, expert, self._home[expert])
        elif self._own is not None:
            self._fetch(self._own, wanted)
        else:
            self._fetch_through_host(wanted)
        self._resident = wanted

    # -- what ops do -------------------------------------------------------------------------------

    def begin_read(self, expert: Expert, buffer: str) -> None:
        """Begin what ``read`` will be asked for, as soon as its slot is free.

        Then the disk has more than one expert to read and no pause between two. Whether it can be
        read is for ``read`` to say.
        """
        if self._left_behind:
            return  # whose slot this may be; read() waits for them
        # Known before it starts: an interrupt in between must not leave a slot to a lost read.
        read = self._begun[expert, buffer] = self._read_into(*self._target(buffer), expert)
        with contextlib.suppress(StreamError):  # of a closed reader, which fails the read as well
            self._reader.start(read)

    def read(self, expert: Expert, buffer: str) -> None:
        """Bring an expert from disk into a slot where it is used, or of the host (``host slot 3``).

        Raises:
            StreamError: It could not be read.
        """
        slots, slot = self._target(buffer)
        begun = self._begun.pop((expert, buffer), None)
        if begun is None:
            self._fetch(slots, {expert: slot})
        else:
            self._wait_for([begun])
        (self._staged if slots is self._host else self._streamed)[expert] = slot

    def give_up_reads(self) -> None:
        """Leave what was begun behind: the step that wanted it has failed."""
        self._left_behind += self._begun.values()
        self._begun.clear()

    def let_land(self, seconds: float = math.inf) -> None:
        """Wait for what was left behind in flight: its slots may be others' now.

        Raises:
            StreamError: It still is after so many seconds.
        """
        deadline = time.monotonic() + seconds
        while self._left_behind:
            read = self._left_behind[-1]
            self._reader.fail_if_lost(read)
            while not read.ends_within(min(deadline - time.monotonic(), LOOK_S)):
                if time.monotonic() >= deadline:
                    raise StreamError(
                        f"reading {read.name} of an earlier step was given up and still runs; "
                        "no step can start beside it"
                    )
            self._left_behind.pop()

    def load(self, expert: Expert, buffer: str) -> None:
        """Copy an expert from the host into a slot where it is used."""
        slot = self._slot(buffer)
        home = self._home[expert] if self._home else self._staged.pop(expert)
        self._fill(slot, expert, home)
        self._streamed[expert] = slot

    def tensors(self, expert: Expert) -> Mapping[str, Any]:
        """Return an expert's tensors where they are used."""
        slot = self._resident.get(expert)
        slot = self._streamed[expert] if slot is None else slot
        return self._slots.tensors(slot, self._layout(expert))

    def _slot(self, buffer: str) -> int:
        """Return the slot of a buffer: those that stay come first, then the ring, then extra."""
        name, _, number = buffer.rpartition(" ")
        return (self.fixed_slots if name == KEPT else len(self._resident)) + int(number)

    def _target(self, buffer: str) -> tuple[_Slots, int]:
        """Return where ``read`` puts an expert."""
        if buffer.startswith("host"):
            assert self._host is not None
            return self._host, int(buffer.rpartition(" ")[2])
        assert self._own is not None
        return self._own, self._slot(buffer)

    def _layout(self, expert: Expert) -> ExpertLayout:
        layer, number = expert
        return self._layouts[layer][number]

    def _fill(self, slot: int, expert: Expert, host_slot: int) -> None:
        assert self._host is not None
        self._slots.fill(slot, self._layout(expert), self._host.view(host_slot))

    def _fetch_through_host(self, wanted: Mapping[Expert, int]) -> None:
        """Read experts into the first host slot, one after the other, and copy them on.

        Only before a ring is in use, so that nothing else is on its way through that slot.
        """
        assert self._host is not None
        for expert, slot in wanted.items():
            self._fetch(self._host, {expert: 0})
            self._fill(slot, expert, 0)

    def _fetch(self, slots: _Slots, wanted: Mapping[Expert, int]) -> None:
        """Read experts into slots, all at once so that the disk's queue is never empty."""
        self.let_land()
        reads = [self._read_into(slots, slot, expert) for expert, slot in wanted.items()]
        try:
            for read in reads:
                self._reader.start(read)
        except BaseException:
            self._left_behind += reads
            raise
        self._wait_for(reads)

    def _wait_for(self, reads: Sequence[Read]) -> None:
        try:
            for read in reads:
                read.wait()
        except BaseException:
            self._left_behind += reads
            raise

    def _read_into(self, slots: _Slots, slot: int, expert: Expert) -> Read:
        layout, view = self._layout(expert), slots.view(slot)
        buffers = [
            view[start : start + segment.num_bytes].data
            for start, segment in zip(layout.starts, layout.segments, strict=True)
        ]
        return Read(layout.name, layout.segments, buffers)


class _Slots:
    """Host memory for so many experts; see ``ExpertSlots``."""

    def __init__(self, num_slots: int, num_bytes: int, max_slots: int = 0) -> None:
        self._num_bytes = num_bytes
        self._arena = Arena(max(num_slots, max_slots) * num_bytes)
        self.hold(num_slots)

    def hold(self, num_slots: int) -> None:
        self._arena.hold(num_slots * self._num_bytes)

    @property
    def memory(self) -> NDArray[np.uint8]:
        return self._arena.bytes

    def view(self, slot: int) -> NDArray[np.uint8]:
        return self._arena.bytes[slot * self._num_bytes : (slot + 1) * self._num_bytes]

    def fill(self, slot: int, layout: ExpertLayout, source: NDArray[np.uint8]) -> None:
        np.copyto(self.view(slot), source)

    def tensors(self, slot: int, layout: ExpertLayout) -> Mapping[str, Weight]:
        view = self.view(slot)
        return {name: tensor.of(view) for name, tensor in layout.tensors.items()}


def slot_bytes(layouts: Sequence[Sequence[ExpertLayout]]) -> int:
    """Return the bytes of a slot that any of these experts fits."""
    return round_up(max(layout.num_bytes for layer in layouts for layout in layer))
