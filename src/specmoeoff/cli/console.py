"""Lines for people on stdout and stderr, without anything that has to be imported."""

from __future__ import annotations

import sys


def say(text: str, end: str = "\n") -> None:
    """Write to stdout at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a line to stderr at once; stdout is for results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
