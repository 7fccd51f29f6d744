"""The parent's view of what an attempt prints: a few lines for the engine's log, the last ones for an error."""

from __future__ import annotations

import os
import time

RATE = 50.0  # lines per second that are shown
BURST = 200
WINDOW = 64 << 10  # bytes that are looked at in one go
WIDTH = 2000


class LogTail:
    """Follow a log file from its present end, and say how much was left out where it is too much to show."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._position = _size(path)
        self._start = self._position
        self._budget = float(BURST)
        self._refilled = time.monotonic()

    def read(self, *, final: bool = False) -> list[str]:
        """Return the new whole lines, or their end; with ``final`` also one that is not ended."""
        size = _size(self._path)
        if size <= self._position:
            return []
        begin = max(self._position, size - WINDOW)
        data = _read(self._path, begin, size)
        if not final:
            end = data.rfind(b"\n") + 1
            if not end and len(data) < WINDOW:
                return []
            data = data[: end or len(data)]
        lines = data.decode("utf-8", "replace").splitlines()
        now = time.monotonic()
        self._budget = min(float(BURST), self._budget + RATE * (now - self._refilled))
        self._refilled = now
        left_out = begin - self._position
        shown = lines[-max(1, int(self._budget)) :]
        left_out += sum(len(line.encode()) + 1 for line in lines[: len(lines) - len(shown)])
        self._budget -= len(shown)
        self._position = begin + len(data)
        notes = [f"[{left_out} bytes left out; all of it is in {self._path}]"] if left_out else []
        return notes + [line[:WIDTH] for line in shown]

    def last_lines(self, count: int = 25) -> list[str]:
        """Return the last lines that the attempt printed."""
        size = _size(self._path)
        return last_lines(_read(self._path, max(self._start, size - (8 << 10)), size), count)


def last_lines(data: bytes, count: int = 25) -> list[str]:
    """Return the last ``count`` lines of ``data`` that are not blank."""
    return [line[:WIDTH] for line in data.decode("utf-8", "replace").splitlines() if line.strip()][-count:]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _read(path: str, begin: int, end: int) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            return file.read(end - begin)
    except OSError:
        return b""
