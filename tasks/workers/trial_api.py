"""The ``trial`` object that user code gets."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from holdfast.core.checkpoint import check_step
from holdfast.core.deadline import Deadline
from holdfast.core.errors import InvalidInput, InvalidStep
from holdfast.core.values import Config, Metrics, plain, plain_metrics
from holdfast.storage.checkpoints.local import Loaded, LocalCheckpoints
from holdfast.storage.checkpoints.manifest import FileEntry
from holdfast.storage.checkpoints.serializers import called, hash_directory, ingest_directory, prepare
from holdfast.tasks.workers.messages import Candidate, Decision, Job, Report, Staged, TelemetryRow
from holdfast.tasks.workers.saving import Saver


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

    def report(self, report: Report) -> Decision:
        """Deliver a report; it is durable when this returns."""
        ...

    def hand_over(self, report: Report) -> None:
        """Give a checkpoint that was written after its report to whoever publishes it; called by the thread that wrote it."""
        ...

    def settle(self) -> None:
        """Wait until what was handed over counts as a checkpoint; StorageError or NotStorable when it cannot be published."""
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

    def __init__(
        self,
        job: Job,
        link: Link,
        checkpoints: LocalCheckpoints,
        checkpoint: ResumedCheckpoint | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
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
        self._saver = Saver(link.hand_over, link.settle) if job.asynchronous else None
        self._deadline = Deadline(job.save_by, clock)
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
        """Tell whether what is reported with ``step`` is going to be saved.

        Asked before a report, it knows whether that is expected to be the last one before ``save_before``, too; what it
        cannot know is whether the trial is about to be told to stop.
        """
        due = check_step(step) % self._job.save_period == 0
        return self._job.saves and (due or self._ends_generation(step) or self._deadline.due(step))

    def _ends_generation(self, step: int) -> bool:
        """Tell whether a population's members wait for each other after ``step``, and go on from what is saved there."""
        interval, last = self._job.interval, self._job.max_steps
        return interval is not None and (step + 1) % interval == 0 and (last is None or step + 1 < last)

    def _check_generation(self, step: int) -> None:
        """Refuse a report that passes over the end of a generation: the others would wait, and nobody could go on from it."""
        interval = self._job.interval
        if interval is None:
            return
        end = ((self._last + 1) // interval + 1) * interval - 1
        if step > end and self._ends_generation(end):
            after = "at the start" if self._last < 0 else f"after step {self._last}"
            raise InvalidInput(
                f"a generation of the population ends with step {end}, but the report {after} is of step {step};"
                f" report each step s for which s + 1 is a multiple of population.interval, {interval} (the first step is 0)"
            )

    def stage(self, step: int) -> Path:
        """Return a folder to write large files into, on the checkpoints' own file system.

        The report of that step saves it as it is, without a copy, when the step is due; otherwise it is removed. The folder
        is holdfast's from that report on: with asynchronous saves it is digested and made durable in the background.
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

        With asynchronous saves the metrics are durable when this returns, and of the checkpoint there is a copy: of the
        state in memory, of a folder on disk. The rest goes on in the background, one save at a time: the next due report
        first waits for it, and raises its error in place of its own work, once. So does the end of the attempt.
        """
        with self._lock:
            self._check_running()
            if self._stopped is not None:
                raise TrialStopped(self._stopped)
            step = self._last + 1 if step is None else self._check_new(step)
            values = plain_metrics(metrics)
            content = self._content(step, state, directory)
            self._check_generation(step)
            if content is None and self._ends_generation(step):
                raise InvalidInput(
                    f"a generation of the population ends with step {step}, and members go on from what is saved there:"
                    " report it with state=, directory= or staged files; stopping.max_steps tells which step is the last one"
                )
            due = content is not None and self.should_checkpoint(step)
            last_in_time = self._deadline.reported(step)
            report = Report(step=step, metrics=values)
            write = self._writer(step, *content) if content is not None and due else None
            staged = write() if write is not None and self._saver is None else None
            self._last = step
            decision = self._link.report(replace(report, staged=staged))
            if decision is not Decision.CONTINUE:
                self._stopped = decision
            if due and last_in_time:
                self._deadline.met()
            if write is not None and self._saver is not None:
                self._saver.start(report, self._made_up_for(write) if last_in_time else write)
            if decision is Decision.PREEMPT and content is not None and not due and self._job.saves:
                self._save_undue(report, *content)
            for stale in [number for number in self._own if number <= step]:
                self._checkpoints.discard(self._own.pop(stale))
            if self._stopped is not None:
                raise TrialStopped(self._stopped)

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

    def flush(self) -> None:
        """Take no more reports, and finish the save that is under way; its error is raised as by a report."""
        self._over = True
        if self._saver is not None and os.getpid() == self._pid:  # a forked copy has no thread that writes
            with self._lock:
                self._saver.finish()

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

    def _made_up_for(self, write: Callable[[], Staged]) -> Callable[[], Staged]:
        """Return ``write`` such that, when it fails, another step is saved before the deadline."""

        def made_up_for() -> Staged:
            try:
                return write()
            except BaseException:
                self._deadline.missed()
                raise

        return made_up_for

    def _save_undue(self, report: Report, kind: str, value: Any) -> None:
        """Save what a trial that has to stop reported at a step that is not due, after the save that is under way."""
        try:
            if self._saver is not None:
                self._saver.finish()
        finally:  # the older one's error must not cost the newer one
            self._link.report(replace(report, staged=self._writer(report.step, kind, value)()))

    def _writer(self, step: int, kind: str, value: Any) -> Callable[[], Staged]:
        """Return what writes the files of a checkpoint, once the save that is under way is finished.

        With asynchronous saves nothing of the user's is touched by what is returned.
        """
        if self._saver is not None:
            self._saver.finish()
        write: Callable[[Path], list[FileEntry]]
        if kind == "state":
            write = prepare(called(value), serializer=self._job.serializer, copy=self._saver is not None).write
        else:
            write = functools.partial(ingest_directory, Path(value)) if kind == "directory" else hash_directory
        folder = self._own.pop(step) if kind == "stage" else self._checkpoints.stage(self.number, self.attempt, step)
        serializer = self._job.serializer if kind == "state" else "directory"
        if kind != "directory":
            return functools.partial(self._write, folder, serializer, write)
        staged = self._write(folder, serializer, write)
        return lambda: staged

    def _write(self, folder: Path, serializer: str, write: Callable[[Path], list[FileEntry]]) -> Staged:
        try:
            return Staged(path=str(folder), serializer=serializer, files=tuple(write(folder)))
        except BaseException:
            self._checkpoints.discard(folder)
            raise


_FIRST_SECOND, _LAST_SECOND = -62135596800, 253402300799
"""of the years 1 to 9999, since 1970: what a date can be"""


def _seconds(timestamp: object) -> float:
    if isinstance(timestamp, bool) or not hasattr(timestamp, "__float__"):
        raise InvalidInput(f"timestamp is {timestamp!r}; give seconds since 1970, or a datetime with its time zone")
    if not _FIRST_SECOND <= timestamp < _LAST_SECOND:  # type: ignore[operator]  # NaN is not either
        raise InvalidInput(f"timestamp is {timestamp!r:.40}; give seconds since 1970 within the years 1 to 9999")
    return float(timestamp)
