"""Run an attempt in the calling thread, without a process of its own: for debugging, and for code that uses Prefect."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from holdfast.core.errors import Infrastructure, StorageError, TrialFailed, TrialTimedOut
from holdfast.core.trial import Outcome
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.tasks.workers.attempt import choose, describe, perform
from holdfast.tasks.workers.messages import (
    OUTCOMES,
    STRENGTH,
    Decision,
    Ended,
    Job,
    Report,
    Supervision,
    TelemetryRow,
)
from holdfast.tasks.workers.saving import blamed
from holdfast.tasks.workers.supervise import POLL
from holdfast.tasks.workers.trainables import Trainable, load
from holdfast.tasks.workers.trial_api import TrialStopped


def run_inline(job: Job, supervision: Supervision, *, clock: Callable[[], float] = time.monotonic) -> Ended:
    """Run ``job`` here and now, and return how it ended; raises as ``WorkerPool.run``, but nothing crashes alone.

    The user's code prints where this process prints, and its working directory is this process's. Wishes to stop and
    the timeout are heeded at its reports only. With asynchronous saves a thread writes the files; they are published in
    the thread that reports, at the next report or at the end. ``clock`` is what ``job.save_by`` is a moment of.
    """
    link = _DirectLink(job, supervision)
    try:
        trainable = _load(job.trainable, job.workdir)
        checkpoints = LocalCheckpoints(Path(job.root))
        resume = choose(job, checkpoints)
    except BaseException as error:
        raise _failure(error) from error
    resumed = None if resume.place is None else job.candidates[resume.place]
    supervision.started(None, resumed, resume.rejected)
    try:
        decision, metrics = perform(job, trainable, link, checkpoints, resume.checkpoint, clock=clock)
    except BaseException as error:
        link.raise_own()
        if link.told is not None and not isinstance(error, Infrastructure):
            return Ended(outcome=OUTCOMES[link.told])
        raise _failure(error) from error
    link.raise_own()
    if decision is not None:
        return Ended(outcome=OUTCOMES[decision])
    return Ended(outcome=Outcome.COMPLETED, metrics=metrics)


_loaded: dict[tuple[str, str, int], Trainable] = {}
_loading = threading.Lock()


def _load(name: str, workdir: str) -> Trainable:
    """Load a trainable once, and again when its file was changed."""
    path = Path(workdir, name.rpartition(":")[0].removeprefix("pickle:"))
    key = (name, workdir, path.stat().st_mtime_ns if path.is_file() else 0)
    with _loading:
        if key not in _loaded:
            _loaded[key] = load(name, workdir)
        return _loaded[key]


def _failure(error: BaseException) -> BaseException:
    if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
        return error  # this process's own; in any other thread the user's code raised it
    failure = describe(error)
    if failure.infrastructure:
        return error if isinstance(error, StorageError) else StorageError(failure.message)
    return TrialFailed(failure.message, kind=failure.kind, traceback=failure.traceback, names=failure.names)


class _DirectLink:
    """Call the supervision straight; what it raises must get past the user's ``except Exception``."""

    def __init__(self, job: Job, supervision: Supervision) -> None:
        self._job = job
        self._supervision = supervision
        self._deadline = float("inf") if job.timeout is None else time.monotonic() + job.timeout
        self._next_poll = time.monotonic() + POLL
        self._wish = Decision.CONTINUE
        self._error: BaseException | None = None
        self._written: Report | None = None
        """a checkpoint that waits to be published; the thread that writes sets it, and none before this one was taken"""
        self._refused: BaseException | None = None
        self.told: Decision | None = None

    def check(self) -> None:
        """Stop code that went on after the supervision had raised."""
        if self._error is not None:
            raise TrialStopped(Decision.KILL)

    def raise_own(self) -> None:
        """Raise what the supervision raised, or the timeout, whatever the user's code made of it."""
        if self._error is not None:
            raise self._error

    def hand_over(self, report: Report) -> None:
        self._written = report

    def settle(self) -> None:
        self._publish()
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused

    def _publish(self) -> None:
        self.check()
        report = self._written
        if report is None:
            return
        self._written = None
        try:
            publish = self._supervision.publication(report)
            try:
                published = publish()
            except StorageError as error:
                self._refused = blamed(error, report)
            else:
                self._supervision.saved(report, published)
        except BaseException as error:  # noqa: BLE001  # raised by raise_own
            self._stop(error)

    def report(self, report: Report) -> Decision:
        self._publish()
        try:
            decision = self._supervision.report(report)
            now = time.monotonic()
            if now >= self._next_poll:
                self._next_poll = now + POLL
                self._wish = max(self._wish, self._supervision.poll(), key=STRENGTH.__getitem__)
        except BaseException as error:  # noqa: BLE001  # raised by raise_own
            self._stop(error)
        decision = max(decision, self._wish, key=STRENGTH.__getitem__)
        if decision is Decision.CONTINUE and now >= self._deadline:
            self._stop(TrialTimedOut(f"trial {self._job.trial} took longer than its trial_timeout of {self._job.timeout:g} s"))
        if decision is not Decision.CONTINUE:
            self.told = self.told or decision
        return decision

    def telemetry(self, row: TelemetryRow) -> None:
        try:
            self._supervision.telemetry([row])
        except BaseException as error:  # noqa: BLE001  # raised by raise_own
            self._stop(error)

    def _stop(self, error: BaseException) -> NoReturn:
        self._error = self._error or error
        raise TrialStopped(Decision.KILL) from error
