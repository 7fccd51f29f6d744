"""SIGTERM and SIGHUP (a closed terminal) as an exception, so that what was begun is ended in order. Imports no Prefect."""

from __future__ import annotations

import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import FrameType


class Terminated(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@contextmanager
def raised(*numbers: signal.Signals, pass_on: bool) -> Iterator[None]:
    """Let each of these signals raise Terminated in the body, where nobody has said what else it does.

    With ``pass_on`` the signal does, after the body, what it would have done: the process ends by it, as a shell expects.
    Only the main thread can be told of signals; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    terminals = [descriptor for descriptor in (1, 2) if _is_terminal(descriptor)]

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)  # a shell sends it once more
            _leave(terminals)
        raise Terminated(number)

    for number in ours:
        signal.signal(number, handle)
    passed_on: Sequence[int] = ()
    try:
        yield
    except Terminated as error:
        passed_on = [error.signal] if pass_on and error.signal in ours else []
        raise
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        for again in passed_on:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os.kill(os.getpid(), again)


def _is_terminal(descriptor: int) -> bool:
    try:
        termios.tcgetattr(descriptor)
    except (termios.error, OSError):
        return False
    return True


def _leave(terminals: Sequence[int]) -> None:
    """Print to nowhere from now on where the terminal is gone: each word would be an error."""
    for descriptor in terminals:
        if not _is_terminal(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def why(error: BaseException) -> str:
    """Say what ended a drive: ``interrupted: SIGTERM``, or that a person stopped it."""
    return _explain.get()(error) or f"interrupted: {_words(error)}"


def signal_of(error: BaseException) -> int | None:
    """Return the number of the signal that an error stands for; None when it is no signal's."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    number = getattr(error, "signal", None)  # of Terminated, and of Prefect's TerminationSignal
    return number if isinstance(number, int) else None


def _words(error: BaseException) -> str:
    number = signal_of(error)
    return f"{type(error).__name__}: {error}" if number is None else signal.Signals(number).name


_explain: ContextVar[Callable[[BaseException], str | None]] = ContextVar("holdfast_explain", default=lambda error: None)


@contextmanager
def explained(by: Callable[[BaseException], str | None]) -> Iterator[None]:
    """In the body ask ``by`` first what an error means: it knows whether a person asked for it."""
    token = _explain.set(by)
    try:
        yield
    finally:
        _explain.reset(token)
