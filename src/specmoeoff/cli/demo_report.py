"""The demo's tables: answers side by side, figures side by side, and what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specmoeoff.memory_size import format_memory_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

QUESTION_LENGTH = 110
ANSWER_LENGTH = 280


def show_answers(
    questions: Sequence[str],
    plain: Sequence[Mapping[str, Any]],
    speculative: Sequence[Mapping[str, Any]],
) -> None:
    """Print every question with both answers next to each other."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for title in ("question", "without speculation", "with speculation", "same"):
        table.add_column(title, ratio=None if title == "same" else 1)
    for question, before, after in zip(questions, plain, speculative, strict=True):
        same = "yes" if before.get("token_ids") == after.get("token_ids") else "NO"
        cells = (shorten(question, QUESTION_LENGTH), _answer(before), _answer(after), same)
        table.add_row(*(Text(cell) for cell in cells))
    Console().print(table)


def show_figures(plain: Mapping[str, Any], speculative: Mapping[str, Any]) -> None:
    """Print what both runs took."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "without", "with")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in figure_rows(plain, speculative):
        table.add_row(*row)
    Console().print(table)


def figure_rows(*runs: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return one row of text per figure, a column per run."""
    return [
        ("decode, tokens/s", *(f"{s['decode_tokens_per_s']:.1f}" for s in runs)),
        ("mean acceptance length", *(f"{s['mean_acceptance_length']:.2f}" for s in runs)),
        ("steps", *(f"{s['steps']}" for s in runs)),
        ("link, GB/s", *(f"{s['link_bandwidth'] / 1e9:.2f}" for s in runs)),
        ("link utilisation", *(f"{s['link_utilisation']:.0%}" for s in runs)),
        ("streamed, GB", *(f"{s['streamed_bytes'] / 1e9:.2f}" for s in runs)),
        ("peak memory", *(format_memory_size(s["peak_memory_bytes"]) for s in runs)),
        ("whole run, s", *(f"{s['wall_s']:.1f}" for s in runs)),
    ]


def verdict(identical: bool, speedup: float) -> str:
    """Return the sentence at the end."""
    found = "All answers are identical, token for token" if identical else "THE ANSWERS DIFFER"
    return f"{found}; with speculation decoding was {speedup:.2f}x as fast."


def shorten(text: str, length: int) -> str:
    """Return ``text`` on one line of at most ``length`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def _answer(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return f"error: {result['error']}"
    return shorten(result["text"], ANSWER_LENGTH)
