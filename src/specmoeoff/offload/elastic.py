"""Lets KV caches take memory from the expert slots while they need it, and gives it back.

A step's own memory (activations, logits) is put aside for the largest step; what a smaller one does
not need is lent to the slots, and to them only: a slot can be taken back at once, a page cannot.

Invariant: slots x slot bytes + sum of (high-water pages x page bytes) never exceeds the total and
what was lent, and the expert store never falls below its least number of slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from specmoeoff.offload.kv_cache import KvCache

GROWTH_PAGES = 4
"""The caches' share moves in runs of pages, so that the slots are not resized for each one."""


class Slots(Protocol):
    """Where experts are kept, an ``ExpertStore`` or ``PlannedExperts``."""

    slot_bytes: int
    num_slots: int
    """Slots that there are."""

    def resize(self, num_slots: int) -> None:
        """Have so many slots from now on, or as many as there can be."""


class ElasticMemory:
    """``total`` bytes shared by one expert store and some KV caches."""

    def __init__(self, total: int, store: Slots, caches: Sequence[KvCache], min_slots: int) -> None:
        self.total = total
        self._store = store
        self._caches = list(caches)
        self._min_slots = min_slots
        self._lent = 0
        for cache in self._caches:
            cache.may_grow = self._grower(cache)
        self.rebalance()

    def rebalance(self) -> None:
        """Hand what the caches do not hold to the expert store (call after sequences ended)."""
        self._store.resize(self._slots_beside(sum(_held_bytes(c) for c in self._caches)))

    def lend(self, num_bytes: int) -> None:
        """Lend the slots ``num_bytes`` that the coming step leaves free, not what was lent."""
        if num_bytes != self._lent:
            self._lent = num_bytes
            self.rebalance()

    def _grower(self, cache: KvCache) -> Callable[[int], bool]:
        def may_grow(num_pages: int) -> bool:
            others = sum(_held_bytes(c) for c in self._caches if c is not cache)
            wanted = others + num_pages * cache.page_bytes
            if self.total - wanted < self._min_slots * self._store.slot_bytes:
                return False
            slots = self._slots_beside(wanted)
            if slots < self._store.num_slots:
                ahead = num_pages + GROWTH_PAGES
                roomy = self._slots_beside(others + ahead * cache.page_bytes)
                self._store.resize(max(roomy, self._min_slots))
            return True

        return may_grow

    def _slots_beside(self, cache_bytes: int) -> int:
        return (self.total + self._lent - cache_bytes) // self._store.slot_bytes


def _held_bytes(cache: KvCache) -> int:
    return cache.high_water * cache.page_bytes
