"""The line of JSON that ends a benchmark, and the file it may also go to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.machine import machine

if TYPE_CHECKING:
    import argparse


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", type=Path, help="also write the record to this file")


def finish(benchmark: str, path: Path | None, fields: dict[str, Any]) -> None:
    """Print the record as one line, the machine included; write it to ``path`` if there is one."""
    line = json.dumps({"benchmark": benchmark, "machine": machine(), **fields})
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n")
    print(line)
