"""Loading trials in bulk: numbers, configs, scores and statuses alone, without attempts, errors and processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text

from holdfast.core.trial import ERRORED, SCORED, Trial, TrialStatus
from holdfast.core.values import Config, Metrics, from_row, loads
from holdfast.storage.database.engine import Statement
from holdfast.storage.database.losses import repeatable
from holdfast.storage.database.merging import Origin
from holdfast.storage.database.reads import _INHERITED, ALL, Reader, _inherit
from holdfast.storage.database.rows import FINAL_STEP


@dataclass(frozen=True)
class LoadedTrials:
    """Trials as four lists (ids, configs, scores, statuses), into which it unpacks."""

    ids: list[int]
    configs: list[Config]
    scores: list[Metrics | None]
    statuses: list[TrialStatus]
    origins: list[str | None]
    """NAME#NUMBER@UUID of a merged trial's original; None for own trials"""
    left_out: int = 0
    """merged trials that are not listed, because they lack a parameter that has no default"""
    cursor: int = 0
    """what the next ``load_since`` begins after"""

    def __iter__(self) -> Iterator[list[Any]]:
        return iter((self.ids, self.configs, self.scores, self.statuses))

    def followed_by(self, other: LoadedTrials) -> LoadedTrials:
        """Return these trials and then those of ``other``."""
        return LoadedTrials(
            ids=self.ids + other.ids,
            configs=self.configs + other.configs,
            scores=self.scores + other.scores,
            statuses=self.statuses + other.statuses,
            origins=self.origins + other.origins,
            left_out=self.left_out + other.left_out,
            cursor=max(self.cursor, other.cursor),
        )


Columns = tuple[list[int], list[Config], list[Metrics | None], list[TrialStatus], list[str | None]]
"""Numbers, configs, scores, statuses and origins of trials, in number order."""


def _names(statuses: frozenset[TrialStatus]) -> str:
    return ", ".join(f"'{status.value}'" for status in sorted(statuses))


_LOADED = Statement(
    text(
        "SELECT t.number, t.status, c.body, t.current_attempt, t.origin FROM trial t JOIN config c ON c.id ="
        " CASE WHEN t.current_attempt = 1 THEN t.config_id ELSE"  # what a later attempt runs may be another one
        " (SELECT a.config_id FROM attempt a WHERE a.trial_id = t.id AND a.number = t.current_attempt) END"
        f" WHERE t.experiment_id = :experiment AND t.number >= :first AND t.status IN ({_names(SCORED | ERRORED)})"
        " ORDER BY t.number"
    )
)

_VALUES = (
    "SELECT t.number, m.name, m.kind, m.number, m.text FROM trial t"
    " JOIN attempt a ON a.trial_id = t.id AND a.number = t.current_attempt"
    " JOIN report r ON r.attempt_id = a.id AND r.step = {step} JOIN metric m ON m.report_id = r.id"
    f" WHERE t.experiment_id = :experiment AND t.number >= :first AND t.status IN ({_names(SCORED)})"
)

# The final record of each scored trial's current attempt.
_FINALS = Statement(text(_VALUES.format(step=FINAL_STEP)))

# What its last report says beyond that: looking a name up costs less than fetching a value that is overlaid.
_LASTS = Statement(
    text(
        _VALUES.format(step="(SELECT MAX(x.step) FROM report x WHERE x.attempt_id = a.id AND x.step >= 0)")
        + " AND NOT EXISTS (SELECT 1 FROM report f JOIN metric g ON g.report_id = f.id"
        f" WHERE f.attempt_id = a.id AND f.step = {FINAL_STEP} AND g.name = m.name)"
    )
)

_STATUSES = {status.value: status for status in TrialStatus}


@repeatable
def load(reader: Reader, *, first: int = 0) -> Columns:
    """Return the trials with numbers from ``first`` that ended with or without scores, in three or four statements.

    COMPLETED and PRUNED ones have their last canonical report, overlaid by the final record, as scores; FAILED and TIMED_OUT
    ones None.
    """
    scope = {"experiment": reader.experiment, "first": first}
    with reader.database.snapshot() as state:
        rows = state.run(_LOADED, **scope)
        lasts, finals = state.run(_LASTS, **scope), state.run(_FINALS, **scope)
        retried = any(row[3] > 1 for row in rows)
        inherited = state.run(_INHERITED, since=-1, last=ALL, **scope) if retried else []
    scores: dict[int, Metrics] = {}
    _inherit(inherited, scores, {})
    for values in (lasts, finals):
        for number, name, kind, value, words in values:
            found = value if kind == "float" and value is not None else from_row(kind, value, words)
            if number in scores:
                scores[number][name] = found
            else:
                scores[number] = {name: found}
    statuses = [_STATUSES[row[1]] for row in rows]
    return (
        [row[0] for row in rows],
        loads(f"[{','.join([row[2] for row in rows])}]"),  # at once: a call costs more than what it parses
        [scores.get(row[0], {}) if status in SCORED else None for row, status in zip(rows, statuses, strict=True)],
        statuses,
        [row[4] for row in rows],
    )


def listed(trials: Sequence[Trial], *, left_out: int = 0) -> LoadedTrials:
    """Return trials as lists; merged ones under the numbers that they have where they come from."""
    return LoadedTrials(
        ids=[trial.number if trial.origin is None else Origin.parse(trial.origin).number for trial in trials],
        configs=[trial.config for trial in trials],
        scores=[trial.metrics if trial.status in SCORED else None for trial in trials],
        statuses=[trial.status for trial in trials],
        origins=[trial.origin for trial in trials],
        left_out=left_out,
    )
