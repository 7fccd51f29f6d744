"""Rows of the processes that run trials, on any machine: who works, who lives, what they are told.

They are of the present alone: no journal, export, fork or rebuilt database has them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text

from holdfast.core.errors import Conflict, ExperimentNotFound, Fenced
from holdfast.core.trial import Outcome
from holdfast.core.values import Json, dumps
from holdfast.storage.database import statements as sql
from holdfast.storage.database.driver import Ending, end_attempt, fence
from holdfast.storage.database.engine import Database, Statement, Transaction
from holdfast.storage.database.losses import repeatable
from holdfast.storage.database.measures import ALL
from holdfast.storage.database.rows import now, storable


@dataclass(frozen=True, kw_only=True)
class WorkerRow:
    """A worker, as its row says."""

    id: int
    """row id"""
    name: str
    """as the engine calls it"""
    engine: str
    hostname: str
    host: str
    """host, boot and pid namespace of its process"""
    pid: int
    started: str
    """start of its process"""
    about: Mapping[str, Any]
    epoch: int
    silent: float
    """seconds since its last beat, by the database's clock"""
    left: str | None
    """why it left or was given up; None while it works"""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a worker hears with each sign of life that it gives."""

    epoch: int
    """the experiment's: another one than the worker's means that its work is over"""
    remaining: float
    """seconds that the driver's lease still runs, by the database's clock; 0 or less: nobody drives"""
    told: str
    """the driver's order: continue, preempt or kill"""
    journaled: int
    """the seq that the journal reaches, as far as is known; -1: nothing"""
    cancelled: frozenset[int]
    """numbers of the trials that somebody asked to cancel"""
    open: frozenset[int]
    """row ids of the worker's attempts that have no outcome: one that it claimed before and that is missing was closed"""
    left: str | None
    """why the worker was given up, or left; None while it works"""


@dataclass(frozen=True)
class _Statements:
    """What looks at the database's clock, which each database has its own words for."""

    join: Statement
    beat: Statement
    look: Statement
    every: Statement
    working: Statement
    stranded: Statement
    one: Statement
    lose: Statement


@functools.cache
def _statements(clock: str) -> _Statements:
    def made(body: str) -> Statement:
        return Statement(text(body))

    columns = (
        "SELECT w.id, w.name, w.engine, w.hostname, w.host, w.pid, w.pid_started, w.about, w.epoch,"
        f' {clock} - w.seen, w."left" FROM '
    )
    worker = f"{columns} worker w"
    within = "w.experiment_id = :experiment AND w.epoch >= :first AND w.epoch <= :last"
    return _Statements(
        # The epoch is looked at by the statement itself; who joins at the moment of a takeover hears of it with its first beat.
        join=made(
            "INSERT INTO worker (experiment_id, epoch, name, engine, hostname, host, pid, pid_started, about, joined, seen)"
            " SELECT e.id, e.epoch, :name, :engine, :hostname, :host, :pid, :pid_started, :about, :joined, "
            f"{clock} FROM experiment e WHERE e.id = :experiment AND e.epoch = :epoch RETURNING id"
        ),
        beat=made(f'UPDATE worker SET seen = {clock} WHERE id = :worker AND experiment_id = :experiment RETURNING "left"'),
        look=made(
            f"SELECT epoch, COALESCE(lease_expires - {clock}, 0), told, journaled FROM experiment WHERE id = :experiment"
        ),
        every=made(f"{worker} WHERE {within} ORDER BY w.id"),
        # By indexes of few rows: with a work pool each trial has had a worker of its own.
        working=made(f'{worker} WHERE {within} AND w."left" IS NULL ORDER BY +w.id'),
        stranded=made(
            f"{columns} trial t JOIN attempt a ON a.trial_id = t.id AND a.number = t.current_attempt"
            " JOIN worker w ON w.id = a.worker_id WHERE t.experiment_id = :experiment AND t.status = 'RUNNING'"
            f' AND {within} AND w."left" IS NOT NULL'
        ),
        one=made(f"{worker} JOIN attempt a ON a.worker_id = w.id WHERE a.id = :attempt"),
        # A beat that comes at the same moment is waited for, and looked at.
        lose=made(
            'UPDATE worker SET "left" = :why WHERE id = :worker AND experiment_id = :experiment AND "left" IS NULL'
            f" AND {clock} - seen > :silent RETURNING id"
        ),
    )


_LEAVE = Statement(
    text('UPDATE worker SET "left" = :why WHERE id = :worker AND experiment_id = :experiment AND "left" IS NULL')
)
_LEFT = Statement(text('SELECT "left" FROM worker WHERE id = :worker AND experiment_id = :experiment'))
_EPOCH = Statement(text("SELECT epoch FROM experiment WHERE id = :experiment"))
_OPEN = Statement(text("SELECT id FROM attempt WHERE worker_id = :worker AND outcome IS NULL"))

_LOADS = Statement(
    text(
        "SELECT a.worker_id, COUNT(*), SUM(CASE WHEN a.outcome IS NULL THEN 1 ELSE 0 END) FROM worker w"
        " JOIN attempt a ON a.worker_id = w.id WHERE w.experiment_id = :experiment AND w.epoch = :epoch GROUP BY a.worker_id"
    )
)

_ANY_SILENCE = -1e12
"""Less than any silence: also where a clock was set back."""


@repeatable
def join(
    database: Database,
    experiment: int,
    epoch: int,
    *,
    name: str,
    engine: str,
    hostname: str,
    host: str,
    pid: int,
    started: str,
    about: Mapping[str, Json],
) -> int:
    """Insert a worker and return its row id; Fenced when ``epoch`` is over."""
    with database.write() as tx:
        rows = tx.run(
            _statements(database.clock).join,
            experiment=experiment,
            epoch=epoch,
            name=storable(name),
            engine=engine,
            hostname=storable(hostname),
            host=storable(host),
            pid=pid,
            pid_started=started,
            about=dumps(dict(about)),
            joined=now(),
        )
        if rows:
            return int(rows[0][0])
        if not tx.run(_EPOCH, experiment=experiment):
            raise _gone()
    raise Fenced(f"epoch {epoch} is over: another process took the experiment over; nothing was written, stop here")


def beat(database: Database, experiment: int, worker: int) -> Beat:
    """Say that a worker (row id) lives, and return what it is told; ExperimentNotFound when its row is gone.

    It waits for no other write of this process, nor for whoever holds the experiment's row.
    """
    its = _statements(database.clock)
    with database.aside() as tx:
        left = tx.run(its.beat, experiment=experiment, worker=worker)
        rows = tx.run(its.look, experiment=experiment)
        if not left or not rows:
            raise _gone()
        epoch, remaining, told, journaled = rows[0]
        return Beat(
            epoch=epoch,
            remaining=float(remaining),
            told=told,
            journaled=journaled,
            cancelled=frozenset(row[0] for row in tx.run(sql.CANCEL_REQUESTS, experiment=experiment)),
            open=frozenset(row[0] for row in tx.run(_OPEN, worker=worker)),
            left=left[0][0],
        )


def _gone() -> ExperimentNotFound:
    return ExperimentNotFound("the worker's row is gone from the database; its experiment was deleted, or read in anew")


@repeatable
def leave(database: Database, experiment: int, worker: int, why: str) -> None:
    """Note why a worker (row id) leaves; the first reason stands, and nothing is said about a row that is gone."""
    with database.aside() as tx:
        tx.run(_LEAVE, experiment=experiment, worker=worker, why=storable(why))


@repeatable
def every(database: Database, experiment: int, *, epoch: int | None = None, unsettled: bool = False) -> list[WorkerRow]:
    """Return an experiment's workers in the order in which they joined; of one epoch if given.

    With ``unsettled``, only those that work, and those that left while attempts of theirs were open: few, however many were
    there before.
    """
    its = _statements(database.clock)
    scope = {"experiment": experiment, "first": 0 if epoch is None else epoch, "last": ALL if epoch is None else epoch}
    with database.snapshot() as state:
        statements = (its.working, its.stranded) if unsettled else (its.every,)
        found = {row[0]: row for statement in statements for row in state.run(statement, **scope)}
    return [_row(found[identity]) for identity in sorted(found)]


def of_attempt(database: Database, attempt: int) -> WorkerRow | None:
    """Return the worker that claimed an attempt (row id); None: the driver's own process, or nobody."""
    rows = database.run(_statements(database.clock).one, attempt=attempt)
    return _row(rows[0]) if rows else None


def loads(database: Database, experiment: int, epoch: int) -> dict[int, tuple[int, int]]:
    """Return how many attempts each worker of an epoch has ended, and how many it runs, by its row id; none for idle ones."""
    rows = database.run(_LOADS, experiment=experiment, epoch=epoch)
    return {int(worker): (int(count) - int(running), int(running)) for worker, count, running in rows}


def _row(row: tuple[Any, ...]) -> WorkerRow:
    identity, name, engine, hostname, host, pid, started, about, epoch, silent, left = row
    return WorkerRow(
        id=identity,
        name=name,
        engine=engine,
        hostname=hostname,
        host=host,
        pid=pid,
        started=started,
        about=json.loads(about),
        epoch=epoch,
        silent=max(float(silent), 0.0),
        left=left,
    )


@repeatable
def lose(
    database: Database,
    experiment: int,
    epoch: int,
    worker: int,
    why: str,
    *,
    silent: float | None = None,
    endings: Mapping[int, Ending] | None = None,
) -> list[tuple[int, int]]:
    """Give a worker (row id) up and close its open attempts as lost; their trials wait again, within any retry budget.

    With ``silent``, a worker that has beaten within so many seconds by the database's clock is left alone. One that left by
    itself keeps its reason. ``endings`` are of attempts (row ids) that are to end in another way than lost. Return the trial's
    number and the row id of each attempt that was closed.
    """
    with database.write() as tx:
        seq = fence(tx, experiment, epoch)
        if not _is_lost(tx, database.clock, experiment, worker, why, _ANY_SILENCE if silent is None else silent):
            return []
        found = [(int(row[0]), int(row[1])) for row in tx.run(sql.OPEN_OF_WORKER, experiment=experiment, worker=worker)]
        for _, attempt in found:
            tx.run(sql.ADD_NOTE, attempt=attempt, note=storable(why))
            ending = (endings or {}).get(attempt) or Ending(outcome=Outcome.LOST)
            end_attempt(tx, experiment, seq, attempt, ending, retry=False)
        return found


def _is_lost(tx: Transaction, clock: str, experiment: int, worker: int, why: str, silent: float) -> bool:
    """Mark a worker as left unless it has beaten meanwhile; tell whether it has left, by whatever hand."""
    scope = {"experiment": experiment, "worker": worker}
    if tx.run(_statements(clock).lose, **scope, why=storable(why), silent=silent):
        return True
    rows = tx.run(_LEFT, **scope)
    if not rows:
        raise Conflict(f"there is no worker row {worker} of this experiment; nothing was written")
    return rows[0][0] is not None
