"""One input line of a job: bytes in, a prompt with its sampling parameters or an error out.

Knows the format. Knows nothing of files, results or engines.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specmoeoff.errors import InvalidInputError
from specmoeoff.sampling_params import SamplingParams

if TYPE_CHECKING:
    from specmoeoff.batch.seen_ids import SeenIds

PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")


@dataclass(frozen=True)
class JobLine:
    """What one line asks for, or why it cannot be asked."""

    index: int
    """Position among the lines that are not blank, from 0."""
    id: str | int
    prompt: dict[str, Any]
    """One of ``PROMPT_FIELDS`` and its value, as ``LLM.generate`` takes it; empty with an error."""
    params: SamplingParams | None = None
    error: str | None = None


class LineReader:
    """Reads the lines of one job in order; remembers the ids to refuse repeated ones."""

    def __init__(self, defaults: SamplingParams, seed: int, seen_ids: SeenIds) -> None:
        """Take the parameters of lines that set none, and the seed of those that set no seed."""
        self._defaults = defaults
        self._seed = seed
        self._seen_ids = seen_ids

    def read(self, index: int, raw: bytes) -> JobLine:
        """Read one line; whatever is wrong with it is said in ``JobLine.error``."""
        line_id: str | int = f"line-{index}"
        try:
            fields = _decode(raw)
            line_id = _read_id(fields, line_id)
            if not self._seen_ids.add(json.dumps(line_id)):
                raise InvalidInputError(f"id {line_id!r} was already used by an earlier line")
            prompt = _read_prompt(fields)
            params = self._read_params(index, fields)
        except InvalidInputError as error:
            return JobLine(index, line_id, prompt={}, error=str(error))
        return JobLine(index, line_id, prompt, params)

    def _read_params(self, index: int, fields: dict[str, Any]) -> SamplingParams:
        own = {k: v for k, v in fields.items() if k != "id" and k not in PROMPT_FIELDS}
        try:
            params = SamplingParams.from_dict(own, self._defaults)
        except OverflowError as error:
            raise InvalidInputError(f"a sampling parameter is too large: {error}") from error
        if params.seed is None:
            # A seed of the line's own, so that its samples are the same after a resume, when the
            # engine counts requests from another start.
            params = params.replace(seed=line_seed(self._seed, index))
        return params


def line_seed(seed: int, index: int) -> int:
    """Return the seed (31 bits) of a line that states none, from the job's seed and its place."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 33


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"the line is not valid UTF-8 (byte {error.start} is 0x{raw[error.start]:02x})"
        ) from error
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"the line is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidInputError(
            f"the line is a JSON {_json_type(fields)}; it must be an object with a prompt"
        )
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _read_id(fields: dict[str, Any], default: str | int) -> str | int:
    line_id = fields.get("id", default)
    if isinstance(line_id, bool) or not isinstance(line_id, (str, int)):
        raise InvalidInputError(f"id is a JSON {_json_type(line_id)}; use a string or an integer")
    return line_id


def _read_prompt(fields: dict[str, Any]) -> dict[str, Any]:
    given = [name for name in PROMPT_FIELDS if name in fields]
    if len(given) != 1:
        found = f"has {' and '.join(given)}" if given else "has none"
        raise InvalidInputError(
            f"the line must have exactly one of prompt, prompt_token_ids and messages; it {found}"
        )
    name = given[0]
    value = fields[name]
    _CHECKS[name](value)
    return {name: value}


def _check_prompt(value: Any) -> None:
    if not isinstance(value, str):
        raise InvalidInputError(f"prompt is a JSON {_json_type(value)}; it must be a string")
    _check_text("prompt", value)


def _check_token_ids(value: Any) -> None:
    if not isinstance(value, list):
        raise InvalidInputError(
            f"prompt_token_ids is a JSON {_json_type(value)}; it must be an array of integers"
        )
    for place, token_id in enumerate(value):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise InvalidInputError(
                f"prompt_token_ids[{place}] is {token_id!r}; token ids are integers from 0"
            )


def _check_messages(value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise InvalidInputError("messages must be an array of one or more chat messages")
    for place, message in enumerate(value):
        if not isinstance(message, dict):
            raise InvalidInputError(
                f"messages[{place}] is a JSON {_json_type(message)}; it must be an object"
            )
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise InvalidInputError(f"messages[{place}] needs a string {name!r}")
            _check_text(f"messages[{place}].{name}", message[name])


_CHECKS = {
    "prompt": _check_prompt,
    "prompt_token_ids": _check_token_ids,
    "messages": _check_messages,
}


def _check_text(name: str, text: str) -> None:
    # JSON can spell half of a surrogate pair, which no tokenizer and no UTF-8 file can hold.
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise InvalidInputError(f"{name} has an unpaired surrogate escape; it is not valid Unicode")


def _json_type(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "number")
