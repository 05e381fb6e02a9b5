"""A random Mixtral for one run: what random_mixtral.py writes, as many layers as the host holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from specmoeoff.engine.memory_plan import default_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SHAPE = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "experts", "vocabulary")
"""What is asked of random_mixtral.py beside layers, without dashes."""
MOST_LAYERS = 32
"""Mixtral 8x7B's."""


@contextmanager
def random_model(
    directory: Path | None, layers: int | None, shape: Mapping[str, int]
) -> Iterator[Path]:
    """Give a directory with a model; one that was named is kept, and taken if it has one.

    Args:
        directory: Where it is or goes; None writes one that is deleted at the end.
        layers: None takes as many as memory and disk hold, ``MOST_LAYERS`` at most.
        shape: A number for each name of ``SHAPE``.
    """
    if directory is None:
        with tempfile.TemporaryDirectory() as temporary:
            _write(Path(temporary), layers, shape)
            yield Path(temporary)
        return
    if not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory, layers, shape)
    yield directory


def _write(directory: Path, layers: int | None, shape: Mapping[str, int]) -> None:
    # Beside the weights the host has the KV cache and the process, the disk other files.
    room = min(0.8 * default_memory(), 0.9 * shutil.disk_usage(directory).free)
    layer = 6 * shape["experts"] * shape["hidden"] * shape["intermediate"]
    layers = layers or max(1, min(MOST_LAYERS, int(room / layer)))
    options = [f"--{name.replace('_', '-')}={shape[name]}" for name in SHAPE]
    script = Path(__file__).parents[1] / "random_mixtral.py"
    command = [sys.executable, str(script), str(directory), f"--layers={layers}", *options]
    subprocess.run(command, check=True)
