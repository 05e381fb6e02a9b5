"""How far a job is: a bar on a terminal, a line every few seconds elsewhere, nothing if quiet.

A thread of its own draws, because the first request may take minutes to finish while tokens are
already flowing. It reads counters and holds no lock that the engine wants.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol, Self

from specmoeoff.cli.console import note
from specmoeoff.cli.figures import duration, rates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from specmoeoff.batch import BatchSummary

LINE_INTERVAL_S = 5.0
BAR_INTERVAL_S = 0.5


class _Display(Protocol):
    """Shows one state of a job."""

    interval_s: float

    def show(self, summary: BatchSummary, rates: str, eta: str) -> None: ...

    def close(self) -> None: ...


class JobProgress:
    """Shows a job while it runs; a context manager. ``update`` is ``run_batch``'s ``progress``."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]], *, quiet: bool) -> None:
        """Take where the figures come from, and whether to show anything at all."""
        self._stats = stats
        self._quiet = quiet
        self._latest: BatchSummary | None = None
        self._started_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)

    def update(self, summary: BatchSummary) -> None:
        """Take in how far the job is; costs nothing."""
        self._latest = summary

    def __enter__(self) -> Self:
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _draw(self) -> None:
        display = _Bar() if sys.stderr.isatty() else _Lines()
        while not self._stop.wait(display.interval_s):
            self._show(display)
        display.close()

    def _show(self, display: _Display) -> None:
        summary = self._latest
        if summary is not None:
            display.show(summary, rates(self._stats()), self._eta(summary))

    def _eta(self, summary: BatchSummary) -> str:
        done_here = summary.num_finished - summary.num_resumed
        if done_here == 0:
            return "ETA unknown"
        per_line = (time.monotonic() - self._started_at) / done_here
        return f"ETA {duration(per_line * (summary.num_lines - summary.num_finished))}"


class _Lines:
    """One plain line per interval, for logs."""

    interval_s = LINE_INTERVAL_S

    def show(self, summary: BatchSummary, rates: str, eta: str) -> None:
        note(f"{summary.num_finished}/{summary.num_lines} lines · {rates} · {eta}")

    def close(self) -> None:
        return


class _Bar:
    """A bar that is redrawn in place."""

    interval_s = BAR_INTERVAL_S

    def __init__(self) -> None:
        # Costs some 4 MB of the budget, so only where there is a terminal to draw on.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def show(self, summary: BatchSummary, rates: str, eta: str) -> None:
        self._progress.update(
            self._task,
            total=summary.num_lines,
            completed=summary.num_finished,
            description=f"{rates} · {eta}",
            refresh=True,
        )

    def close(self) -> None:
        self._progress.stop()
