"""The ``trial`` object that user code gets."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Protocol

from holdfast.core.checkpoint import check_step
from holdfast.core.errors import InvalidInput, InvalidStep
from holdfast.core.values import Config, Metrics, plain, plain_metrics
from holdfast.storage.checkpoints.local import Loaded, LocalCheckpoints
from holdfast.storage.checkpoints.serializers import hash_directory, ingest_directory, write_state
from holdfast.tasks.workers.messages import Candidate, Decision, Job, Staged, TelemetryRow

FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, functools.partial)
"""What ``state`` is called as; a model is often callable too, and is a value."""


class TrialStopped(BaseException):
    """Raised out of ``trial.report`` to end the attempt; no Exception, so that ``except Exception`` lets it pass."""

    def __init__(self, decision: Decision) -> None:
        super().__init__(f"the trial was told to stop: {decision.value}")
        self.decision = decision


class Link(Protocol):
    """Where a trial's words go."""

    def check(self) -> None:
        """Raise unless this process may speak for the attempt."""
        ...

    def report(self, step: int, metrics: Metrics, staged: Staged | None) -> Decision:
        """Deliver a report; it is durable when this returns."""
        ...

    def telemetry(self, row: TelemetryRow) -> None:
        """Deliver telemetry, now or with the next report."""
        ...


class ResumedCheckpoint:
    """The verified checkpoint that this attempt continues from; ``path`` is absolute."""

    def __init__(self, checkpoints: LocalCheckpoints, candidate: Candidate, loaded: Loaded, trial: int) -> None:
        self.step = candidate.step
        self.metrics: Metrics = dict(loaded.metrics)
        self.path = Path(os.path.abspath(loaded.path))
        self._checkpoints = checkpoints
        self._candidate = candidate
        self._trial = trial
        self._loaded: Loaded | None = loaded

    def load(self) -> Any:
        """Return the state, or the folder when the checkpoint holds the user's own files.

        The first call hands out what was loaded when the attempt started; a later one reads it again.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            candidate = self._candidate
            loaded = self._checkpoints.load(
                candidate.path, digest=candidate.digest, trial=self._trial, attempt=candidate.attempt, step=candidate.step
            )
        return loaded.state

    def __repr__(self) -> str:
        return f"<checkpoint of step {self.step} at {self.path}>"


class Trial:
    """One config under evaluation, as its code sees it.

    ``config`` are its typed values, ``references`` what the spec names besides; ``seed`` is the same in every attempt;
    ``checkpoint`` is None unless this attempt continues an earlier one.
    """

    def __init__(self, job: Job, link: Link, checkpoints: LocalCheckpoints, checkpoint: ResumedCheckpoint | None) -> None:
        self.config: Config = dict(job.config)
        self.number = job.trial
        self.attempt = job.attempt
        self.seed = job.seed
        self.experiment = job.experiment
        self.references: dict[str, Any] = job.references
        self.checkpoint = checkpoint
        self._job = job
        self._link = link
        self._checkpoints = checkpoints
        self._last = -1 if checkpoint is None else checkpoint.step
        self._own: dict[int, Path] = {}
        self._stopped: Decision | None = None
        self._pid = os.getpid()
        self._over = False
        self._lock = threading.RLock()  # user code may report from a thread of its own

    def __repr__(self) -> str:
        return f"<trial {self.number}, attempt {self.attempt}, of {self.experiment}>"

    @property
    def stopped(self) -> Decision | None:
        """What the trial was told when it was told to stop."""
        return self._stopped

    def should_checkpoint(self, step: int) -> bool:
        """Tell whether what is reported with ``step`` is going to be saved."""
        return self._job.saves and check_step(step) % self._job.save_period == 0

    def stage(self, step: int) -> Path:
        """Return a folder to write large files into, on the checkpoints' own file system.

        The report of that step saves it as it is, without a copy, when the step is due; otherwise it is removed.
        """
        with self._lock:
            self._check_running()
            step = self._check_new(step)
            if step not in self._own:
                self._own[step] = self._checkpoints.stage(self.number, self.attempt, step)
            return self._own[step]

    def report(
        self,
        metrics: Mapping[str, Any],
        *,
        step: int | None = None,
        state: Any = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        """Record ``metrics`` at ``step``, durably, and save a checkpoint when the step is due.

        ``step`` is the one after the last unless given, and must rise. ``state`` is a value, or a function that returns
        it and is called only when it is to be saved; ``directory`` is a folder of files to copy instead. Raises
        TrialStopped, which ends the attempt, when it is told to stop; InvalidStep; NotStorable; StorageError.
        """
        with self._lock:
            self._check_running()
            if self._stopped is not None:
                raise TrialStopped(self._stopped)
            step = self._last + 1 if step is None else self._check_new(step)
            values = plain_metrics(metrics)
            content = self._content(step, state, directory)
            staged = self._save(step, *content) if content and self.should_checkpoint(step) else None
            self._last = step
            decision = self._link.report(step, values, staged)
            if decision is Decision.PREEMPT and staged is None and content and self._job.saves:
                self._link.report(step, values, self._save(step, *content))
            for stale in [number for number in self._own if number <= step]:
                self._checkpoints.discard(self._own.pop(stale))
            if decision is not Decision.CONTINUE:
                self._stopped = decision
                raise TrialStopped(decision)

    def telemetry(self, name: str, value: Any, timestamp: float | datetime | None = None) -> None:
        """Record ``value`` under ``name`` at ``timestamp``: seconds since 1970, an aware datetime, or now."""
        if isinstance(timestamp, datetime):
            if timestamp.utcoffset() is None:
                raise InvalidInput(
                    f"timestamp is {timestamp.isoformat()} without a time zone; give it one, or seconds since 1970"
                )
            timestamp = timestamp.timestamp()
        moment = time.time() if timestamp is None else _seconds(timestamp)
        row = (moment, str(name), plain(value, f"telemetry {name!r}"))
        with self._lock:
            self._check_running()
            self._link.telemetry(row)

    def finish(self) -> None:
        """Take no more reports, and remove the folders that were staged and never reported."""
        self._over = True
        while self._own and os.getpid() == self._pid:  # a forked copy must not remove its original's
            self._checkpoints.discard(self._own.popitem()[1])

    def _check_running(self) -> None:
        self._link.check()
        if self._over:
            raise InvalidInput(
                f"attempt {self.attempt} of trial {self.number} has ended; its trial object is of no use any more"
            )

    def _check_new(self, step: Any) -> int:
        item = getattr(step, "__index__", None)
        if item is not None and not isinstance(step, (bool, int)):
            step = item()  # a numpy integer
        number = check_step(step)
        if number <= self._last:
            first = self.checkpoint is not None and self._last == self.checkpoint.step
            what = "the checkpoint's step" if first else "the last reported step"
            raise InvalidStep(f"step is {number}; it must be greater than {what}, {self._last}")
        return number

    def _content(self, step: int, state: Any, directory: Any) -> tuple[str, Any] | None:
        given: list[tuple[str, Any]] = []
        if state is not None:
            given.append(("state", state))
        if directory is not None:
            given.append(("directory", directory))
        if step in self._own:
            given.append(("stage", self._own[step]))
        if len(given) > 1:
            raise InvalidInput(f"step {step} has {' and '.join(kind for kind, _ in given)}; a checkpoint holds one of them")
        return given[0] if given else None

    def _save(self, step: int, kind: str, value: Any) -> Staged:
        if kind == "state" and isinstance(value, FUNCTIONS):
            value = value()
        folder = self._own.pop(step) if kind == "stage" else self._checkpoints.stage(self.number, self.attempt, step)
        serializer = self._job.serializer if kind == "state" else "directory"
        try:
            if kind == "state":
                files = write_state(value, folder, serializer=serializer)
            elif kind == "directory":
                files = ingest_directory(Path(value), folder)
            else:
                files = hash_directory(folder)
        except BaseException:
            self._checkpoints.discard(folder)
            raise
        return Staged(path=str(folder), serializer=serializer, files=tuple(files))


_FIRST_SECOND, _LAST_SECOND = -62135596800, 253402300799
"""of the years 1 to 9999, since 1970: what a date can be"""


def _seconds(timestamp: object) -> float:
    if isinstance(timestamp, bool) or not hasattr(timestamp, "__float__"):
        raise InvalidInput(f"timestamp is {timestamp!r}; give seconds since 1970, or a datetime with its time zone")
    if not _FIRST_SECOND <= timestamp < _LAST_SECOND:  # type: ignore[operator]  # NaN is not either
        raise InvalidInput(f"timestamp is {timestamp!r:.40}; give seconds since 1970 within the years 1 to 9999")
    return float(timestamp)
