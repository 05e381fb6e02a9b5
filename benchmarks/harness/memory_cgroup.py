"""Memory cgroups: a limit that counts the page cache too, so that no engine can live on it.

Version 1 where its memory controller is mounted, version 2 otherwise. Making one needs root.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.cgroup_mounts import mounted_controller

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_JOIN_AND_RUN = 'echo $$ >"$0" && exec "$@"'


@dataclass(frozen=True)
class MemoryCgroup:
    """A cgroup that exists; see ``memory_cgroup``."""

    path: Path
    version: int

    def wrap(self, command: Sequence[str]) -> list[str]:
        """Return a command that joins the group and becomes ``command``, in the same process."""
        return ["/bin/sh", "-c", _JOIN_AND_RUN, str(self.path / "cgroup.procs"), *command]

    @property
    def peak_bytes(self) -> int | None:
        """Most memory charged to the group at once, page cache included; None if not counted."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        try:
            return int((self.path / name).read_text())
        except OSError:  # memory.peak is younger than version 2
            return None

    @property
    def oom_kills(self) -> int:
        """Processes of the group that were killed for memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        fields = (line.split() for line in (self.path / name).read_text().splitlines())
        return next((int(value) for key, value in fields if key == "oom_kill"), 0)


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[MemoryCgroup]:
    """Make a cgroup of ``limit`` bytes and remove it at the end.

    Raises:
        SystemExit: There is no memory controller, or no right to use it.
    """
    mounted = mounted_controller("memory", "memory")
    if mounted is None:
        raise _unavailable("no memory controller is mounted")
    root, version = mounted
    group = MemoryCgroup(root / f"specmoeoff-{os.getpid()}-{time.monotonic_ns()}", version)
    try:
        if version == 2:
            _enable_memory(root)
        group.path.mkdir()
    except OSError as error:
        raise _unavailable(str(error)) from error
    try:
        try:
            _limit(group, limit)
        except OSError as error:
            raise _unavailable(str(error)) from error
        yield group
    finally:
        _remove(group.path)


def _enable_memory(root: Path) -> None:
    control = root / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory")


def _limit(group: MemoryCgroup, limit: int) -> None:
    if group.version == 1:
        (group.path / "memory.swappiness").write_text("0")
        (group.path / "memory.limit_in_bytes").write_text(str(limit))
        return
    (group.path / "memory.max").write_text(str(limit))
    with contextlib.suppress(OSError):  # absent where the kernel has no swap
        (group.path / "memory.swap.max").write_text("0")


def _remove(path: Path) -> None:
    # A process that was just reaped may stay in the group for a moment.
    for _ in range(50):
        try:
            path.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return


def _unavailable(reason: str) -> SystemExit:
    return SystemExit(
        f"cannot make a memory cgroup ({reason}): run this as root, or with --no-cgroup, "
        "which lets every engine use the page cache of the whole machine"
    )
