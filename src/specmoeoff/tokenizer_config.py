"""What a checkpoint says of its tokenizer beside tokenizer.json: special tokens, chat template.

Reads small JSON files as Transformers writes them, old and new. Encodes nothing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from specmoeoff.errors import CheckpointError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import tokenizers

_SPECIAL_TOKEN_NAMES = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with what only the older special_tokens_map.json has.

    Raises:
        CheckpointError: A file is not a JSON object; the message names it.
    """
    names = ("special_tokens_map.json", "tokenizer_config.json")
    older, newer = (_read_json(directory / name) for name in names)
    return {**older, **newer}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; it must be an object")
    return content


def _content(token: object) -> str | None:
    """Return the string of a token that is written as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens by name, as templates know them."""
    tokens: dict[str, Any] = {
        name: content
        for name in _SPECIAL_TOKEN_NAMES
        if (content := _content(config.get(name))) is not None
    }
    extra = config.get("additional_special_tokens")
    if isinstance(extra, list):
        tokens["additional_special_tokens"] = [_content(token) for token in extra]
    return tokens


def add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], directory: Path
) -> None:
    """Add tokens, and mark special ones, that only tokenizer_config.json knows of.

    Raises:
        CheckpointError: A token has no content, or another id in tokenizer.json.
    """
    from tokenizers import AddedToken

    known = backend.get_added_tokens_decoder()
    wanted = config.get("added_tokens_decoder") or {}
    for token_id, fields in sorted(wanted.items(), key=lambda item: int(item[0])):
        content = _content(fields)
        if content is None:
            raise CheckpointError(
                f"{directory}: tokenizer_config.json gives added token {token_id} no content"
            )
        special = bool(fields.get("special"))
        old = known.get(int(token_id))
        if old is not None and old.content == content and old.special >= special:
            continue
        flags = {name: bool(fields.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        normalized = bool(fields.get("normalized", not special))
        backend.add_tokens([AddedToken(content, special=special, normalized=normalized, **flags)])
        if backend.token_to_id(content) != int(token_id):
            raise CheckpointError(
                f"{directory}: tokenizer_config.json says that token {token_id} is {content!r}, "
                f"but tokenizer.json gives it {backend.token_to_id(content)}"
            )


def chat_template_source(directory: Path, config: Mapping[str, Any]) -> str:
    """Return the Jinja source of the chat template.

    Raises:
        InvalidInputError: The checkpoint has none.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    if not isinstance(source, str):
        raise InvalidInputError(
            f"{directory} has no chat template (neither chat_template.jinja nor chat_template in "
            f"tokenizer_config.json): give the prompt as text"
        )
    return source
