"""What goes wrong: calls that fail or hang, and what a run says that is closed meanwhile."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from specmoeoff.offload import reader as reader_module

if TYPE_CHECKING:
    from collections.abc import Callable

READS: tuple[Any, str] = (reader_module.os, "preadv")
"""Where every read of an expert passes."""


def failing(
    real: Callable[..., Any], error: BaseException, fails: Callable[[int], bool]
) -> Callable[..., Any]:
    """Return ``real``, but for the calls, counted from 1, that raise."""
    calls = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if fails(calls):
            raise error
        return real(*args, **options)

    return call


def fail_once(
    patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: BaseException
) -> None:
    """Have one call of ``owner.name`` raise."""
    patch.setattr(owner, name, failing(getattr(owner, name), error, lambda n: n == call))


def fail_every(
    patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, error: BaseException
) -> None:
    """Have every ``number``-th call of ``owner.name`` raise."""
    patch.setattr(owner, name, failing(getattr(owner, name), error, lambda n: n % number == 0))


def read_in_small_parts(patch: pytest.MonkeyPatch) -> None:
    """Have every read return a page at most, as the kernel may."""
    real = os.preadv
    patch.setattr(*READS, lambda fd, into, at: real(fd, [into[0][:4096]], at))


class Hang:
    """Holds calls of ``owner.name``, from the n-th on, until it is released."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, call: int = 1) -> None:
        self.started, self.gate = threading.Event(), threading.Event()
        real, left = getattr(owner, name), call

        def hanging(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                self.started.set()
                assert self.gate.wait(60)
            return real(*args, **options)

        patch.setattr(owner, name, hanging)


def told_when_closed(
    run: Callable[[], object],
    hang: Hang,
    close: Callable[[], None],
    error: type[Exception] | tuple[type[Exception], ...],
) -> str:
    """Return what ``run`` raises in its thread when it is closed while a call hangs."""
    told: list[str] = []

    def running() -> None:
        with pytest.raises(error) as raised:
            run()
        told.append(str(raised.value))

    runner = threading.Thread(target=running)
    runner.start()
    assert hang.started.wait(30)
    close()
    runner.join(30)
    assert not hang.gate.is_set()
    (reason,) = told
    return reason
