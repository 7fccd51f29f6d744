"""Tables of trials, reports and telemetry as pandas frames; pandas is imported when one is made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from holdfast.core.errors import InvalidInput
from holdfast.core.hypervolume import hypervolumes
from holdfast.core.objective import Direction, feasible
from holdfast.core.ranking import candidates_of, front_of, group_of, mean, median, reference_point
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ERRORED, FINISHED, SCORED, Trial
from holdfast.core.values import Json
from holdfast.storage.database.reads import ReportRow

if TYPE_CHECKING:
    import pandas as pd

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": mean,
    "median": median,
    "min": min,
    "max": max,
    "std": lambda values: statistics.stdev(values) if len(values) > 1 else 0.0,
}
"""How the numbers of a group become one; std is the sample's, 0 for a single trial."""

_ENDED = FINISHED | ERRORED


def results_df(
    trials: Sequence[Trial], spec: ExperimentSpec, *, aggregate: str | None = None, ended: Sequence[int] = ()
) -> pd.DataFrame:
    """Return one row a trial, or with ``aggregate`` one a group; see :meth:`holdfast.Experiment.results_df`.

    ``ended`` are the numbers of the trials in the order in which they ended; what it lacks follows by ``seq``.
    """
    if aggregate is not None:
        return _groups_df(trials, spec, aggregate)
    rows = [
        {
            "trial": trial.number,
            "status": trial.status.value,
            "group": group_of(trial),
            "repeat": trial.repeat,
            **_prefixed("config", trial.config),
            **_prefixed("metric", trial.metrics),
            "step": trial.step,
            "attempts": trial.attempts,
            "error": trial.error.message if trial.error else None,
        }
        for trial in trials
    ]
    configs = _columns("config", spec.space.parameters, [trial.config for trial in trials])
    metrics = _columns("metric", spec.objectives, [trial.metrics for trial in trials])
    table = _frame(rows, ["trial", "status", "group", "repeat", *configs, *metrics, "step", "attempts", "error"])
    if spec.feasible:
        table["feasible"] = [trial.status in SCORED and feasible(trial.metrics, spec.feasible) for trial in trials]
    if len(spec.objectives) > 1:
        _add_front(table, trials, spec, ended)
    return table


def _add_front(table: pd.DataFrame, trials: Sequence[Trial], spec: ExperimentSpec, ended: Sequence[int]) -> None:
    """Add the columns ``pareto`` and ``hypervolume``.

    Repeats of one config join the front as one, when the last one of them that counts has ended; the hypervolume of trials
    that did not end is NaN.
    """
    found = candidates_of(trials, spec)
    front = {candidate.trial.number for candidate in front_of(found, spec.goals)}
    table["pareto"] = [trial.number in front for trial in trials]
    point = reference_point(trials, spec)
    table.attrs["reference_point"] = None if point is None else dict(zip(spec.objectives, point, strict=True))
    order = {number: place for place, number in enumerate(ended)}
    moments = {trial.number: (order.get(trial.number, len(order)), trial.seq) for trial in trials if trial.status in _ENDED}
    joined = {max(candidate.members, key=lambda trial: moments[trial.number]).number: candidate.values for candidate in found}
    numbers = sorted(moments, key=moments.__getitem__)
    nowhere = (math.nan,) * len(spec.goals)
    values = [joined.get(number, nowhere) for number in numbers]
    volumes = [0.0] * len(values) if point is None else hypervolumes(values, point, spec.goals)
    after = dict(zip(numbers, volumes, strict=True))
    table["hypervolume"] = [after.get(trial.number, math.nan) for trial in trials]


def groups_df(trials: Sequence[Trial], spec: ExperimentSpec) -> pd.DataFrame:
    """Return one row a group with every aggregate of the objectives; see :meth:`holdfast.Experiment.groups_df`."""
    parts = {how: _groups_df(trials, spec, how) for how in AGGREGATES}
    table = parts["mean"]
    table = table[[name for name in table.columns if not name.startswith("metric.")]].copy()
    for goal in spec.goals:
        worst = "max" if goal.direction is Direction.MIN else "min"
        for name, how in (("mean", "mean"), ("median", "median"), ("std", "std"), ("worst", worst)):
            table[f"metric.{goal.name}.{name}"] = parts[how][f"metric.{goal.name}"]
    return table


def _groups_df(trials: Sequence[Trial], spec: ExperimentSpec, aggregate: str) -> pd.DataFrame:
    if aggregate not in AGGREGATES:
        raise InvalidInput(f"aggregate is {aggregate!r}; allowed: {', '.join(AGGREGATES)}")
    groups: dict[int, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(group_of(trial), []).append(trial)
    rows, configs, metrics = [], [], []
    for number, members in groups.items():
        values = _aggregated([trial.metrics for trial in members if trial.status in SCORED], AGGREGATES[aggregate])
        configs.append(members[0].config)
        metrics.append(values)
        rows.append(
            {
                "group": number,
                "trials": len(members),
                "scored": sum(trial.status in SCORED for trial in members),
                "errored": sum(trial.status in ERRORED for trial in members),
                **_prefixed("config", members[0].config),
                **_prefixed("metric", values),
            }
        )
    columns = [*_columns("config", spec.space.parameters, configs), *_columns("metric", spec.objectives, metrics)]
    return _frame(rows, ["group", "trials", "scored", "errored", *columns])


def _aggregated(found: Sequence[Mapping[str, Json]], aggregate: Callable[[Sequence[float]], float]) -> dict[str, Json]:
    """Return one value of each metric; what is no number, or NaN, is left out, and a metric without any number is None."""
    values: dict[str, list[float]] = {}
    for metrics in found:
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
                values.setdefault(name, []).append(value)
    return {name: _one(numbers, aggregate) for name, numbers in values.items()}


def _one(numbers: Sequence[float], aggregate: Callable[[Sequence[float]], float]) -> float:
    try:
        return aggregate(numbers)
    except (OverflowError, AttributeError, ValueError):  # beyond the range of floats; statistics stumbles over infinities
        return float("nan")


def history_df(history: Sequence[ReportRow], spec: ExperimentSpec) -> pd.DataFrame:
    """Return one row a report; see :meth:`holdfast.Experiment.history_df`."""
    rows = [
        {
            "trial": row.trial,
            "attempt": row.attempt,
            "step": row.step,
            "reported": row.reported,
            "canonical": row.canonical,
            **_prefixed("metric", row.metrics),
        }
        for row in history
    ]
    metrics = _columns("metric", spec.objectives, [row.metrics for row in history])
    return _frame(rows, ["trial", "attempt", "step", "reported", "canonical", *metrics])


def telemetry_df(rows: Sequence[tuple[int, datetime, str, Any]]) -> pd.DataFrame:
    """Return one row a measurement: trial, time, name, value."""
    columns = ["trial", "time", "name", "value"]
    return _frame([dict(zip(columns, row, strict=True)) for row in rows], columns)


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


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
