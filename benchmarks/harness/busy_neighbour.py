"""Another process that keeps one core busy, as machines shared with others have."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """Keep one core busy until the end of the ``with`` block; the scheduler chooses which."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
