"""What a process does with saves that are under way when it ends."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import weakref
from types import FrameType
from typing import Protocol

from holdfast.core.errors import HoldfastError

log = logging.getLogger(__name__)


class Flushes(Protocol):
    def flush(self) -> None:
        """Finish what is under way; raise its error."""
        ...


_alive: weakref.WeakSet[Flushes] = weakref.WeakSet()
os.register_at_fork(after_in_child=_alive.clear)  # the saves of a forked process's parent are the parent's


def flush_on_exit(store: Flushes) -> None:
    """Finish what ``store`` has under way when the process ends or gets SIGTERM; errors are logged then.

    SIGTERM is left alone where the program handles or ignores it; a handler that ends the process normally flushes, too.
    """
    _alive.add(store)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


@atexit.register
def _flush_all() -> None:
    for store in list(_alive):
        try:
            store.flush()
        except HoldfastError:
            log.exception("%r: the last save failed", store)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Flush in a thread, because the code that was interrupted may hold what flushing waits for; then die of the signal."""
    signal.signal(number, signal.SIG_DFL)  # a second one does not wait

    def leave() -> None:
        try:
            _flush_all()
        finally:
            os.kill(os.getpid(), number)

    threading.Thread(target=leave, name="holdfast-leaving").start()
