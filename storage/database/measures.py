"""What stopping rules look at: the reports that count, and whose may have changed, within an open transaction too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import text

from holdfast.core.checkpoint import chain
from holdfast.core.errors import ExperimentNotFound
from holdfast.core.objective import Objective, score
from holdfast.core.trial import Attempt
from holdfast.core.values import from_row
from holdfast.storage.database import statements as sql
from holdfast.storage.database.engine import Statement, Transaction

ALL = 2**62
"""A trial's number that is above all others."""


def _sql(body: str) -> Statement:
    return Statement(text(body))


_MEASURED = _sql(
    "SELECT t.number, a.number, r.step, m.kind, m.number, m.text FROM trial t JOIN attempt a ON a.trial_id = t.id"
    " JOIN report r ON r.attempt_id = a.id JOIN metric m ON m.report_id = r.id AND m.name = :metric"
    " WHERE t.experiment_id = :experiment AND t.number >= :first AND t.number <= :last AND r.step >= 0"
)

# Only trials that were tried more than once have reports that do not count.
_LINKS = _sql(
    "SELECT t.number, a.number, " + sql.OWN_PARENT + ", a.parent_step FROM trial t JOIN attempt a ON a.trial_id = t.id"
    " LEFT JOIN attempt p ON p.id = a.parent_id"
    " WHERE t.experiment_id = :experiment AND t.number >= :first AND t.number <= :last AND t.current_attempt > 1"
)

_SEQ = _sql("SELECT seq FROM experiment WHERE id = :experiment")

# Which attempts a trial has, and what each goes on from, changes with the trial's row.
_CHANGED = _sql("SELECT number FROM trial WHERE experiment_id = :experiment AND number >= 0 AND seq > :since")

# A report leaves its trial's row as it is. Only a running attempt reports, and its steps rise: the last one is the newest.
_REPORTED = _sql(
    "SELECT t.number FROM trial t JOIN attempt a ON a.trial_id = t.id AND a.number = t.current_attempt"
    " JOIN report r ON r.attempt_id = a.id AND r.step = (SELECT MAX(x.step) FROM report x WHERE x.attempt_id = a.id)"
    " WHERE t.experiment_id = :experiment AND t.number >= 0 AND t.status = 'RUNNING' AND r.seq > :since"
)


def changed(tx: Transaction, experiment: int, since: int) -> tuple[int, set[int]]:
    """Return the seq up to which that is all, and the trials whose reports that count may have changed after ``since``.

    That seq is the one before the experiment's newest, which is the open transaction's own when it began with the fence: what
    it writes, and what another one writes instead when it is rolled back, comes after. ``since`` is -1 at first.
    """
    rows = tx.run(_SEQ, experiment=experiment)
    if not rows:
        raise ExperimentNotFound("the experiment's row is gone from the database; it was deleted meanwhile")
    scope = {"experiment": experiment, "since": since}
    return int(rows[0][0]) - 1, {row[0] for statement in (_CHANGED, _REPORTED) for row in tx.run(statement, **scope)}


def measured(
    tx: Transaction, experiment: int, metrics: Sequence[str], first: int = 0, last: int = ALL
) -> dict[str, list[tuple[int, int, float]]]:
    """Return (trial, step, value) of the reports that count, by metric, ordered; what is no number is left out."""
    scope = {"experiment": experiment, "first": first, "last": last}
    links = tx.run(_LINKS, **scope)
    found = {metric: tx.run(_MEASURED, **scope, metric=metric) for metric in metrics}
    attempts: dict[int, dict[int, Attempt]] = {}
    for number, attempt, parent, parent_step in links:
        attempts.setdefault(number, {})[attempt] = Attempt(id=0, number=attempt, parent=parent, parent_step=parent_step)
    limits = {number: dict(chain(max(of_trial), of_trial)) for number, of_trial in attempts.items()}
    return {metric: sorted(_counted(rows, limits)) for metric, rows in found.items()}


def _counted(
    rows: Sequence[tuple[Any, ...]], limits: Mapping[int, Mapping[int, int | None]]
) -> Iterator[tuple[int, int, float]]:
    """Yield trial, step and value of the numbers on each trial's chain, whose attempts end at ``limits``."""
    for trial, attempt, step, kind, number, body in rows:
        if trial in limits:
            limit = limits[trial].get(attempt, -1)
            if limit is not None and step > limit:
                continue
        value = number if kind == "float" and number is not None else score({"": from_row(kind, number, body)}, _NAMELESS)
        if value is not None:
            yield trial, step, value


_NAMELESS = Objective(name="")
