"""Which trials are best: candidates for it, the best one, the front, the point that hypervolumes refer to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from holdfast.core.hypervolume import hypervolume
from holdfast.core.objective import Direction, Objective, feasible, pareto, score, scores, violation
from holdfast.core.scalarisation import checked_scalarisation, checked_weights, scalarised
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ERRORED, SCORED, Trial

Values = Callable[[Trial], Sequence[float] | None]
"""What counts of a trial: a finite value per objective, or None when it has none."""

_ENDED_BADLY = ERRORED | SCORED  # the latter where there are no values


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A config that can be the best: a trial, or the trials that repeat one config, as one."""

    members: tuple[Trial, ...]
    """the scored trials that count, in number order"""
    values: tuple[float, ...]
    """of each objective; the aggregate over the members"""

    @property
    def trial(self) -> Trial:
        """The first member, which stands for all."""
        return self.members[0]


def group_of(trial: Trial) -> int:
    """Return the number of the first of the trials that repeat one config; a trial that stands alone is its own."""
    return trial.number if trial.group is None else trial.group


def aggregate(values: Sequence[float], how: str, objective: Objective) -> float:
    """Return the mean, the median or the worst of one objective's finite values."""
    if how == "worst":
        return max(values) if objective.direction is Direction.MIN else min(values)
    return median(values) if how == "median" else mean(values)


def mean(values: Sequence[float]) -> float:
    """Return the mean of finite values, whose sum may exceed the range of floats."""
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.fsum(value / len(values) for value in values)


def median(values: Sequence[float]) -> float:
    """Return the median of finite values; of an even number the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else mean(ordered[half - 1 : half + 1])


def candidates(
    trials: Iterable[Trial],
    objectives: Sequence[Objective],
    conditions: Sequence[str] = (),
    how: str = "mean",
    *,
    values: Values | None = None,
) -> list[Candidate]:
    """Return what can be best, by the number of the trial that stands for it.

    Trials count that are COMPLETED or PRUNED and have a finite value of every objective. Those of one group are one
    candidate, which is feasible when each of them meets every condition; the worst of a group is no candidate when one of
    them errored, or ended without such values.
    """
    groups: dict[int, list[tuple[Trial, Sequence[float]]]] = {}
    spoiled = set()
    for trial in trials:
        found = None
        if trial.status in SCORED:
            found = scores(trial.metrics, objectives) if values is None else values(trial)
        if found is not None:
            groups.setdefault(group_of(trial), []).append((trial, found))
        elif how == "worst" and trial.status in _ENDED_BADLY:
            spoiled.add(group_of(trial))
    result = []
    for group, members in groups.items():
        members.sort(key=lambda member: member[0].number)
        if group in spoiled:
            continue
        if conditions and not all(feasible(trial.metrics, conditions) for trial, _ in members):
            continue
        if len(members) == 1:
            point = tuple(members[0][1])
        else:
            columns = zip(*(found for _, found in members), strict=True)
            point = tuple(aggregate(column, how, goal) for column, goal in zip(columns, objectives, strict=True))
        if all(map(math.isfinite, point)):
            result.append(Candidate(members=tuple(trial for trial, _ in members), values=point))
    return sorted(result, key=lambda candidate: candidate.trial.number)


def candidates_of(trials: Iterable[Trial], spec: ExperimentSpec) -> list[Candidate]:
    """Return what can be best by the spec's objectives, its conditions on metrics and its aggregate of repeats."""
    return candidates(trials, spec.goals, spec.feasible, spec.search.aggregate)


def ranked(
    found: Sequence[Candidate],
    objectives: Sequence[Objective],
    weights: Mapping[str, float] | None = None,
    scalarisation: str = "sum",
) -> list[tuple[float, Candidate]]:
    """Return candidates, best first (ties: the earliest), each with what it is ranked by: less is better with weights.

    That is the first objective, or with ``weights`` all of them as one number, over the ranges of ``found``. InvalidInput for
    what are no weights, or no scalarisation.
    """
    checked_scalarisation(scalarisation)
    if weights is None:
        numbers = [candidate.values[0] for candidate in found]
        sign = 1.0 if objectives[0].direction is Direction.MIN else -1.0
    else:
        numbers = scalarised(
            [candidate.values for candidate in found], objectives, checked_weights(weights, objectives), scalarisation
        )
        sign = 1.0
    return sorted(zip(numbers, found, strict=True), key=lambda pair: sign * pair[0])  # stable: the earliest stays first


def front_of(found: Sequence[Candidate], objectives: Sequence[Objective]) -> list[Candidate]:
    """Return the candidates that no other one dominates, in their order; equal ones are all kept."""
    return [found[place] for place in pareto([candidate.values for candidate in found], objectives)]


def best_of(
    trials: Iterable[Trial], objectives: Sequence[Objective], conditions: Sequence[str] = (), how: str = "mean"
) -> Trial | None:
    """Return the trial that stands for the best candidate by the first objective (ties: the earliest), or None."""
    order = ranked(candidates(trials, objectives, conditions, how), objectives)
    return order[0][1].trial if order else None


def reference_point(trials: Iterable[Trial], spec: ExperimentSpec) -> tuple[float, ...] | None:
    """Return the point up to which the hypervolume counts, None while there is none.

    The spec's ``search.reference_point``, else the worst finite value of each objective among the COMPLETED and PRUNED trials,
    feasible or not.
    """
    if spec.search.reference_point is not None:
        return tuple(spec.search.reference_point[goal.name] for goal in spec.goals)
    scored = [trial.metrics for trial in trials if trial.status in SCORED]
    worst = []
    for goal in spec.goals:
        values = [value for metrics in scored if (value := score(metrics, goal)) is not None and math.isfinite(value)]
        if not values:
            return None
        worst.append(aggregate(values, "worst", goal))
    return tuple(worst)


def volume_of(found: Sequence[Candidate], objectives: Sequence[Objective], reference: Sequence[float] | None) -> float:
    """Return the hypervolume of candidates; 0 without a reference point."""
    return 0.0 if reference is None else hypervolume((candidate.values for candidate in found), reference, objectives)


def nearest(trials: Iterable[Trial], spec: ExperimentSpec) -> tuple[Trial, float] | None:
    """Return the trial that breaks the spec's conditions least, and the sum of its violations (ties: the earliest).

    Of a group it is the one that breaks them most, since all have to meet them. None when no trial has a finite value of every
    objective, so that it could be a candidate if it were feasible.
    """
    groups: dict[int, tuple[float, int, Trial]] = {}
    for trial in trials:
        if trial.status in SCORED and scores(trial.metrics, spec.goals) is not None:
            broken = (violation(trial.metrics, spec.feasible), -trial.number, trial)
            group = group_of(trial)
            groups[group] = max(groups.get(group, broken), broken, key=lambda item: item[:2])
    if not groups:
        return None
    least = min(groups.values(), key=lambda item: (item[0], -item[1]))
    return least[2], least[0]
