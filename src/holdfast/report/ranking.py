"""What people and programs are shown of the best trials: the best ones, the Pareto front, and why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from holdfast.core.expression import Expression
from holdfast.core.objective import Direction
from holdfast.core.ranking import Candidate, candidates_of, front_of, nearest, ranked, reference_point, volume_of
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import SCORED, Trial
from holdfast.core.values import strict
from holdfast.experiment import Experiment
from holdfast.report.holders import lease_json
from holdfast.report.tables import COLOURS, add_numbers, brief, config_words, summary_json, trial_json
from holdfast.report.working import execution_json, workers_json

LEADERS = 5
"""Rows of the best trials."""

FRONT = 20
"""Rows of a Pareto front."""


class Ranking:
    """The best trials of one state of an experiment; InvalidInput for ``weights`` that are none."""

    def __init__(
        self,
        trials: Sequence[Trial],
        spec: ExperimentSpec,
        weights: Mapping[str, float] | None = None,
        scalarisation: str = "sum",
    ) -> None:
        self._trials = trials
        self._spec = spec
        self._weights = weights
        self._scalarisation = scalarisation
        self._candidates = candidates_of(trials, spec)
        self._order = ranked(self._candidates, spec.goals, weights, scalarisation)
        self.best = self._order[0][1].trial if self._order else None

    def json(self) -> dict[str, Any]:
        """Return ``best``; with several objectives ``pareto``, ``reference_point`` and ``hypervolume``, too."""
        found: dict[str, Any] = {"best": None if self.best is None else trial_json(self.best)}
        closest = self._closest()
        if closest is not None:
            found["least_infeasible"] = {"number": closest[0].number, "violation": strict(closest[1])}
        if len(self._spec.objectives) > 1:
            point = reference_point(self._trials, self._spec)
            front = front_of(self._candidates, self._spec.goals)
            found["pareto"] = [
                {**trial_json(candidate.trial), "values": dict(zip(self._spec.objectives, candidate.values, strict=True))}
                for candidate in front
            ]
            found["reference_point"] = None if point is None else dict(zip(self._spec.objectives, point, strict=True))
            found["reference_point_from"] = self._source()
            found["hypervolume"] = strict(volume_of(front, self._spec.goals, point))
        return found

    def parts(self) -> Iterator[str | Table]:
        """Yield lines and tables: what is best, and with several objectives the front."""
        if not self._candidates:
            closest = self._closest()
            if closest is not None:
                yield f"best:    none, {self._why(*closest)}"
            elif any(trial.status in SCORED for trial in self._trials) and nearest(self._trials, self._spec) is None:
                yield f"best:    none, no trial has ended with a finite value of {' and '.join(self._spec.objectives)}"
            return
        if self._weights is not None:
            words = ", ".join(f"{name} {weight:g}" for name, weight in self._weights.items())
            yield f"best:    trial {self._order[0][1].trial.number}, by the weights {words} ({self._scalarisation})"
        if any(len(candidate.members) > 1 for candidate in self._candidates):
            yield f"repeats: of trials with one config the {self._spec.search.aggregate} is shown, beside the first of them"
        if self._weights is not None:
            yield self._table([candidate for _, candidate in self._order[:LEADERS]], [value for value, _ in self._order])
        elif len(self._spec.objectives) == 1:
            yield self._table([candidate for _, candidate in self._order[:LEADERS]])
        if len(self._spec.objectives) > 1:
            yield from self._front()

    def _front(self) -> Iterator[str | Table]:
        goals, point = self._spec.goals, reference_point(self._trials, self._spec)
        front = front_of(self._candidates, goals)
        sign = 1.0 if goals[0].direction is Direction.MIN else -1.0
        front.sort(key=lambda candidate: (sign * candidate.values[0], candidate.trial.number))
        volume = volume_of(front, goals, point)
        assert point is not None  # a candidate has a finite value of every objective
        words = ", ".join(f"{name} {brief(value)}" for name, value in zip(self._spec.objectives, point, strict=True))
        several = "s" if len(front) > 1 else ""
        yield f"front:   {len(front)} trial{several} that no other one dominates, best {goals[0].name} first"
        yield f"volume:  {brief(volume)}, the hypervolume up to {words} ({self._source()})"
        yield self._table(front[:FRONT])
        if len(front) > FRONT:
            yield f"{len(front) - FRONT} more trials are on the front: --json has every one"

    def _source(self) -> str:
        return "the worst values seen" if self._spec.search.reference_point is None else "search.reference_point"

    def _table(self, found: Sequence[Candidate], sums: Sequence[float] | None = None) -> Table:
        """Return candidates as a table: number, status, the number that ranks them, objectives, repeats, step, config."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("trial", justify="right", no_wrap=True)
        table.add_column("status", no_wrap=True)
        if sums is not None:
            table.add_column("weighted", justify="right", no_wrap=True)
        for place, goal in enumerate(self._spec.goals):
            add_numbers(table, goal.name, [brief(candidate.values[place]) for candidate in found])
        repeated = any(len(candidate.members) > 1 for candidate in found)
        if repeated:
            table.add_column("repeats", justify="right", no_wrap=True)
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("config", overflow="fold")
        for place, candidate in enumerate(found):
            trial = candidate.trial
            table.add_row(
                str(trial.number),
                Text(trial.status.value, style=COLOURS.get(trial.status, "")),
                *([] if sums is None else [brief(sums[place])]),
                *(brief(value) for value in candidate.values),
                *([str(len(candidate.members))] if repeated else []),
                "" if trial.step is None else str(trial.step),
                Text(config_words(trial)),
            )
        return table

    def _closest(self) -> tuple[Trial, float] | None:
        """Return the trial that comes nearest to being feasible, and how far it is from it, when no one is."""
        found = None if self._candidates or not self._spec.feasible else nearest(self._trials, self._spec)
        return found if found is not None and found[1] > 0.0 else None

    def _why(self, trial: Trial, far: float) -> str:
        conditions = " and ".join(self._spec.feasible)
        words = f"no trial is feasible ({conditions}); trial {trial.number} comes nearest"
        if math.isfinite(far):
            return f"{words}: its violations sum up to {brief(far)}"
        lacks = sorted({name for text in self._spec.feasible for name in Expression(text).names} - trial.metrics.keys())
        return f"{words}: it has no {', '.join(lacks)}" if lacks else f"{words}: its metrics are no numbers that tell how far"


def show_json(experiment: Experiment, weights: Mapping[str, float] | None = None, scalarisation: str = "sum") -> dict[str, Any]:
    """Return an experiment as ``show --json`` prints it."""
    ranking = Ranking(experiment.trials, experiment.spec, weights, scalarisation)
    search = experiment.spec.search
    engine = {"engine": search.engine, "chosen": search.chosen or None}
    drive = {"lease": lease_json(experiment), "ended": experiment.ended}
    ancestors = {"ancestors": experiment._opened.folder.identity().ancestors}  # the same package
    elsewhere = {**execution_json(experiment.spec.execution), "workers": workers_json(experiment)}
    return {**summary_json(experiment), **ancestors, **drive, **elsewhere, **engine, **ranking.json()}
