"""Reads: bulk, with a number of statements that does not grow with the number of trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import text

from holdfast.core.checkpoint import Checkpoint, chain, eligible
from holdfast.core.trial import Attempt, ErrorInfo, Outcome, Trial, TrialStatus
from holdfast.core.values import Config, Metrics, from_row, loads
from holdfast.storage.database import measures
from holdfast.storage.database import statements as sql
from holdfast.storage.database.engine import Database, Statement, Transaction
from holdfast.storage.database.losses import repeatable
from holdfast.storage.database.populations import GENERATIONS
from holdfast.storage.database.rows import FINAL_STEP, moment, to_checkpoint


def _sql(body: str) -> Statement:
    return Statement(text(body))


# Trials with their config and current attempt, in number order.
_TRIALS_TEXT = (
    "SELECT t.number, t.status, c.body, a.config_id, t.seed, t.seq, t.ts_start, t.origin, t.metadata,"
    " t.source, t.group_number, t.repeat, t.ended_seq,"
    " a.id, a.number, a.epoch, a.outcome, a.claimed_by, " + sql.OWN_PARENT + ", a.parent_step, a.reason, a.note,"
    " a.error_kind, a.error, a.traceback, a.flow_run_id, a.task_run_id, a.host, a.pid, a.pid_started, a.started, a.ended, "
    + sql.DONOR
    + ", p.number, a.created, a.worker_id"
    ", CASE WHEN a.config_id <> t.config_id THEN (SELECT f.body FROM config f WHERE f.id = t.config_id) END"
    ", CASE WHEN a.reason = 'retry' AND t.status = 'PENDING' THEN (SELECT COUNT(*) FROM attempt f"
    " JOIN attempt l ON l.trial_id = f.trial_id AND f.epoch <= l.epoch WHERE l.trial_id = t.id AND l.number = a.number - 1"
    f" AND f.epoch >= {sql.DRIVE_OF.format(experiment='t.experiment_id', epoch='l.epoch')}"
    " AND f.outcome IN ('failed', 'timed_out', 'crashed')) ELSE 0 END"
    " FROM trial t JOIN attempt a ON a.trial_id = t.id AND a.number = t.current_attempt"
    " JOIN config c ON c.id = a.config_id"
    " LEFT JOIN attempt p ON p.id = a.parent_id"
    " WHERE {scope} ORDER BY {number}"
)

# The metrics of each trial's final record and of its current attempt's last report.
_METRICS_TEXT = (
    "SELECT t.number, r.step, m.name, m.kind, m.number, m.text FROM trial t"
    " JOIN attempt a ON a.trial_id = t.id AND a.number = t.current_attempt"
    " JOIN report r ON r.attempt_id = a.id AND (r.step = -1"
    " OR r.step = (SELECT MAX(x.step) FROM report x WHERE x.attempt_id = a.id AND x.step >= 0))"
    " LEFT JOIN metric m ON m.report_id = r.id"
    " WHERE {scope}"
)

# The reports of trials whose current attempt has none yet: they stand on an earlier attempt of the chain.
_INHERITED_TEXT = (
    "SELECT t.number, a.number, " + sql.OWN_PARENT + ", a.parent_step, r.step, m.name, m.kind, m.number, m.text FROM trial t"
    " JOIN attempt a ON a.trial_id = t.id LEFT JOIN attempt p ON p.id = a.parent_id"
    " LEFT JOIN report r ON r.attempt_id = a.id AND r.step >= 0 LEFT JOIN metric m ON m.report_id = r.id"
    " WHERE {scope}"
    " AND t.current_attempt > 1 AND NOT EXISTS (SELECT 1 FROM report x JOIN attempt y ON y.id = x.attempt_id"
    " WHERE y.trial_id = t.id AND y.number = t.current_attempt AND x.step >= 0)"
)


def _scoped(body: str, number: str) -> Statement:
    scope = f"t.experiment_id = :experiment AND t.seq > :since AND {number} >= :first AND {number} <= :last"
    return _sql(body.format(scope=scope, number=number))


_TRIALS, _METRICS, _INHERITED = (_scoped(body, "t.number") for body in (_TRIALS_TEXT, _METRICS_TEXT, _INHERITED_TEXT))

# The same for the few that changed of many: the plus keeps SQLite from walking all trials by number.
_CHANGED = tuple(_scoped(body, "+t.number") for body in (_TRIALS_TEXT, _METRICS_TEXT, _INHERITED_TEXT))

_ATTEMPTS = _sql(
    f"SELECT t.number, a.id, a.number, a.epoch, a.outcome, a.claimed_by, {sql.OWN_PARENT}, a.parent_step, a.reason, a.note,"
    " a.error_kind, a.error, a.traceback, a.flow_run_id, a.task_run_id, a.host, a.pid, a.pid_started, a.started, a.ended,"
    f" {sql.DONOR}, p.number, a.created, a.worker_id"
    " FROM attempt a JOIN trial t ON t.id = a.trial_id LEFT JOIN attempt p ON p.id = a.parent_id"
    " WHERE t.experiment_id = :experiment AND t.number >= :first AND t.number <= :last ORDER BY t.number, a.number"
)

_CHECKPOINTS = _sql(
    "SELECT t.number, c.id, a.number, c.step, c.path, c.digest, c.bytes, c.status, c.reason, c.pinned FROM checkpoint c"
    " JOIN attempt a ON a.id = c.attempt_id JOIN trial t ON t.id = a.trial_id"
    " WHERE t.experiment_id = :experiment AND t.number >= :first AND t.number <= :last ORDER BY t.number, a.number, c.step"
)

_BORROWED = _sql(
    "SELECT t.number, a.number, x.number, c.id, p.number, c.step, c.path, c.digest, c.bytes, c.status, c.reason, c.pinned"
    " FROM attempt a JOIN trial t ON t.id = a.trial_id JOIN attempt p ON p.id = a.parent_id AND p.trial_id <> a.trial_id"
    " JOIN trial x ON x.id = p.trial_id JOIN checkpoint c ON c.attempt_id = p.id AND c.step = a.parent_step"
    " WHERE t.experiment_id = :experiment AND t.number >= :first AND t.number <= :last ORDER BY t.number, a.number"
)

_CHECKPOINT_METRICS = _sql(
    "SELECT c.id, m.name, m.kind, m.number, m.text FROM checkpoint c JOIN attempt a ON a.id = c.attempt_id"
    " JOIN trial t ON t.id = a.trial_id JOIN report r ON r.attempt_id = a.id AND r.step = c.step"
    " JOIN metric m ON m.report_id = r.id"
    " WHERE t.experiment_id = :experiment AND t.number >= :first AND t.number <= :last"
)

_HISTORY = _sql(
    "SELECT t.number, a.number, r.step, r.seq, r.reported, r.decision, m.name, m.kind, m.number, m.text FROM report r"
    " JOIN attempt a ON a.id = r.attempt_id JOIN trial t ON t.id = a.trial_id LEFT JOIN metric m ON m.report_id = r.id"
    " WHERE t.experiment_id = :experiment AND t.number >= 0 AND r.step >= 0 ORDER BY t.number, r.step, a.number, m.name"
)

_TELEMETRY = _sql(
    "SELECT t.number, e.ts, e.name, e.kind, e.number, e.text FROM telemetry e JOIN attempt a ON a.id = e.attempt_id"
    " JOIN trial t ON t.id = a.trial_id WHERE t.experiment_id = :experiment AND t.number >= :first AND t.number <= :last"
    " ORDER BY t.number, e.ts, e.name"
)

DRIVING = "driving"
"""The audit row of a flow run that drives."""
_DRIVING = _sql(
    "SELECT detail FROM audit WHERE experiment_id = :experiment AND epoch < :before AND action = 'driving'"
    " ORDER BY id DESC LIMIT 200"
)
_AUDIT = _sql("SELECT seq, epoch, happened, action, detail FROM audit WHERE experiment_id = :experiment ORDER BY id")

# Numbers below 0 are trials merged from other experiments: none of this one's own.
_ENDED = _sql(
    "SELECT number, ended_seq FROM trial WHERE experiment_id = :experiment AND number >= 0"
    " AND seq > :cursor AND ended_seq > :cursor"  # what ended after it changed after it: the index is by seq
    " ORDER BY ended_seq, number"
)

_COUNTS = _sql("SELECT status, COUNT(*) FROM trial WHERE experiment_id = :experiment AND number >= 0 GROUP BY status")

_SEQ = _sql("SELECT seq FROM experiment WHERE id = :experiment")

_CONFIG = _sql("SELECT body FROM config WHERE id = :config")

_STATES = _sql("SELECT number, body FROM proposer_state WHERE experiment_id = :experiment ORDER BY number")

_IDS = _sql("SELECT number, id FROM trial WHERE experiment_id = :experiment AND number >= 0")

ALL = measures.ALL

_STATUSES = {status.value: status for status in TrialStatus}
_OUTCOMES: dict[str | None, Outcome | None] = {None: None, **{outcome.value: outcome for outcome in Outcome}}


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One report; ``canonical`` unless a later attempt has gone back behind it."""

    trial: int
    attempt: int
    step: int
    seq: int
    reported: datetime
    decision: str
    canonical: bool
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    seq: int
    epoch: int
    happened: datetime
    action: str
    detail: dict[str, Any]


@dataclass(frozen=True)
class Drove:
    """A Prefect flow run that drove an experiment."""

    flow_run: str
    times: int | None
    """how many times it had been run by then: Prefect's Retry runs the same one again; None: Prefect did not say"""


class Reader:
    """Everything that is stored of one experiment."""

    def __init__(self, database: Database, experiment: int) -> None:
        self.database = database
        self.experiment = experiment

    def _fetch(self, statement: Statement, **values: object) -> list[tuple[Any, ...]]:
        return self.database.run(statement, experiment=self.experiment, **values)

    def seq(self) -> int:
        """Return the experiment's counter: it rises with every write."""
        return int(self._fetch(_SEQ)[0][0])

    @repeatable
    def trials(self, *, since: int = -1, first: int = 0, last: int = ALL) -> list[Trial]:
        """Return the trials that changed after seq ``since``, with numbers from ``first`` to ``last``, in number order.

        Trials that were merged from other experiments have numbers below 0, and come with ``first=-ALL``.
        """
        scope = {"experiment": self.experiment, "since": since, "first": first, "last": last}
        of_trials, of_metrics, of_inherited = (_TRIALS, _METRICS, _INHERITED) if since < 0 else _CHANGED
        with self.database.snapshot() as state:
            rows = state.run(of_trials, **scope)
            metrics = state.run(of_metrics, **scope)
            steps = {number: step for number, step, *_ in metrics if step != FINAL_STEP}
            retried = any(row[_ATTEMPT_NUMBER] > 1 and row[0] not in steps for row in rows)
            inherited = state.run(of_inherited, **scope) if retried else []
        finals: dict[int, Metrics] = {}
        reports: dict[int, Metrics] = {}
        for number, step, name, *value in metrics:
            if name is not None:
                target = finals if step == FINAL_STEP else reports
                target.setdefault(number, {})[name] = from_row(*value)
        _inherit(inherited, reports, steps)
        for number, final in finals.items():
            reports[number] = {**reports[number], **final} if number in reports else final
        configs = loads(f"[{','.join(row[2] for row in rows)}]")  # at once: a call costs more than what it parses
        return [
            _trial(row, config, reports.get(row[0], {}), steps.get(row[0])) for row, config in zip(rows, configs, strict=True)
        ]

    def trial(self, number: int) -> Trial | None:
        """Return one trial, or None."""
        found = self.trials(first=number, last=number)
        return found[0] if found else None

    def trial_ids(self) -> dict[int, int]:
        """Return the row id of each trial by number."""
        return {row[0]: row[1] for row in self._fetch(_IDS)}

    def states(self) -> dict[int, bytes]:
        """Return what the engine kept with each of its proposals that it kept something with, by the trial's number."""
        return {number: bytes(body) for number, body in self._fetch(_STATES)}

    def cancel_requests(self) -> set[int]:
        """Return the numbers of trials that somebody asked to cancel and that have not ended."""
        return {row[0] for row in self._fetch(sql.CANCEL_REQUESTS)}

    def stop_requested(self) -> bool:
        """Tell whether somebody asked the driver to stop."""
        return bool(self._fetch(sql.REQUESTS)[0][1])

    def last_decisions(self) -> dict[int, str]:
        """Return the decision on the last report of each open attempt, by attempt row id."""
        return {row[0]: row[1] for row in self._fetch(_DECISIONS)}

    def counts(self) -> dict[TrialStatus, int]:
        """Return how many trials have each status that occurs."""
        found = {TrialStatus(status): int(count) for status, count in self._fetch(_COUNTS)}
        return {status: found[status] for status in TrialStatus if status in found}

    def attempts(self, *, first: int = 0, last: int = ALL) -> dict[int, dict[int, Attempt]]:
        """Return every attempt by trial and number."""
        return _by_trial(self._fetch(_ATTEMPTS, first=first, last=last))

    @repeatable
    def checkpoints(self, *, first: int = 0, last: int = ALL) -> list[Checkpoint]:
        """Return the checkpoint rows of every status, by trial, attempt and step, with the metrics reported with each."""
        with self.database.snapshot() as state:
            return self._checkpoints(state, first=first, last=last)

    def _checkpoints(self, state: Transaction, *, first: int, last: int) -> list[Checkpoint]:
        scope = {"experiment": self.experiment, "first": first, "last": last}
        metrics: dict[int, Metrics] = {}
        for identity, name, *value in state.run(_CHECKPOINT_METRICS, **scope):
            metrics.setdefault(identity, {})[name] = from_row(*value)
        return [to_checkpoint(row[0], row[1:], metrics.get(row[1])) for row in state.run(_CHECKPOINTS, **scope)]

    @repeatable
    def candidates(self, trial: int, attempt: int) -> list[Checkpoint]:
        """Return the checkpoints that an attempt may continue from, the one to try first in front."""
        with self.database.snapshot() as state:
            rows = state.run(_ATTEMPTS, experiment=self.experiment, first=trial, last=trial)
            checkpoints = self._checkpoints(state, first=trial, last=trial)
            borrowed = self._borrowed(state, first=trial, last=trial)
        return eligible(attempt, _by_trial(rows).get(trial, {}), checkpoints, borrowed.get(trial))

    def borrowed(self, *, first: int = 0, last: int = ALL) -> dict[int, dict[int, Checkpoint]]:
        """Return the checkpoints that attempts go on from though they are other trials', by trial and attempt."""
        with self.database.snapshot() as state:
            return self._borrowed(state, first=first, last=last)

    def _borrowed(self, state: Transaction, *, first: int, last: int) -> dict[int, dict[int, Checkpoint]]:
        found: dict[int, dict[int, Checkpoint]] = {}
        for number, attempt, donor, *row in state.run(_BORROWED, experiment=self.experiment, first=first, last=last):
            found.setdefault(number, {})[attempt] = to_checkpoint(donor, tuple(row))
        return found

    def generations(self) -> int:
        """Return how many generations of the population have been evolved."""
        return int(self._fetch(GENERATIONS)[0][0])

    @repeatable
    def history(self) -> list[ReportRow]:
        """Return every report by trial, step and attempt; superseded ones are flagged, not left out."""
        with self.database.snapshot() as state:
            attempts = _by_trial(state.run(_ATTEMPTS, experiment=self.experiment, first=0, last=ALL))
            rows = state.run(_HISTORY, experiment=self.experiment)
        links = {number: dict(chain(max(of_trial), of_trial)) for number, of_trial in attempts.items()}
        found: dict[tuple[int, int, int], ReportRow] = {}
        for number, attempt, step, seq, reported, decision, name, *value in rows:
            key = (number, step, attempt)
            row = found.get(key)
            if row is None:
                limits = links[number]
                canonical = attempt in limits and ((limit := limits[attempt]) is None or step <= limit)
                row = found[key] = ReportRow(
                    trial=number,
                    attempt=attempt,
                    step=step,
                    seq=seq,
                    reported=moment(reported),  # type: ignore[arg-type]  # the column is never null
                    decision=decision,
                    canonical=canonical,
                )
            if name is not None:
                row.metrics[name] = from_row(*value)
        return list(found.values())

    @repeatable
    def measured(self, metrics: Sequence[str], *, first: int = 0, last: int = ALL) -> dict[str, list[tuple[int, int, float]]]:
        """Return (trial, step, value) of the reports that count, by metric, ordered; what is no number is left out."""
        with self.database.snapshot() as state:
            return measures.measured(state, self.experiment, metrics, first, last)

    def telemetry(self, *, first: int = 0, last: int = ALL) -> list[tuple[int, datetime, str, Any]]:
        """Return (trial, UTC time, name, value) by trial, time and name."""
        rows = self._fetch(_TELEMETRY, first=first, last=last)
        return [(row[0], moment(row[1]), row[2], from_row(*row[3:])) for row in rows]  # type: ignore[misc]  # never null

    def ended_since(self, cursor: int) -> list[tuple[int, int]]:
        """Return (trial, ended_seq) of the trials that ended after ``cursor``, in the order in which they ended."""
        return [(row[0], row[1]) for row in self._fetch(_ENDED, cursor=cursor)]

    def audit(self) -> list[AuditRow]:
        """Return who did what to the experiment, oldest first."""
        return [
            AuditRow(seq=row[0], epoch=row[1], happened=moment(row[2]), action=row[3], detail=json.loads(row[4]))  # type: ignore[arg-type]  # never null
            for row in self._fetch(_AUDIT)
        ]

    def drives(self, uuid: str, *, before: int = ALL) -> list[Drove]:
        """Return which flow runs drove the experiment ``uuid`` in epochs below ``before``, newest first.

        A copy has the rows of its original, too, whose runs are none of the copy's.
        """
        details = [json.loads(row[0]) for row in self._fetch(_DRIVING, before=before)]
        return [Drove(str(detail["flow_run_id"]), detail.get("times")) for detail in details if detail.get("uuid") == uuid]

    def config(self, config: int) -> dict[str, Any] | None:
        """Return the config of an id, or None."""
        rows = self.database.run(_CONFIG, config=config)
        return loads(rows[0][0]) if rows else None


_DECISIONS = _sql(
    "SELECT a.id, r.decision FROM trial t JOIN attempt a ON a.trial_id = t.id AND a.number = t.current_attempt"
    " JOIN report r ON r.attempt_id = a.id"
    " AND r.step = (SELECT MAX(x.step) FROM report x WHERE x.attempt_id = a.id AND x.step >= 0)"
    " WHERE t.experiment_id = :experiment AND t.number >= 0 AND t.status = 'RUNNING'"
)


def _inherit(rows: Sequence[tuple[Any, ...]], reports: dict[int, Metrics], steps: dict[int, int]) -> None:
    """Fill in the last canonical report of trials whose current attempt has not reported."""
    attempts: dict[int, dict[int, Attempt]] = {}
    values: dict[int, dict[tuple[int, int], Metrics]] = {}
    for number, attempt, parent, parent_step, step, name, *value in rows:
        attempts.setdefault(number, {})[attempt] = Attempt(id=0, number=attempt, parent=parent, parent_step=parent_step)
        if step is not None:
            metrics = values.setdefault(number, {}).setdefault((attempt, step), {})
            if name is not None:
                metrics[name] = from_row(*value)
    for number, links in attempts.items():
        for attempt, limit in chain(max(links), links):
            on_chain = [key for key in values.get(number, {}) if key[0] == attempt and (limit is None or key[1] <= limit)]
            if on_chain:
                last = max(on_chain)
                reports[number], steps[number] = values[number][last], last[1]
                break


def _by_trial(rows: Sequence[tuple[Any, ...]]) -> dict[int, dict[int, Attempt]]:
    """Return the attempts in rows of ``_ATTEMPTS`` by trial and number; a trial's newest is its current one."""
    found: dict[int, dict[int, Attempt]] = {}
    for row in rows:
        attempt = _attempt(row[1:])
        found.setdefault(row[0], {})[attempt.number] = attempt
    return found


def _attempt(row: Sequence[Any]) -> Attempt:
    identity, number, epoch, outcome, claimed, parent, parent_step, reason, note, kind, message, trace, *rest = row
    flow_run, task_run, host, pid, pid_started, started, ended, donor, donor_attempt, created, worker = rest
    return Attempt(
        id=identity,
        number=number,
        epoch=epoch,
        outcome=_OUTCOMES[outcome],
        claimed=claimed is not None,
        parent=parent,
        parent_step=parent_step,
        donor=None if donor is None else (donor, donor_attempt),
        reason=reason,
        note=note,
        error=ErrorInfo(kind=kind, message=message or "", traceback=trace or "") if kind else None,
        flow_run_id=flow_run,
        task_run_id=task_run,
        host=host,
        pid=pid,
        pid_started=pid_started,
        started=moment(started),
        ended=moment(ended),
        created=moment(created),
        worker=worker,
    )


_ATTEMPT_NUMBER = 14
"""The column of ``_TRIALS`` that holds the current attempt's number; its id stands before it, the rest of it after."""


def _trial(row: Sequence[Any], config: Config, metrics: Metrics, step: int | None) -> Trial:
    number, status, _, config_id, seed, seq, ts_start, origin, metadata, source, group, repeat, ended_seq, *rest = row
    *attempt, first, failures = rest
    current = _attempt(attempt)
    return Trial(
        number=number,
        status=_STATUSES[status],
        config=config,
        config_id=config_id,
        seed=seed,
        seq=seq,
        ended_seq=ended_seq,
        ts_start=None if ts_start is None else moment(ts_start),
        origin=origin,
        source=source,
        group=group,
        repeat=repeat,
        metadata={} if metadata == "{}" else loads(metadata),
        attempts=current.number if current.claimed else current.number - 1,  # only the current one can be unclaimed
        attempt=current,
        failures=failures,
        metrics=metrics,
        step=step,
        first=None if first is None else loads(first),
    )
