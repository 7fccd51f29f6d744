"""What becomes of attempts whose tasks did not end by themselves: rows decide, not what an engine says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from prefect.futures import PrefectFuture

from holdfast.core.errors import Contention, Infrastructure, Unfit
from holdfast.core.trial import ACTIVE, ErrorInfo, Outcome, Trial, TrialStatus
from holdfast.flows.runners.port import How
from holdfast.holding import liveness
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.workers import WorkerRow

SILENT_SECONDS = 30.0
"""A worker that has said nothing for so long is lost."""
MOST_REFUSALS = 10
"""So many times that no worker began a trial, while no other one began either, interrupt a search in which nothing runs."""
MOST_LOSSES = 5
"""So many workers in a row that were lost with the same trial, which came no further: it is what ends them."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a trial that no worker began is handed out again."""


@dataclass
class Flight:
    """An attempt that was handed to an engine."""

    number: int
    """of its trial"""
    attempt: int
    row: int
    future: PrefectFuture[Any]
    over_since: float | None = None
    """when its attempt was first seen to have ended, by the monotonic clock, while its task had not"""
    why: str | None = None
    """why its task ended in another way than by its own end, if it did: only rows tell of the attempt from then on"""

    @property
    def is_watched(self) -> bool:
        return self.why is not None


class Verdict(StrEnum):
    """What a driver does about an attempt whose task ended without saying so itself."""

    OVER = "over"
    """it has its outcome, or another attempt follows: nothing"""
    AGAIN = "again"
    """nobody has begun it: it is handed out again"""
    LOSE = "lose"
    """its worker is gone: it is closed as lost"""
    WATCH = "watch"
    """somebody may run it still: until it has ended, or its worker fell silent"""


def judge(trial: Trial | None, attempt: int, how: How, error: object = None) -> Verdict:
    """Say what is to be done about attempt ``attempt`` of a trial as it is stored; ``error`` is what its task raised."""
    if trial is None or trial.attempt.number != attempt or trial.attempt.outcome is not None or trial.status not in ACTIVE:
        return Verdict.OVER
    if trial.status is TrialStatus.PENDING:
        return Verdict.AGAIN
    if how is How.LOST:
        return Verdict.LOSE
    if how is How.UNCLEAR or isinstance(error, Contention | Unfit):
        return Verdict.WATCH  # another execution has claimed it, or this one was only lost sight of
    return Verdict.LOSE


def gone(rows: Iterable[WorkerRow]) -> list[tuple[WorkerRow, str]]:
    """Return the workers that run nothing any more, each with the reason.

    They left by themselves, have been silent for too long, or were a process of this host that is gone.
    """
    found = []
    for row in rows:
        if row.left is not None:
            found.append((row, f"it left: {row.left}"))
        elif row.silent >= SILENT_SECONDS:
            found.append((row, f"it has been silent for {row.silent:.0f} s"))
        elif liveness({"host": row.host, "pid": row.pid, "started": row.started}) is False:
            found.append((row, "its process is gone"))
    return found


class Losses:
    """How often in a row each trial was lost and had come no further: one that takes too much memory would end every worker."""

    def __init__(self) -> None:
        self._counts: dict[int, tuple[int, int]] = {}
        """by the trial's number: the furthest step that it reported, and how often it was lost since"""

    def add(self, trial: Trial) -> int:
        """Note that a trial was lost; return how often it was, in a row."""
        furthest, count = self._counts.get(trial.number, (-1, 0))
        step = -1 if trial.step is None else trial.step
        count = 1 if step > furthest else count + 1
        self._counts[trial.number] = max(step, furthest), count
        return count

    def is_last(self, trial: Trial) -> bool:
        """Tell whether the next loss of a trial is one too many, as far as it has come."""
        furthest, count = self._counts.get(trial.number, (-1, 0))
        return count + 1 >= MOST_LOSSES and (trial.step is None or trial.step <= furthest)


def fatal(why: str) -> Ending:
    """Return the end of an attempt that was lost with one worker too many."""
    message = f"{MOST_LOSSES} workers in a row were lost with this trial, which came no further; the last one: {why}"
    return Ending(outcome=Outcome.CRASHED, error=ErrorInfo(kind="WorkerLost", message=message))


class Refusals:
    """Trials that workers were given and did not begin: when each is handed out again, and when that has no use any more."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._due: dict[int, float] = {}
        self._pauses: dict[int, float] = {}
        self._said: set[str] = set()
        self._counts: dict[int, int] = {}
        """how often each trial was not begun since any trial was"""

    @property
    def waiting(self) -> set[int]:
        """Numbers of the trials that wait to be handed out again."""
        return set(self._due)

    def add(self, number: int, why: str, *, running: bool = False) -> None:
        """Note that trial ``number`` was not begun. A reason is said once.

        Infrastructure when it was handed out too often, unless other trials are ``running``: workers can run some then. What
        passes within a minute interrupts nothing, however many workers say it.
        """
        count = self._counts[number] = self._counts.get(number, 0) + 1
        if why not in self._said:
            self._said.add(why)
            self._say(f"trial {number} was not begun, and is handed out again: {why}")
        if count >= MOST_REFUSALS and not running:
            raise Infrastructure(
                f"{count} times in a row no worker began trial {number}, nor any other; the search is interrupted, mend this, "
                f"then restore: {why}"
            )
        pause = self._pauses[number] = min(2 * self._pauses.get(number, _FIRST_PAUSE / 2), _LONGEST_PAUSE)
        self._due[number] = self._clock() + pause

    def later(self, number: int, times: int) -> None:
        """Let a trial wait that had no luck so many ``times`` in a row."""
        self._due[number] = self._clock() + min(_FIRST_PAUSE * 2**times, _LONGEST_PAUSE)

    def begun(self, number: int) -> None:
        """Note that a trial began: workers can run some."""
        self._counts.clear()
        self.forget(number)

    def forget(self, number: int) -> None:
        """Wait for a trial no more."""
        self._due.pop(number, None)
        self._pauses.pop(number, None)

    def due(self) -> list[int]:
        """Return the trials that are to be handed out again now, and forget that they wait."""
        now = self._clock()
        found = sorted(number for number, moment in self._due.items() if moment <= now)
        for number in found:
            del self._due[number]
        return found


def worker_words(row: WorkerRow) -> str:
    """Say which worker it is."""
    return f"worker {row.name} (process {row.pid} on {row.hostname})"
