"""What a command leaves with: 0 done, 2 usage or input, 3 does not fit, 1 the rest, 130 Ctrl-C.

``SPECMOEOFF_DEBUG=1`` keeps the traceback of an error that is otherwise one line.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from specmoeoff.cli.console import note
from specmoeoff.errors import SpecMoEOffError

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130
BROKEN_PIPE = 1


def guarded(command: Callable[[], int]) -> int:
    """Run ``command`` and return its exit code, or that of the error it raised, having said it."""
    try:
        return command()
    except SpecMoEOffError as error:
        if os.environ.get("SPECMOEOFF_DEBUG"):
            raise
        note(_sentence("error", error, str(error)))
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        if os.environ.get("SPECMOEOFF_DEBUG"):
            raise
        note(_sentence("interrupted", interrupt, ""))
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone, which is its right. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _sentence(kind: str, error: BaseException, message: str) -> str:
    parts = [part for part in (message, *getattr(error, "__notes__", ())) if part]
    return f"{kind}: {'; '.join(parts)}" if parts else kind
