"""Holds this process to a read rate of a disk, so that a disk that drifts no longer does.

Virtual disks change their rate by a factor of two within minutes. Below the least that one gives,
the kernel's own throttle makes it as steady as a clock. Version 1 of cgroups where its blkio
controller is mounted, version 2 otherwise; needs root.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cgroup_mounts import mounted_controller

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def held_disk_rate(bytes_per_s: int, path: Path) -> Iterator[None]:
    """Let this process read the disk that ``path`` lies on at that rate at most.

    Raises:
        SystemExit: There is no controller for it, or no right to use it.
    """
    disk = _disk_of(path)
    mounted = mounted_controller("blkio", "io")
    if mounted is None:
        raise _unavailable("no controller of disk rates is mounted")
    root, version = mounted
    own = _own_group(root, "blkio" if version == 1 else "")
    try:
        if version == 2:
            (root / "cgroup.subtree_control").write_text("+io")
        group = root / f"specmoeoff-{os.getpid()}"
        group.mkdir()
    except OSError as error:
        raise _unavailable(error) from error
    try:
        try:
            if version == 1:
                limit = group / "blkio.throttle.read_bps_device"
                limit.write_text(f"{disk} {bytes_per_s}")
            else:
                (group / "io.max").write_text(f"{disk} rbps={bytes_per_s}")
            _move(group)
        except OSError as error:
            raise _unavailable(error) from error
        yield
    finally:
        with contextlib.suppress(OSError):
            _move(own)
        group.rmdir()


def _own_group(root: Path, controller: str) -> Path:
    """Return the group that this process is in; version 2 names no controller."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            return root / group.lstrip("/")
    return root


def _move(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _disk_of(path: Path) -> str:
    """Return "MAJOR:MINOR" of the whole disk: a throttle takes no partition."""
    number = path.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if (device / "partition").exists():
        device = device.parent
    try:
        return (device / "dev").read_text().strip()
    except OSError as error:
        raise _unavailable(f"{path} does not lie on a disk") from error


def _unavailable(reason: object) -> SystemExit:
    return SystemExit(f"cannot hold the disk to a rate ({reason}): run this as root, or without")
