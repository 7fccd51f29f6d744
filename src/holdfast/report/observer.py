"""Whoever watches a search from outside: the command line's progress display, a notebook, nobody."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from holdfast import references
from holdfast.core.failure_section import FailureSection
from holdfast.core.resume import Action, Planned
from holdfast.core.trial import ACTIVE, Trial, TrialStatus
from holdfast.locate import Opened, default_database
from holdfast.report.restored import restored_lines
from holdfast.report.texts import one_line
from holdfast.result import SearchResult
from holdfast.storage.root import parent_of


class Observer:
    """Told of what happens, in the thread of the search; this one does nothing. Its methods must not block."""

    def say(self, text: str) -> None:
        """A sentence for a person."""

    def preparing(self) -> None:
        """The input is good and there is work: an API will be needed."""

    def opened(self, opened: Opened, *, restored: bool) -> None:
        """The experiment is ours: its path is known, nothing runs yet."""

    def planned(self, plan: Sequence[Planned]) -> None:
        """What a restore does with each stored trial."""

    def running(self, api_url: str | None) -> None:
        """Prefect's API answers; trials start now."""

    def trial(self, trial: Trial) -> None:
        """A trial's row changed."""

    def ended(self, result: SearchResult) -> None:
        """The search ended, on its own accord or interrupted."""


class Together(Observer):
    """Tells two observers."""

    def __init__(self, first: Observer, second: Observer) -> None:
        self._both = (first, second)

    def say(self, text: str) -> None:
        for one in self._both:
            one.say(text)

    def preparing(self) -> None:
        for one in self._both:
            one.preparing()

    def opened(self, opened: Opened, *, restored: bool) -> None:
        for one in self._both:
            one.opened(opened, restored=restored)

    def planned(self, plan: Sequence[Planned]) -> None:
        for one in self._both:
            one.planned(plan)

    def running(self, api_url: str | None) -> None:
        for one in self._both:
            one.running(api_url)

    def trial(self, trial: Trial) -> None:
        for one in self._both:
            one.trial(trial)

    def ended(self, result: SearchResult) -> None:
        for one in self._both:
            one.ended(result)


class RunLog(Observer):
    """Writes what happens to a logger: the log of a flow run, in Prefect's UI.

    What user code says, and names that people chose, come as one printable line each: a log is read by programs, too.
    """

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._logger = logger
        self._open: set[int] = set()
        self._failure = FailureSection()

    def say(self, text: str) -> None:
        self._line(text)

    def opened(self, opened: Opened, *, restored: bool) -> None:
        self._failure = opened.spec.failure
        self._line(f"experiment {opened.record.name}: {opened.folder.location}")
        self._line(f"after a crash: {restore_command(opened)}")
        if opened.spec.search.chosen:
            self._line(opened.spec.search.chosen)

    def planned(self, plan: Sequence[Planned]) -> None:
        for planned in plan:
            if planned.action is not Action.KEEP:
                self._line(f"trial {planned.trial}: {planned.action.value} ({planned.reason})")

    def trial(self, trial: Trial) -> None:
        seen = trial.number in self._open
        if trial.status in ACTIVE:
            self._open.add(trial.number)
            if is_retry(trial):
                self._line(waiting_words(trial, self._failure, datetime.now(UTC)))
        elif seen:  # else it had ended before this run
            self._open.remove(trial.number)
            pruned = trial.status is TrialStatus.PRUNED and trial.attempt.note
            words = (
                f"{trial.metrics} ({trial.attempt.note})"
                if pruned
                else trial.metrics
                if trial.error is None
                else f"{trial.error.kind}: {trial.error.message}"
            )
            self._line(f"trial {trial.number} {trial.status.value} {words}")

    def ended(self, result: SearchResult) -> None:
        self._line(f"{result.reason}: {len(result.trials)} trials, {len(result.errors)} errored")
        for line in () if result.restored is None else restored_lines(result.restored):
            self._line(line)

    def _line(self, text: str) -> None:
        self._logger.info("%s", one_line(text))


def is_retry(trial: Trial) -> bool:
    """Tell whether a trial waits because it has failed."""
    return trial.status is TrialStatus.PENDING and trial.attempt.reason == "retry"


def waiting_words(trial: Trial, failure: FailureSection, now: datetime) -> str:
    """Return what a trial waits for, and how long if it failed: that is no longer than its delay, whatever the clock says."""
    what = f"for attempt {trial.attempt.number} ({trial.attempt.reason})"
    if is_retry(trial) and trial.attempt.created is not None and trial.failures:
        delay = failure.delay(trial.failures)
        left = min(delay - (now - trial.attempt.created).total_seconds(), delay)
        if left >= 0.05:
            what = f"{left:.{0 if left >= 9.95 else 1}f}".removesuffix(".0") + f" s {what}"
    return f"trial {trial.number} waits {what}"


def restore_command(opened: Opened) -> str:
    """Return the command that continues an experiment; of a database elsewhere it shows all but the password."""
    words = ["holdfast", "restore", shlex.quote(references.name_of_location(opened.folder.location))]
    default = default_database(parent_of(opened.folder.location))
    if opened.database.file is None or isinstance(default, str) or str(opened.database.file) != default.database:
        words += ["--database", shlex.quote(references.name_of_database(opened.database.label))]
    return " ".join(words)


watching: ContextVar[Observer | None] = ContextVar("holdfast_observer", default=None)
