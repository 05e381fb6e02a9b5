"""``pack`` as typer sees it; commands.py has the other commands."""

from __future__ import annotations

from typing import Annotated

from specmoeoff.cli.arguments import Json, Model, Quiet, output_option
from specmoeoff.cli.options import PackOptions


def pack(
    model: Model,
    output: Annotated[
        str,
        output_option("--output", "-o", metavar="DIR", help="Where it goes; must not exist."),
    ],
    quiet: Quiet = False,
    json: Json = False,
) -> PackOptions:
    """Return what ``pack`` was asked to do; the user reads ``help``."""
    return PackOptions(model, output, quiet=quiet, json=json)
