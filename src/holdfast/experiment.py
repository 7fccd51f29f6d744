"""The handle on a stored experiment: read and manage it without running anything."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from holdfast.core.checkpoint import Checkpoint
from holdfast.core.errors import InvalidInput
from holdfast.core.objective import Objective, scores
from holdfast.core.space import Space
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ACTIVE, ERRORED, SCORED, Trial, TrialStatus
from holdfast.core.values import Config, Metrics
from holdfast.locate import Opened
from holdfast.storage.database import requests
from holdfast.storage.database.leases import Lease, Leases
from holdfast.storage.database.reads import AuditRow, Reader, ReportRow

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LoadedTrials:
    """Trials as four lists (ids, configs, scores, statuses), into which it unpacks."""

    ids: list[int]
    configs: list[Config]
    scores: list[Metrics | None]
    statuses: list[TrialStatus]
    origins: list[str | None]

    def __iter__(self) -> Iterator[list[Any]]:
        return iter((self.ids, self.configs, self.scores, self.statuses))


class Experiment:
    """A stored experiment. Closes its database connections when used as a context manager, or by :meth:`close`."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._reader = Reader(opened.database, opened.record.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the handle opens new ones when it is used again."""
        self._opened.close()

    @property
    def id(self) -> str:
        """The UUID, which never changes."""
        return self._opened.record.uuid

    @property
    def name(self) -> str:
        return self._opened.record.name

    @property
    def path(self) -> Path | str:
        """The folder, or the URL on an object store."""
        return self._opened.folder.place

    @property
    def spec(self) -> ExperimentSpec:
        return self._opened.spec

    @property
    def space(self) -> Space:
        return self.spec.space

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return self.spec.goals

    @property
    def description(self) -> str:
        return self.spec.description

    @property
    def spec_source(self) -> str | None:
        """The text of the file that the spec was read from, or None."""
        return self._opened.record.spec_source

    @property
    def lease(self) -> Lease:
        """Who drives the experiment now."""
        return Leases(self._opened.database, self._opened.record.id).look()

    @property
    def trials(self) -> list[Trial]:
        """Every trial in number order."""
        return self._reader.trials()

    @property
    def status(self) -> str:
        """running, interrupted, stopped, completed or failed: derived from the lease and the trials, never stored."""
        from holdfast.storage.database.experiments import by_uuid

        record = by_uuid(self._opened.database, self.id)
        counts = self._reader.counts()
        if self.lease.is_held:
            return "running"
        unfinished = sum(counts.get(status, 0) for status in ACTIVE)
        if record is not None and record.ended is not None and record.ended.startswith("stopped"):
            return "stopped"
        if unfinished or record is None or record.ended is None or record.ended.startswith("interrupted"):
            return "interrupted"
        errored = sum(counts.get(status, 0) for status in ERRORED)
        return "failed" if errored and errored == sum(counts.values()) else "completed"

    def counts(self) -> dict[TrialStatus, int]:
        """Return how many trials have each status that occurs."""
        return self._reader.counts()

    def trial(self, number: int) -> Trial:
        """Return one trial; InvalidInput when there is none of that number."""
        found = self._reader.trial(number)
        if found is None:
            raise InvalidInput(f"there is no trial {number} in {self.name!r}")
        return found

    def best_trial(self) -> Trial | None:
        """Return the COMPLETED or PRUNED trial with the best finite first objective (ties: the earliest), or None."""
        return best_of(self.trials, self.objectives)

    def load(self, last_trial_id: int = -1) -> LoadedTrials:
        """Return trials with numbers above ``last_trial_id`` that have ended with or without scores.

        COMPLETED and PRUNED ones have their metrics as scores, FAILED and TIMED_OUT ones None; others are not listed.
        """
        listed = [
            trial for trial in self._reader.trials(first=last_trial_id + 1) if trial.status in SCORED or trial.status in ERRORED
        ]
        return LoadedTrials(
            ids=[trial.number for trial in listed],
            configs=[trial.config for trial in listed],
            scores=[trial.metrics if trial.status in SCORED else None for trial in listed],
            statuses=[trial.status for trial in listed],
            origins=[trial.origin for trial in listed],
        )

    def pending_trials(self, timestamp: datetime, *, running: bool) -> list[Trial]:
        """Return the waiting trials that are due at ``timestamp`` (inclusive; aware), with running ones when asked."""
        if timestamp.tzinfo is None:
            raise InvalidInput(f"timestamp {timestamp.isoformat()} has no time zone; add one")
        wanted = {TrialStatus.PENDING, TrialStatus.RUNNING} if running else {TrialStatus.PENDING}
        return [
            trial for trial in self.trials if trial.status in wanted and (trial.ts_start is None or trial.ts_start <= timestamp)
        ]

    def load_telemetry(self, trial: int) -> list[tuple[datetime, str, Any]]:
        """Return a trial's measurements: (UTC time, name, value), ordered by time and name."""
        return [row[1:] for row in self._reader.telemetry(first=trial, last=trial)]

    def load_config(self, config_id: int) -> Config:
        """Return the config of an id; InvalidInput when there is none."""
        found = self._reader.config(config_id)
        if found is None:
            raise InvalidInput(f"there is no config {config_id}; trials have .config_id")
        return found

    def checkpoints(self) -> list[Checkpoint]:
        """Return every checkpoint's row by trial, attempt and step."""
        return self._reader.checkpoints()

    def history(self) -> list[ReportRow]:
        """Return every report by trial, step and attempt; superseded ones are flagged."""
        return self._reader.history()

    def audit(self) -> list[AuditRow]:
        """Return who did what to the experiment, oldest first."""
        return self._reader.audit()

    def results_df(self) -> pd.DataFrame:
        """Return one row a trial: number, status, config.<param> and metric.<name> columns, step, attempts, error.

        Every parameter of the space and every objective has its column, whether a trial has a value or not.
        """
        return results_df(self.trials, self.spec)

    def history_df(self) -> pd.DataFrame:
        """Return one row a report: trial, attempt, step, reported, canonical, metric.<name> columns."""
        history = self.history()
        rows = [
            {
                "trial": row.trial,
                "attempt": row.attempt,
                "step": row.step,
                "reported": row.reported,
                "canonical": row.canonical,
                **{f"metric.{name}": value for name, value in row.metrics.items()},
            }
            for row in history
        ]
        metrics = _columns("metric", self.spec.objectives, [row.metrics for row in history])
        return _frame(rows, ["trial", "attempt", "step", "reported", "canonical", *metrics])

    def stop(self, *, wait: float = 0.0) -> bool:
        """Ask the driver to save and stop; wait up to ``wait`` seconds. Return whether nobody drives it now."""
        if not self.lease.is_held:
            return True
        requests.request_stop(self._opened.database, self._opened.record.id)
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and self.lease.is_held:
            time.sleep(0.2)
        return not self.lease.is_held

    def cancel(self, trial: int) -> None:
        """Ask for one waiting or running trial to be ended; Conflict when it has ended already."""
        requests.request_cancel(self._opened.database, self._opened.record.id, trial)


def best_of(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Trial | None:
    """Return the best of the scored trials by the first objective, or None when no one has finite values."""
    best: tuple[float, Trial] | None = None
    for trial in trials:
        values = scores(trial.metrics, objectives) if trial.status in SCORED else None
        if values is not None and (best is None or objectives[0].better(values[0], best[0])):
            best = (values[0], trial)
    return best[1] if best else None


def results_df(trials: Sequence[Trial], spec: ExperimentSpec) -> pd.DataFrame:
    """Return one row a trial; see :meth:`Experiment.results_df`."""
    rows = [
        {
            "trial": trial.number,
            "status": trial.status.value,
            **{f"config.{name}": value for name, value in trial.config.items()},
            **{f"metric.{name}": value for name, value in trial.metrics.items()},
            "step": trial.step,
            "attempts": trial.attempts,
            "error": trial.error.message if trial.error else None,
        }
        for trial in trials
    ]
    configs = _columns("config", spec.space.parameters, [trial.config for trial in trials])
    metrics = _columns("metric", spec.objectives, [trial.metrics for trial in trials])
    return _frame(rows, ["trial", "status", *configs, *metrics, "step", "attempts", "error"])


def _columns(prefix: str, declared: Iterable[str], found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the columns of declared names, in that order, and of all others that occur, by name."""
    first = list(declared)
    others = {name for values in found for name in values}
    return [f"{prefix}.{name}" for name in [*first, *sorted(others.difference(first))]]


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Return a table of numeric columns where all values are numbers, and of plain objects where they are not."""
    import pandas as pd

    values = {name: [row.get(name) for row in rows] for name in columns}
    return pd.DataFrame({name: pd.Series(column, dtype=_dtype(column)) for name, column in values.items()})


def _dtype(column: Sequence[Any]) -> Any:
    kinds = {type(value) for value in column}
    numbers = kinds - {type(None)}
    if float in numbers and numbers <= {float, int}:
        return "float64"  # what is missing is NaN
    if numbers == {int} and all(abs(value) < 2**63 for value in column if value is not None):
        return "int64" if kinds == numbers else "Int64"
    return "bool" if kinds == {bool} else None if kinds == {datetime} else object


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search or restore leaves: every trial of every status."""

    name: str
    path: Path | str
    trials: list[Trial]
    best: Trial | None
    reason: str
    """why it ended"""
    spec: ExperimentSpec = field(repr=False)
    fast_failed: bool = False

    @property
    def errors(self) -> list[Trial]:
        """The errored trials."""
        return [trial for trial in self.trials if trial.status in ERRORED]

    @property
    def failed(self) -> bool:
        """Whether the search as a whole failed: ``fail_fast`` ended it, or every trial errored."""
        return self.fast_failed or (bool(self.trials) and len(self.errors) == len(self.trials))

    def results_df(self) -> pd.DataFrame:
        """Return one row a trial."""
        return results_df(self.trials, self.spec)


def result_of(opened: Opened, reason: str, *, fast_failed: bool = False) -> SearchResult:
    """Read the result of an experiment as it stands."""
    trials = Reader(opened.database, opened.record.id).trials()
    return SearchResult(
        name=opened.record.name,
        path=opened.folder.place,
        trials=trials,
        best=best_of(trials, opened.spec.goals),
        reason=reason,
        spec=opened.spec,
        fast_failed=fast_failed,
    )
