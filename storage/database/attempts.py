"""Writes of a running attempt. The token it claimed with decides, not the runner that happens to execute it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from holdfast.core.checkpoint import Checkpoint, check_step, eligible
from holdfast.core.errors import AlreadyClaimed, CheckpointConflict, Conflict, Fenced
from holdfast.core.trial import Event, Outcome, TrialStatus, transition
from holdfast.core.values import Metrics
from holdfast.storage.database import populations
from holdfast.storage.database import statements as sql
from holdfast.storage.database.driver import Ending, end_attempt, fence, forget_checkpoints, mark_checkpoint
from holdfast.storage.database.engine import Database, Transaction
from holdfast.storage.database.losses import repeatable
from holdfast.storage.database.rows import add_metrics, attempts_of, now, place_of, storable, to_checkpoint, typed


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A published checkpoint that is to get its row."""

    path: str
    digest: str
    bytes: int


class Process(Protocol):
    """Where user code runs: enough to tell later whether it still does."""

    @property
    def host(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def started(self) -> str: ...


Judge = Callable[[Transaction], tuple[str, str]]
"""Decides about a report within the transaction that commits it: (decision, why)."""


@dataclass(frozen=True, kw_only=True)
class AttemptWriter:
    """A claimed attempt, as writes: each is refused (Fenced) once a later epoch or attempt took over, or it ended."""

    database: Database
    experiment: int
    epoch: int
    attempt: int
    """row id"""
    trial: int
    """row id"""
    number: int
    token: str

    @classmethod
    @repeatable
    def claim(
        cls,
        database: Database,
        experiment: int,
        epoch: int,
        attempt: int,
        *,
        token: str,
        flow_run_id: str | None = None,
        task_run_id: str | None = None,
        process: Process | None = None,
        resumed: Checkpoint | None = None,
        rejected: Mapping[int, str] | None = None,
        note: str = "",
        worker: int | None = None,
    ) -> Self:
        """Claim a waiting attempt and set its trial RUNNING; of two claimers one wins, the other gets AlreadyClaimed.

        ``worker`` is the row id of the worker that claims it: Fenced once that has left, was given up, or is told to end.
        ``rejected`` are checkpoints (row ids, with reasons) that turned out bad when ``process`` loaded them: they are marked,
        and the attempt's parent becomes ``resumed``, what it really continues from.
        """
        with database.write() as tx:
            seq = fence(tx, experiment, epoch)
            if worker is not None and not tx.run(sql.WORKS, experiment=experiment, epoch=epoch, worker=worker):
                raise Fenced(f"worker {worker} has left, was given up, or is told to end; nothing was written, stop here")
            rows = tx.run(
                sql.CLAIM,
                experiment=experiment,
                attempt=attempt,
                token=token,
                epoch=epoch,
                started=now(),
                flow_run_id=flow_run_id,
                task_run_id=task_run_id,
                host=process.host if process else None,
                pid=process.pid if process else None,
                pid_started=process.started if process else None,
                worker=worker,
            )
            if not rows:
                raise AlreadyClaimed(f"attempt {attempt} was claimed by another process, or has ended; nothing was run")
            trial, number = rows[0]
            moved = tx.changed(
                sql.MOVE_TRIAL,
                trial=trial,
                old=TrialStatus.PENDING.value,
                new=transition(TrialStatus.PENDING, Event.CLAIM).value,
                seq=seq,
                ended_seq=None,
            )
            if moved != 1:
                raise Conflict(f"attempt {attempt} cannot be claimed: its trial does not wait")
            if rejected:
                _reject(tx, seq, attempt, resumed, rejected, note)
        return cls(
            database=database, experiment=experiment, epoch=epoch, attempt=attempt, trial=trial, number=number, token=token
        )

    def _begin(self, tx: Transaction) -> int:
        seq = fence(tx, self.experiment, self.epoch)
        if not tx.run(sql.HOLDS, attempt=self.attempt, token=self.token):
            raise Fenced(f"attempt {self.number} has ended or is somebody else's; nothing was written, stop here")
        return seq

    def check(self) -> None:
        """Raise Fenced unless this attempt may still write."""
        rows = self.database.run(
            sql.STILL_HOLDS, attempt=self.attempt, token=self.token, experiment=self.experiment, epoch=self.epoch
        )
        if not rows:
            raise Fenced(f"attempt {self.number} is over: a later epoch or attempt took over; nothing was written, stop here")

    @repeatable
    def report(
        self,
        step: int,
        metrics: Metrics,
        *,
        decision: str = "continue",
        note: str = "",
        saved: Saved | None = None,
        judge: Judge | None = None,
    ) -> tuple[int, int]:
        """Commit a report and, in the same transaction, the row of the checkpoint that was published with it.

        ``note``, if any, is added to the attempt's: why the decision is as it is. ``judge`` gives both instead; it sees every
        report that was committed before, and not this one, and is called again when the transaction is repeated.
        Return the report's seq, and its time in microseconds since 1970 UTC.
        CheckpointConflict when this attempt has a report of that step already.
        """
        with self.database.write() as tx:
            seq = self._begin(tx)
            check_step(step)
            moment = now()
            if tx.run(sql.REPORT_OF, attempt=self.attempt, step=step):
                raise CheckpointConflict(f"attempt {self.number} has reported step {step} already; the first report stands")
            if judge is not None:
                decision, note = judge(tx)
            row = tx.run(sql.ADD_REPORT, attempt=self.attempt, step=step, seq=seq, reported=moment, decision=decision)
            add_metrics(tx, row[0][0], metrics)
            if note:
                tx.run(sql.ADD_NOTE, attempt=self.attempt, note=storable(note))
                tx.run(sql.TOUCH, trial=self.trial, seq=seq)
            if saved is not None:
                self._add_checkpoint(tx, seq, step, saved, moment)
        return seq, moment

    @repeatable
    def save(self, step: int, saved: Saved) -> None:
        """Commit the row of a checkpoint whose report is committed already: saved in the background, or for a stop.

        CheckpointConflict when this attempt has a checkpoint of that step already.
        """
        with self.database.write() as tx:
            self._add_checkpoint(tx, self._begin(tx), step, saved, now())

    def _add_checkpoint(self, tx: Transaction, seq: int, step: int, saved: Saved, moment: int) -> None:
        if tx.run(sql.CHECKPOINT_OF, attempt=self.attempt, step=check_step(step)):
            raise CheckpointConflict(f"attempt {self.number} has a checkpoint of step {step} already; the first one stands")
        tx.run(
            sql.ADD_CHECKPOINT,
            attempt=self.attempt,
            step=step,
            seq=seq,
            path=saved.path,
            digest=saved.digest,
            bytes=saved.bytes,
            created=moment,
        )

    @repeatable
    def kept(self, after: int = 0) -> tuple[list[Checkpoint], list[Checkpoint]]:
        """Return the trial's valid checkpoints: (those on this attempt's chain, oldest first; others that are not pinned).

        Each carries the metrics that were reported with it. ``after`` is a row id: only later ones are returned.
        """
        with self.database.snapshot() as state:
            attempts, _ = attempts_of(state, self.trial)
            metrics = _metrics_by_checkpoint(state, self.trial, after)
            rows = state.run(sql.VALID_CHECKPOINTS_OF, trial=self.trial, after=after)
        found = [to_checkpoint(0, row, metrics.get(row[0])) for row in rows]
        on_chain = eligible(self.number, attempts, found)
        identities = {checkpoint.id for checkpoint in on_chain}
        return on_chain[::-1], [item for item in found if item.id not in identities and not (item.pinned or item.lent)]

    @repeatable
    def pins(self) -> dict[int, bool]:
        """Return whether it is pinned for each of the trial's valid checkpoints (row ids)."""
        return {identity: bool(pinned) for identity, pinned in self.database.run(sql.PINS_OF, trial=self.trial)}

    @repeatable
    def forget(self, checkpoints: Collection[int]) -> set[int]:
        """Mark checkpoints (row ids) as deleted and return those that were: only their files may go afterwards.

        What was pinned or found bad by somebody else meanwhile stays as it is.
        """
        with self.database.write() as tx:
            return forget_checkpoints(tx, self._begin(tx), dict.fromkeys(checkpoints, "pruned"))

    @repeatable
    def give_back(self) -> None:
        """Leave the other trial's checkpoint that this attempt went on from to that trial's rules: it has its own by now."""
        with self.database.write() as tx:
            populations.give_back(tx, self._begin(tx), self.attempt)

    @repeatable
    def telemetry(self, rows: Sequence[tuple[int, str, object]]) -> None:
        """Store (microseconds, name, plain value) rows; rows that are there already are left as they are."""
        with self.database.write() as tx:
            seq = self._begin(tx)
            values = [{"attempt": self.attempt, "seq": seq, "ts": ts, **typed(name, value)} for ts, name, value in rows]
            tx.many(sql.ADD_TELEMETRY, values)

    @repeatable
    def fail(self, ending: Ending, *, max_failures: int) -> TrialStatus:
        """Commit a failure; when the retry budget allows it, the next attempt waits in the same transaction."""
        with self.database.write() as tx:
            seq = self._begin(tx)
            failures = int(tx.run(sql.FAILURES, experiment=self.experiment, trial=self.trial, epoch=self.epoch)[0][0])
            retry = ending.outcome is not Outcome.CANCELLED and failures < max_failures
            return end_attempt(tx, self.experiment, seq, self.attempt, ending, retry=retry)

    @repeatable
    def end(self, ending: Ending) -> TrialStatus:
        """Commit an end that is no failure: preempted, cancelled."""
        with self.database.write() as tx:
            return end_attempt(tx, self.experiment, self._begin(tx), self.attempt, ending, retry=False)


def _reject(
    tx: Transaction,
    seq: int,
    attempt: int,
    resumed: Checkpoint | None,
    rejected: Mapping[int, str],
    note: str,
) -> None:
    for checkpoint, reason in rejected.items():
        mark_checkpoint(tx, seq, checkpoint, "corrupt", reason)
        tx.run(sql.TOUCH_TRIAL, checkpoint=checkpoint, seq=seq)  # it may be another trial's
    parent, step = (None, None) if resumed is None else place_of(tx, resumed)
    tx.run(sql.SET_PARENT, attempt=attempt, parent=parent, parent_step=step, reason=None, note=storable(note))


def _metrics_by_checkpoint(state: Transaction, trial: int, after: int) -> dict[int, Metrics]:
    """Return the finite numbers reported with each checkpoint: what retention ranks by."""
    found: dict[int, Metrics] = {}
    for checkpoint, name, number in state.run(sql.CHECKPOINT_METRICS, trial=trial, after=after):
        found.setdefault(checkpoint, {})[name] = number
    return found
