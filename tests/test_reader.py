"""The reader: exact bytes whatever the pieces, and faults that name their file and go away."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults import READS, Hang, told_when_closed
from specmoeoff.errors import StreamError
from specmoeoff.offload import reader as reader_module
from specmoeoff.offload.arena import Arena
from specmoeoff.offload.direct_read import ALIGNMENT
from specmoeoff.offload.reader import Read, Reader, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE_BYTES = 37 * ALIGNMENT + 123


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).integers(0, 256, FILE_BYTES, np.uint8).tobytes()


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(content)
    return path


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader(piece_bytes=4 * ALIGNMENT)
    yield made
    made.close()


def segment(file: Path, block: int, num_blocks: int) -> Segment:
    needed = min(num_blocks * ALIGNMENT, FILE_BYTES - block * ALIGNMENT)
    return Segment(file, block * ALIGNMENT, num_blocks * ALIGNMENT, needed)


def buffers(segments: list[Segment]) -> list[memoryview]:
    arenas = [Arena(each.num_bytes) for each in segments]
    for arena in arenas:
        arena.hold(arena.num_bytes)
    return [arena.bytes[: s.num_bytes].data for arena, s in zip(arenas, segments, strict=True)]


def read_all(reader: Reader, file: Path, name: str = "everything") -> bytes:
    whole = segment(file, 0, 38)
    (buffer,) = buffers([whole])
    reader.submit(name, [whole], [buffer]).wait()
    return bytes(buffer[:FILE_BYTES])


@given(data=st.data(), piece_blocks=st.integers(1, 50), num_threads=st.integers(1, 4))
def test_reads_are_the_files_bytes(
    data: st.DataObject,
    piece_blocks: int,
    num_threads: int,
    content: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("reader") / "f"
    file.write_bytes(content)
    reader = Reader(num_threads, piece_blocks * ALIGNMENT)
    try:
        reads = []
        for number in range(data.draw(st.integers(1, 4))):
            segments = [
                segment(file, block, data.draw(st.integers(1, 38 - block)))
                for block in data.draw(st.lists(st.integers(0, 37), min_size=1, max_size=3))
            ]
            places = buffers(segments)
            urgent = data.draw(st.booleans())
            reads.append((reader.submit(f"r{number}", segments, places, urgent), segments, places))
        for read, segments, places in reads:
            read.wait()
            assert read.is_done
            assert not read.has_failed
            for each, place in zip(segments, places, strict=True):
                wanted = content[each.offset : each.offset + each.needed_bytes]
                assert bytes(place[: each.needed_bytes]) == wanted
        assert reader.stats.bytes == sum(s.num_bytes for _, segments, _ in reads for s in segments)
        assert reader.busy_seconds() > 0
    finally:
        reader.close()


def test_urgent_reads_overtake_the_queue(
    file: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[str] = []
    gate = threading.Event()
    real = os.preadv

    def preadv(descriptor: int, into: list[memoryview], offset: int) -> int:
        gate.wait()
        return real(descriptor, into, offset)

    monkeypatch.setattr(reader_module.os, "preadv", preadv)
    single = Reader(num_threads=1, piece_bytes=ALIGNMENT)
    real_read = single._read
    monkeypatch.setattr(
        single, "_read", lambda piece: (served.append(piece.read.name), real_read(piece))
    )
    one = segment(file, 0, 1)
    (buffer,) = buffers([one])
    first = single.submit("first", [one], [buffer])
    while not served:
        time.sleep(0.001)
    waiting = single.submit("waiting", [one], [buffer])
    single.submit("second urgent", [one], [buffer], urgent=True)
    single.submit("urgent", [one], [buffer], urgent=True)
    gate.set()
    first.wait()
    waiting.wait()
    single.close()
    assert served == ["first", "urgent", "second urgent", "waiting"]


def test_truncation_is_noticed_and_repaired(file: Path, reader: Reader, content: bytes) -> None:
    assert read_all(reader, file) == content
    os.truncate(file, 20 * ALIGNMENT + 5)
    with pytest.raises(StreamError, match=r"shard\.safetensors ended at byte .* reading expert 3"):
        read_all(reader, file, "expert 3")
    file.write_bytes(content)
    assert read_all(reader, file) == content


def test_a_file_put_back_by_rename_is_read_again(
    file: Path, reader: Reader, content: bytes, tmp_path: Path
) -> None:
    read_all(reader, file)
    os.truncate(file, 0)
    with pytest.raises(StreamError, match=r"shard\.safetensors"):
        read_all(reader, file)
    other = tmp_path / "other"
    other.write_bytes(content)
    other.rename(file)
    assert read_all(reader, file) == content


def test_a_missing_file_is_named(tmp_path: Path, reader: Reader, content: bytes) -> None:
    file = tmp_path / "gone.safetensors"
    with pytest.raises(StreamError, match=r"gone\.safetensors: reading expert 1 failed: No such"):
        read_all(reader, file, "expert 1")
    file.write_bytes(content)
    assert read_all(reader, file) == content


def test_a_removed_file_stays_readable_while_open(
    file: Path, reader: Reader, content: bytes
) -> None:
    read_all(reader, file)
    file.unlink()
    assert read_all(reader, file) == content


def test_one_bad_piece_fails_the_read_once_all_its_pieces_are_back(
    file: Path, reader: Reader, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(descriptor: int, into: list[memoryview], offset: int) -> int:
        if offset == 8 * ALIGNMENT:
            raise OSError(5, "Input/output error")
        return real(descriptor, into, offset)

    with monkeypatch.context() as patch:
        patch.setattr(reader_module.os, "preadv", preadv)
        with pytest.raises(StreamError, match="Input/output error"):
            read_all(reader, file)
    assert not reader._queue
    assert read_all(reader, file) == content


def test_any_exception_reaches_the_waiter(
    file: Path, reader: Reader, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(piece: object) -> None:
        raise ValueError("a surprise")

    with monkeypatch.context() as patch:
        patch.setattr(reader, "_read", explode)
        with pytest.raises(StreamError, match="a surprise"):
            read_all(reader, file)
    assert read_all(reader, file) == content


def test_where_o_direct_is_refused_the_page_cache_serves(
    file: Path, reader: Reader, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(reader_module.os, "open", refuse)
    assert read_all(reader, file) == content


def test_an_unaligned_direct_read_falls_back(
    file: Path, reader: Reader, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    cut = set()

    def preadv(descriptor: int, into: list[memoryview], offset: int) -> int:
        if offset % ALIGNMENT == 0 and offset not in cut:
            cut.add(offset)
            return real(descriptor, [into[0][:ALIGNMENT]], offset) - 100
        return real(descriptor, into, offset)

    monkeypatch.setattr(reader_module.os, "preadv", preadv)
    assert read_all(reader, file) == content


def test_close_fails_what_is_queued_and_refuses_more(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "GRACE_S", 30.0)
    reader = Reader(num_threads=1, piece_bytes=ALIGNMENT)
    gate, started = threading.Event(), threading.Event()
    real = reader._read

    def slow(piece: object) -> None:
        started.set()
        gate.wait()
        real(piece)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "_read", slow)
    one = segment(file, 0, 1)
    (buffer,) = buffers([one])
    flying = reader.submit("flying", [one], [buffer])
    started.wait()
    queued = reader.submit("queued", [one], [buffer])
    closer = threading.Thread(target=reader.close)
    closer.start()
    with pytest.raises(StreamError, match="queued: the reader was closed"):
        queued.wait()
    gate.set()
    closer.join()
    flying.wait()
    with pytest.raises(StreamError, match="late cannot be read: the reader was closed"):
        reader.submit("late", [one], [buffer])
    reader.close()


def test_no_descriptor_is_left_open(file: Path, content: bytes) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = Reader(piece_bytes=4 * ALIGNMENT)
    for _ in range(5):
        assert read_all(reader, file) == content
        os.truncate(file, 0)
        with pytest.raises(StreamError):
            read_all(reader, file)
        file.write_bytes(content)
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# A read that hangs --------------------------------------------------------------------------------


def test_closing_leaves_a_read_that_hangs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its waiter is told; when the disk answers at last, memory and files are still there."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    hang = Hang(monkeypatch, *READS)
    reader = Reader(num_threads=2, piece_bytes=ALIGNMENT)
    whole = segment(file, 0, 38)
    arena = Arena(whole.num_bytes)
    arena.hold(arena.num_bytes)
    memory = weakref.ref(arena.bytes)
    read = reader.submit("expert 1", [whole], [arena.bytes[: whole.num_bytes].data])
    assert hang.started.wait(30)
    reader.close()
    with pytest.raises(StreamError, match="expert 1: the reader was closed"):
        read.wait()
    reader.close()
    alive = [thread for thread in reader._threads if thread.is_alive()]
    assert alive
    assert all(thread.daemon for thread in alive), "it would keep the process from ending"
    del arena, read
    gc.collect()
    assert memory() is not None, "late bytes would be written into memory that was freed"
    hang.gate.set()
    for thread in alive:
        thread.join(30)
        assert not thread.is_alive()
    gc.collect()
    assert memory() is None
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_who_waits_is_told_when_another_thread_closes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = Hang(monkeypatch, *READS)
    reader = Reader(num_threads=1, piece_bytes=ALIGNMENT)
    one = segment(file, 0, 1)
    (buffer,) = buffers([one])
    read = reader.submit("expert 1", [one], [buffer])
    told = told_when_closed(read.wait, hang, reader.close, StreamError)
    assert told == "expert 1: the reader was closed"
    hang.gate.set()


def test_a_read_that_was_never_started_is_lost_and_no_other(file: Path, reader: Reader) -> None:
    one = segment(file, 0, 1)
    (buffer,) = buffers([one])
    started, lost = reader.submit("a", [one], [buffer]), Read("b", [one], [buffer])
    reader.fail_if_lost(started)
    reader.fail_if_lost(lost)
    with pytest.raises(StreamError, match="reading b was interrupted"):
        lost.wait()
    started.wait()
    reader.fail_if_lost(started)
    started.wait()
