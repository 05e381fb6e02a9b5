"""The command line: ``specmoeoff generate | chat | doctor | trace | pack | demo``."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command that the arguments name and leave the process with its exit code."""
    from specmoeoff.cli.exits import guarded

    sys.exit(guarded(_run))


def _run() -> int:
    from specmoeoff.cli import app, fresh
    from specmoeoff.cli.options import (
        ChatOptions,
        DemoOptions,
        DoctorOptions,
        GenerateOptions,
        PackOptions,
        TraceOptions,
    )

    options = app.parse(sys.argv[1:])
    match options:
        case GenerateOptions() | ChatOptions():
            return fresh.run(options)
        case DoctorOptions():
            from specmoeoff.cli import doctor

            return doctor.run(options)
        case TraceOptions():
            from specmoeoff.cli import trace

            return trace.run(options)
        case PackOptions():
            from specmoeoff.cli import pack

            return pack.run(options)
        case DemoOptions():
            from specmoeoff.cli import demo

            return demo.run(options)
        case _:
            return options
