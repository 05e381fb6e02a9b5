"""Where the kernel's control groups are mounted: version 1 or 2, controller by controller."""

from __future__ import annotations

from pathlib import Path


def mounted_controller(version_1: str, version_2: str) -> tuple[Path, int] | None:
    """Return the root of a controller's groups and its version, 1 if it is in both.

    Args:
        version_1: What version 1 calls the controller.
        version_2: What version 2 calls it.
    """
    mounts = [line.split()[1:4] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for point, kind, options in mounts:
        if kind == "cgroup" and version_1 in options.split(","):
            return Path(point), 1
    for point, kind, _ in mounts:
        controllers = Path(point) / "cgroup.controllers"
        if kind == "cgroup2" and version_2 in controllers.read_text().split():
            return Path(point), 2
    return None
