"""What a finished build is: a manifest with the parameters, and the size and SHA-256 of every file.

The manifest is written last, so a directory either has a whole build or none. Nothing that was
not built here is ever replaced.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from specmoeoff.demo.fetch import sha256_of
from specmoeoff.errors import CheckpointError, InvalidInputError, SpecMoEOffError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

RECIPE = 1
"""Raised whenever the bytes of a build change, so that older builds are made anew."""
PARTS = ("target", "draft")
_MANIFEST = "manifest.json"
# Present while an old build gives way to a new one: target and draft are ours to overwrite.
_MARK = ".replacing"


def is_complete(directory: Path, parameters: Mapping[str, Any]) -> bool:
    """Whether the manifest fits and every file has its size; ``verify`` reads them as well."""
    manifest = _read(directory)
    if manifest is None or (manifest["recipe"], manifest["parameters"]) != (RECIPE, parameters):
        return False
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == entry["bytes"]
        for name, entry in manifest["files"].items()
    )


def verify(directory: Path) -> None:
    """Check every file of a build against the manifest's sums (about a second per 1.5 GB).

    Raises:
        CheckpointError: A file is missing or differs, or there is no build.
    """
    manifest = _read(directory)
    if manifest is None:
        raise CheckpointError(f"{directory} holds no complete demo model (no {_MANIFEST})")
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file() or sha256_of(path) != entry["sha256"]:
            raise CheckpointError(
                f"{path} is missing or damaged; remove {directory} and build it again"
            )


def refuse_foreign(directory: Path) -> None:
    """Raise InvalidInputError if a build would replace what no build has made."""
    if _read(directory) is not None or (directory / _MARK).exists():
        return
    for name in PARTS:
        if (directory / name).exists():
            raise InvalidInputError(
                f"{directory / name} exists and was not built by this demo; "
                "choose another directory"
            )


def install(
    work: Path, directory: Path, parameters: Mapping[str, Any], sums: dict[str, str]
) -> None:
    """Move a finished build from ``work`` into ``directory``, replacing an older one.

    Args:
        work: Holds ``target`` and ``draft``; on the same file system as directory.
        directory: Where they go.
        parameters: What the build was made from.
        sums: SHA-256 of files that have been hashed already, by path relative to work.
    """
    files = {
        path.relative_to(work).as_posix(): path
        for part in PARTS
        for path in sorted((work / part).rglob("*"))
        if path.is_file()
    }
    entries = {
        name: {"bytes": path.stat().st_size, "sha256": sums.get(name) or sha256_of(path)}
        for name, path in files.items()
    }
    manifest = {"recipe": RECIPE, "parameters": parameters, "files": entries}
    (work / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    (directory / _MARK).touch()
    (directory / _MANIFEST).unlink(missing_ok=True)
    for part in PARTS:
        if (directory / part).exists():
            shutil.rmtree(directory / part)
        (work / part).rename(directory / part)
    (work / _MANIFEST).rename(directory / _MANIFEST)
    (directory / _MARK).unlink()


@contextmanager
def only_builder(directory: Path) -> Iterator[None]:
    """Hold the directory's lock: a second process waits, and then finds the build complete."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise SpecMoEOffError(
            f"cannot write to {directory}: {error}; choose another directory"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(directory: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(manifest, dict) and {"recipe", "parameters", "files"} <= manifest.keys()
    return manifest if known else None
