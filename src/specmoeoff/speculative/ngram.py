"""Drafts by looking the last tokens up in the sequence's own past (prompt lookup).

The longest n-gram that ends the sequence and stood in it before is found, most recent place first,
and the tokens that followed it there are proposed. It costs no model and no pass, and is right
where text repeats itself: code, quotations, lists, structured output.

Knows token ids only. A sequence's index grows with it: a step costs its new tokens, not its length.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from specmoeoff.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

_EMPTY = 0
_FIRST_SLOTS = 64


class NgramDrafter:
    """Proposes for one sequence, which only ever grows.

    Args:
        prompt_lookup_max: Longest n-gram looked up.
        prompt_lookup_min: Shortest n-gram looked up, at least 1.

    Example:
        >>> NgramDrafter(3, 1).propose([5, 6, 7, 8, 9, 5, 6], 3)
        [7, 8, 9]
    """

    def __init__(self, prompt_lookup_max: int, prompt_lookup_min: int) -> None:
        if not 1 <= prompt_lookup_min <= prompt_lookup_max:
            raise InvalidInputError(
                f"prompt_lookup_min {prompt_lookup_min} and prompt_lookup_max "
                f"{prompt_lookup_max} must satisfy 1 <= min <= max"
            )
        self._sizes = range(prompt_lookup_max, prompt_lookup_min - 1, -1)
        self._tables: dict[int, _LastPlaces] = {}
        self._num_seen = 0

    def propose(self, token_ids: Sequence[int], k: int) -> list[int]:
        """Return up to k tokens that may follow.

        Either k or none: a copy that reaches the end of the sequence goes on through itself, so a
        sequence that repeats is continued for as long as asked.

        Args:
            token_ids: The whole sequence. It may only grow between calls; a shorter one starts
                the index again.
            k: Most tokens to propose.
        """
        if len(token_ids) < self._num_seen or not self._tables:
            self._tables = {size: _LastPlaces(size) for size in self._sizes}
            self._num_seen = 0
        # The n-grams that end the sequence stay out until it grows: they must match earlier ones.
        for end in range(max(1, self._num_seen), len(token_ids)):
            for size, table in self._tables.items():
                if size <= end:
                    table.record(token_ids, end)
        self._num_seen = max(1, len(token_ids))
        source = self._longest_match(token_ids) if k > 0 else None
        if source is None:
            return []
        period = len(token_ids) - source
        following = list(token_ids[source : source + min(k, period)])
        return [following[i % period] for i in range(k)]

    def _longest_match(self, token_ids: Sequence[int]) -> int | None:
        """Return where the longest earlier match ends, the most recent one of that size."""
        for size in self._sizes:
            if size < len(token_ids):
                end = self._tables[size].find(token_ids, len(token_ids))
                if end is not None:
                    return end
        return None


class _LastPlaces:
    """Where each n-gram of one size ended last: a hash table that stores positions alone.

    n-grams are compared in the sequence itself, so this is exact at 8 to 16 bytes per token. (A
    dict of tuples takes a few hundred, and memory is what experts are streamed for.)
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._slots: array[int] = array("i", bytes(4 * _FIRST_SLOTS))
        self._num_used = 0

    def record(self, token_ids: Sequence[int], end: int) -> None:
        """Note that an n-gram ends before position ``end`` (so ``end >= size``)."""
        slot = self._slot(token_ids, end)
        if self._slots[slot] == _EMPTY:
            self._num_used += 1
        self._slots[slot] = end
        if 2 * self._num_used > len(self._slots):
            self._grow(token_ids)

    def find(self, token_ids: Sequence[int], end: int) -> int | None:
        """Return the end last recorded for the n-gram that ends before ``end``."""
        return self._slots[self._slot(token_ids, end)] or None

    def _slot(self, token_ids: Sequence[int], end: int) -> int:
        """Return the slot of an n-gram, or the empty one where it belongs."""
        ngram = tuple(token_ids[end - self._size : end])
        mask = len(self._slots) - 1
        slot = hash(ngram) & mask
        while (other := self._slots[slot]) != _EMPTY:
            if tuple(token_ids[other - self._size : other]) == ngram:
                break
            slot = (slot + 1) & mask
        return slot

    def _grow(self, token_ids: Sequence[int]) -> None:
        ends = [end for end in self._slots if end != _EMPTY]
        self._slots = array("i", bytes(8 * len(self._slots)))
        for end in ends:
            self._slots[self._slot(token_ids, end)] = end
