"""A peer's kernel in a process that answers requests for timings, and is stopped in between.

Stopped, because pools that spin while they wait would slow whoever is measured next.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self


class PeerFailedError(Exception):
    """The process ended; the message says how, in one line."""


class KernelPeer:
    """One process of a peer, started and stopped; see ggml_peer.cc for what it is asked.

    Raises:
        PeerFailedError: The process ended before it was ready, or while it was measured.
    """

    def __init__(self, name: str, command: Sequence[object]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self._read("ready")
        except PeerFailedError:
            self.close()
            raise
        self._process.send_signal(signal.SIGSTOP)

    def best_seconds(self, rows: int, seconds: float) -> float:
        """Return the best time of a run with so many rows, within so many seconds."""
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, which says more
            print(rows, seconds, file=self._process.stdin, flush=True)
        answer = float(self._read())
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, wanted: str = "") -> str:
        """Return the next line that is an answer; libraries print others of their own."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            words = line.split()
            if (wanted and words == [wanted]) or (not wanted and _is_number(words)):
                return line.strip()
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise PeerFailedError(f"{how}: {said[-1][:200] if said else 'no message'}")


def _is_number(words: list[str]) -> bool:
    try:
        return len(words) == 1 and float(words[0]) > 0
    except ValueError:
        return False
