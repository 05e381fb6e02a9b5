"""Reads a range of a file into memory of its own, past the page cache.

With O_DIRECT the disk writes straight into an anonymous, page-aligned mapping: memory rises by the
range (and at most a page at each end) and the page cache is left alone. A file system that refuses
O_DIRECT is read through the cache in small pieces, each dropped from it at once.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ALIGNMENT = 4096
"""Bytes; O_DIRECT wants file offset, length and memory address to be multiples of the disk's block,
which is this or less on every common file system."""
BUFFERED_CHUNK = 4 << 20
"""Bytes that may lie in the page cache at once when it cannot be avoided."""


def read_range(file: Path, offset: int, nbytes: int, itemsize: int = 1) -> NDArray[np.uint8]:
    """Read ``nbytes`` bytes at ``offset`` into a fresh buffer that the returned array owns.

    Args:
        file: File to read.
        offset: First byte, at any alignment.
        nbytes: Length; the result is uint8 [nbytes].
        itemsize: The address of the result is a multiple of it (at most ``ALIGNMENT``).

    Raises:
        EOFError: The file ends before the range does.
        OSError: The file cannot be opened or read.
    """
    if nbytes == 0:
        return np.empty(0, np.uint8)
    begin = offset - offset % ALIGNMENT
    lead = offset - begin
    span = -(-(lead + nbytes) // ALIGNMENT) * ALIGNMENT
    # Private, so that it counts as ordinary memory and is given back when the array dies.
    buffer = mmap.mmap(-1, span, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _fill(file, begin, lead + nbytes, memoryview(buffer))
    whole = np.frombuffer(buffer, np.uint8)
    if lead % itemsize:
        # Only files with an oddly padded header come here. memmove needs no second copy.
        address = whole.ctypes.data
        ctypes.memmove(address, address + lead, nbytes)
        lead = 0
    return whole[lead : lead + nbytes]


def _fill(file: Path, begin: int, needed: int, buffer: memoryview) -> None:
    """Read at least ``needed`` bytes from ``begin``, which is aligned, into ``buffer``."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            _read_direct(file, os.O_RDONLY | direct, begin, needed, buffer)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
    _read_buffered(file, begin, needed, buffer)


def _read_direct(file: Path, flags: int, begin: int, needed: int, buffer: memoryview) -> None:
    fd = os.open(file, flags | os.O_CLOEXEC)
    try:
        done = 0
        while done < needed:
            count = os.preadv(fd, [buffer[done:]], begin + done)
            if done + count < needed:
                # Only the end of the file, or an interrupt, cuts a read short; go on from a block.
                count -= count % ALIGNMENT
                if count == 0:
                    raise EOFError
            done += count
    finally:
        os.close(fd)


def _read_buffered(file: Path, begin: int, needed: int, buffer: memoryview) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Read-ahead would fill the cache beyond what is asked for.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        done = 0
        while done < needed:
            chunk = buffer[done : min(done + BUFFERED_CHUNK, needed)]
            count = os.preadv(fd, [chunk], begin + done)
            if count == 0:
                raise EOFError
            os.posix_fadvise(fd, begin + done, count, os.POSIX_FADV_DONTNEED)
            done += count
    finally:
        os.close(fd)
