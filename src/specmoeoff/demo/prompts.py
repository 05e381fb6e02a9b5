"""The texts of the demo: MT-Bench questions as prompts, and the rest of them for calibration.

The two never meet: what the routers are balanced on is not what the demo measures.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from specmoeoff.demo.fetch import Progress, fetch_questions
from specmoeoff.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

Message = dict[str, str]

# Two of each of the eight categories, of moderate length. Ordered so that the first eight already
# have one of each.
PROMPT_IDS = (81, 96, 101, 119, 121, 134, 141, 159, 86, 100, 105, 112, 123, 131, 143, 155)


def load_prompts(n: int = 16) -> list[list[Message]]:
    """Return n real prompts as chat messages, fetching them the first time.

    Raises:
        InvalidInputError: n is not 1 to 16.
        SpecMoEOffError: They cannot be fetched.
    """
    if not 1 <= n <= len(PROMPT_IDS):
        raise InvalidInputError(f"n is {n}; the demo has 1 to {len(PROMPT_IDS)} prompts")
    first_turns = {question["question_id"]: question["turns"][0] for question in _questions()}
    return [[{"role": "user", "content": first_turns[i]}] for i in PROMPT_IDS[:n]]


def calibration_texts(progress: Progress | None = None) -> Iterator[str]:
    """Yield every turn of the questions that are no prompts, in order."""
    for question in _questions(progress):
        if question["question_id"] not in PROMPT_IDS:
            yield from question["turns"]


def _questions(progress: Progress | None = None) -> list[dict[str, Any]]:
    lines = fetch_questions(progress).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
