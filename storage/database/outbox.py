"""What changed in an experiment since a seq, read in one state of the database: the journal's source."""

from __future__ import annotations

import base64
from typing import Any

from sqlalchemy import text

from holdfast.core.errors import Fenced
from holdfast.storage.database.engine import Database, Statement, Transaction
from holdfast.storage.database.losses import repeatable
from holdfast.storage.database.statements import DONOR, OWN_PARENT
from holdfast.storage.journal import COLUMNS, Batch, Row, Rows


def _sql(body: str) -> Statement:
    return Statement(text(body))


_HEAD = _sql(
    "SELECT epoch, seq, uuid, name, spec, workdir, code_digest, copied_from, seed, created, active_seconds, stop_requested,"
    " ended, spec_source, git_commit FROM experiment WHERE id = :experiment"
)

_TRIALS = _sql(
    "SELECT t.number, t.status, c.body, t.seq, t.ended_seq, t.current_attempt, t.seed, t.group_number, t.repeat, t.created,"
    " t.ts_start, t.source, t.origin, t.metadata, t.cancel_requested FROM trial t JOIN config c ON c.id = t.config_id"
    " WHERE t.experiment_id = :experiment AND t.seq > :since ORDER BY +t.number"  # +: by the index of changes, not of numbers
)

_ATTEMPTS = _sql(
    f"SELECT t.number, a.number, c.body, {OWN_PARENT}, a.parent_step, a.reason, a.note, a.created, a.epoch, a.claimed_by,"
    " a.started, a.ended, a.outcome, a.error_kind, a.error, a.traceback, a.result, a.flow_run_id, a.task_run_id, a.host, a.pid,"
    f" a.pid_started, {DONOR}, p.number FROM trial t JOIN attempt a ON a.trial_id = t.id JOIN config c ON c.id = a.config_id"
    " LEFT JOIN attempt p ON p.id = a.parent_id"
    " WHERE t.experiment_id = :experiment AND t.seq > :since ORDER BY +t.number, a.number"
)

# What attempts write beside their trial's row belongs to trials that run, or have changed since. Once, at the beginning: it
# looks at every trial.
_LIVE = "t.experiment_id = :experiment AND (t.seq > :since OR t.status = 'RUNNING')"

_AT_ONCE = 64
"""Trials that one statement asks for: with hundreds that run, one for each would be most of what a batch costs."""
_NOBODY = -(2**62)
"""The number of no trial."""
_PLACES = ", ".join(f":n{place}" for place in range(_AT_ONCE))
# The same where it is known which trials these are.
_THESE = f"t.experiment_id = :experiment AND t.number IN ({_PLACES})"

_REPORT = "t.number, a.number, r.step, r.seq, r.reported, r.decision, r.id, m.name, m.kind, m.number, m.text"
_REPORTS, _REPORTS_OF = (
    _sql(
        f"SELECT {_REPORT} FROM trial t JOIN attempt a ON a.trial_id = t.id JOIN report r ON r.attempt_id = a.id"
        f" LEFT JOIN metric m ON m.report_id = r.id WHERE {whose} AND r.seq > :since ORDER BY r.id, m.name"
    )
    for whose in (_LIVE, _THESE)
)

# The same where the last row that was read is known: a look at the newest rows alone, however long the attempts are.
# It is one of this experiment: ids of another one that is deleted are given again. CROSS JOIN keeps SQLite to this order.
_NEW_REPORTS = _sql(
    f"SELECT {_REPORT} FROM report r CROSS JOIN attempt a CROSS JOIN trial t LEFT JOIN metric m ON m.report_id = r.id"
    " WHERE r.id > :last AND a.id = r.attempt_id AND t.id = a.trial_id AND t.experiment_id = :experiment AND r.seq > :since"
    " ORDER BY r.id, m.name"
)

_TELEMETRY = "t.number, a.number, e.ts, e.name, e.kind, e.number, e.text, e.seq, e.id"
_ALL_TELEMETRY, _TELEMETRY_OF = (
    _sql(
        f"SELECT {_TELEMETRY} FROM trial t JOIN attempt a ON a.trial_id = t.id JOIN telemetry e ON e.attempt_id = a.id"
        f" WHERE {whose} AND e.seq > :since ORDER BY e.id"
    )
    for whose in (_LIVE, _THESE)
)
_NEW_TELEMETRY = _sql(
    f"SELECT {_TELEMETRY} FROM telemetry e CROSS JOIN attempt a CROSS JOIN trial t"
    " WHERE e.id > :last AND a.id = e.attempt_id AND t.id = a.trial_id AND t.experiment_id = :experiment AND e.seq > :since"
    " ORDER BY e.id"
)

_CHECKPOINTS, _CHECKPOINTS_OF = (
    _sql(
        "SELECT t.number, a.number, c.step, c.seq, c.path, c.digest, c.bytes, c.created, c.status, c.reason, c.pinned"
        " FROM trial t JOIN attempt a ON a.trial_id = t.id JOIN checkpoint c ON c.attempt_id = a.id"
        f" WHERE {whose} AND c.seq > :since ORDER BY t.number, a.number, c.step"
    )
    for whose in (_LIVE, _THESE)
)

_RUNNING = _sql("SELECT number FROM trial WHERE experiment_id = :experiment AND status = 'RUNNING'")

_STATES = _sql(
    "SELECT number, body, seq FROM proposer_state WHERE experiment_id = :experiment AND seq > :since ORDER BY number"
)

_AUDIT = _sql(
    "SELECT seq, epoch, happened, action, detail FROM audit WHERE experiment_id = :experiment AND seq > :since ORDER BY id"
)

_FIXED = ("uuid", "name", "seed", "created", "copied_from", "spec_source", "git_commit")


_UNKNOWN = -2


class Outbox:
    """Reads an experiment's changes, batch after batch."""

    def __init__(self, database: Database, experiment: int, epoch: int | None = None) -> None:
        self._database = database
        self._experiment = experiment
        self._epoch = epoch
        """the holder's, who is told when it is over; None for others"""
        self._reached = _UNKNOWN
        """the end of the last batch, when the next one begins there: what is known of trials and rows is of that moment"""
        self._last_report = 0
        self._last_telemetry = 0
        self._running: set[int] = set()
        """numbers of the trials that ran when the last batch was read"""
        self._spec = ""

    @repeatable
    def __call__(self, since: int) -> Batch:
        """Return what changed after seq ``since``: -1 for everything. Fenced once a later epoch took over."""
        with self._database.snapshot() as state:
            return self._batch(state, since)

    def _batch(self, state: Transaction, since: int) -> Batch:
        head = state.run(_HEAD, experiment=self._experiment)[0]
        epoch, end, uuid, name, spec, workdir, code, copied, seed, created, active, stop, ended, source, commit = head
        if self._epoch not in (None, epoch):
            raise Fenced(
                f"epoch {self._epoch} is over: another process took the experiment over; nothing was written, stop here"
            )
        if end == since:
            return Batch(start=since, end=end, rows={}, experiment={})
        experiment: dict[str, Any] = {"active_seconds": active, "stop_requested": stop, "ended": ended}
        if since == -1:
            fixed = (uuid, name, seed, created, copied, source, commit)
            experiment |= dict(zip(_FIXED, fixed, strict=True))
        if since == -1 or spec != self._spec:
            experiment |= {"spec": spec, "workdir": workdir, "code_digest": code}
        scope = {"experiment": self._experiment, "since": since}
        known, self._reached = since == self._reached, _UNKNOWN  # what is cut off here begins anew, with a look at all trials
        trials = _lists(state.run(_TRIALS, **scope))
        changed = {row[0] for row in trials}
        rows: Rows = {
            "trial": trials,
            "attempt": [_attempt(row) for row in state.run(_ATTEMPTS, **scope)],
            "report": self._reports(state, since, changed if known else None),
            "telemetry": self._telemetry(state, since, changed if known else None),
            "checkpoint": self._checkpoints(state, since, changed if known else None),
            "proposer_state": [
                [number, base64.b64encode(bytes(body)).decode(), seq] for number, body, seq in state.run(_STATES, **scope)
            ],
            "audit": _lists(state.run(_AUDIT, **scope)),
        }
        before = self._running if known else {row[0] for row in state.run(_RUNNING, experiment=self._experiment)}
        self._running = before.difference(changed) | {row[0] for row in trials if row[1] == "RUNNING"}
        self._reached, self._spec = end, spec
        return Batch(start=since, end=end, rows=rows, experiment=experiment)

    def _of_live(
        self, state: Transaction, since: int, changed: set[int] | None, every: Statement, these: Statement
    ) -> list[tuple[Any, ...]]:
        """Return the rows of trials that run or have ``changed``: with one look at all trials where that is not known."""
        scope = {"experiment": self._experiment, "since": since}
        if changed is None:
            return state.run(every, **scope)
        numbers = sorted(self._running | changed)
        found: list[tuple[Any, ...]] = []
        for first in range(0, len(numbers), _AT_ONCE):
            some = [*numbers[first : first + _AT_ONCE], *[_NOBODY] * _AT_ONCE]
            found += state.run(these, **scope, **{f"n{place}": some[place] for place in range(_AT_ONCE)})
        return found

    def _checkpoints(self, state: Transaction, since: int, changed: set[int] | None) -> list[Row]:
        return _lists(self._of_live(state, since, changed, _CHECKPOINTS, _CHECKPOINTS_OF))

    def _reports(self, state: Transaction, since: int, changed: set[int] | None) -> list[Row]:
        if changed is not None and self._last_report:
            found = state.run(_NEW_REPORTS, experiment=self._experiment, since=since, last=self._last_report)
        else:
            found = self._of_live(state, since, changed, _REPORTS, _REPORTS_OF)
        rows: dict[int, Row] = {}
        for *report, identity, name, kind, number, value in found:
            row = rows.setdefault(identity, [*report, []])
            if name is not None:
                row[-1].append([name, kind, number, value])
        self._last_report = max(rows, default=self._last_report)
        return list(rows.values())

    def _telemetry(self, state: Transaction, since: int, changed: set[int] | None) -> list[Row]:
        if changed is not None and self._last_telemetry:
            found = state.run(_NEW_TELEMETRY, experiment=self._experiment, since=since, last=self._last_telemetry)
        else:
            found = self._of_live(state, since, changed, _ALL_TELEMETRY, _TELEMETRY_OF)
        self._last_telemetry = max((row[-1] for row in found), default=self._last_telemetry)
        return [list(row[:-1]) for row in found]


_PARENT = COLUMNS["attempt"].index("parent")


def _attempt(row: tuple[Any, ...]) -> Row:
    """Return an attempt whose parent is a number of its own trial's, or [trial, attempt] of another one's."""
    *found, donor, attempt = row
    if donor is not None:
        found[_PARENT] = [donor, attempt]
    return found


def _lists(rows: list[tuple[Any, ...]]) -> list[Row]:
    return [list(row) for row in rows]
