"""Text to tokens and back: the checkpoint's tokenizer, and decoding while tokens still arrive.

Special tokens are added where tokenizer.json's post-processor says so, nowhere else. What
``Detokenizer`` hands out is final: no half character, nothing that may become a stop string, and
together exactly what decoding everything at the end gives.

The ``tokenizers`` library is imported when a tokenizer is loaded, not before.
"""

from __future__ import annotations

import copy
import reprlib
from typing import TYPE_CHECKING, Any

from specmoeoff.chat_template import ChatTemplate
from specmoeoff.errors import CheckpointError, InvalidInputError
from specmoeoff.stop_strings import StopStrings
from specmoeoff.tokenizer_config import (
    add_missing_tokens,
    chat_template_source,
    read_tokenizer_config,
    special_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import tokenizers

    from specmoeoff.sampling_params import SamplingParams

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What an unfinished or invalid UTF-8 sequence is decoded to."""


class Tokenizer:
    """The tokenizer of a checkpoint directory."""

    def __init__(
        self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], directory: Path
    ) -> None:
        self._backend = backend
        self._directory = directory
        self._config = config
        self._chat_template: ChatTemplate | None = None
        self._special_tokens = special_tokens(config)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """Tokens that ``skip_special_tokens`` leaves out."""
        self.byte_ids = _byte_fallback_ids(backend)
        """Tokens that stand for one byte each in a tokenizer with byte fallback."""
        eos = self._special_tokens.get("eos_token")
        self.eos_token_id: int | None = None if eos is None else backend.token_to_id(eos)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer | None:
        """Read a directory's tokenizer; None when there is no tokenizer.json.

        Raises:
            CheckpointError: A tokenizer file cannot be read; the message names it.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
        # Limits that were set for training would silently cut prompts.
        backend.no_truncation()
        backend.no_padding()
        config = read_tokenizer_config(directory)
        add_missing_tokens(backend, config, directory)
        return cls(backend, config, directory)

    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included; a model may have more rows than that."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Raises:
            InvalidInputError: The text holds half a surrogate pair, which no encoding has.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise InvalidInputError(_encoding_problem(text)) from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids without a token have none."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token inside a text, leading space included."""
        # Decoders that strip the first space of a text do not strip the second token's.
        once = self.decode([token_id], skip_special_tokens=False)
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(once) :]

    def is_silent(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether decoding leaves a token out."""
        if token_id in self.special_ids:
            return skip_special_tokens
        return self._backend.id_to_token(token_id) is None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the prompt of a conversation; the template writes bos itself, if at all.

        Raises:
            InvalidInputError: There is no template, or it refuses the messages.
            CheckpointError: The template is broken.
        """
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return the same prompt as text."""
        if self._chat_template is None:
            source = chat_template_source(self._directory, self._config)
            self._chat_template = ChatTemplate(source, str(self._directory), self._special_tokens)
        return self._chat_template.render(messages, add_generation_prompt)


class Detokenizer:
    """Decodes one sequence as it grows, and finds its stop strings.

    Args:
        tokenizer: The tokenizer.
        prompt_token_ids: The prompt: whether the first token starts with a space depends on it.
        params: Stop strings, ``min_tokens`` and ``skip_special_tokens``.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._decoder = _GrowingText(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stops = StopStrings(params.stop_strings, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def fork(self) -> Detokenizer:
        """Return one that goes on from here; neither changes the other."""
        twin = copy.copy(self)
        twin._decoder, twin._stops = self._decoder.fork(), copy.copy(self._stops)
        return twin

    def append(self, token_ids: Sequence[int]) -> tuple[str, int, str | None]:
        """Add tokens; how they are grouped into calls never changes the result.

        Returns:
            The text that became final, how many of the tokens were used (fewer when a stop string
            was completed before the last), and the stop string, which ends the text.
        """
        released = []
        for num_consumed, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            text = self._decoder.append(token_id)
            final, stop = self._stops.release(text, self._num_tokens > self._min_tokens)
            released.append(final)
            if stop is not None:
                return "".join(released), num_consumed, stop
        return "".join(released), len(token_ids), None

    def flush(self) -> str:
        """Return what was held back, once no more tokens will come."""
        final, stop = self._stops.release(
            self._decoder.flush(), self._num_tokens > self._min_tokens
        )
        return final if stop is not None else final + self._stops.rest()


class _GrowingText:
    """Decodes token by token at a cost that does not grow with the text.

    A token's text depends on its neighbours (joined bytes, stripped spaces), so a window of the
    last tokens is decoded and only what is new in it is given out. A byte-level decoder started at
    any byte agrees with one started before it after three bytes, so the window may be cut anywhere
    that leaves a few tokens.
    """

    _LONGEST_WINDOW = 16
    _SHORTEST_WINDOW = 8

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = self._tail(prompt_token_ids)
        self._num_given = self._num_complete()
        # The prompt may end within a character. If the output does not complete it, it is the
        # prompt's alone.
        self._prompt_held = self._decode()[self._num_given :]

    def fork(self) -> _GrowingText:
        """See ``Detokenizer.fork``."""
        twin = copy.copy(self)
        twin._window = list(self._window)
        return twin

    def append(self, token_id: int) -> str:
        """Add a token and return the text that can no longer change."""
        if self._tokenizer.is_silent(token_id, self._skip_special_tokens):
            return ""
        self._window.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            # One bad byte makes the decoder replace the whole run of bytes: wait for its end.
            return ""
        text = self._decode()
        held = _num_held(text)
        new = self._give(text, len(text) - held)
        if len(self._window) > self._LONGEST_WINDOW:
            self._window = self._window[-self._SHORTEST_WINDOW :]
            self._num_given = len(self._decode()) - held
        return new

    def flush(self) -> str:
        """Return the rest, unfinished characters replaced."""
        text = self._decode()
        return self._give(text, len(text))

    def _give(self, text: str, end: int) -> str:
        begin, self._num_given = self._num_given, end
        if end > begin and self._prompt_held:
            if text.startswith(self._prompt_held, begin):
                begin += len(self._prompt_held)
            self._prompt_held = ""
        return text[begin:end]

    def _num_complete(self) -> int:
        """Return the characters of the window without one that is not complete yet."""
        complete = list(self._window)
        # An incomplete character has three bytes at most; in a run of byte tokens it would take
        # the complete ones before it with it.
        for _ in range(3):
            if not complete or complete[-1] not in self._tokenizer.byte_ids:
                break
            if not self._tokenizer.decode(complete, False).endswith(_REPLACEMENT):
                break
            complete.pop()
        text = self._tokenizer.decode(complete, skip_special_tokens=False)
        return len(text) - _num_held(text)

    def _tail(self, token_ids: Sequence[int]) -> list[int]:
        """Return the last tokens that have text: enough of them, and no part of a run of bytes."""
        tail: list[int] = []
        for token_id in reversed(token_ids):
            if len(tail) >= self._SHORTEST_WINDOW and tail[-1] not in self._tokenizer.byte_ids:
                break
            if not self._tokenizer.is_silent(token_id, self._skip_special_tokens):
                tail.append(token_id)
        return tail[::-1]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)


def _num_held(text: str) -> int:
    """Return 1 if the text may end within a character, whose bytes so far are one replacement."""
    return int(text.endswith(_REPLACEMENT))


def _encoding_problem(text: object) -> str:
    if not isinstance(text, str):
        return f"the prompt is {reprlib.repr(text)}; it must be text"
    half = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), 0)
    return f"the prompt has half a surrogate pair, {text[half]!r}, at character {half}"


def _byte_fallback_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    last = backend.token_to_id("<0xFF>")
    # The vocabulary may have such tokens and a decoder that does not know them.
    if last is None or backend.decode([last], skip_special_tokens=False) != _REPLACEMENT:
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in ids if i is not None)
