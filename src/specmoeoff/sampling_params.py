"""What a caller may ask of the sampling of one request: vLLM's names, meanings and defaults.

Frozen and validated as a whole when made, so nothing behind this module checks a value again.
Knows no tokenizer, model or logits: whether a token id exists is found out by whoever has them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specmoeoff.errors import InvalidInputError

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this take the likeliest token instead of dividing by almost nothing."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Raises:
        InvalidInputError: A value has the wrong type or is out of range; the message quotes it.
    """

    n: int = 1
    """Samples drawn for the prompt, at least 1; exactly 1 when greedy."""
    temperature: float = 1.0
    """Divides the logits: below 1 sharpens, above 1 flattens, 0 always takes the likeliest."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach this sum, above 0 to 1."""
    top_k: int = 0
    """Keep this many of the likeliest tokens (0 or -1: all)."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability, 0 to 1."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output; above 0,
    1 is off, more discourages repetition."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that are in the output, -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for every time it is in the output, -2 to 2."""
    seed: int | None = None
    """Makes the sampling repeatable, 0 to 2^64 - 1; None follows the engine's seed."""
    stop: str | Sequence[str] | None = None
    """String, or strings, that end the output; the output is cut before them."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end the output."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    include_stop_str_in_output: bool = False
    """Cut the output after the stop string instead of before it."""
    max_tokens: int | None = 16
    """Most tokens of output, at least 1; None goes on to the model's limit."""
    min_tokens: int = 0
    """Tokens of output before eos, a stop token or a stop string may end it."""
    logprobs: int | None = None
    """Return the log-probabilities of each chosen token and of this many likeliest ones
    (0: the chosen one alone, -1: the whole vocabulary, None: none)."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1)
        _check_float("temperature", self.temperature, 0.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _check_int("top_k", self.top_k, -1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, above_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_int("seed", self.seed, 0, 2**64 - 1, optional=True)
        _check_int("max_tokens", self.max_tokens, 1, optional=True)
        _check_int("min_tokens", self.min_tokens, 0)
        _check_int("logprobs", self.logprobs, -1, optional=True)
        _check_int("prompt_logprobs", self.prompt_logprobs, -1, optional=True)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, getattr(self, name), "true or false")
        self._check_stops()
        self._check_together()

    def _check_stops(self) -> None:
        if isinstance(self.stop, (bytes, Mapping)) or not isinstance(
            self.stop, (str, Sequence, type(None))
        ):
            raise _refusal("stop", self.stop, "a string or a list of strings")
        for string in self.stop_strings:
            if not isinstance(string, str) or not string:
                raise _refusal("an entry of stop", string, "a string that is not empty")
        if isinstance(self.stop_token_ids, (str, bytes)) or not isinstance(
            self.stop_token_ids, (Sequence, type(None))
        ):
            raise _refusal("stop_token_ids", self.stop_token_ids, "a list of token ids")
        for token_id in self.stop_token_ids or ():
            _check_int("an entry of stop_token_ids", token_id, 0, 2**31 - 1)

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidInputError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}"
            )
        if self.greedy and self.n > 1:
            raise InvalidInputError(
                f"n is {self.n}; it must be 1 when greedy (temperature {self.temperature}), "
                f"where all samples would be the same"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, however many were given."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens before them."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def replace(self, **changes: Any) -> SamplingParams:
        """Return a copy with some fields changed, validated as a whole.

        Raises:
            InvalidInputError: A field is unknown, or a value cannot be used.
        """
        for name in changes:
            _check_known(name)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(
        cls, mapping: Mapping[str, Any], defaults: SamplingParams | None = None
    ) -> SamplingParams:
        """Build from plain data, a line of JSON say.

        Args:
            mapping: Field names and values.
            defaults: Where the fields that ``mapping`` leaves out come from.

        Raises:
            InvalidInputError: A field is unknown (the closest known one is suggested), or a value
                cannot be used.
        """
        if not isinstance(mapping, Mapping):
            raise _refusal("sampling parameters", mapping, "an object of field names and values")
        return (defaults or cls()).replace(**{str(name): mapping[name] for name in mapping})


def _field_names() -> Iterator[str]:
    return (field.name for field in dataclasses.fields(SamplingParams))


def _check_known(name: str) -> None:
    names = list(_field_names())
    if name in names:
        return
    closest = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {closest[0]!r}?" if closest else f"known ones: {', '.join(names)}"
    raise InvalidInputError(f"sampling parameter {reprlib.repr(name)} is unknown; {remedy}")


def _refusal(name: str, value: object, allowed: str) -> InvalidInputError:
    return InvalidInputError(f"{name} is {reprlib.repr(value)}; it must be {allowed}")


def _check_int(
    name: str, value: object, low: int, high: int | None = None, *, optional: bool = False
) -> None:
    if optional and value is None:
        return
    # bool is an int to Python and never meant as one here.
    if not isinstance(value, bool) and isinstance(value, numbers.Integral):
        number = int(value)
        if number >= low and (high is None or number <= high):
            return
    bounds = f"at least {low}" if high is None else f"{low} to {high}"
    raise _refusal(name, value, f"an integer, {bounds}{', or None' if optional else ''}")


def _check_float(
    name: str, value: object, low: float, high: float | None = None, *, above_low: bool = False
) -> None:
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        number = float(value)
        enough = number > low if above_low else number >= low
        if math.isfinite(number) and enough and (high is None or number <= high):
            return
    first = f"above {low:g}" if above_low else f"{low:g}"
    bounds = (
        f"{first} to {high:g}" if high is not None else f"{'' if above_low else 'at least '}{first}"
    )
    raise _refusal(name, value, f"a finite number, {bounds}")
