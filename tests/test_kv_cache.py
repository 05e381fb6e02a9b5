"""The KV cache: exact page accounting under any operations, and memory only where sequences are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from specmoeoff.config import KV_DTYPES
from specmoeoff.engine.memory_plan import resident_bytes
from specmoeoff.offload.kv_cache import KvCache, KvSequence, page_bytes

MAX_PAGES, PAGE = 12, 4


class Operations(RuleBasedStateMachine):
    """Sequences come, grow, shrink and go; every slot that was handed out keeps its token."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.kv = KvCache(1, 1, 2, MAX_PAGES, "float32", PAGE)
        self.kv.may_grow = self.may_grow
        self.limit = MAX_PAGES
        self.tokens: dict[int, list[float]] = {}
        self.alive: list[KvSequence] = []
        self.counter = 0.0

    def may_grow(self, num_pages: int) -> bool:
        assert num_pages > self.kv.high_water
        return num_pages <= self.limit

    @rule(target=sequences)
    def begin(self) -> KvSequence:
        sequence = KvSequence()
        self.tokens[id(sequence)] = []
        self.alive.append(sequence)
        return sequence

    @rule(limit=st.integers(1, MAX_PAGES))
    def allow(self, limit: int) -> None:
        self.limit = limit

    @rule(sequence=sequences, count=st.integers(0, 20))
    def grow(self, sequence: KvSequence, count: int) -> None:
        kv, before = self.kv, list(sequence.pages)
        used, high = kv.num_used, kv.high_water
        wanted = sequence.length + count
        if not kv.reserve(sequence, wanted):
            assert (sequence.pages, kv.num_used, kv.high_water) == (before, used, high)
            missing = kv.pages_for(wanted) - len(before)
            assert missing > 0
            free = sorted(set(range(MAX_PAGES)) - self.used_pages())
            assert missing > len(free) or free[missing - 1] >= self.limit
            return
        assert sequence.pages[: len(before)] == before
        slots = kv.append(sequence, count)
        keys, _ = kv.layer(0)
        for slot in slots:
            self.counter += 1
            page, at = divmod(int(slot), PAGE)
            keys[page, 0, :, at] = self.counter
            self.tokens[id(sequence)].append(self.counter)

    @rule(sequence=sequences, length=st.integers(0, 30))
    def truncate(self, sequence: KvSequence, length: int) -> None:
        pages = list(sequence.pages)
        self.kv.truncate(sequence, length)
        assert sequence.pages == pages
        del self.tokens[id(sequence)][length:]

    @rule(sequence=consumes(sequences))
    def free(self, sequence: KvSequence) -> None:
        self.kv.free(sequence)
        assert (sequence.pages, sequence.length) == ([], 0)
        self.alive = [other for other in self.alive if other is not sequence]

    @rule(target=sequences, sequence=consumes(sequences))
    @precondition(lambda self: self.alive)
    def reuse(self, sequence: KvSequence) -> KvSequence:
        self.kv.free(sequence)
        self.tokens[id(sequence)] = []
        return multiple(sequence)  # type: ignore[return-value]

    def used_pages(self) -> set[int]:
        return {page for sequence in self.alive for page in sequence.pages}

    @invariant()
    def pages_are_never_shared_and_never_lost(self) -> None:
        pages = [page for sequence in self.alive for page in sequence.pages]
        assert len(pages) == len(set(pages)) == self.kv.num_used
        assert sorted([*pages, *self.kv._free]) == list(range(MAX_PAGES))
        assert self.kv.high_water == max(pages, default=-1) + 1

    @invariant()
    def tokens_are_where_they_were_put(self) -> None:
        keys, _ = self.kv.layer(0)
        table = self.kv.page_table(self.alive)
        for row, sequence in zip(table, self.alive, strict=True):
            assert sequence.length == len(self.tokens[id(sequence)])
            found = [keys[row[i // PAGE], 0, 0, i % PAGE] for i in range(sequence.length)]
            assert found == self.tokens[id(sequence)]


TestOperations = Operations.TestCase


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_layers_and_pages_do_not_overlap(dtype: str) -> None:
    kv = KvCache(3, 2, 6, 4, dtype, 8)
    fields = []
    for layer in range(3):
        k, v = kv.layer(layer)
        assert k.shape == (4, 2, 6, 8)
        assert v.shape == (4, 2, 8, 6)
        scales = [field for field in kv.scales(layer) if field is not None]
        assert [field.shape for field in scales] == [(4, 2, 8)] * (2 if dtype == "int8" else 0)
        fields += [k, v, *scales]
    for number, field in enumerate(fields):
        for page in range(4):
            field[page] = 10 * number + page
    for number, field in enumerate(fields):
        for page in range(4):
            assert (field[page] == 10 * number + page).all()
    assert kv.page_bytes == page_bytes(3, 2, 6, dtype, 8) >= sum(f[0].nbytes for f in fields)


def test_freed_memory_returns_to_the_system() -> None:
    kv = KvCache(4, 8, 128, 64, "float32", 32)
    sequences = [KvSequence() for _ in range(8)]
    before = resident_bytes()
    for sequence in sequences:
        assert kv.reserve(sequence, 8 * 32)
        kv.append(sequence, 8 * 32)
    for layer in range(4):
        for field in kv.layer(layer):
            field[:] = 1
    assert resident_bytes() - before > 60 * kv.page_bytes
    for sequence in sequences[4:]:
        kv.free(sequence)
    assert kv.high_water == 32
    assert resident_bytes() - before < 34 * kv.page_bytes
    kv.free(sequences[0])
    assert kv.high_water == 32, "a hole below the mark stays"
    for sequence in sequences[1:4]:
        kv.free(sequence)
    assert resident_bytes() - before < 2 * kv.page_bytes


def test_a_refusal_that_raises_loses_no_page() -> None:
    kv = KvCache(1, 1, 2, 4, "float32", 4)

    def interrupted(num_pages: int) -> bool:
        raise KeyboardInterrupt

    kv.may_grow = interrupted
    with pytest.raises(KeyboardInterrupt):
        kv.reserve(KvSequence(), 9)
    assert sorted(kv._free) == [0, 1, 2, 3]
    kv.may_grow = lambda num_pages: True
    assert kv.reserve(KvSequence(), 16)


@given(lengths=st.lists(st.integers(0, 30), max_size=5))
def test_page_tables_are_padded_with_zeros(lengths: list[int]) -> None:
    kv = KvCache(1, 1, 2, 64, "float32", 4)
    sequences = [KvSequence() for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        assert kv.reserve(sequence, length)
    table = kv.page_table(sequences)
    assert table.dtype == np.int32
    assert table.shape == (len(lengths), max([1, *(kv.pages_for(n) for n in lengths)]))
    for row, sequence in zip(table, sequences, strict=True):
        assert row.tolist() == sequence.pages + [0] * (len(row) - len(sequence.pages))
