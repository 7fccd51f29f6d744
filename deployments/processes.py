"""The processes of ``holdfast up``: started, watched, ended with everything that they started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LONGEST_LOG = 10_000_000
"""bytes; a longer log is put aside when its part starts"""
FIRST_PAUSE = 1.0
"""seconds before a part that died is started again; doubles with each time in a row"""
LONGEST_PAUSE = 60.0
LASTING = 300.0
"""seconds after which a part counts as one that runs"""
MOST_DEATHS = 5
"""in a row; then it is no use"""


@dataclass(frozen=True)
class Died:
    """A part's process has ended."""

    part: Part
    process: subprocess.Popen[bytes]


@dataclass(frozen=True)
class Signalled:
    """A signal came."""

    number: int


Events = queue.SimpleQueue[Died | Signalled]
"""What the main thread waits for; a signal handler may put, too."""


@dataclass(eq=False)
class Part:
    """One program of ``holdfast up``, and the process that runs it now."""

    name: str
    words: Sequence[str]
    """a module and its arguments; whoever lists processes sees them"""
    log: Path
    environment: Mapping[str, str]
    events: Events
    is_ready: Callable[[], bool] = lambda: True
    passed: Sequence[int] = ()
    """descriptors that it inherits"""
    prepares: Sequence[str] = ()
    """modules that it may import before it is time to begin"""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    """in a row"""
    due: float | None = None
    """when it is to be started again, by the monotonic clock"""
    _logged: int = field(default=0, init=False)
    _is_waiting: bool = field(default=False, init=False)

    def prepare(self) -> None:
        """Start a process that imports what it needs, and waits for :meth:`start`."""
        self._spawn(["--prepare", ",".join(self.prepares), *self.words])
        self._is_waiting = True

    def start(self) -> None:
        """Let the process that was prepared begin, or start one."""
        waiting, self._is_waiting = self._is_waiting and self.is_running, False
        if waiting and self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # its death is among the events
                self.process.stdin.write(b"\n")
                self.process.stdin.flush()
            return
        self._spawn(self.words)

    def _spawn(self, words: Sequence[str]) -> None:
        """Start a process; its standard input is a pipe that closes when this process is gone, by which it knows."""
        with contextlib.suppress(FileNotFoundError):
            if self.log.stat().st_size > LONGEST_LOG:
                os.replace(self.log, self.log.with_suffix(".old.log"))
        with self.log.open("ab") as log:
            self._logged = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "holdfast.deployments.part", *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us, who end one after the other
                env=dict(self.environment),
                pass_fds=tuple(self.passed),
            )
        self.started, self.due = time.monotonic(), None
        threading.Thread(target=self._await, args=(self.process,), daemon=True).start()

    def _await(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self.events.put(Died(self, process))

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def pause_after_death(self) -> float | None:
        """Count a death; return the seconds until the next start, or None when it has died too often."""
        self.deaths = 1 if time.monotonic() - self.started > LASTING else self.deaths + 1
        return None if self.deaths >= MOST_DEATHS else min(FIRST_PAUSE * 2 ** (self.deaths - 1), LONGEST_PAUSE)

    def tell(self) -> None:
        """Ask it to end."""
        if self.process is not None:
            self.process.terminate()

    def kill(self) -> None:
        """End it at once, and everything that it started and that is still below it."""
        process = self.process
        if process is None:
            return
        with contextlib.suppress(psutil.Error):
            end_descendants(process.pid)
        process.kill()
        process.wait()

    def close(self) -> None:
        """Give up what belongs to the process, which has ended."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    def last_words(self) -> str:
        """Return the end of what it has written since its start."""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(max(self._logged, self.log.stat().st_size - 1500))
            return log.read().decode(errors="replace").strip()
        return ""


def children_of(*pids: int | None, recursive: bool = False) -> list[psutil.Process]:
    """Return the running processes that were started by processes ``pids`` (None: this one)."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(pid).children(recursive=recursive):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
    return found


def end_descendants(pid: int | None = None) -> None:
    """Kill every process below process ``pid`` (this one), and what they start meanwhile."""
    deadline = time.monotonic() + 10.0
    while (found := children_of(pid, recursive=True)) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1.0)


def keep_orphans() -> None:
    """Let processes whose parent ends become ours, on Linux: a search whose worker died is still ended with us."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def reap_orphans(parts: Sequence[Part]) -> None:
    """Take note of the end of processes that became ours."""
    ours = {part.process.pid for part in parts if part.process is not None}
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error, ChildProcessError):
                if process.pid not in ours and process.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(process.pid, os.WNOHANG)


def signals_to(events: Events) -> None:
    """Put SIGINT, SIGTERM and SIGHUP among the events, but those that whoever started us has decided about (``nohup``)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, lambda number, frame: events.put(Signalled(number)))
