"""The plainest fast read: O_DIRECT over the checkpoint's files, round and round.

This is what the link can do, measured beside the engine, because virtual disks drift.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True)
class ReadLoop:
    """A number of threads that each read blocks of one size, whichever is next."""

    num_threads: int
    block_bytes: int

    @property
    def name(self) -> str:
        """Return "4 x 4 MiB"."""
        return f"{self.num_threads} x {self.block_bytes >> 20} MiB"

    def bandwidth(self, files: Sequence[Path], seconds: float) -> float:
        """Read for that long and return bytes per second.

        Raises:
            ValueError: No file has a whole block.
        """
        blocks = _Blocks(files, self.block_bytes)
        start = time.monotonic()
        deadline = start + seconds
        threads = [
            threading.Thread(target=blocks.read_until, args=(deadline,))
            for _ in range(self.num_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - start
        blocks.close()
        return blocks.total_bytes / elapsed


class _Blocks:
    def __init__(self, files: Sequence[Path], block_bytes: int) -> None:
        flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
        self._descriptors = [os.open(file, flags) for file in files]
        self._places = [
            (descriptor, offset)
            for file, descriptor in zip(files, self._descriptors, strict=True)
            for offset in range(0, file.stat().st_size - block_bytes + 1, block_bytes)
        ]
        if not self._places:
            self.close()
            raise ValueError(f"no file of {len(files)} has a block of {block_bytes} bytes to read")
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._next = 0
        self.total_bytes = 0

    def read_until(self, deadline: float) -> None:
        with mmap.mmap(-1, self._block_bytes) as buffer:
            while time.monotonic() < deadline:
                with self._lock:
                    descriptor, offset = self._places[self._next % len(self._places)]
                    self._next += 1
                count = os.preadv(descriptor, [buffer], offset)
                with self._lock:
                    self.total_bytes += count

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
