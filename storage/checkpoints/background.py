"""One piece of work at a time in a thread of its own, whose error is raised once, in the thread that asked for it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """At most one call is under way. The interpreter waits for it before it ends, because its thread is no daemon.

    Where no thread can be had, a call is made in place; its error is raised by the next wait all the same.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a call is under way, or has failed and nobody knows yet."""
        return self._thread is not None or self._error is not None

    def start(self, call: Callable[[], object]) -> None:
        """Begin ``call``; waits for the one before, and raises its error instead."""
        self.wait()
        thread = threading.Thread(target=self._run, args=(call,), name=self._name)
        try:
            thread.start()
        except RuntimeError:  # there are too many, or the interpreter is about to end
            self._run(call)
        else:
            self._thread = thread

    def wait(self) -> None:
        """Wait until nothing is under way; raise the error of the last call, once."""
        thread = self._thread
        if thread is not None:
            thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  # raised by wait
            self._error = error
