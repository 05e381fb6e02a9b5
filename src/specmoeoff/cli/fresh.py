"""Runs a command in a fresh process image, which holds only what the command imports.

Parsing arguments costs 13 MiB of peak memory (typer brings pydantic along), and the budget covers
the whole process: two more experts of the demo model, streamed in every step. So the parsed
options are written to a memory file, and Python is executed again in the same process to run them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from specmoeoff.cli.options import ChatOptions, GenerateOptions, from_dict

_ENTRY = (
    "import sys; sys.path.append(sys.argv.pop(1)); from specmoeoff.cli.fresh import main; main()"
)


def run(options: GenerateOptions | ChatOptions) -> int:
    """Replace this process by one that runs the command; run it here if that is impossible."""
    if sys.executable and hasattr(os, "memfd_create"):
        _replace_process(options)
    return _run_here(options)


def _replace_process(options: GenerateOptions | ChatOptions) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    fd = os.memfd_create("specmoeoff-options")
    fields = {"command": type(options).__name__, **dataclasses.asdict(options)}
    os.write(fd, json.dumps(fields).encode("utf-8", "surrogateescape"))
    os.set_inheritable(fd, True)
    # -P: the working directory must not become a place to import from. The user's arguments are
    # only there to be seen in a process list.
    package_home = str(Path(__file__).parents[2])
    arguments = ["-P", "-c", _ENTRY, package_home, str(fd), *sys.argv[1:]]
    os.execv(sys.executable, [sys.executable, *arguments])


def main() -> None:
    """Run the options in the memory file that the first argument names."""
    from specmoeoff.cli.exits import guarded

    with os.fdopen(int(sys.argv[1]), "rb") as file:
        file.seek(0)
        fields = json.loads(file.read())
    sys.exit(guarded(lambda: _run_here(from_dict(fields.pop("command"), fields))))


def _run_here(options: GenerateOptions | ChatOptions) -> int:
    if isinstance(options, GenerateOptions):
        from specmoeoff.cli import generate

        return generate.run(options)
    from specmoeoff.cli import chat

    return chat.run(options)
