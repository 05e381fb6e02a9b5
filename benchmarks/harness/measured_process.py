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
from specmoeoff.memory_size import parse_memory_size

if TYPE_CHECKING:
    import argparse
    import resource
    from collections.abc import Iterable, Iterator, Mapping, Sequence

BLOCK_BYTES = 512
"""What the kernel counts ``ru_inblock`` in: bytes that really came from the disk."""


@dataclass(frozen=True)
class Limits:
    """What a measured process may have."""

    memory: int | None
    """Bytes of the memory cgroup it runs in; None is no cgroup."""
    timeout_s: float
    realtime: bool = False
    """Run with SCHED_RR, so that a busy neighbour cannot hold up one thread of a barrier."""
    cold_cache: bool = True
    """Empty the page cache first; else the model's files are read into it."""

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Limits:
        """Return what ``add_options`` was told."""
        memory = parse_memory_size(options.memory) if options.cgroup else None
        return cls(memory, options.timeout, options.realtime)

    @staticmethod
    def add_options(parser: argparse.ArgumentParser, timeout_s: float) -> None:
        """Add --timeout, --no-cgroup and --realtime; --memory is each script's own."""
        parser.add_argument("--timeout", type=float, default=timeout_s, help="seconds for one run")
        parser.add_argument("--no-cgroup", dest="cgroup", action="store_false")
        parser.add_argument(
            "--realtime", action="store_true", help="run everything with SCHED_RR (chrt -r 1)"
        )


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
    other_cores: float
    """Cores kept busy by others meanwhile, the kernel's own threads included."""

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
    command: Sequence[str], limits: Limits, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run a command to its end, or to its time limit: then all that it started is killed.

    Raises:
        SystemExit: A cgroup was asked for and cannot be made.
    """
    scheduler = ["chrt", "-r", "1"] if limits.realtime else []
    command = [*scheduler, *command]
    with contextlib.ExitStack() as stack:
        group = None
        if limits.memory is not None:
            group = stack.enter_context(memory_cgroup(limits.memory))
        out = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        err = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        start, busy_s = time.monotonic(), _busy_seconds()
        process = subprocess.Popen(
            command if group is None else group.wrap(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        usage, timed_out = _wait(process, limits.timeout_s)
        wall_s = time.monotonic() - start
        others_s = _busy_seconds() - busy_s - usage.ru_utime - usage.ru_stime
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
            other_cores=max(0.0, others_s / wall_s),
        )


def _wait(
    process: subprocess.Popen[bytes], timeout_s: float
) -> tuple[resource.struct_rusage, bool]:
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
        process.wait()
        raise
    finally:
        timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage, expired.is_set()


def _busy_seconds() -> float:
    """Return the seconds that all cores together have worked since the machine started."""
    user, nice, system, _idle, _waiting, interrupts, soft, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def prepare_page_cache(limits: Limits, directories: Iterable[Path]) -> None:
    """Empty the page cache, or fill it with the files in ``directories``, as the limits say."""
    if limits.cold_cache:
        drop_page_cache(directories)
        return
    block = bytearray(1 << 22)
    for path in _files(directories):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def drop_page_cache(directories: Iterable[Path]) -> None:
    """Empty the page cache: all of it as root, else that of the files in ``directories``."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    for path in _files(directories):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(directories: Iterable[Path]) -> Iterator[Path]:
    for directory in directories:
        paths = [directory] if directory.is_file() else directory.iterdir()
        yield from (path for path in paths if path.is_file())
