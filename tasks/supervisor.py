"""A running attempt, seen from its task: what user code reports becomes durable here, and decisions go back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

from holdfast.core import faults, retention
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.errors import CheckpointConflict, CheckpointNotFound, Corrupt, Infrastructure
from holdfast.core.objective import goal_of
from holdfast.core.population import ends_generation
from holdfast.core.values import Config, Metrics
from holdfast.storage.checkpoints.local import Published
from holdfast.storage.checkpoints.manifest import Kind, Manifest
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.engine import Transaction
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.rows import micros
from holdfast.storage.recovery import Told
from holdfast.tasks.pruning import Pruner
from holdfast.tasks.runtime import Runtime
from holdfast.tasks.workers.messages import STRENGTH, Candidate, Decision, ProcessIdentity, Rejected, Report, Staged


@dataclass
class Supervisor:
    """The supervision of one attempt (``tasks.workers.messages.Supervision``): called in the task's thread."""

    runtime: Runtime
    claim: Callable[..., AttemptWriter]
    trial: int
    attempt: int
    config: Config
    candidates: Sequence[Checkpoint]
    logger: logging.Logger | logging.LoggerAdapter[Any]
    metrics: Metrics = field(default_factory=dict)
    """of the last report"""
    reported: int | None = None
    resumed: Checkpoint | None = None
    pruned: str | None = None
    """why a stopping rule ended the trial; its committed decision holds, however the attempt comes to its end"""
    _writer: AttemptWriter | None = None
    _missed: list[Rejected] = field(default_factory=list)
    """checkpoints that could not be brought here"""
    _told: list[tuple[int, Told]] = field(default_factory=list)
    """seq and content of each report that the journal may lack"""
    _pruner: Pruner | None = None
    _has_saved: bool = False
    _borrowed: list[int] = field(default_factory=list)
    """numbers of the trials, its own among them, whose local copies stay while this attempt runs"""

    @property
    def writer(self) -> AttemptWriter:
        """The claimed attempt; claims it when its process never came to that (it could not load the trainable)."""
        if self._writer is None:
            self._writer = self.claim()
        return self._writer

    def _checkpoint(self, candidate: Candidate | None) -> Checkpoint | None:
        if candidate is None:
            return None
        return next(known for known in self.candidates if known.path == candidate.path)

    def fetched(self) -> tuple[Candidate, ...]:
        """Return the checkpoints that the attempt may continue from, newest first; on an object store, the newest good one.

        That one is here then; newer ones that are missing, torn or altered are rejected. StorageError passes.
        """
        if self.runtime.folder.is_local:
            return tuple(self._candidate(checkpoint) for checkpoint in self.candidates)
        self._borrow(self.trial)
        for checkpoint in self.candidates:
            self._borrow(checkpoint.trial)
            try:
                self.runtime.checkpoints.fetch(
                    checkpoint.path,
                    digest=checkpoint.digest,
                    trial=checkpoint.trial,
                    attempt=checkpoint.attempt,
                    step=checkpoint.step,
                )
            except (Corrupt, CheckpointNotFound) as error:
                self._missed.append(Rejected(candidate=self._candidate(checkpoint), reason=str(error)))
            else:
                return (self._candidate(checkpoint),)
        return ()

    def _candidate(self, checkpoint: Checkpoint) -> Candidate:
        candidate = candidate_of(checkpoint)
        return candidate if checkpoint.trial == self.trial else replace(candidate, trial=checkpoint.trial)

    def _borrow(self, trial: int) -> None:
        if trial not in self._borrowed:
            with self.runtime.borrowing:
                self.runtime.borrowed[trial] += 1
            self._borrowed.append(trial)

    def _release(self) -> None:
        """Drop the trial's local copies, unless another member of the population, or a second execution, uses one."""
        with self.runtime.borrowing:
            self.runtime.borrowed.subtract(self._borrowed)
            self._borrowed.clear()
            if self.runtime.borrowed[self.trial] <= 0:
                self.runtime.checkpoints.release(self.trial)
                if self._writer is None:
                    self.runtime.folder.log_file(self.trial, self.attempt).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what the ended attempt left on this host only, its log first kept with the experiment; failures are logged.

        In the driver's process nothing happens when somebody else runs the trial: it may be on this host, too. A worker's
        local files are its own.
        """
        if self.runtime.folder.is_local:
            return
        try:
            if self._writer is not None and self.runtime.lost is None and self._is_current():
                self.runtime.folder.keep_log(self.trial, self.attempt)
            elif self.runtime.worker is None:
                return
            self._release()
        except (OSError, Infrastructure) as error:
            self.logger.warning("the trial's log stays on this host: %s", error)

    def let_go(self) -> None:
        """Tell the runtime that the attempt is supervised no more."""
        if self._writer is not None:
            self.runtime.let_go(self._writer)

    def _is_current(self) -> bool:
        return Leases(self.runtime.database, self.runtime.experiment).look().epoch == self.runtime.epoch

    def started(self, process: ProcessIdentity | None, resumed: Candidate | None, rejected: Sequence[Rejected]) -> None:
        """Claim the attempt for the process that is ready to run it, with what it really continues from.

        Raises AlreadyClaimed when another process runs it: user code has not been called then.
        """
        bad: dict[int, str] = {}
        rejected = [*self._missed, *rejected]
        for rejection in rejected:
            checkpoint = self._checkpoint(rejection.candidate)
            if checkpoint is not None:
                bad[checkpoint.id] = rejection.reason
                self.logger.warning("checkpoint at step %d is not used: %s", checkpoint.step, rejection.reason)
        self.resumed = self._checkpoint(resumed)
        note = "; ".join(f"checkpoint at step {item.candidate.step}: {item.reason}" for item in rejected)
        self.runtime.held()
        with self.runtime.changing(self.trial) if self.attempt > 1 else nullcontext():
            self._writer = self.claim(process=process, resumed=self.resumed, rejected=bad, note=note)
        faults.point("attempt.claimed")

    def report(self, report: Report) -> Decision:
        """Make a report, and the checkpoint staged with it, durable; return what the trial is to do."""
        self.runtime.held()
        decision = max(self.poll(), self._generation(report.step), key=STRENGTH.__getitem__)
        undue = report.staged is not None and self.reported == report.step
        if undue and report.staged is not None:  # saved only because of preemption: its report is committed already
            self.writer.save(report.step, _saved(self.publication(report)()))
        else:
            decision = self._commit(report, decision)
        if report.staged is not None:
            self._note_saved()
            self._prune()
        self.runtime.held()  # suspended meanwhile: the trial must not go on to stage files where somebody else drives
        return decision

    def check_end(self) -> None:
        """Raise unless the end of the attempt is its own to tell: a worker's attempt may have been closed as lost."""
        self.runtime.held()
        if self.runtime.worker is not None:
            self.writer.check()

    def _note_saved(self) -> None:
        """Note a checkpoint that counts; with the first one, what was lent by another trial is given back."""
        first, self._has_saved = not self._has_saved, True
        if first and self.resumed is not None and self.resumed.trial != self.trial:
            self.writer.give_back()

    def _generation(self, step: int) -> Decision:
        """Return PREEMPT at the end of a generation: the member waits for the others then."""
        spec = self.runtime.spec
        ends = ends_generation(spec.population, step, spec.stopping.max_steps)
        return Decision.PREEMPT if ends else Decision.CONTINUE

    def publication(self, report: Report) -> Callable[[], Published]:
        """Return what publishes a checkpoint whose report is committed; its manifest tells what is known now."""
        assert report.staged is not None
        self.runtime.held()
        self.writer.check()
        manifest = self._manifest(report, report.staged)
        return partial(self.runtime.checkpoints.publish, Path(report.staged.path), manifest)

    def saved(self, report: Report, published: Published) -> None:
        """Commit the row of a checkpoint whose report is committed, and prune."""
        self.runtime.held()
        try:
            self.writer.save(report.step, _saved(published))
        except CheckpointConflict:
            self.runtime.checkpoints.delete(published.path)
            raise
        faults.point("checkpoint.committed")
        self._note_saved()
        self._prune()

    def _commit(self, report: Report, decision: Decision) -> Decision:
        """Commit a report with what the trial is told: ``decision``, or that a stopping rule ends it, whichever is stronger.

        What ends this process is not stored instead of what a rule says: it must not change what becomes of the trial.
        """
        saved = _saved(self.publication(report)()) if report.staged is not None else None
        writer = self.writer
        reason: str | None = None
        answer = decision.value
        try:
            with self.runtime.judged(self.trial, report.step, report.metrics) as why:

                def judge(tx: Transaction) -> tuple[str, str]:
                    nonlocal reason, answer
                    found = why(tx)
                    reason = None if decision is Decision.CANCEL else found
                    answer = (decision if reason is None else Decision.PRUNE).value
                    return answer, reason or ""

                seq, moment = writer.report(report.step, report.metrics, saved=saved, judge=judge)
        except CheckpointConflict:
            if saved is not None:
                self.runtime.checkpoints.delete(saved.path)
            raise
        self.metrics, self.reported = report.metrics, report.step
        self._told.append((seq, (report.step, moment, answer, report.metrics)))
        faults.point("report.committed" if saved is None else "checkpoint.committed")
        if reason is None:
            return decision
        self._stopped(reason)
        return max(decision, Decision.PRUNE, key=STRENGTH.__getitem__)

    def _stopped(self, reason: str) -> None:
        self.pruned = reason
        if self.runtime.pool is None:
            self.logger.info("%s", reason)
            return
        log = self.runtime.folder.log_file(self.trial, self.attempt)  # what is in it goes to Prefect, too
        with suppress(OSError), log.open("a") as stream:  # the attempt's note has it in any case
            stream.write(f"{reason}\n")

    def unjournaled(self) -> list[Told]:
        """Return the reports that the journal may lack: they travel with what is durable before it."""
        reached = self.runtime.journaled()
        self._told = [item for item in self._told if item[0] > reached]
        return [told for _, told in self._told]

    def _manifest(self, report: Report, staged: Staged) -> Manifest:
        return Manifest(
            experiment=self.runtime.uuid,
            trial=self.trial,
            attempt=self.attempt,
            step=report.step,
            writer=Path(staged.path).name.rpartition("-")[2],
            created=datetime.now(UTC).isoformat(),
            serializer=cast(Kind, staged.serializer),
            metrics=report.metrics,
            files=tuple(staged.files),
            beside={
                "parent": None if self.resumed is None else [self._parent(self.resumed), self.resumed.step],
                "reported": micros(datetime.now(UTC)),
                "reports": [list(told) for told in self.unjournaled()],
            },
        )

    def _parent(self, resumed: Checkpoint) -> int | list[int]:
        """Return an attempt as the journal names it: another trial's with the trial."""
        return resumed.attempt if resumed.trial == self.trial else [resumed.trial, resumed.attempt]

    def _prune(self) -> None:
        """Delete what retention does not keep: rows first, then files; what is cut off here is swept later."""
        if self._pruner is None:
            spec = self.runtime.spec
            verified = None if self.resumed is None else self.resumed.id
            settings = spec.checkpoints
            goal = goal_of(settings.metric_name, settings.higher_is_better, spec.goals)
            self._pruner = Pruner(retention.policies(settings, goal), verified)
        surplus = self._pruner.surplus(self.writer)
        if not surplus:
            return
        marked = self.writer.forget([checkpoint.id for checkpoint in surplus])
        faults.point("checkpoint.pruned-row")
        for checkpoint in (each for each in surplus if each.id in marked):
            self.runtime.checkpoints.delete(checkpoint.path)

    def telemetry(self, rows: Sequence[tuple[float, str, Any]]) -> None:
        """Store measurements."""
        self.runtime.held()
        self.writer.telemetry([(round(moment * 1e6), name, value) for moment, name, value in rows])

    def log(self, lines: Sequence[str]) -> None:
        """Pass throttled lines of the trial's output on to Prefect."""
        for line in lines:
            self.logger.info("%s", line)

    def poll(self) -> Decision:
        """Say what the attempt is to do, while it says nothing itself."""
        return self.runtime.decision(self.trial, None if self._writer is None else self._writer.attempt)


def _saved(published: Published) -> Saved:
    return Saved(path=published.path, digest=published.digest, bytes=published.bytes)


def candidate_of(checkpoint: Checkpoint) -> Candidate:
    """Return what the worker needs to know of a checkpoint."""
    return Candidate(
        attempt=checkpoint.attempt,
        step=checkpoint.step,
        path=checkpoint.path,
        digest=checkpoint.digest,
        metrics=dict(checkpoint.metrics),
    )


def full_metrics(last: Mapping[str, Any], final: Mapping[str, Any] | None) -> Metrics:
    """Return a trial's metrics: its last report overlaid by its final record."""
    return {**last, **(final or {})}
