"""The child's end of the two pipes."""

from __future__ import annotations

import contextlib
import os
import threading

from holdfast.core.errors import HoldfastError
from holdfast.core.values import Json
from holdfast.tasks.workers.messages import Frame, Inbox, encode

READ = 1 << 16


class WrongProcess(HoldfastError):
    """A process that user code forked speaks in the name of its attempt."""


class SupervisorGone(EOFError):
    """Nobody listens any more; a class of its own, because user code may raise EOFError."""


class Channel:
    """Send and receive frames, blocking. SupervisorGone once the supervisor is gone; WrongProcess in a forked process."""

    def __init__(self, receive_fd: int, send_fd: int) -> None:
        self._receive_fd = receive_fd
        self._send_fd = send_fd
        self._inbox = Inbox()
        self._owner = os.getpid()
        self._sending = threading.Lock()  # a thread that user code left may still report

    @property
    def owned(self) -> bool:
        """Tell whether this is still the process that the channel was made in."""
        return os.getpid() == self._owner

    def close(self) -> None:
        """Close both ends in a process that was forked, so that it does not hold the supervisor's pipe open."""
        for descriptor in (self._receive_fd, self._send_fd):
            with contextlib.suppress(OSError):  # closed by the user's code already
                os.close(descriptor)

    def check_owned(self) -> None:
        if not self.owned:
            raise WrongProcess(
                f"process {os.getpid()} was forked by the trial's process {self._owner}; only the latter can report"
            )

    def send(self, message: dict[str, Json]) -> None:
        self.check_owned()
        view = memoryview(encode(message))
        with self._sending:
            try:
                while view:
                    view = view[os.write(self._send_fd, view) :]
            except BrokenPipeError:
                raise SupervisorGone from None

    def receive(self) -> Frame:
        while (frame := self._inbox.next()) is None:
            data = os.read(self._receive_fd, READ)
            if not data:
                raise SupervisorGone
            self._inbox.feed(data)
        return frame
