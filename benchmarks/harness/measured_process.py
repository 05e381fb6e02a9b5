"""Runs one command to its end and says what it took: time, bytes read, peak memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.memory_cgroup import memory_cgroup

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

BLOCK_BYTES = 512
"""What the kernel counts ``ru_inblock`` in: bytes that really came from the disk."""


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int
    """Exit code; negative is the signal that killed it."""
    timed_out: bool
    stdout: str
    stderr: str
    wall_s: float
    read_bytes: int
    """Bytes read from the disk, page faults included."""
    peak_rss_bytes: int
    """Mapped file pages included."""
    cgroup_peak_bytes: int | None
    oom_kills: int

    @property
    def failure(self) -> str | None:
        """Why there is no result, in a few words; None if the process ended well."""
        if self.timed_out:
            return f"timed out after {self.wall_s:.0f} s"
        if self.oom_kills:
            return "killed for memory"
        if self.code:
            lines = self.stderr.strip().splitlines()
            return f"exit code {self.code}: {lines[-1][:200] if lines else 'no message'}"
        return None


def run_measured(
    command: Sequence[str],
    *,
    memory: int | None,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run a command, in a memory cgroup of ``memory`` bytes unless that is None.

    The command and everything it started are killed after ``timeout_s`` seconds.

    Raises:
        CgroupUnavailableError: A cgroup was asked for and cannot be made.
    """
    with contextlib.ExitStack() as stack:
        group = None if memory is None else stack.enter_context(memory_cgroup(memory))
        out = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        err = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        start = time.monotonic()
        process = subprocess.Popen(
            command if group is None else group.wrap(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        usage, timed_out = _wait(process, timeout_s)
        wall_s = time.monotonic() - start
        out.seek(0)
        err.seek(0)
        return Finished(
            code=process.returncode,
            timed_out=timed_out,
            stdout=out.read(),
            stderr=err.read(),
            wall_s=wall_s,
            read_bytes=usage.ru_inblock * BLOCK_BYTES,
            peak_rss_bytes=usage.ru_maxrss * 1024,
            cgroup_peak_bytes=group.peak_bytes if group else None,
            oom_kills=group.oom_kills if group else 0,
        )


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[os.struct_rusage, bool]:
    expired = threading.Event()

    def kill() -> None:
        expired.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(timeout_s, kill)
    timer.start()
    try:
        # wait4 alone tells what this one child took.
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        kill()
        raise
    finally:
        timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage, expired.is_set()


def drop_page_cache(directories: Iterable[Path]) -> None:
    """Empty the page cache: all of it as root, else that of the files in ``directories``."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    for directory in directories:
        for path in [directory] if directory.is_file() else directory.iterdir():
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
