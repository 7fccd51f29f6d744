"""Writes of the lease holder. Each method is one transaction that begins with the fence."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from holdfast.core.errors import AlreadyFinished, Conflict, Fenced, InvalidInput
from holdfast.core.population import Change
from holdfast.core.seeding import trial_seed
from holdfast.core.space import config_text
from holdfast.core.trial import ENDING, ErrorInfo, Event, Outcome, TrialStatus, transition
from holdfast.core.values import LONGEST_MESSAGE, LONGEST_TRACE, Config, Json, Metrics, digest, dumps, dumps_ordered, shortened
from holdfast.storage.database import populations
from holdfast.storage.database import statements as sql
from holdfast.storage.database.engine import Database, Transaction
from holdfast.storage.database.losses import repeatable
from holdfast.storage.database.rows import FINAL_STEP, add_metrics, micros, newest, now, storable

if TYPE_CHECKING:
    from holdfast.storage.database.attempts import AttemptWriter, Process


ORDERS = ("continue", "preempt", "kill")
"""What a driver can tell all workers."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended."""

    outcome: Outcome
    metrics: Metrics | None = None
    """the final record"""
    error: ErrorInfo | None = None
    result: str | None = None
    """path of the persisted result"""
    note: str = ""


def fence(tx: Transaction, experiment: int, epoch: int) -> int:
    """Return the next seq of the experiment; Fenced when a later epoch took over."""
    rows = tx.run(sql.FENCE, experiment=experiment, epoch=epoch)
    if not rows:
        raise Fenced(f"epoch {epoch} is over: another process took the experiment over; nothing was written, stop here")
    return int(rows[0][0])


def add_trial(
    tx: Transaction,
    experiment: int,
    seq: int,
    config: Config,
    *,
    seed: int,
    source: str,
    ts_start: datetime | None = None,
    metadata: Mapping[str, Json] | None = None,
    group: int | None = None,
    repeat: int = 0,
) -> int:
    """Insert a config (if it is new), its trial and first attempt; return the trial's number."""
    number, trial, config_id = _add_trial(
        tx,
        experiment,
        seq,
        config,
        seed=seed,
        source=source,
        ts_start=ts_start,
        metadata=metadata,
        group=group,
        repeat=repeat,
    )
    add_attempt(tx, trial, 1, config_id, reason="first")
    return number


def _add_trial(
    tx: Transaction,
    experiment: int,
    seq: int,
    config: Config,
    *,
    seed: int,
    source: str,
    status: TrialStatus = TrialStatus.PENDING,
    ts_start: datetime | None = None,
    metadata: Mapping[str, str] | None = None,
    group: int | None = None,
    repeat: int = 0,
) -> tuple[int, int, int]:
    """Insert a config (if it is new) and its trial, without an attempt; return number, trial and config (row ids)."""
    number = int(tx.run(sql.NEXT_NUMBER, experiment=experiment)[0][0])
    text = config_text(config)
    config_id = tx.run(sql.CONFIG, digest=digest(text), body=text)[0][0]
    created = now()
    trial = tx.run(
        sql.ADD_TRIAL,
        experiment=experiment,
        number=number,
        config=config_id,
        status=status.value,
        seq=seq,
        seed=trial_seed(seed, number),
        group_number=number if group is None and repeat == 0 and source == "queued" else group,
        repeat=repeat,
        created=created,
        ts_start=None if ts_start is None else micros(ts_start),
        source=source,
        metadata=dumps(dict(metadata)) if metadata else "{}",
    )[0][0]
    return number, trial, config_id


def add_attempt(
    tx: Transaction, trial: int, number: int, config: int, *, reason: str, parent: tuple[int, int] | None = None, note: str = ""
) -> int:
    """Insert a waiting attempt that continues ``parent`` (attempt row id, step), or starts at 0; return its row id."""
    rows = tx.run(
        sql.ADD_ATTEMPT,
        trial=trial,
        number=number,
        config=config,
        parent=None if parent is None else parent[0],
        parent_step=None if parent is None else parent[1],
        reason=reason,
        note=storable(note),
        created=now(),
    )
    return int(rows[0][0])


def end_attempt(tx: Transaction, experiment: int, seq: int, attempt: int, ending: Ending, *, retry: bool) -> TrialStatus:
    """Close an attempt and move its trial; with ``retry``, or when the outcome asks for it, the next attempt waits.

    AlreadyFinished when the attempt has an outcome; Fenced when it is not its trial's current one any more.
    """
    rows = tx.run(sql.TRIAL_OF, experiment=experiment, attempt=attempt)
    if not rows:
        raise Conflict(f"attempt row {attempt} is none of this experiment's; nothing was written")
    trial, status, current, number, config, _, parent = rows[0]
    if number != current:
        raise Fenced(f"attempt {number} is over: attempt {current} took its trial over; nothing was written")
    error = ending.error
    changed = tx.changed(
        sql.END_ATTEMPT,
        attempt=attempt,
        outcome=ending.outcome.value,
        ended=now(),
        error_kind=storable(error.kind) if error else None,
        error=storable(shortened(error.message, LONGEST_MESSAGE)) if error else None,
        traceback=storable(shortened(error.traceback, LONGEST_TRACE)) if error else None,
        result=ending.result,
        note=storable(ending.note),
    )
    if changed != 1:
        raise AlreadyFinished(f"attempt {number} has its outcome already; the first one stands")
    if ending.metrics:
        rows = tx.run(sql.ADD_REPORT, attempt=attempt, step=FINAL_STEP, seq=seq, reported=now(), decision="final")
        add_metrics(tx, rows[0][0], ending.metrics)
    event = Event.REQUEUE if retry else ENDING[ending.outcome]
    after = transition(TrialStatus(status), event)
    if after is TrialStatus.PENDING:
        reason = "retry" if retry else "resume"
        add_attempt(tx, trial, number + 1, config, reason=reason, parent=newest(tx, trial, number))
        tx.run(sql.MOVE_TO_ATTEMPT, trial=trial, old=status, new=after.value, seq=seq, number=number + 1)
    else:
        tx.run(sql.MOVE_TRIAL, trial=trial, old=status, new=after.value, seq=seq, ended_seq=seq)
        if parent is not None:
            populations.give_back(tx, seq, attempt)
    return after


class Driver:
    """The right to drive an experiment, as writes: every one is refused (Fenced) once a later epoch took over."""

    def __init__(self, database: Database, experiment: int, epoch: int, *, seed: int) -> None:
        self.database = database
        self.experiment = experiment
        self.epoch = epoch
        self.seed = seed

    @repeatable
    def propose(
        self,
        config: Config,
        *,
        number: int | None = None,
        source: str = "proposed",
        group: int | None = None,
        repeat: int = 0,
        state: bytes | None = None,
    ) -> int:
        """Commit a proposal: its config, trial and first attempt (and the engine's state); return the trial's number.

        Conflict when ``number``, for which the config was computed, was taken meanwhile: by a trial from the queue.
        """
        with self.database.write() as tx:
            seq = fence(tx, self.experiment, self.epoch)
            given = add_trial(tx, self.experiment, seq, config, seed=self.seed, source=source, group=group, repeat=repeat)
            if number not in (None, given):
                raise Conflict(f"trial {number} was queued meanwhile, the next one is {given}; nothing was written")
            number = given
            if state is not None:
                tx.run(sql.ADD_STATE, experiment=self.experiment, number=number, body=state, seq=seq)
        return number

    @repeatable
    def start(
        self,
        config: Config,
        *,
        token: str,
        process: Process | None = None,
        flow_run_id: str | None = None,
        task_run_id: str | None = None,
        source: str = "proposed",
        state: bytes | None = None,
    ) -> AttemptWriter:
        """Commit a trial that runs at once: what ``propose`` and ``AttemptWriter.claim`` write, in one transaction."""
        from holdfast.storage.database.attempts import AttemptWriter

        running = transition(TrialStatus.PENDING, Event.CLAIM)
        with self.database.write() as tx:
            seq = fence(tx, self.experiment, self.epoch)
            number, trial, config_id = _add_trial(
                tx, self.experiment, seq, config, seed=self.seed, source=source, status=running
            )
            rows = tx.run(
                sql.ADD_CLAIMED,
                trial=trial,
                config=config_id,
                token=token,
                epoch=self.epoch,
                started=now(),
                flow_run_id=flow_run_id,
                task_run_id=task_run_id,
                host=process.host if process else None,
                pid=process.pid if process else None,
                pid_started=process.started if process else None,
            )
            if state is not None:
                tx.run(sql.ADD_STATE, experiment=self.experiment, number=number, body=state, seq=seq)
        return AttemptWriter(
            database=self.database,
            experiment=self.experiment,
            epoch=self.epoch,
            attempt=rows[0][0],
            trial=trial,
            number=1,
            token=token,
        )

    @repeatable
    def end(self, attempt: int, ending: Ending, *, retry: bool = False) -> TrialStatus:
        """Close an attempt; see :func:`end_attempt`. Return the trial's new status."""
        with self.database.write() as tx:
            seq = fence(tx, self.experiment, self.epoch)
            return end_attempt(tx, self.experiment, seq, attempt, ending, retry=retry)

    @repeatable
    def skip(self, trials: Collection[int]) -> None:
        """Leave waiting trials (row ids) out until a later restore."""
        with self.database.write() as tx:
            seq = fence(tx, self.experiment, self.epoch)
            for trial in trials:
                self._move(tx, seq, trial, Event.SKIP)

    @repeatable
    def cancel(self, trial: int) -> None:
        """End a waiting or skipped trial (row id) as a person asked; a running one ends with its attempt."""
        with self.database.write() as tx:
            seq = fence(tx, self.experiment, self.epoch)
            current = self._move(tx, seq, trial, Event.CANCEL)
            populations.give_back(tx, seq, populations.standing(tx, trial, current)[0])

    def _move(self, tx: Transaction, seq: int, trial: int, event: Event) -> int:
        status, current, _ = self._status(tx, trial)
        if status is TrialStatus.RUNNING:
            raise Conflict("the trial is RUNNING: end its attempt instead; nothing was written")
        after = transition(status, event)
        tx.run(sql.MOVE_TRIAL, trial=trial, old=status, new=after.value, seq=seq, ended_seq=seq)
        return current

    def _status(self, tx: Transaction, trial: int) -> tuple[TrialStatus, int, int]:
        """Return a trial's status, current attempt and config (row id)."""
        rows = tx.run(sql.STATUS_OF, experiment=self.experiment, trial=trial)
        if not rows:
            raise Conflict(f"trial row {trial} is none of this experiment's; nothing was written")
        return TrialStatus(rows[0][0]), rows[0][1], rows[0][2]

    @repeatable
    def rerun(self, trial: int, *, restart: bool, note: str = "") -> None:
        """Let an ended or waiting trial (row id) run again, from its newest checkpoint or, with ``restart``, from step 0.

        A waiting attempt that was never claimed is used; it begins where the call says. A restarted member of a population has
        its first config again.
        """
        with self.database.write() as tx:
            seq = fence(tx, self.experiment, self.epoch)
            status, current, config = self._status(tx, trial)
            after = status if status is TrialStatus.PENDING else transition(status, Event.RERUN)
            identity, before, runs = populations.standing(tx, trial, current)
            parent = None if restart else newest(tx, trial, current)
            reason = "restart" if restart else "resume"
            number = current
            if tx.run(sql.UNCLAIMED, attempt=identity):
                if restart and runs != config:
                    tx.run(populations.SET_CONFIG, attempt=identity, config=config)
                tx.run(
                    sql.SET_PARENT,
                    attempt=identity,
                    parent=parent and parent[0],
                    parent_step=parent and parent[1],
                    reason=None if before == parent else reason,
                    note=storable(note),
                )
            else:
                number = current + 1
                add_attempt(tx, trial, number, config if restart else runs, reason=reason, parent=parent, note=note)
            tx.run(sql.MOVE_TO_ATTEMPT, trial=trial, old=status.value, new=after.value, seq=seq, number=number)

    @repeatable
    def evolve(self, generation: int, changes: Sequence[Change]) -> None:
        """Commit what becomes of the members of a population after ``generation`` (from 0), which all of them wait for.

        Each changed member's waiting attempt gets its new config and the donor's checkpoint as its parent, and that checkpoint
        stays until the member has one of its own. Conflict when the generation was evolved already, or a member does not wait.
        """
        with self.database.write() as tx:
            seq = fence(tx, self.experiment, self.epoch)
            detail = populations.evolve(tx, self.experiment, seq, generation, changes)
            add_audit(tx, self.experiment, seq, self.epoch, populations.EVOLVED, detail)

    @repeatable
    def reject(self, checkpoints: Mapping[int, str]) -> None:
        """Mark checkpoints (row ids) as corrupt, each with the reason."""
        with self.database.write() as tx:
            seq = fence(tx, self.experiment, self.epoch)
            for checkpoint, reason in checkpoints.items():
                tx.run(sql.MARK_CHECKPOINT, checkpoint=checkpoint, status="corrupt", reason=storable(reason), seq=seq)
                tx.run(sql.TOUCH_TRIAL, checkpoint=checkpoint, seq=seq)
                mark_checkpoint(tx, seq, checkpoint, "corrupt", reason)

    @repeatable
    def forget(self, checkpoints: Mapping[int, str], *, status: str = "valid") -> set[int]:
        """Mark checkpoints (row ids) of a status as deleted, each with the reason; return those that were.

        Only their files may go afterwards: what was pinned meanwhile stays.
        """
        with self.database.write() as tx:
            seq = fence(tx, self.experiment, self.epoch)
            marked = forget_checkpoints(tx, seq, checkpoints, status=status)
            for checkpoint in marked:
                tx.run(sql.TOUCH_TRIAL, checkpoint=checkpoint, seq=seq)
        return marked

    @repeatable
    def change_spec(self, spec: Mapping[str, Json], changes: Mapping[str, Json]) -> None:
        """Store a changed spec, and what changed as an audit row."""
        with self.database.write() as tx:
            seq = fence(tx, self.experiment, self.epoch)
            tx.run(sql.SET_SPEC, experiment=self.experiment, spec=dumps_ordered(dict(spec)))
            add_audit(tx, self.experiment, seq, self.epoch, "changed", changes)

    @repeatable
    def set_code(self, *, trainable_digest: str | None, workdir: str, location: str) -> None:
        """Note where the experiment and its code are now."""
        with self.database.write() as tx:
            fence(tx, self.experiment, self.epoch)
            tx.run(sql.SET_CODE, experiment=self.experiment, code=trainable_digest, workdir=workdir, location=location)

    @repeatable
    def tell(self, decision: str) -> None:
        """Give an order to every worker, who hears it with its next beat: continue, preempt or kill."""
        if decision not in ORDERS:
            raise InvalidInput(f"the order is {decision!r}; allowed: {', '.join(ORDERS)}")
        with self.database.write() as tx:
            fence(tx, self.experiment, self.epoch)
            tx.run(sql.TELL, experiment=self.experiment, told=decision)

    @repeatable
    def audit(self, action: str, detail: Mapping[str, Json]) -> None:
        """Add an audit row."""
        with self.database.write() as tx:
            add_audit(tx, self.experiment, fence(tx, self.experiment, self.epoch), self.epoch, action, detail)


def mark_checkpoint(tx: Transaction, seq: int, checkpoint: int, status: str, reason: str) -> None:
    """Give a checkpoint (row id) another status; Conflict when there is none."""
    if tx.changed(sql.MARK_CHECKPOINT, checkpoint=checkpoint, status=status, reason=storable(reason), seq=seq) != 1:
        raise Conflict(f"there is no checkpoint row {checkpoint}; nothing was written")


def forget_checkpoints(tx: Transaction, seq: int, checkpoints: Mapping[int, str], *, status: str = "valid") -> set[int]:
    """Mark those of the checkpoints (row ids) as deleted that have ``status`` and are not pinned; return them.

    Conflict when there is no such row at all.
    """
    marked = set()
    for checkpoint, reason in checkpoints.items():
        if tx.run(sql.FORGET_CHECKPOINT, checkpoint=checkpoint, status=status, reason=storable(reason), seq=seq):
            marked.add(checkpoint)
        elif not tx.run(sql.HAS_CHECKPOINT, checkpoint=checkpoint):
            raise Conflict(f"there is no checkpoint row {checkpoint}; nothing was written")
    return marked


def add_audit(tx: Transaction, experiment: int, seq: int, epoch: int, action: str, detail: Mapping[str, Json]) -> None:
    """Insert an audit row into an open transaction."""
    tx.run(
        sql.ADD_AUDIT, experiment=experiment, seq=seq, epoch=epoch, happened=now(), action=action, detail=dumps(dict(detail))
    )


def code_digest(text: str) -> str:
    """Return the identity of a trainable's source."""
    return digest(text)
