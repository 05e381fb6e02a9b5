"""OUTPUT.partial: results in the order they finished, until OUTPUT can have them in input order.

The file starts with a line that says which job it belongs to. Every result is appended by one
write, so a kill can tear the last line and nothing else. Where each result begins is remembered
by its index (8 bytes a line); the results themselves are not.

Holds at all times: every complete line in the file is a finished result, each index at most once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from array import array
from typing import IO, TYPE_CHECKING, Any

from specmoeoff.errors import InvalidInputError, SpecMoEOffError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

SYNC_INTERVAL_S = 5.0
HEADER_KEY = "specmoeoff_batch"
_HEADER_START = f'{{"{HEADER_KEY}": '.encode()
_NOT_FINISHED = 0  # the header is at offset 0, so no result is


class OutputError(SpecMoEOffError):
    """Results cannot be written; the message names the file and what the system said."""


def partial_path(output_path: Path) -> Path:
    """Return where the results of a job lie until it is done."""
    return output_path.with_name(output_path.name + ".partial")


class PartialResults:
    """The finished results of one job, open for appending."""

    def __init__(self, path: Path, header: Mapping[str, Any], num_lines: int) -> None:
        """Open or create the file and take in what it holds.

        Args:
            path: Where it is.
            header: What identifies the job, as JSON values.
            num_lines: Lines the job has.

        Raises:
            InvalidInputError: It belongs to another job, is no such file, or is in use.
            OutputError: It cannot be opened or written.
        """
        self.path = path
        self.num_finished = 0
        self.num_failed = 0
        self._offsets = array("Q", [_NOT_FINISHED]) * num_lines
        self._size = 0
        self._synced_at = time.monotonic()
        with _naming(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self._take_in({HEADER_KEY: 1, **header})
        except BaseException:
            os.close(self._fd)
            raise

    def is_finished(self, index: int) -> bool:
        """Return whether the file has this line's result."""
        return self._offsets[index] != _NOT_FINISHED

    def append(self, index: int, line: bytes, *, failed: bool) -> None:
        """Write one result and, every few seconds, make sure that it is on the disk.

        Raises:
            OutputError: It could not be written; what was written before is kept.
        """
        offset = self._size
        self._write(line)
        self._offsets[index] = offset
        self.num_finished += 1
        self.num_failed += failed
        if time.monotonic() - self._synced_at > SYNC_INTERVAL_S:
            self.sync()

    def sync(self) -> None:
        """Make sure that all results are on the disk."""
        with _naming(self.path):
            os.fsync(self._fd)
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Close the file; it stays where it is."""
        os.close(self._fd)

    def publish(self, output_path: Path) -> None:
        """Write all results to ``output_path`` in input order, at once or not at all.

        The partial file is removed afterwards.

        Raises:
            OutputError: It could not be written; the partial file still has everything.
        """
        ordered_path = output_path.with_name(output_path.name + ".ordered")
        try:
            with _naming(output_path):
                self._write_ordered(ordered_path)
                ordered_path.replace(output_path)
                _sync_directory(output_path.parent)
                self.path.unlink()
        except BaseException:
            ordered_path.unlink(missing_ok=True)
            raise

    def _write_ordered(self, ordered_path: Path) -> None:
        with self.path.open("rb") as results, ordered_path.open("wb") as ordered:
            for offset in self._offsets:
                results.seek(offset)
                ordered.write(results.readline())
            ordered.flush()
            os.fsync(ordered.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidInputError(
                f"{self.path} is being written by another process; wait for it or stop it"
            ) from error
        except OSError:
            # Some network file systems have no locks; two writers there are the user's to avoid.
            return

    def _take_in(self, header: Mapping[str, Any]) -> None:
        """Note the results the file has; cut off a torn last line; write the header if new."""
        with self.path.open("rb") as results:
            first = results.readline()
            if first.endswith(b"\n"):
                _check_header(self.path, first, header)
                self._size = self._note_results(results)
            elif not _HEADER_START.startswith(first[: len(_HEADER_START)]):
                raise _foreign(self.path)
        with _naming(self.path):
            os.ftruncate(self._fd, self._size)
        if self._size == 0:
            self._write(json.dumps(header).encode() + b"\n")

    def _note_results(self, results: IO[bytes]) -> int:
        """Return where the last complete line ends."""
        offset = results.tell()
        while (line := results.readline()).endswith(b"\n"):
            index, failed = _read_result(line)
            if 0 <= index < len(self._offsets) and not self.is_finished(index):
                self._offsets[index] = offset
                self.num_finished += 1
                self.num_failed += failed
            offset += len(line)
        return offset

    def _write(self, line: bytes) -> None:
        try:
            with _naming(self.path):
                written = os.write(self._fd, line)
                while written < len(line):  # a nearly full disk takes a part, then refuses
                    written += os.write(self._fd, line[written:])
        except OutputError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)


def _read_result(line: bytes) -> tuple[int, bool]:
    """Return a result's index and whether it is an error; index -1 if the line is damaged."""
    try:
        record = json.loads(line)
        index = record["index"]
    except (ValueError, TypeError, KeyError):
        return -1, False
    return (index, "error" in record) if isinstance(index, int) else (-1, False)


def _check_header(path: Path, line: bytes, header: Mapping[str, Any]) -> None:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or HEADER_KEY not in found:
        raise _foreign(path)
    expected = json.loads(json.dumps(header))
    different = [key for key in expected if found.get(key) != expected[key]]
    if different:
        raise InvalidInputError(
            f"{path} belongs to another job (another {', '.join(different)}): resume it with what "
            "it was started with, or start afresh by --overwrite"
        )


def _foreign(path: Path) -> InvalidInputError:
    return InvalidInputError(
        f"{path} is not a file of partial results; move it away or choose another output"
    )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what the system says into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
