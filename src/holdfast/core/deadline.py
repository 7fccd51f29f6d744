"""When one more step is to be saved because the time runs out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

RECENT = 10
"""Pauses between reports of which the longest is what the next one is expected to take."""


class Deadline:
    """Tells which report is expected to be the last one before a moment: it is saved, due or not, once.

    ``moment`` is one of ``clock``, in seconds; None when there is none, and one that is past already is none either: no report
    is the last one before it.
    """

    def __init__(self, moment: float | None, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self._moment = moment if moment is not None and moment > self._last else None
        self._met = False
        self._pauses: deque[float] = deque(maxlen=RECENT)
        self._told: dict[int, bool] = {}

    def due(self, step: int) -> bool:
        """Tell whether the report of ``step``, which comes now, is the one to save; the answer holds until a report came."""
        if self._moment is None or self._met:
            return False
        if step not in self._told:
            now = self._clock()
            self._told[step] = now + max(now - self._last, *self._pauses, 0.0) >= self._moment
        return self._told[step]

    def reported(self, step: int) -> bool:
        """Note that the report of ``step`` has come; return what :meth:`due` said of it."""
        due = self.due(step)
        now = self._clock()
        self._pauses.append(now - self._last)
        self._last = now
        self._told.clear()
        return due

    def met(self) -> None:
        """Note that the step was saved: no other one is due for the deadline's sake."""
        self._met = True

    def missed(self) -> None:
        """Note that the step could not be saved after all: another one is due in its place."""
        self._met = False
