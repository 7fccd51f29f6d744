"""The parent's handle on one child process."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping

from holdfast.core.values import Json
from holdfast.tasks.workers.logs import last_lines
from holdfast.tasks.workers.messages import Frame, Inbox, ProcessIdentity, encode
from holdfast.tasks.workers.processes import end_session, identity, same_host
from holdfast.tasks.workers.reaper import Reaper

READ = 1 << 16
SEND_SECONDS = 600.0
LAST_BREATH = 1.0
"""Seconds in which a child whose pipe is closed is expected to end by itself, which tells how it died."""


class WorkerDied(Exception):
    """The child is gone, or speaks no more; :meth:`Worker.fate` tells how."""


class Worker:
    """A child process that runs one job at a time. Used by one thread at a time; only :meth:`kill` may come from others."""

    def __init__(self, environment: Mapping[str, str], reaper: Reaper) -> None:
        child_receives, self._send_fd = os.pipe()
        self._receive_fd, child_sends = os.pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # what it prints outside of jobs
        try:
            module = ["-P", "-m", "holdfast.tasks.workers.child"]  # -P: modules of the working directory shadow nothing
            self._process = subprocess.Popen(
                [sys.executable, *module, str(child_receives), str(child_sends), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                env=environment,
                pass_fds=(child_receives, child_sends),
                start_new_session=True,
            )
        except BaseException:
            self._close()
            raise
        finally:
            os.close(child_receives)
            os.close(child_sends)
        self.pid = self._process.pid
        self._reaper = reaper
        reaper.add(self.pid)
        self.identity = ProcessIdentity(host=same_host(), pid=self.pid, started=identity(self.pid) or "")
        self._pidfd = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else None
        for descriptor in (self._send_fd, self._receive_fd):
            os.set_blocking(descriptor, False)
        self._poller = select.poll()
        self._poller.register(self._receive_fd, select.POLLIN)
        if self._pidfd is not None:
            self._poller.register(self._pidfd, select.POLLIN)
        self._inbox = Inbox()
        self._killing = threading.Lock()
        self._gone = False
        self.ready = False
        with contextlib.suppress(WorkerDied):  # whoever uses it will notice
            self.send({"t": "setup", "path": [entry for entry in sys.path if entry]})

    @property
    def alive(self) -> bool:
        """Tell whether the process runs; does not reap it, so that its number stays its own."""
        if self._gone:
            return False
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def send(self, message: Mapping[str, Json]) -> None:
        """Send a frame; WorkerDied when it cannot be delivered."""
        view = memoryview(encode(message))
        deadline = time.monotonic() + SEND_SECONDS
        while view:
            try:
                view = view[os.write(self._send_fd, view) :]
            except BlockingIOError:
                select.select((), (self._send_fd,), (), 0.2)
                if not self.alive or time.monotonic() > deadline:
                    raise WorkerDied from None
            except OSError:
                raise WorkerDied from None

    def receive(self, timeout: float, wake: int | None = None) -> Frame | None:
        """Return the next frame, or None after ``timeout`` seconds; WorkerDied when none will come any more.

        None also once there is something to read from the descriptor ``wake``.
        """
        if wake is None:
            return self._receive(timeout, None)
        self._poller.register(wake, select.POLLIN)
        try:
            return self._receive(timeout, wake)
        finally:
            self._poller.unregister(wake)

    def _receive(self, timeout: float, wake: int | None) -> Frame | None:
        while True:
            try:
                frame = self._inbox.next()
            except (ValueError, TypeError):
                raise WorkerDied from None  # user code wrote into the pipe
            if frame is not None:
                if frame["t"] != "ready":
                    return frame
                self.ready = True
                continue
            events = self._poller.poll(math.ceil(max(timeout, 0.0) * 1000))
            if not events:
                if self._pidfd is None and not self.alive:
                    raise WorkerDied
                return None
            ready = {descriptor for descriptor, _ in events}
            if ready == {wake}:
                return None
            self._read(dead=self._receive_fd not in ready)

    def _read(self, *, dead: bool) -> None:
        try:
            data = os.read(self._receive_fd, READ)  # also when it is dead: its last words may just have come
        except BlockingIOError:
            if dead:
                raise WorkerDied from None
            return
        if not data:
            raise WorkerDied
        self._inbox.feed(data)

    def fate(self) -> str:
        """Return how the process ended, ending it if need be."""
        deadline = time.monotonic() + LAST_BREATH
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.005)
        by_us = self._gone or self.alive
        with contextlib.suppress(WorkerDied):  # it may have said that it was ready
            while self.receive(0) is not None:
                pass
        self.kill()
        if by_us:
            return "closed or broke the pipe to its supervisor"
        code = self._process.returncode
        if code is None:
            return "ended in an unknown way"
        if code >= 0:
            return f"exited with code {code}"
        name = f"signal {-code}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
        return f"killed by {name}" + (" (memory ran out, or somebody killed it)" if name == "SIGKILL" else "")

    def printed(self) -> list[str]:
        """Return the last lines that the process printed outside of jobs."""
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - 8192))
        return last_lines(self._output.read())

    def kill(self) -> None:
        """End the process and everything in its session, and wait until they are gone. Idempotent."""
        with self._killing:
            if self._gone:
                return
            end_session(self.pid)  # before it is reaped: until then its number is nobody else's
            self._process.wait()
            self._reaper.remove(self.pid)
            self._gone = True

    def dispose(self) -> None:
        """Kill the process and give its descriptors back."""
        try:
            self.kill()
        finally:
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None
            self._close()

    def _close(self) -> None:
        for descriptor in (self._send_fd, self._receive_fd):
            os.close(descriptor)
        self._output.close()
