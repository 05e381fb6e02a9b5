"""``specmoeoff pack``: a checkpoint whose experts take a quarter fewer bytes, without loss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from specmoeoff.cli.console import note, say
from specmoeoff.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from specmoeoff.cli.options import PackOptions


def run(options: PackOptions) -> int:
    """Run the command and return its exit code."""
    from specmoeoff.engine.model_files import ModelFiles
    from specmoeoff.engine.weights import expert_specs
    from specmoeoff.offload.packing import pack_checkpoint

    files = ModelFiles.open(options.model)
    names = {spec.name for spec in expert_specs(files.model)}
    try:
        with _Bar(options.quiet) as bar:
            packed = pack_checkpoint(files.checkpoint, Path(options.output), names, bar.show)
    except OSError as error:
        raise InvalidInputError(
            f"{options.output} cannot be written: {error.strerror or error}"
        ) from error
    if options.json:
        say(json.dumps({"output": options.output, **dataclasses.asdict(packed)}))
        return 0
    share = packed.packed_bytes / packed.source_bytes
    note(
        f"{packed.num_packed} of {packed.num_tensors} tensors packed and checked: "
        f"{packed.source_bytes / 1e9:.2f} GB are now {packed.packed_bytes / 1e9:.2f} GB "
        f"({share:.0%})"
    )
    say(options.output)
    return 0


class _Bar:
    """A bar of bytes on stderr, its last state only where that is no terminal; nothing if quiet."""

    def __init__(self, quiet: bool) -> None:
        self._show: Callable[[int, int], None] = lambda done, total: None
        self._close: Callable[[], None] = lambda: None
        if not quiet:
            self._open()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        progress = Progress(console=Console(stderr=True))
        task = progress.add_task("packing", total=None)
        progress.start()
        self._show = lambda done, total: progress.update(task, completed=done, total=total)
        self._close = progress.stop

    def show(self, done: int, total: int) -> None:
        """Show how many bytes of all have been read."""
        self._show(done, total)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close()
