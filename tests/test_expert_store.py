"""The expert store: right bytes, bounded slots, no deadlock, and as few bytes as the rule says."""

from __future__ import annotations

import linecache
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff.engine.memory_plan import resident_bytes
from specmoeoff.errors import StreamError
from specmoeoff.offload import expert_store
from specmoeoff.offload import reader as reader_module
from specmoeoff.offload.checkpoint import Checkpoint
from specmoeoff.offload.expert_layout import ExpertLayout, lay_out
from specmoeoff.offload.expert_store import ExpertStore
from specmoeoff.offload.reader import Read, Reader
from tiny import write_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

LAYERS, EXPERTS = 3, 4
ROWS, COLUMNS = 30, 70


class Shelf:
    """Experts on disk whose every byte is known."""

    def __init__(self, directory: Path, layers: int = LAYERS, experts: int = EXPERTS) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.file = directory / "model.safetensors"
        rng = np.random.default_rng(5)
        self.values = {
            (layer, expert, name): rng.integers(0, 1 << 16, (ROWS, COLUMNS), np.uint16)
            for layer in range(layers)
            for expert in range(experts)
            for name in ("gate", "up", "down")
        }
        write_safetensors(
            self.file, {".".join(map(str, key)): ("BF16", v) for key, v in self.values.items()}
        )
        tensors = Checkpoint.open(directory).tensors
        self.layouts: list[list[ExpertLayout]] = [
            [
                lay_out(
                    f"expert {expert} of layer {layer}",
                    {n: tensors[f"{layer}.{expert}.{n}"] for n in ("gate", "up", "down")},
                )
                for expert in range(experts)
            ]
            for layer in range(layers)
        ]

    def expect(self, layer: int, expert: int, tensors: object) -> None:
        for name, tensor in tensors.items():  # type: ignore[attr-defined]
            np.testing.assert_array_equal(tensor, self.values[layer, expert, name])


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.close()


def make_store(
    shelf: Shelf, num_slots: int, reader: Reader, mode: str = "belt", lookahead: int | None = None
) -> ExpertStore:
    return ExpertStore(shelf.layouts, 2, num_slots, reader, mode, lookahead)


def check_slots(store: ExpertStore) -> None:
    """No slot has two experts, none is lost, and no more are resident than may be."""
    used = store._slot_of[store._slot_of >= 0].tolist()
    assert sorted([*used, *store._free]) == list(range(store.num_slots))
    assert store.resident_experts == len(used) <= store.num_slots
    assert set(store._reads) <= set(np.flatnonzero(store._slot_of >= 0).tolist())


def serve_layer(shelf: Shelf, store: ExpertStore, layer: int, wanted: list[int]) -> None:
    counts = np.zeros(store.num_experts, np.int32)
    counts[wanted] = 1
    got = []
    for run in store.serve(layer, counts):
        check_slots(store)
        for expert, tensors in run:
            shelf.expect(layer, expert, tensors)
            got.append(expert)
    assert got == sorted(set(wanted))


def run_pass(shelf: Shelf, store: ExpertStore, num_tokens: int = 64) -> None:
    store.begin_step(num_tokens)
    for layer in range(store.num_layers):
        serve_layer(shelf, store, layer, list(range(store.num_experts)))


PASSES = st.lists(
    st.tuples(
        st.integers(1, 100),
        st.lists(
            st.sets(st.integers(0, EXPERTS - 1), min_size=1).map(sorted),
            min_size=LAYERS,
            max_size=LAYERS,
        ),
        st.none() | st.integers(1, LAYERS * EXPERTS + 1),
    ),
    min_size=1,
    max_size=5,
)


@given(
    passes=PASSES,
    num_slots=st.integers(1, LAYERS * EXPERTS + 2),
    mode=st.sampled_from(["belt", "auto", "demand"]),
    lookahead=st.none() | st.integers(0, 12),
)
@settings(max_examples=150)
def test_served_tensors_are_the_files_bytes(
    shelf: Shelf,
    passes: list[tuple[int, list[list[int]], int | None]],
    num_slots: int,
    mode: str,
    lookahead: int | None,
) -> None:
    reader = Reader(num_threads=2)
    try:
        store = make_store(shelf, num_slots, reader, mode, lookahead)
        for num_tokens, layers, resize_to in passes:
            store.begin_step(num_tokens)
            check_slots(store)
            for layer, wanted in enumerate(layers):
                serve_layer(shelf, store, layer, wanted)
            if resize_to is not None:
                store.resize(resize_to)
                assert store.num_slots == min(resize_to, store.max_slots)
                check_slots(store)
    finally:
        reader.close()


def test_all_slots_taken_by_later_experts_of_the_layer(shelf: Shelf, reader: Reader) -> None:
    store = make_store(shelf, 2, reader, "demand")
    store.begin_step(1)
    serve_layer(shelf, store, 0, [1, 2])
    serve_layer(shelf, store, 0, [0, 1, 2, 3])


@pytest.mark.parametrize("mode", ["belt", "auto"])
@pytest.mark.parametrize("num_slots", [5, 12, 16, 25, 40, 60])
def test_the_belt_streams_what_does_not_fit_and_little_more(
    tmp_path: Path, reader: Reader, num_slots: int, mode: str
) -> None:
    layers, experts = 16, 4
    shelf, total = Shelf(tmp_path, layers, experts), layers * experts
    store = make_store(shelf, num_slots, reader, mode)
    for _ in range(4):
        run_pass(shelf, store)
    before = store.stats.fetched_experts
    passes = 6
    for _ in range(passes):
        run_pass(shelf, store)
    per_pass = (store.stats.fetched_experts - before) / passes
    # What is on its way takes slots that would otherwise keep something: the look-ahead window,
    # or a whole layer where that is wider.
    on_its_way = max(store._window(), experts)
    assert total - num_slots <= per_pass + 1e-9
    assert per_pass <= (total - num_slots) * (1 + on_its_way / total) + 1


def test_what_fits_is_read_once(shelf: Shelf, reader: Reader) -> None:
    store = make_store(shelf, 100, reader)
    for _ in range(4):
        run_pass(shelf, store)
    assert store.stats.fetched_experts == LAYERS * EXPERTS
    assert reader.stats.bytes == sum(
        segment.num_bytes
        for layer in shelf.layouts
        for layout in layer
        for segment in layout.segments
    )


def test_demand_reads_only_what_is_wanted(shelf: Shelf, reader: Reader) -> None:
    store = make_store(shelf, LAYERS * EXPERTS, reader, "demand")
    for _ in range(3):
        store.begin_step(1)
        for layer in range(LAYERS):
            serve_layer(shelf, store, layer, [1, 3])
    assert store.stats.fetched_experts == store.stats.missed_experts == 2 * LAYERS
    assert store.stats.wanted_experts == 3 * 2 * LAYERS


def test_demand_keeps_the_experts_that_come_often(shelf: Shelf, reader: Reader) -> None:
    store = make_store(shelf, LAYERS + 1, reader, "demand")
    fetched = []
    for step in range(60):
        store.begin_step(1)
        before = store.stats.fetched_experts
        for layer in range(LAYERS):
            serve_layer(shelf, store, layer, [2] if step % 5 else [2, step // 5 % 2])
        fetched.append(store.stats.fetched_experts - before)
    # The regular ones stay through the visits of the others.
    assert sum(fetched[30:]) <= 6 * 2 * LAYERS
    assert [count for step, count in enumerate(fetched) if step >= 30 and step % 5 > 1] == [0] * 18


def test_resize_gives_memory_back(tmp_path: Path, reader: Reader) -> None:
    rows = 64 << 10
    values = {name: np.ones((rows, 16), np.uint16) for name in ("gate", "up", "down")}
    write_safetensors(tmp_path / "model.safetensors", {n: ("BF16", v) for n, v in values.items()})
    layout = lay_out("expert", Checkpoint.open(tmp_path).tensors)
    store = ExpertStore([[layout] * 8], 2, 8, reader)
    store.begin_step(64)
    for _ in store.serve(0, np.ones(8, np.int32)):
        pass
    full = resident_bytes()
    store.resize(2)
    assert full - resident_bytes() > 5.5 * layout.num_bytes
    store.resize(8)
    assert full - resident_bytes() > 5.5 * layout.num_bytes, "growing costs nothing until used"
    for run in store.serve(0, np.ones(8, np.int32)):
        for _, tensors in run:
            assert (tensors["down"] == 1).all()


def test_all_experts_are_resident_once_each_was_served(shelf: Shelf, reader: Reader) -> None:
    store = make_store(shelf, LAYERS * EXPERTS, reader)
    assert store.resident() is None
    run_pass(shelf, store)
    everything = store.resident()
    assert everything is not None
    for layer, experts in enumerate(everything):
        for expert, tensors in enumerate(experts):
            shelf.expect(layer, expert, tensors)
    assert store.resident() is everything
    wanted = store.stats.wanted_experts
    store.ran(np.array([[1, 0, 2, 0], [0, 0, 0, 3], [1, 1, 1, 0]], np.int32))
    assert store.stats.wanted_experts == wanted + 6


def test_none_are_once_one_gave_way(shelf: Shelf, reader: Reader) -> None:
    store = make_store(shelf, LAYERS * EXPERTS, reader)
    run_pass(shelf, store)
    before = store.resident()
    store.resize(LAYERS * EXPERTS - 1)
    assert store.resident() is None
    store.resize(LAYERS * EXPERTS)
    assert store.resident() is None
    run_pass(shelf, store)
    after = store.resident()
    assert after is not None
    assert after is not before
    for layer, experts in enumerate(after):
        for expert, tensors in enumerate(experts):
            shelf.expect(layer, expert, tensors)


@pytest.mark.parametrize("mode", ["belt", "demand"])
@pytest.mark.parametrize("num_slots", [2, 5, LAYERS * EXPERTS])
def test_a_failed_read_is_raised_and_a_retry_works(
    tmp_path: Path, reader: Reader, mode: str, num_slots: int
) -> None:
    shelf = Shelf(tmp_path)
    content = shelf.file.read_bytes()
    store = make_store(shelf, num_slots, reader, mode)
    os.truncate(shelf.file, len(content) // 2)
    for _ in range(3):
        with pytest.raises(StreamError, match=r"model\.safetensors .*expert \d of layer \d"):
            run_pass(shelf, store)
        check_slots(store)
    store.resize(2)
    store.resize(num_slots)
    check_slots(store)
    shelf.file.write_bytes(content)
    for _ in range(3):
        run_pass(shelf, store)


def test_an_abandoned_pass_holds_nothing(shelf: Shelf, reader: Reader) -> None:
    store = make_store(shelf, 2, reader)
    kept = []
    for layer in range(LAYERS):
        serving = store.serve(layer, np.ones(EXPERTS, np.int64))
        next(serving)
        kept.append(serving)  # alive, as a traceback keeps it
    run_pass(shelf, store)
    del kept
    run_pass(shelf, store)


def test_an_interrupted_wait_is_not_an_arrival(
    shelf: Shelf, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, interrupted = Read.wait, []

    def wait(read: Read) -> None:
        if not interrupted:
            interrupted.append(read.name)
            raise KeyboardInterrupt
        real(read)

    real_read = reader._read
    monkeypatch.setattr(Read, "wait", wait)
    monkeypatch.setattr(reader, "_read", lambda piece: (_pause(), real_read(piece)))
    store = make_store(shelf, 3, reader, "demand")
    with pytest.raises(KeyboardInterrupt):
        run_pass(shelf, store)
    check_slots(store)
    run_pass(shelf, store)


def _pause() -> None:
    import time

    time.sleep(0.005)


def test_a_failure_of_what_nobody_wants_is_silent(
    shelf: Shelf, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    bad = shelf.layouts[0][3].segments[0].offset

    def preadv(descriptor: int, into: list[memoryview], offset: int) -> int:
        if offset == bad:
            raise OSError(5, "Input/output error")
        return real(descriptor, into, offset)

    monkeypatch.setattr(reader_module.os, "preadv", preadv)
    store = make_store(shelf, 8, reader)
    for _ in range(3):
        store.begin_step(64)
        for layer in range(LAYERS):
            serve_layer(shelf, store, layer, [0, 1, 2] if layer == 0 else [0, 1, 2, 3])
    with pytest.raises(StreamError, match="expert 3 of layer 0 failed: Input/output error"):
        run_pass(shelf, store)


def test_a_read_ahead_that_fails_while_it_is_waited_for_is_asked_for_again(
    shelf: Shelf, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    bad = shelf.layouts[0][0].segments[0].offset
    failures = [OSError(5, "Input/output error")]

    def preadv(descriptor: int, into: list[memoryview], offset: int) -> int:
        if offset == bad and failures:
            _pause()  # until somebody waits
            raise failures.pop()
        return real(descriptor, into, offset)

    monkeypatch.setattr(reader_module.os, "preadv", preadv)
    store = make_store(shelf, 8, reader)
    run_pass(shelf, store)
    assert not failures


# Interrupts ---------------------------------------------------------------------------------------


class Interrupt:
    """Raises KeyboardInterrupt before the n-th line that this thread runs in some files.

    Not on the line of a ``with``: leaving it is traced as well, and there no signal is looked for.
    """

    def __init__(self, line: int, *files: str | None) -> None:
        self.left = line
        self.files = files

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not line.lstrip().startswith("with "):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._trace


@pytest.mark.parametrize("num_slots", [2, 5, 9])
def test_an_interrupt_anywhere_leaves_no_wrong_bytes(shelf: Shelf, num_slots: int) -> None:
    """A slot is never taken for filled, given to two or lost, wherever Ctrl-C comes."""
    files = (expert_store.__file__, reader_module.__file__)
    reader = Reader()
    store = make_store(shelf, num_slots, reader)
    for line in range(1, 4000, 7):
        interrupt = Interrupt(line, *files)
        try:
            with interrupt:
                run_pass(shelf, store)
                store.resize(2 + line % (num_slots - 1))
                store.resize(num_slots)
        except KeyboardInterrupt:
            pass
        store.resize(2 + line % (num_slots - 1))
        check_slots(store)
        run_pass(shelf, store)
        store.resize(num_slots)
        if interrupt.left > 0:
            break
    else:
        pytest.fail("there are more lines than were tried")
    check_slots(store)
    reader.close()
