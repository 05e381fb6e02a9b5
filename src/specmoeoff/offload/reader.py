"""Reads byte ranges of files into memory with a few threads, past the page cache.

A read is cut into pieces so that several threads (and the disk's queue) share one large expert;
pieces are served in the order they were asked for, urgent ones first. Knows files, offsets and
buffers; knows nothing of experts or layers.

A read that hangs cannot be called back. Closing leaves it behind after ``GRACE_S``: who waits for
it is told, its thread ends when the disk answers, and until then its buffer is kept, so that late
bytes land in memory that is still there and that nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from specmoeoff.errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

PIECE_BYTES = 4 << 20
NUM_THREADS = 4
LOOK_S = 0.5
"""Longest wait for a read at a time: Ctrl-C that comes just before a wait is seen when it ends."""
GRACE_S = 0.4
"""How long closing waits for pieces in flight; with the lanes' share it stays below two seconds."""


@dataclass(frozen=True)
class Segment:
    """A run of one file that lands in one run of memory, both aligned for O_DIRECT."""

    file: Path
    offset: int
    """Aligned byte offset in the file."""
    num_bytes: int
    """Aligned length; it may reach past the end of the file by less than one block."""
    needed_bytes: int
    """Bytes from ``offset`` that must arrive for the read to be whole."""


class Read:
    """One read: wait() returns when its bytes are there, or raises why they are not."""

    def __init__(
        self, name: str, segments: Sequence[Segment], buffers: Sequence[memoryview]
    ) -> None:
        self.name = name
        self.segments = segments
        self.buffers = buffers
        """Where each segment goes, ``num_bytes`` of it."""
        self._left = 0
        self._error: Exception | None = None
        self._done = threading.Event()

    @property
    def is_done(self) -> bool:
        """Whether wait() would return at once."""
        return self._done.is_set()

    @property
    def has_failed(self) -> bool:
        """Whether wait() would raise at once."""
        return self._done.is_set() and self._error is not None

    def ends_within(self, seconds: float) -> bool:
        """Wait that long at most; return whether wait() would return at once."""
        return self._done.wait(max(seconds, 0.0))

    def wait(self) -> None:
        """Block until every piece has arrived.

        Raises:
            StreamError: A piece could not be read; the message names the file and the read.
        """
        while not self._done.wait(LOOK_S):
            pass
        if self._error is not None:
            raise StreamError(str(self._error)) from self._error

    def expect(self, num_pieces: int) -> None:
        """Say how many pieces are to come (called under the reader's lock)."""
        self._left = num_pieces

    def finish_piece(self, error: Exception | None) -> None:
        """Count one piece as arrived (called under the reader's lock)."""
        self._error = self._error or error
        self._left -= 1
        if self._left == 0:
            self._done.set()

    def fail(self, error: Exception) -> None:
        """Give it up, whatever has arrived (called under the reader's lock)."""
        if not self._done.is_set():
            self._error = self._error or error
            self._done.set()


@dataclass
class ReaderStats:
    """Counters since the start; ``busy_s`` is time with at least one piece in flight."""

    bytes: int = 0
    busy_s: float = 0.0


@dataclass(eq=False)
class _Piece:
    read: Read
    file: Path
    offset: int
    needed_bytes: int
    buffer: memoryview = field(repr=False)


class Reader:
    """A queue of reads and the threads that serve it."""

    def __init__(self, num_threads: int = NUM_THREADS, piece_bytes: int = PIECE_BYTES) -> None:
        self.stats = ReaderStats()
        self._piece_bytes = piece_bytes
        self._queue: deque[_Piece] = deque()
        self._flying: list[_Piece] = []
        self._busy_since = 0.0
        self._closed = False
        self._wake = threading.Condition()
        self._descriptors: dict[Path, tuple[int, bool]] = {}
        self._failed_descriptors: list[int] = []
        self._threads = [
            threading.Thread(target=self._serve, name=f"reader-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        name: str,
        segments: Sequence[Segment],
        buffers: Sequence[memoryview],
        urgent: bool = False,
    ) -> Read:
        """Make a read of several segments, each into its buffer, and start it.

        Raises:
            StreamError: The reader was closed.
        """
        read = Read(name, segments, buffers)
        self.start(read, urgent)
        return read

    def start(self, read: Read, urgent: bool = False) -> None:
        """Queue a read.

        ``urgent`` reads go before everything queued; several urgent ones are served last asked
        first, so ask for them in reverse.

        Raises:
            StreamError: The reader was closed.
        """
        pieces = self._cut(read)
        with self._wake:
            if self._closed:
                error = StreamError(f"{read.name} cannot be read: the reader was closed")
                read.fail(error)
                raise error
            read.expect(len(pieces))
            # Each of these is one call that an interrupt cannot cut in two.
            if urgent:
                self._queue.extendleft(reversed(pieces))
            else:
                self._queue.extend(pieces)
            self._wake.notify(len(pieces))

    def fail_if_lost(self, read: Read) -> None:
        """Fail a read that an interrupt kept from starting; see that any other is served."""
        with self._wake:
            if not any(piece.read is read for piece in (*self._queue, *self._flying)):
                read.fail(StreamError(f"reading {read.name} was interrupted"))
            # It may have come between queueing and waking.
            self._wake.notify_all()

    def busy_seconds(self) -> float:
        """Return the seconds in which at least one piece was in flight, up to now."""
        with self._wake:
            running = time.monotonic() - self._busy_since if self._flying else 0.0
            return self.stats.busy_s + running

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be read any more."""
        return self._closed

    def close(self) -> None:
        """Drop what is queued, give what is in flight ``GRACE_S`` to end, and close the files.

        A piece that hangs is left to its thread: its read fails for whoever waits, and the files
        are closed when the last such piece has ended.
        """
        with self._wake:
            self._closed = True
            self._fail(self._queue)
            self._queue.clear()
            self._wake.notify_all()
        deadline = time.monotonic() + GRACE_S
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        with self._wake:
            self._fail(self._flying)
            self._close_files()

    def _cut(self, read: Read) -> list[_Piece]:
        return [
            _Piece(
                read,
                segment.file,
                segment.offset + at,
                max(0, min(segment.needed_bytes - at, self._piece_bytes)),
                buffer[at : at + self._piece_bytes],
            )
            for segment, buffer in zip(read.segments, read.buffers, strict=True)
            for at in range(0, segment.num_bytes, self._piece_bytes)
        ]

    @staticmethod
    def _fail(pieces: Iterable[_Piece]) -> None:
        for piece in pieces:
            piece.read.fail(StreamError(f"{piece.read.name}: the reader was closed"))

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                piece = self._queue.popleft()
                if not self._flying:
                    self._busy_since = time.monotonic()
                self._flying.append(piece)
            error: Exception | None = None
            try:
                self._read(piece)
            except Exception as caught:  # whatever it is belongs to the read, not to this thread
                error = self._explain(piece, caught)
            with self._wake:
                self._flying.remove(piece)
                if error is None:
                    self.stats.bytes += len(piece.buffer)
                else:
                    self._forget_descriptor(piece.file)
                if not self._flying:
                    self.stats.busy_s += time.monotonic() - self._busy_since
                    self._close_failed()
                    if self.is_closed:
                        self._close_files()
                piece.read.finish_piece(error)
            # A thread that waits for the next piece keeps no buffer of the last one.
            del piece

    def _read(self, piece: _Piece) -> None:
        descriptor, direct = self._descriptor(piece.file)
        got = 0
        while got < piece.needed_bytes:
            # After a short direct read the position may be unaligned; the buffered descriptor
            # that _read_buffered opens does not mind.
            try:
                count = os.preadv(descriptor, [piece.buffer[got:]], piece.offset + got)
            except OSError as error:
                if not (direct and error.errno == errno.EINVAL):
                    raise
                count = self._read_buffered(piece, got)
            if count == 0:
                raise StreamError(
                    f"{piece.file} ended at byte {piece.offset + got} while reading "
                    f"{piece.read.name}: the file was truncated after it was opened"
                )
            got += count

    def _read_buffered(self, piece: _Piece, got: int) -> int:
        descriptor = os.open(piece.file, os.O_RDONLY)
        try:
            return os.preadv(descriptor, [piece.buffer[got:]], piece.offset + got)
        finally:
            os.close(descriptor)

    def _descriptor(self, file: Path) -> tuple[int, bool]:
        with self._wake:
            known = self._descriptors.get(file)
            if known is None:
                known = _open(file)
                self._descriptors[file] = known
            return known

    def _forget_descriptor(self, file: Path) -> None:
        """Have the file opened anew by the next read: it may have been put back under its name."""
        known = self._descriptors.pop(file, None)
        if known is not None:
            self._failed_descriptors.append(known[0])

    def _close_files(self) -> None:
        """Close all files, if no piece in flight can be using one."""
        self._failed_descriptors += [descriptor for descriptor, _ in self._descriptors.values()]
        self._descriptors.clear()
        if not self._flying:
            self._close_failed()

    def _close_failed(self) -> None:
        """Close what failed, once no piece in flight can be using it."""
        while self._failed_descriptors:
            os.close(self._failed_descriptors.pop())

    @staticmethod
    def _explain(piece: _Piece, error: Exception) -> Exception:
        if isinstance(error, StreamError):
            return error
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        return StreamError(f"{piece.file}: reading {piece.read.name} failed: {reason}")


def _open(file: Path) -> tuple[int, bool]:
    with contextlib.suppress(OSError):
        return os.open(file, os.O_RDONLY | os.O_DIRECT), True
    descriptor = os.open(file, os.O_RDONLY)
    # Where O_DIRECT is refused, at least do not let read-ahead fill the page cache.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor, False
