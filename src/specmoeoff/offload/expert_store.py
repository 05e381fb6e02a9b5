"""Keeps as many experts in memory as it may, and has the next ones read before they are wanted.

A step walks the layers in order and starts over: accesses are cyclic. So one rule decides both what
to drop and how far to run ahead: an expert's *expected next use*, in passes from now, is the way to
its layer plus the passes it will probably sit out (1/p - 1, where p is its probability of being
routed to in a step). The farthest is dropped first. Within the look-ahead window, experts that are
likely enough to be wanted are fetched before anyone asks; the window reaches over the end of the
pass, so reading goes on while tokens are drafted and sampled. With everything likely this is a belt
that never stops; with nothing likely enough it is a cache filled on demand.

Knows bytes, slots and probabilities. Knows nothing of tokens or models.

Holds at all times: no more than ``num_slots`` slots are resident; an acquired expert stays.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.errors import StreamError
from specmoeoff.offload.arena import Arena, round_up
from specmoeoff.offload.reader import Read

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from specmoeoff.kernels import Weight
    from specmoeoff.offload.expert_layout import ExpertLayout
    from specmoeoff.offload.reader import Reader

Tensors = Mapping[str, "Weight"]

MEMORY_TOKENS = 32.0
"""The routing probabilities forget with this time constant, in tokens."""
LEAST_LOOKAHEAD = 6
"""Experts: enough reads in flight for the disk's queue and the jitter of a layer."""
LONGEST_GAP_S = 2.0
"""Longer pauses are a user's, not a draft's."""
GAP_MEMORY = 0.3
"""Weight of the newest gap in the measured one."""
LEAST_SHARE = 0.25
"""No expert is thought less likely than this share of the mean: routing changes with the text."""
THRESHOLDS = {"belt": 0.0, "auto": 0.8, "demand": 2.0}
"""Fetch ahead what is wanted in the next pass with at least this probability, by expert mode."""


@dataclass
class StoreStats:
    """Counters since the start."""

    fetched_experts: int = 0
    wanted_experts: int = 0
    missed_experts: int = 0
    """Experts that had to be asked for after routing."""
    stalled_s: float = 0.0
    """Seconds the compute thread waited for bytes."""


class ExpertStore:
    """The experts of one model, [num_layers][num_experts], behind a fixed number of slots."""

    def __init__(
        self,
        layouts: Sequence[Sequence[ExpertLayout]],
        experts_per_token: int,
        num_slots: int,
        reader: Reader,
        mode: str = "auto",
        lookahead: int | None = None,
    ) -> None:
        self.num_layers, self.num_experts = len(layouts), len(layouts[0])
        self._layouts = [layout for layer in layouts for layout in layer]
        self._total = len(self._layouts)
        self._experts_per_token = experts_per_token
        self.slot_bytes = round_up(max(layout.num_bytes for layout in self._layouts))
        self.max_slots = min(num_slots, self._total)
        self.num_slots = self.max_slots
        self.stats = StoreStats()
        self._reader = reader
        self._arena = Arena(self.max_slots * self.slot_bytes)
        self._arena.hold(self.num_slots * self.slot_bytes)
        self._threshold = THRESHOLDS[mode]
        self._lookahead = lookahead
        self._free = list(range(self.max_slots))[::-1]
        self._slot_of = np.full(self._total, -1, np.int64)
        self._reads: dict[int, Read] = {}
        self._views: dict[int, tuple[int, Tensors]] = {}  # slot -> expert, tensors
        self._all: list[list[Tensors]] | None = None
        self._held: list[int] = []
        self._demanded: set[int] = set()
        """Experts that were asked for last because they were wanted, not ahead of that."""
        self._per_token = np.full(self._total, experts_per_token / self.num_experts)
        self._wanted = np.ones(self._total)
        self._cursor = 0
        self._pass_ended = 0.0
        self._gap_s = 0.0
        self._is_changing = False
        """Whether a pass or a change of size has begun and not reached its end."""
        self._passing = self._spread_out()

    # -- what the engine calls ------------------------------------------------------------------

    def resident(self) -> list[list[Tensors]] | None:
        """Return all experts, [num_layers][num_experts], if each has its slot and its bytes.

        The same object is returned as long as none has moved.
        """
        if self._all is None and self.resident_experts == self._total and not self._reads:
            layers = range(self.num_layers)
            first = [layer * self.num_experts for layer in layers]
            self._all = [
                [self._tensors(at + expert) for expert in range(self.num_experts)] for at in first
            ]
        return self._all

    def ran(self, counts: NDArray[np.int32]) -> None:
        """Note a pass over resident experts: tokens routed to each, [num_layers, num_experts]."""
        self.stats.wanted_experts += int(np.count_nonzero(counts))

    def begin_step(self, num_tokens: int) -> None:
        """Say how many tokens the coming pass routes, and start reading ahead for it."""
        self._begin()
        self._cursor = 0
        least = LEAST_SHARE * self._experts_per_token / self.num_experts
        per_token = np.maximum(self._per_token, least)
        self._wanted = 1.0 - (1.0 - per_token) ** max(num_tokens, 1)
        self._read_ahead()

    def serve(self, layer: int, counts: NDArray[np.int32]) -> Iterator[list[tuple[int, Tensors]]]:
        """Yield a layer's wanted experts in rising order, in runs, as their bytes arrive.

        Args:
            layer: The layer the compute has reached.
            counts: Tokens routed to each expert, [E].

        Yields:
            Lists of (expert, tensors); the tensors stay valid until the next list is asked for.

        Raises:
            StreamError: An expert could not be read.
        """
        if layer == 0:
            self._measure_gap()
        first = layer * self.num_experts
        wanted = [first + int(e) for e in np.flatnonzero(counts)]
        self._learn(first, counts)
        self.stats.wanted_experts += len(wanted)
        self._cursor = first
        pending = wanted
        # A pass that failed half-way may have left its own here.
        self._held = []
        while pending:
            asked = self._ask_for(pending)
            run = self._ready_run(pending, asked)
            self._held = run
            yield [(index - first, self._tensors(index)) for index in run]
            self._held = []
            self._cursor = run[-1] + 1
            pending = pending[len(run) :]
            self._read_ahead(pending)
        self._cursor = first + self.num_experts
        self._pass_ended = time.perf_counter()
        self._read_ahead()
        self._is_changing = layer < self.num_layers - 1

    def resize(self, num_slots: int) -> None:
        """Hold at most ``num_slots`` from now on; the memory of dropped slots is given back.

        Call between passes. Slots are dropped from the top of the arena, so the expert in the last
        one may have to move.
        """
        self._begin()
        while self.num_slots > num_slots:
            last = self.num_slots - 1
            if last in self._free:
                self._free.remove(last)
            else:
                slot = self._free.pop() if self._free else self._thin_out()
                if slot != last:
                    self._move(last, slot)
            self.num_slots = last
        while self.num_slots < min(num_slots, self.max_slots):
            self._free.append(self.num_slots)
            self.num_slots += 1
        self._arena.hold(self.num_slots * self.slot_bytes)
        self._is_changing = False

    @property
    def resident_experts(self) -> int:
        """Experts that have a slot now, on their way or arrived."""
        return self.num_slots - len(self._free)

    # -- fetching -------------------------------------------------------------------------------

    def _ask_for(self, pending: Sequence[int]) -> int:
        """Have the missing ones read, as many as there are slots for; return how many are covered.

        At least the first is covered, if another pending one must give way.
        """
        covered = 0
        missing = []
        for index in pending:
            if self._has_failed(index):
                self._free.append(self._release_slot(index))
            if self._slot_of[index] < 0:
                slot = self._take_slot(protect=pending)
                if slot is None and covered == 0:
                    slot = self._take_slot(protect=pending[:1])
                if slot is None:
                    break
                missing.append((index, slot))
            covered += 1
        self._demanded = {index for index, _ in missing}
        # Each urgent read goes to the front, so the first one wanted is submitted last.
        for index, slot in reversed(missing):
            self._submit(index, slot, urgent=True)
        self.stats.missed_experts += len(missing)
        return covered

    def _ready_run(self, pending: Sequence[int], covered: int) -> list[int]:
        """Wait for the first pending expert and return it with those after it that have arrived."""
        first = pending[0]
        try:
            self._wait(first)
        except StreamError:
            if first in self._demanded:
                raise
            # Fetched ahead, maybe before the file was put right: asked for once more.
            self._ask_for([first])
            self._wait(first)
        run = [first]
        for index in pending[1:covered]:
            read = self._reads.get(index)
            if read is not None and (not read.is_done or read.has_failed):
                break
            self._wait(index)
            run.append(index)
        return run

    def _wait(self, index: int) -> None:
        read = self._reads.get(index)
        if read is None:
            return
        start = time.perf_counter()
        try:
            # Interrupted, it stays in flight: what arrives later must not be taken for arrived.
            read.wait()
        except StreamError:
            self._free.append(self._release_slot(index))
            raise
        finally:
            self.stats.stalled_s += time.perf_counter() - start
        del self._reads[index]

    def _has_failed(self, index: int) -> bool:
        """Whether an expert was fetched ahead in vain; asking again may find the file restored."""
        read = self._reads.get(index)
        return read is not None and read.has_failed

    def _read_ahead(self, protect: Sequence[int] = ()) -> None:
        """Fetch the likely experts of the window that are missing, nearest first."""
        if self._threshold > 1.0 or self.resident_experts == self._total:
            return
        ahead = (self._cursor + np.arange(self._window())) % self._total
        likely = ahead[(self._slot_of[ahead] < 0) & (self._wanted[ahead] >= self._threshold)]
        if not len(likely):
            return
        # Looked for once: what is fetched below is in flight, so it is no candidate anyway.
        candidates = self._droppable(protect)
        uses = self._next_use(candidates)
        victims = iter(np.argsort(-uses, kind="stable").tolist())
        for index, next_use in zip(likely.tolist(), self._next_use(likely).tolist(), strict=True):
            if self._free:
                slot = self._free.pop()
            else:
                victim = next(victims, None)
                if victim is None or uses[victim] <= next_use:
                    return
                slot = self._release_slot(int(candidates[victim]))
            self._submit(index, slot, urgent=False)

    def _window(self) -> int:
        """Experts to look ahead: what the link can bring while nothing is consumed, and a few more.

        A longer window would cost bytes, not save time: see docs/offloading.md.
        """
        ahead = self._lookahead
        if ahead is None:
            busy_s = self._reader.stats.busy_s
            bandwidth = self._reader.stats.bytes / busy_s if busy_s else 0.0
            ahead = LEAST_LOOKAHEAD + math.ceil(self._gap_s * bandwidth / self.slot_bytes)
            ahead = min(ahead, self.num_slots // 2)
        return max(1, min(ahead, self.num_slots - 1, self._total - 1))

    def _measure_gap(self) -> None:
        """Learn how long the time between passes is, when drafts are made and tokens sampled."""
        if self._pass_ended:
            gap_s = time.perf_counter() - self._pass_ended
            self._gap_s += GAP_MEMORY * (min(gap_s, LONGEST_GAP_S) - self._gap_s)

    def _submit(self, index: int, slot: int, urgent: bool) -> None:
        layout = self._layouts[index]
        base = slot * self.slot_bytes
        memory = self._arena.bytes
        buffers = [
            memory[base + start : base + start + segment.num_bytes].data
            for start, segment in zip(layout.starts, layout.segments, strict=True)
        ]
        read = Read(layout.name, layout.segments, buffers)
        # Noted before it starts: whatever interrupts this, a slot that has no read has its bytes.
        self._reads[index] = read
        self._slot_of[index] = slot
        self._reader.start(read, urgent)
        self.stats.fetched_experts += 1

    def _begin(self) -> None:
        """Set right what an interrupt may have cut in two, and expect another."""
        if self._is_changing:
            self._held = []
            for index, read in list(self._reads.items()):
                self._reader.fail_if_lost(read)
                if self._slot_of[index] < 0:
                    del self._reads[index]
            taken = set(self._slot_of.tolist())
            self._free = [slot for slot in range(self.num_slots)[::-1] if slot not in taken]
        self._is_changing = True

    # -- choosing what to drop -------------------------------------------------------------------

    def _next_use(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the expected next use of experts, in passes from the cursor."""
        way = ((index - self._cursor) % self._total) / self._total
        return way + 1.0 / np.maximum(self._wanted[index], 1e-3) - 1.0 + self._passing[index]

    def _spread_out(self) -> NDArray[np.float64]:
        """Mark what only passes through in the first pass, so that what stays is spread evenly.

        Were the first ones kept instead, every pass would compute on them with the disk idle and
        then wait for the disk with the processor idle. The rule of the farthest next use keeps
        whatever spacing it starts with.
        """
        kept = max(self.num_slots - self._window(), 0)
        index = np.arange(self._total + 1) * kept // self._total
        return np.where(np.diff(index) > 0, 0.0, 1.0)

    def _take_slot(self, protect: Sequence[int]) -> int | None:
        """Return a free slot, or that of the expert wanted last; None if all are protected."""
        if self._free:
            return self._free.pop()
        candidates = self._droppable(protect)
        if len(candidates):
            return self._release_slot(int(candidates[int(np.argmax(self._next_use(candidates)))]))
        return self._drop_in_flight(protect)

    def _droppable(self, protect: Sequence[int] = ()) -> NDArray[np.int64]:
        droppable = self._slot_of >= 0
        droppable[[*self._held, *protect]] = False
        droppable[[index for index, read in self._reads.items() if not read.is_done]] = False
        return np.flatnonzero(droppable)

    def _drop_in_flight(self, protect: Sequence[int]) -> int | None:
        """Give up what is being fetched (last wanted first) when there is nothing else to drop."""
        others = [index for index in self._reads if index not in protect]
        if not others:
            return None
        victim = others[int(np.argmax(self._next_use(np.array(others))))]
        with contextlib.suppress(StreamError):
            self._reads[victim].wait()
        return self._release_slot(victim)

    def _thin_out(self) -> int:
        """Free a slot so that what stays remains evenly spread over the pass."""
        candidates = self._droppable()
        if not len(candidates):
            slot = self._drop_in_flight(protect=())
            if slot is None:
                raise RuntimeError("every expert slot is held")
            return slot
        gaps = np.diff(candidates, prepend=candidates[-1] - self._total)
        return self._release_slot(int(candidates[int(np.argmin(gaps))]))

    def _move(self, slot: int, other: int) -> None:
        """Move what a slot holds to another one."""
        index = int(np.flatnonzero(self._slot_of == slot)[0])
        read = self._reads.get(index)
        if read is not None:
            # One that failed is noticed, and asked for again, when it is wanted.
            with contextlib.suppress(StreamError):
                read.wait()
        memory = self._arena.bytes[: self.max_slots * self.slot_bytes].reshape(self.max_slots, -1)
        self._all = None
        memory[other] = memory[slot]
        self._slot_of[index] = other

    def _release_slot(self, index: int) -> int:
        """Take an expert's slot away; whatever was read ahead for it is forgotten."""
        self._all = None  # first: an interrupt after the next line must not leave it
        slot = int(self._slot_of[index])
        self._slot_of[index] = -1
        self._passing[index] = 0.0
        read = self._reads.get(index)
        if read is not None and read.is_done:
            del self._reads[index]
        return slot

    def _learn(self, first: int, counts: NDArray[np.int32]) -> None:
        """Update the routing probabilities of a layer from the tokens each expert got."""
        num_tokens = max(int(counts.sum()) // self._experts_per_token, 1)
        per_token = self._per_token[first : first + self.num_experts]
        forget = -math.expm1(-num_tokens / MEMORY_TOKENS)
        per_token += forget * (counts / num_tokens - per_token)

    def _tensors(self, index: int) -> Tensors:
        """Return an expert's tensors as views of its slot, made once for as long as it has it."""
        slot = int(self._slot_of[index])
        known = self._views.get(slot)
        if known is None or known[0] != index:
            views = self._layouts[index].tensors.items()
            start = slot * self.slot_bytes
            known = index, {name: view.of(self._arena.bytes, start) for name, view in views}
            self._views[slot] = known
        return known[1]
