"""What this machine offers: cores, kernels, memory and the limit on it, the speed of its disk."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.offload.reader import Read, Reader, Segment

PROBE_BYTES = 512 << 20
PROBE_S = 2.0
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Machine:
    """The figures that decide how a model runs here. Sizes in bytes."""

    num_cores: int
    """Cores that this process may use."""
    cpu_targets: tuple[str, ...]
    """Kernel targets that this CPU can run; empty without the native module."""
    total_memory: int
    available_memory: int
    cgroup_limit: int | None


def inspect_machine() -> Machine:
    """Look at the machine; takes milliseconds."""
    from specmoeoff.engine.memory_plan import cgroup_limit

    memory = _read_meminfo()
    return Machine(
        num_cores=len(os.sched_getaffinity(0)),
        cpu_targets=_cpu_targets(),
        total_memory=memory["MemTotal"],
        available_memory=memory["MemAvailable"],
        cgroup_limit=cgroup_limit(),
    )


def disk_bandwidth(files: Sequence[Path]) -> float | None:
    """Return bytes/s of reading ``files`` past the page cache, by the reader that feeds the belt.

    Reads half a gigabyte, or for two seconds; None if the files have less than one block.

    Raises:
        StreamError: A file cannot be read.
    """
    from specmoeoff.offload.direct_read import ALIGNMENT
    from specmoeoff.offload.reader import Reader, Segment

    chunks = []
    for file in files:
        size = file.stat().st_size // ALIGNMENT * ALIGNMENT
        for offset in range(0, size, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, size - offset)
            chunks.append(Segment(file, offset, length, length))
    # Spread over all files, so that no fast or slow corner of the disk decides.
    step = max(1, len(chunks) * _CHUNK_BYTES // PROBE_BYTES)
    return _timed(Reader(), chunks[::step])


def _timed(reader: Reader, chunks: Sequence[Segment]) -> float | None:
    buffers = [memoryview(mmap.mmap(-1, _CHUNK_BYTES)) for _ in range(2)]
    num_bytes = 0
    reads: list[Read] = []
    started_at = time.monotonic()
    try:
        for i, chunk in enumerate(chunks):
            if i >= len(buffers):  # a buffer is free when the read before last is done
                reads[i - len(buffers)].wait()
            if time.monotonic() - started_at > PROBE_S:
                break
            buffer = buffers[i % len(buffers)][: chunk.num_bytes]
            reads.append(reader.submit(f"probe {i}", [chunk], [buffer]))
            num_bytes += chunk.num_bytes
        for read in reads:
            read.wait()
    finally:
        reader.close()
    return num_bytes / (time.monotonic() - started_at) if num_bytes else None


def _cpu_targets() -> tuple[str, ...]:
    from specmoeoff import kernels

    targets = getattr(kernels, "cpu_targets", None)
    return tuple(targets()) if targets is not None else ()


def _read_meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
