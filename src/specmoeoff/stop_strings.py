"""Finds stop strings in text that arrives in pieces, and holds back what may become one.

Knows text only: pieces may be cut anywhere, and where they are cut never changes what is found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopStrings:
    """The stop strings of one sequence, and the text held back on their account.

    Args:
        stop_strings: What ends the text, none of them empty.
        include_in_output: Cut after the stop string instead of before it.
    """

    def __init__(self, stop_strings: Sequence[str], include_in_output: bool) -> None:
        self._stop_strings = stop_strings
        self._include_in_output = include_in_output
        self._held = ""

    def release(self, text: str, may_stop: bool) -> tuple[str, str | None]:
        """Add text.

        Args:
            text: What follows the text so far.
            may_stop: Whether a stop string that ends in ``text`` counts.

        Returns:
            What can be given out now, and the stop string that ended it. Of several the one that
            is completed first counts, as if the text came character by character; of those the
            longest.
        """
        buffer = self._held + text
        match = self._first_match(buffer, len(self._held)) if may_stop and text else None
        if match is not None:
            end, begin = match
            self._held = ""
            return buffer[: end if self._include_in_output else begin], buffer[begin:end]
        cut = len(buffer) - self._num_possible(buffer)
        self._held = buffer[cut:]
        return buffer[:cut], None

    def rest(self) -> str:
        """Return what is held back: it did not become a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _first_match(self, buffer: str, num_old: int) -> tuple[int, int] | None:
        """Return end and begin of the match that ends first, in new text; the longest of equals."""
        matches = []
        for stop in self._stop_strings:
            begin = buffer.find(stop, max(0, num_old - len(stop) + 1))
            if begin >= 0:
                matches.append((begin + len(stop), begin))
        return min(matches, default=None)

    def _num_possible(self, buffer: str) -> int:
        """Return how many last characters are the beginning of a stop string."""
        longest = 0
        for stop in self._stop_strings:
            for length in range(min(len(stop) - 1, len(buffer)), longest, -1):
                if buffer.endswith(stop[:length]):
                    longest = length
                    break
        return longest
