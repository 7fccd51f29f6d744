"""What user code prints goes to its attempt's log file, whatever it did to its streams before."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from holdfast.storage.checkpoints.files import storage_errors

FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class _LastResort(logging.StreamHandler[TextIO]):
    """Show records while user code has configured no handler; ``logging.basicConfig`` works as in any script."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # looked up each time, since user code may replace it
        return sys.stderr


class Output:
    """The standard output and error of this process."""

    def __init__(self) -> None:
        self._streams: list[TextIO] = []
        logging.lastResort = _LastResort()
        logging.getLogger().setLevel(logging.INFO)

    def into(self, log: str) -> None:
        """Append to the file ``log`` from now on; folders on the way to it are made. StorageError when that fails."""
        with storage_errors(f"write the log {log}"):
            try:
                descriptor = os.open(log, FLAGS, 0o666)
            except FileNotFoundError:
                Path(log).parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(log, FLAGS, 0o666)
        for number in (1, 2):
            os.dup2(descriptor, number)
            os.set_inheritable(number, True)  # dup2 leaves it alone when user code had closed the number
        if descriptor > 2:
            os.close(descriptor)
        if not self._streams or any(stream.closed for stream in self._streams):
            self._streams = [_stream(number) for number in (1, 2)]
        sys.stdout, sys.stderr = self._streams

    def flush(self) -> None:
        for stream in {
            id(stream): stream for stream in (sys.stdout, sys.stderr, *self._streams) if stream is not None
        }.values():
            with contextlib.suppress(Exception):  # closed, or user code's own
                stream.flush()


def _stream(number: int) -> TextIO:
    return open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
