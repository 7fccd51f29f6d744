"""SIGTERM and SIGHUP (a closed terminal) as an exception, so that what was begun is ended in order. Imports no Prefect."""

from __future__ import annotations

import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import FrameType
from typing import Any

SAME_SECONDS = 5.0
"""Signals that come so soon after the first one say the same: a shell, and whoever ends a group of processes, send several."""


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
    came: list[float] = []
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    terminals = [descriptor for descriptor in (1, 2) if _is_terminal(descriptor)]

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)  # a shell sends it once more
            _leave(terminals)
        came.append(time.monotonic())
        if came[-1] - came[0] < SAME_SECONDS and len(came) > 1:
            return  # what the first one began must not be cut short: a lease would stay behind
        raise Terminated(number)

    for number in ours:
        signal.signal(number, handle)
    passed_on: Sequence[int] = ()
    try:
        yield
    except BaseException as error:
        by = getattr(error, "signal", None)  # of Terminated, and of Prefect's TerminationSignal
        passed_on = [number for number in ours if pass_on and number == by]
        raise
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        for again in passed_on:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os.kill(os.getpid(), again)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no further signal cut the body short for its first seconds: it ends what a signal, or an error, interrupted.

    A person presses Ctrl-C twice; the first one has said it all, and a lease that is not given back looks like a crash.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    begun = time.monotonic()
    before: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - begun >= SAME_SECONDS:
            restore()
            os.kill(os.getpid(), number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        found = signal.getsignal(number)
        if callable(found) or found is signal.SIG_DFL:  # what is ignored, or C's, stays as it is
            before[number] = found
            signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


class Deferred:
    """Signals that are taken where nothing is held: within :func:`deferred`.

    An exception that a signal raises anywhere can leave a lock held for as long as it is being handled: a context manager
    that was entered a moment ago does not know yet that it was. Whoever ends the search then waits for ever.
    """

    def __init__(self) -> None:
        self.wake: Callable[[], object] = lambda: None
        """called when a signal comes: whoever waits is to come to a check"""
        self._pending: int | None = None
        self._since = 0.0
        self._is_open = False
        self._before: dict[int, Any] = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; raise what it stands for where it may, and when an earlier one has not been taken for seconds."""
        waits = self._pending is not None
        if self._is_open or (waits and time.monotonic() - self._since >= SAME_SECONDS):
            self._pending = None
            self._before[number](number, frame)
        elif not waits:
            self._pending, self._since = number, time.monotonic()
            self.wake()

    def check(self) -> None:
        """Raise what a signal that came meanwhile stands for."""
        number, self._pending = self._pending, None
        if number is not None:
            self._before[number](number, None)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let signals raise at once in the body: somebody else's code, which may take its time and holds nothing of ours."""
        self.check()
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before = signal.getsignal(number)
            if callable(before):  # what ends the process at once, or is ignored, raises nothing
                self._before[number] = before
                signal.signal(number, self.handle)

    def remove(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


@contextmanager
def deferred() -> Iterator[Deferred]:
    """Take signals that would raise somewhere in the body at its checks alone.

    What has not been taken by the end of the body is raised there. Only the main thread gets signals.
    """
    signals = Deferred()
    if threading.current_thread() is threading.main_thread():
        signals.install()
    try:
        yield signals
    finally:
        signals.remove()
    signals.check()


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
