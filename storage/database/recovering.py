"""Searches that were cut off: one look at what is known of one, and who may restore it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text

from holdfast.core.errors import AlreadyClaimed, ExperimentNotFound, LeaseHeld
from holdfast.core.recovery import GAVE_UP, NOTES, RECOVERING, Note
from holdfast.core.trial import ERRORED, UNFINISHED, Attempt, TrialStatus
from holdfast.core.values import Json, loads
from holdfast.storage.database.driver import add_audit
from holdfast.storage.database.engine import Database, Statement, Transaction
from holdfast.storage.database.leases import describe
from holdfast.storage.database.losses import repeatable
from holdfast.storage.database.requests import begin_request


def _sql(body: str) -> Statement:
    return Statement(text(body))


_NAMES = ", ".join(f"'{action}'" for action in NOTES)

_NOTES = _sql(
    f"SELECT seq, epoch, action, detail FROM audit WHERE experiment_id = :experiment AND action IN ({_NAMES}) ORDER BY id"
)

_COUNTS = _sql("SELECT status, COUNT(*) FROM trial WHERE experiment_id = :experiment AND number >= 0 GROUP BY status")

# A trial that fails again each time it is retried is no progress, nor is a checkpoint that the next restart throws away.
_PROGRESS = _sql(
    "SELECT COALESCE((SELECT MAX(t.ended_seq) FROM trial t WHERE t.experiment_id = :experiment AND t.number >= 0"
    " AND (t.status IN ('COMPLETED', 'PRUNED') OR (:errored = 1 AND t.status IN ('FAILED', 'TIMED_OUT')))), 0),"
    " COALESCE((SELECT MAX(c.seq) FROM checkpoint c JOIN attempt a ON a.id = c.attempt_id JOIN trial t ON t.id = a.trial_id"
    " WHERE t.experiment_id = :experiment AND c.status = 'valid'), 0)"
)

_OPEN = _sql(
    "SELECT t.number, a.id, a.number, a.flow_run_id, a.task_run_id FROM trial t"
    " JOIN attempt a ON a.trial_id = t.id AND a.number = t.current_attempt"
    " WHERE t.experiment_id = :experiment AND t.number >= 0 AND t.status = 'RUNNING' AND a.outcome IS NULL ORDER BY t.number"
)


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the database knows of an experiment, as far as a watcher asks."""

    epoch: int
    holder: dict[str, Any] | None
    remaining: float
    """seconds until the lease ends, by the database's clock"""
    ended: str | None
    stop_requested: bool
    now: float
    """seconds since 1970, by the database's clock"""
    notes: tuple[Note, ...]
    counts: dict[TrialStatus, int]
    progress: int
    """seq of the newest end of a trial, or checkpoint, that lasts"""

    def count(self, statuses: frozenset[TrialStatus]) -> int:
        return sum(self.counts.get(status, 0) for status in statuses)

    @property
    def unfinished(self) -> int:
        return self.count(frozenset(UNFINISHED))

    @property
    def errored(self) -> int:
        return self.count(frozenset(ERRORED))


def _lease(database: Database) -> Statement:
    clock = database.clock
    return Statement(
        text(
            f"SELECT epoch, holder, COALESCE(lease_expires - {clock}, 0), ended, stop_requested, {clock} FROM experiment"
            " WHERE id = :experiment"
        )
    )


@repeatable
def look(database: Database, experiment: int, *, restarts: bool = False, reruns_errored: bool = False) -> Known:
    """Return what is known of an experiment, in statements whose number does not grow with its trials.

    ``restarts``: unfinished trials begin again at step 0, so that checkpoints are no progress; ``reruns_errored``: nor are
    trials that failed. ExperimentNotFound when its row is gone.
    """
    lease = _lease(database)
    with database.snapshot() as state:
        rows = state.run(lease, experiment=experiment)
        if not rows:
            raise ExperimentNotFound("the experiment's row is gone from the database; it was deleted meanwhile")
        notes = [_note(row) for row in state.run(_NOTES, experiment=experiment)]
        counts = state.run(_COUNTS, experiment=experiment)
        progress = (0, 0)
        if any(note.action == RECOVERING for note in notes):  # else nobody asks
            progress = state.run(_PROGRESS, experiment=experiment, errored=int(not reruns_errored))[0]
    epoch, holder, remaining, ended, stop, now = rows[0]
    return Known(
        epoch=int(epoch),
        holder=json.loads(holder) if holder else None,
        remaining=float(remaining),
        ended=ended,
        stop_requested=bool(stop),
        now=float(now),
        notes=tuple(notes),
        counts={TrialStatus(status): int(count) for status, count in counts},
        progress=int(progress[0] if restarts else max(progress)),
    )


def _note(row: tuple[Any, ...]) -> Note:
    return Note(seq=int(row[0]), epoch=int(row[1]), action=row[2], detail=loads(row[3]))


@repeatable
def claim(
    database: Database,
    experiment: int,
    *,
    epoch: int,
    attempt: int,
    gone: Mapping[str, Any] | None = None,
    detail: Mapping[str, Json],
) -> None:
    """Claim restore number ``attempt`` of an experiment whose epoch was seen to be ``epoch``, with an audit row.

    Of any number of watchers one gets it; the others raise AlreadyClaimed, as they do when somebody has taken the experiment
    meanwhile. LeaseHeld while the lease lasts by the database's clock, unless its holder is the one that is known to be
    ``gone``. Nothing is written then.
    """
    lease = _lease(database)
    with database.write() as tx:
        seq, newest = begin_request(tx, experiment)
        _, holder, remaining, *_, now = tx.run(lease, experiment=experiment)[0]
        if newest != epoch:
            raise AlreadyClaimed(f"epoch {epoch} is over: somebody took the experiment meanwhile; nothing was changed")
        found = json.loads(holder) if holder else None
        if found is not None and found != gone and float(remaining) > 0:
            raise LeaseHeld(f"{describe(found)} holds the lease, for another {float(remaining):.0f} s; nothing was changed")
        if any(
            note.action == RECOVERING and note.detail.get("attempt") == attempt for note in _of_epoch(tx, experiment, epoch)
        ):
            raise AlreadyClaimed(f"another watcher claimed restore {attempt} of epoch {epoch}; nothing was changed")
        told: dict[str, Json] = {**detail, "epoch": epoch, "attempt": attempt, "at": float(now)}
        add_audit(tx, experiment, seq, epoch, RECOVERING, told)


@repeatable
def give_up(database: Database, experiment: int, *, epoch: int, detail: Mapping[str, Json]) -> bool:
    """Note that nobody restores an experiment by itself any more; return False when its epoch is over, or that is noted."""
    if any(note.action == GAVE_UP and note.epoch == epoch for note in look(database, experiment).notes):
        return False  # without a write: a watcher asks each time
    try:
        with database.write() as tx:
            seq, newest = begin_request(tx, experiment)
            if newest != epoch or any(note.action == GAVE_UP for note in _of_epoch(tx, experiment, epoch)):
                raise AlreadyClaimed("noted already")
            add_audit(tx, experiment, seq, epoch, GAVE_UP, {**detail, "epoch": epoch})
    except AlreadyClaimed:
        return False
    return True


def _of_epoch(tx: Transaction, experiment: int, epoch: int) -> list[Note]:
    return [note for note in map(_note, tx.run(_NOTES, experiment=experiment)) if note.epoch == epoch]


def open_runs(database: Database, experiment: int) -> list[Attempt]:
    """Return the attempts that are open, with no more of them than numbers and their runs in Prefect."""
    rows = database.run(_OPEN, experiment=experiment)
    return [
        Attempt(id=identity, number=number, trial=trial, claimed=True, flow_run_id=flow, task_run_id=task)
        for trial, identity, number, flow, task in rows
    ]
