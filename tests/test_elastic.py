"""Elastic memory: slots and KV pages never hold more than the total, whatever happens."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoeoff.offload.elastic import ElasticMemory
from specmoeoff.offload.kv_cache import KvCache, KvSequence

MIN_SLOTS = 2


@dataclass
class FakeStore:
    """Counts slots; a resize is all that elastic memory asks of a store."""

    slot_bytes: int
    max_slots: int
    num_slots: int = 0
    resizes: int = 0

    def __post_init__(self) -> None:
        self.num_slots = self.max_slots

    def resize(self, num_slots: int) -> None:
        self.num_slots = min(num_slots, self.max_slots)
        self.resizes += 1


def make(
    total_pages: int, slot_pages: int, max_slots: int, num_caches: int
) -> tuple[ElasticMemory, FakeStore, list[KvCache]]:
    caches = [KvCache(1, 1, 32, 64, "float32", 8 * (i + 1)) for i in range(num_caches)]
    store = FakeStore(slot_pages * 4096, max_slots)
    total = total_pages * 4096 + MIN_SLOTS * store.slot_bytes
    return ElasticMemory(total, store, caches, MIN_SLOTS), store, caches  # type: ignore[arg-type]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "reserve", "free", "rebalance"]),
        st.integers(0, 1),
        st.integers(0, 3),
        st.integers(1, 120),
    ),
    max_size=40,
)


@given(
    operations=OPERATIONS,
    total_pages=st.integers(1, 40),
    slot_pages=st.integers(1, 9),
    max_slots=st.integers(MIN_SLOTS, 12),
    num_caches=st.integers(1, 2),
)
def test_the_invariant(
    operations: list[tuple[str, int, int, int]],
    total_pages: int,
    slot_pages: int,
    max_slots: int,
    num_caches: int,
) -> None:
    elastic, store, caches = make(total_pages, slot_pages, max_slots, num_caches)
    sequences = [[KvSequence() for _ in range(4)] for _ in caches]

    def check() -> None:
        held = sum(cache.high_water * cache.page_bytes for cache in caches)
        assert store.num_slots * store.slot_bytes + held <= elastic.total
        assert MIN_SLOTS <= store.num_slots <= max_slots

    check()
    for name, which, number, amount in operations:
        which %= num_caches
        if name == "reserve":
            caches[which].reserve(sequences[which][number], amount)
        elif name == "free":
            caches[which].free(sequences[which][number])
        else:
            elastic.rebalance()
        check()
    for cache, own in zip(caches, sequences, strict=True):
        for sequence in own:
            cache.free(sequence)
    elastic.rebalance()
    check()
    assert store.num_slots == min(max_slots, elastic.total // store.slot_bytes)


@pytest.mark.parametrize("slot_pages", [1, 3, 7])
def test_alone_a_sequence_gets_all_that_is_not_the_least(slot_pages: int) -> None:
    elastic, store, (cache,) = make(21, slot_pages, 30, 1)
    pages = (elastic.total - MIN_SLOTS * store.slot_bytes) // cache.page_bytes
    sequence = KvSequence()
    for length in range(1, pages * cache.page_size + 1):
        assert cache.reserve(sequence, length)
    assert not cache.reserve(sequence, pages * cache.page_size + 1)
    assert store.num_slots >= MIN_SLOTS


def test_slots_move_in_runs_of_pages() -> None:
    _, store, (cache,) = make(60, 1, 100, 1)
    sequence, before = KvSequence(), store.resizes
    for length in range(0, 40 * cache.page_size, cache.page_size):
        assert cache.reserve(sequence, length)
    assert store.resizes - before <= 12
