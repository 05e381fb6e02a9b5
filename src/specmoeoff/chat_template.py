"""Renders a conversation to text with the Jinja template of a checkpoint.

The environment is what templates on the hub are written for (Transformers' one): trimmed blocks,
loop controls, ``raise_exception``, ``strftime_now``, a plain ``tojson``, the ``generation`` tag.
It is sandboxed, because a template is a program from whoever made the checkpoint.

Knows neither tokens nor files. Jinja is imported with the first template.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from specmoeoff.errors import CheckpointError, InvalidInputError

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.parser import Parser


class ChatTemplate:
    """A compiled template.

    Args:
        source: The Jinja source.
        origin: Where it comes from, for messages.
        special_tokens: ``bos_token``, ``eos_token`` and so on, for the template to use.

    Raises:
        CheckpointError: The source is not valid Jinja.
    """

    def __init__(self, source: str, origin: str, special_tokens: Mapping[str, Any]) -> None:
        import jinja2

        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(
                f"the chat template of {origin} is not valid Jinja: {error}"
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Return the text of a conversation.

        Args:
            messages: Objects with ``role`` and ``content``; others of their fields reach the
                template as they are. Content may be a string or a list of text parts.
            add_generation_prompt: End with the opening of the assistant's turn.

        Raises:
            InvalidInputError: The messages are malformed, or the template refuses them.
        """
        checked = _checked_messages(messages)
        try:
            return self._template.render(
                messages=checked,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:
            # A template is a program: what it does with messages it was not written for is open.
            roles = ", ".join(str(message["role"]) for message in checked)
            raise InvalidInputError(
                f"the chat template refuses the messages (roles: {roles}): {error}"
            ) from error


def _environment() -> Environment:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """Marks what the assistant wrote, for training; here it only passes its body on."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own class attribute

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which would change what the model reads.
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidInputError(
            f"messages is {reprlib.repr(messages)}; it must be a list of objects with role and "
            f"content, at least one"
        )
    return [_checked_message(index, message) for index, message in enumerate(messages)]


def _checked_message(index: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidInputError(
            f"message {index} is {reprlib.repr(message)}; it must be an object with role and "
            f"content"
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InvalidInputError(
            f"message {index} has role {reprlib.repr(role)}; it must be a string such as 'user'"
        )
    if content is None and message.get("tool_calls"):
        return dict(message)
    if isinstance(content, list) and content:
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        strings = [text for text in texts if isinstance(text, str)]
        if len(strings) == len(texts):
            content = "\n".join(strings)
    if not isinstance(content, str):
        raise InvalidInputError(
            f"message {index} (role {role!r}) has content {reprlib.repr(content)}; it must be a "
            f"string, or a list of parts with a text each"
        )
    return {**message, "content": content}
