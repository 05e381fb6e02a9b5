"""Real prompts as token ids: MT-Bench questions in the target's own chat template.

Speculation needs real text, because with random tokens no draft agrees with any target. The
demo's 16 prompts come first; then the other questions' turns, so that no two are equal (equal
prompts would share their experts in every step and make a large batch look cheap).
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from specmoeoff.demo import load_prompts
from specmoeoff.demo.prompts import PROMPT_IDS, calibration_texts
from specmoeoff.text import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path


def real_prompts(model: Path, count: int, max_tokens: int | None = None) -> list[list[int]]:
    """Return ``count`` prompts as token ids.

    Args:
        model: The checkpoint whose tokenizer and chat template are used.
        count: Prompts to return.
        max_tokens: Cut the question, word by word, until the prompt has no more tokens than this;
            None leaves the questions whole.
    """
    tokenizer = _tokenizer(model)
    return [_encode(tokenizer, text, max_tokens) for text in _texts(count)]


def equally_long(prompts: list[list[int]], length: int) -> list[list[int]]:
    """Repeat short prompts and cut long ones, so that all have ``length`` tokens."""
    return [(prompt * -(-length // len(prompt)))[:length] for prompt in prompts]


def as_text(model: Path, token_ids: list[int]) -> str:
    """Return a prompt as the text it came from, the template's special tokens included."""
    return _tokenizer(model).decode(token_ids, skip_special_tokens=False)


def _tokenizer(model: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(model)
    if tokenizer is None:
        raise SystemExit(f"{model} has no tokenizer.json, and real prompts need one")
    return tokenizer


def _texts(count: int) -> list[str]:
    texts = [m[-1]["content"] for m in load_prompts(min(count, len(PROMPT_IDS)))]
    texts += islice(calibration_texts(), count - len(texts))
    if len(texts) < count:
        raise SystemExit(f"{count} prompts were asked for; there are {len(texts)}")
    return texts


def _encode(tokenizer: Tokenizer, text: str, max_tokens: int | None) -> list[int]:
    words = text.split(" ")
    while True:
        content = " ".join(words)
        ids = tokenizer.apply_chat_template([{"role": "user", "content": content}])
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        if len(words) <= 1:
            raise SystemExit(f"the chat template alone has {len(ids)} tokens; allow more")
        words.pop()
