"""Trials that wait for their turn."""

from __future__ import annotations

from datetime import datetime
from heapq import heappop, heappush


class Waitlist:
    """Waiting trials, by number: those that may run at once, and those that have a time before which they do not."""

    def __init__(self) -> None:
        self._ready: set[int] = set()
        self._line: list[int] = []
        """a heap of them, and of some that wait no longer: these are dropped when they come to its head"""
        self.timed: dict[int, datetime] = {}
        """not to be run before"""

    def __contains__(self, number: object) -> bool:
        return number in self._ready or number in self.timed

    def __len__(self) -> int:
        return len(self._ready) + len(self.timed)

    def put(self, number: int, start: datetime | None) -> None:
        """Note that a trial waits, in place of what was noted of it before."""
        self.discard(number)
        if start is not None:
            self.timed[number] = start
            return
        self._ready.add(number)
        heappush(self._line, number)

    def discard(self, number: int) -> None:
        """Note that a trial does not wait."""
        self._ready.discard(number)
        self.timed.pop(number, None)

    def first(self) -> int | None:
        """Return the first trial, by number, that may run at once: in a long queue without a look at all of it."""
        while self._line and self._line[0] not in self._ready:
            heappop(self._line)
        return self._line[0] if self._line else None
