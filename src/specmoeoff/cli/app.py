"""Arguments in, the options of one command out; nothing is run from here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from specmoeoff.cli import pack_command, texts, trace_command
from specmoeoff.cli.commands import app
from specmoeoff.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.cli.options import (
        ChatOptions,
        DemoOptions,
        DoctorOptions,
        GenerateOptions,
        PackOptions,
        TraceOptions,
    )

    Options = (
        GenerateOptions | ChatOptions | DoctorOptions | TraceOptions | PackOptions | DemoOptions
    )

app.command(epilog=texts.TRACE_EXAMPLES, help=texts.TRACE)(trace_command.trace)
app.command(epilog=texts.PACK_EXAMPLES, help=texts.PACK)(pack_command.pack)


def parse(arguments: Sequence[str]) -> Options | int:
    """Return the options of the command that ``arguments`` name, or the exit code after help.

    Raises:
        InvalidInputError: The arguments make no sense.
    """
    try:
        parsed = app(list(arguments) or ["--help"], prog_name="specmoeoff", standalone_mode=False)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except Exception as error:
        raise _one_line(error) from error
    return 0 if parsed is None else parsed


def _one_line(error: Exception) -> Exception:
    """Return usage errors as ours; they belong to click, which typer brings along or vendors."""
    sentence = getattr(error, "format_message", None)
    if sentence is None:
        return error
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "specmoeoff"
    text = str(sentence()).strip().rstrip(".")
    return InvalidInputError(f"{text[:1].lower()}{text[1:]}; see {command} --help")
