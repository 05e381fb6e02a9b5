"""``specmoeoff chat``: a conversation on the terminal, or one message per line of a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from specmoeoff.cli.console import note, say
from specmoeoff.cli.figures import rates, totals
from specmoeoff.cli.options import ChatOptions, sampling_params

if TYPE_CHECKING:
    from collections.abc import Iterator

    from specmoeoff.llm import LLM
    from specmoeoff.sampling_params import SamplingParams

HELP = """\
/help   show this
/reset  forget the conversation (the system prompt stays)
/stats  show speed, acceptance and memory so far
/exit   leave (so do Ctrl-D and, at the prompt, Ctrl-C)
Ctrl-C during an answer ends the answer."""


class Conversation:
    """The messages so far and the model that answers them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        """Start with the system prompt alone."""
        self._llm = llm
        self._params = params
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._system)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = list(self._system)

    def reply(self, text: str) -> Iterator[str]:
        """Yield the answer to ``text`` piece by piece; what was said before an interrupt is kept.

        A message that cannot be answered (too long, say) is taken back, with the reason on stderr.
        """
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        prompt = {"messages": list(self.messages)}
        stream = self._llm.generate_stream([prompt], self._params)
        try:
            for output in stream:
                if output.error is not None:
                    note(f"error: {output.error}; /reset starts anew")
                    continue
                answer.append(output.outputs[0].text)
                yield answer[-1]
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()
            self._remember("".join(answer))

    def _remember(self, answer: str) -> None:
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()


def run(options: ChatOptions) -> int:
    """Run the command and return its exit code."""
    params = sampling_params(options.sampling)
    interactive = sys.stdin.isatty()
    with options.engine.open_llm() as llm:
        conversation = Conversation(llm, params, options.system)
        if interactive and not options.quiet:
            note("type a message, or /help")
        for message in _messages(interactive):
            if message in ("/exit", "/quit"):
                break
            _handle(conversation, llm, message, interactive)
    return 0


def _handle(conversation: Conversation, llm: LLM, message: str, interactive: bool) -> None:
    if message == "/help":
        say(HELP)
    elif message == "/reset":
        conversation.reset()
    elif message == "/stats":
        stats = llm.stats().as_dict()
        say(f"{rates(stats)}\n{totals(stats)}")
    elif message.startswith("/"):
        note(f"{message.split()[0]} is no command; /help lists them")
    elif interactive:
        with contextlib.suppress(KeyboardInterrupt):
            _answer(conversation, message)
    else:
        _answer(conversation, message)


def _answer(conversation: Conversation, message: str) -> None:
    # Closed at once when interrupted, so that the conversation remembers what was said.
    with contextlib.closing(conversation.reply(message)) as pieces:  # type: ignore[type-var]
        try:
            for piece in pieces:
                say(piece, end="")
        finally:
            say("")


def _messages(interactive: bool) -> Iterator[str]:
    """Yield what the user says, without empty lines, until the end of the input."""
    if interactive:
        # For its side effect: input() gets line editing and history.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    else:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            if not interactive:
                raise
            say("")
            return
        if not line and not interactive:
            return
        if line.strip():
            yield line.strip()
