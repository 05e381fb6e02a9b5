"""N-gram drafts against a search of the whole past, and the index's promise to only add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoeoff.errors import InvalidInputError
from specmoeoff.speculative.ngram import NgramDrafter


def search(token_ids: list[int], k: int, longest: int, shortest: int) -> list[int]:
    """Return the proposal by looking everywhere."""
    for size in range(longest, shortest - 1, -1):
        if size >= len(token_ids):
            continue
        for end in range(len(token_ids) - 1, size - 1, -1):
            if token_ids[end - size : end] == token_ids[-size:]:
                tokens = list(token_ids)
                for i in range(k):
                    tokens.append(tokens[end + i])
                return tokens[len(token_ids) :]
    return []


# Few kinds of token make many repeats; some are large so that hashing is not trivial.
tokens = st.sampled_from([0, 1, 2, 3, 151_000, 151_001])


@given(
    st.lists(st.lists(tokens, max_size=40), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 9),
)
def test_proposals_agree_with_a_search_at_every_step(
    pieces: list[list[int]], one: int, other: int, k: int
) -> None:
    longest, shortest = max(one, other), min(one, other)
    index = NgramDrafter(longest, shortest)
    sequence: list[int] = []
    for piece in pieces:
        sequence += piece
        assert index.propose(sequence, k) == search(sequence, k, longest, shortest)


@pytest.mark.parametrize(
    ("sequence", "k", "expected"),
    [
        ([5, 6, 7, 8, 9, 5, 6], 3, [7, 8, 9]),
        ([5, 6, 7, 8, 9, 5, 6], 7, [7, 8, 9, 5, 6, 7, 8]),
        ([4, 4, 4], 4, [4, 4, 4, 4]),
        ([1, 2, 3, 4], 4, []),
        # The longest match wins over the most recent: 8 followed 1 2 3, 9 followed 2 3.
        ([1, 2, 3, 8, 2, 3, 9, 1, 2, 3], 1, [8]),
        # Of equally long ones the most recent wins.
        ([2, 3, 8, 2, 3, 9, 2, 3], 1, [9]),
        ([1, 2, 1, 2], 0, []),
        ([1], 3, []),
        ([], 3, []),
    ],
)
def test_proposals_by_hand(sequence: list[int], k: int, expected: list[int]) -> None:
    assert NgramDrafter(4, 2 if sequence != [4, 4, 4] else 1).propose(sequence, k) == expected


class CountingTokens(Sequence[int]):
    """A sequence that counts how many of its tokens are read."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.num_read = 0

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        found = self.tokens[index]
        self.num_read += len(found) if isinstance(found, list) else 1
        return found

    def __len__(self) -> int:
        return len(self.tokens)


def test_a_step_reads_its_new_tokens_and_not_the_whole_past() -> None:
    index, sequence = NgramDrafter(4, 2), CountingTokens()
    sequence.tokens = [(i * i) % 997 for i in range(20_000)]
    index.propose(sequence, 4)
    sequence.num_read = 0
    for i in range(500):
        sequence.tokens.append(i % 7)
        index.propose(sequence, 4)
    assert sequence.num_read < 500 * 200


def test_a_shorter_sequence_starts_again() -> None:
    index = NgramDrafter(2, 1)
    index.propose([1, 2, 3, 4, 5, 6, 7, 8], 2)
    assert index.propose([3, 9, 3], 2) == [9, 3]


def test_a_wrong_range_is_refused_with_its_values() -> None:
    for longest, shortest in ((2, 3), (2, 0)):
        with pytest.raises(InvalidInputError, match=f"min {shortest} and prompt_lookup_max 2"):
            NgramDrafter(longest, shortest)
