"""What a process does about its stores when it ends: saves that are under way are finished, temporary folders go."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  # its hook must be registered before ours
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

log = logging.getLogger(__name__)


class Flushes(Protocol):
    def flush(self) -> None:
        """Finish what is under way; raise its error."""
        ...


_busy: set[Flushes] = set()
"""Stores with something under way, or with an error that nobody has seen: they must not be collected."""
_folders: dict[tuple[int, str], str] = {}
"""Temporary folders by process and location."""
os.register_at_fork(after_in_child=_busy.clear)  # the saves of a forked process's parent are the parent's


@dataclass
class _Sigterm:
    """What SIGTERM sets going: a thread of the process ``owner``, waked by a pipe.

    A handler may interrupt code that holds any lock, that of the threads among them; so it takes none, and starts nothing.
    """

    owner: int
    thread: threading.Thread
    wake: int
    come: bool = False


_sigterm: _Sigterm | None = None


def watch_sigterm() -> None:
    """Have SIGTERM finish what is under way, where the program neither handles nor ignores it. For the main thread alone."""
    global _sigterm  # noqa: PLW0603  # signals are the whole process's
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, _terminate):
        return
    if _sigterm is not None and _sigterm.come and _sigterm.owner == os.getpid():
        return  # it has done its work, and the signal's own default is to follow
    if _sigterm is None or _sigterm.owner != os.getpid():
        receive, send = os.pipe()
        thread = threading.Thread(target=_leave, args=(receive,), name="holdfast-leaving", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # there are too many: SIGTERM stays what it is
            os.close(receive)
            os.close(send)
            return
        _sigterm = _Sigterm(owner=os.getpid(), thread=thread, wake=send)
    signal.signal(signal.SIGTERM, _terminate)


def begin(store: Flushes) -> None:
    """Note that ``store`` has something under way, which is to be finished when the process ends; errors are logged then."""
    watch_sigterm()
    _busy.add(store)


def done(store: Flushes) -> None:
    """Note that nothing is under way any more, and that its error, if any, was raised."""
    _busy.discard(store)


def make_way() -> None:
    """Wait for the end in a thread that uses a store once SIGTERM has come: what is under way is finished by another one."""
    while _sigterm is not None and _sigterm.come and threading.current_thread() is not _sigterm.thread:
        time.sleep(1)


def _flush_all() -> None:
    for store in list(_busy):
        try:
            store.flush()
        except Exception:  # nobody is left to raise it to, and the other stores have saves of their own to finish
            log.exception("%r: the last save failed", store)


# Before the executors of concurrent.futures are shut down, which an upload needs: they were registered when that was imported,
# and the last one is called first. Where Python has no such hook (it is not documented), atexit's comes later.
getattr(threading, "_register_atexit", atexit.register)(_flush_all)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one does not wait
    if _sigterm is None or _sigterm.owner != os.getpid():  # in a fork, which has inherited the handler alone
        os.kill(os.getpid(), number)
        return
    _sigterm.come = True
    os.write(_sigterm.wake, b"\0")


def _leave(receive: int) -> None:
    os.read(receive, 1)
    try:
        _flush_all()
        _remove_folders()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def temporary_folder(location: str) -> Path:
    """Return this process's folder for copies of what is at a location; it is removed when the process ends."""
    key = (os.getpid(), location)
    if key not in _folders:
        _folders[key] = tempfile.mkdtemp(prefix="holdfast-checkpoints-")
    return Path(_folders[key])


@atexit.register
def _remove_folders() -> None:
    for (owner, _), folder in _folders.items():
        if owner == os.getpid():  # not what a fork has inherited
            shutil.rmtree(folder, ignore_errors=True)
