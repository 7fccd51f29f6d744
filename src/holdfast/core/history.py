"""What stopping rules look at: the canonical reports of an experiment's own trials, of the metrics that the rules name."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from holdfast.core.objective import Objective, score
from holdfast.core.values import Json


@dataclass
class Series:
    """One trial's values of one metric, by rising step; values that are not finite are kept."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def since(self, step: int) -> float | None:
        """Return the value of the first report at or beyond ``step``, or None."""
        place = bisect_left(self.steps, step)
        return self.values[place] if place < len(self.steps) else None

    def before(self, step: int) -> int:
        """Return how many steps were done at the last report before ``step``; 0 when there is none."""
        place = bisect_left(self.steps, step)
        return self.steps[place - 1] + 1 if place else 0


class History:
    """The values that were reported, by metric, trial and step; the same whether rebuilt from rows or kept up to date.

    Only reports that count are in it: when a trial's next attempt goes back behind some, what is left is loaded anew. Reports
    without the metric, or with something else than a number there, are not in it. Not safe for several threads.
    """

    def __init__(self, metrics: Iterable[str] = ()) -> None:
        self._goals = {name: Objective(name=name) for name in metrics}
        self._series: dict[str, dict[int, Series]] = {name: {} for name in self._goals}
        self._at: dict[str, dict[int, dict[int, float]]] = {name: {} for name in self._goals}

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self._goals)

    def add(self, trial: int, step: int, metrics: Mapping[str, Json]) -> None:
        """Take in one report, which is the trial's newest."""
        for name, goal in self._goals.items():
            value = score(metrics, goal)
            if value is not None:
                self._add(name, trial, step, value)

    def _add(self, metric: str, trial: int, step: int, value: float) -> None:
        series = self._series[metric].setdefault(trial, Series())
        series.steps.append(step)
        series.values.append(value)
        self._at[metric].setdefault(step, {})[trial] = value

    def load(self, metric: str, rows: Iterable[tuple[int, int, float]]) -> None:
        """Take in (trial, step, value) of reports; the steps of each trial rise."""
        for trial, step, value in rows:
            self._add(metric, trial, step, value)

    def withdraw(self, trial: int, step: int) -> None:
        """Take a trial's newest report out again: it was not committed."""
        for name, by_trial in self._series.items():
            series = by_trial.get(trial)
            if series is not None and series.steps and series.steps[-1] == step:
                series.steps.pop()
                series.values.pop()
                self._drop(name, trial, step)

    def forget(self, trial: int) -> None:
        """Take all of a trial's reports out."""
        for name, by_trial in self._series.items():
            for step in by_trial.pop(trial, Series()).steps:
                self._drop(name, trial, step)

    def _drop(self, metric: str, trial: int, step: int) -> None:
        at = self._at[metric][step]
        del at[trial]
        if not at:
            del self._at[metric][step]

    def of(self, metric: str, trial: int) -> Series:
        """Return a trial's values; not to be changed."""
        return self._series[metric].get(trial) or Series()

    def trials(self, metric: str) -> Iterator[tuple[int, Series]]:
        """Yield the trials that have reported, and their values."""
        return ((trial, series) for trial, series in self._series[metric].items() if series.steps)

    def at(self, metric: str, step: int) -> Mapping[int, float]:
        """Return the values that were reported at exactly ``step``, by trial."""
        return self._at[metric].get(step, {})

    def contents(self) -> dict[str, dict[int, list[tuple[int, float]]]]:
        """Return all of it: (step, value) by metric and trial, in the order of trials."""
        return {
            name: {
                trial: list(zip(series.steps, series.values, strict=True))
                for trial, series in sorted(by_trial.items())
                if series.steps
            }
            for name, by_trial in self._series.items()
        }
