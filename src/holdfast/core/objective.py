"""Objectives: which metrics count, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from holdfast.core.expression import Expression
from holdfast.core.values import Json


class Direction(StrEnum):
    MIN = "min"
    MAX = "max"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One metric to be minimised or maximised."""

    name: str
    direction: Direction = Direction.MIN

    def better(self, left: float, right: float) -> bool:
        """Tell whether ``left`` is strictly better than ``right``; NaN is never better."""
        return left < right if self.direction is Direction.MIN else left > right

    def reached(self, value: float, target: float) -> bool:
        """Tell whether ``value`` is at least as good as ``target``."""
        return value == target or self.better(value, target)


def goal_of(metric: str | None, higher_is_better: bool | None, objectives: Sequence[Objective]) -> Objective:
    """Return what is looked at: null is the first objective, and the direction of the objective of that name, or the first."""
    name = objectives[0].name if metric is None else metric
    named = next((objective for objective in objectives if objective.name == name), objectives[0])
    if higher_is_better is None:
        return Objective(name=name, direction=named.direction)
    return Objective(name=name, direction=Direction.MAX if higher_is_better else Direction.MIN)


def score(metrics: Mapping[str, Json], objective: Objective) -> float | None:
    """Return the objective's value as a float, or None when it is missing or no number (bool is none)."""
    value = metrics.get(objective.name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond the range of floats
        return math.inf if value > 0 else -math.inf


def scores(metrics: Mapping[str, Json], objectives: Sequence[Objective]) -> list[float] | None:
    """Return every objective's finite value in order, or None when one is missing, no number, NaN or infinite."""
    values = [score(metrics, objective) for objective in objectives]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return finite if len(finite) == len(objectives) else None


def pareto(points: Sequence[Sequence[float]], objectives: Sequence[Objective]) -> list[int]:
    """Return the places of the points that no other one dominates, ascending; equal points stand or fall together.

    A point dominates another when it is nowhere worse and somewhere better. In lexicographic order a dominator comes first,
    so that each point is compared with the front so far alone; with two objectives with its last point, which is the best by
    the second one.
    """
    signs = [1.0 if objective.direction is Direction.MIN else -1.0 for objective in objectives]
    costs = [tuple(sign * value for sign, value in zip(signs, point, strict=True)) for point in points]
    front: list[tuple[float, ...]] = []
    kept = []
    for place in sorted(range(len(costs)), key=costs.__getitem__):
        cost = costs[place]
        if front and front[-1] == cost:
            kept.append(place)
            continue
        rivals = front[-1:] if len(signs) <= 2 else reversed(front)
        if not any(all(ours <= theirs for ours, theirs in zip(other, cost, strict=True)) for other in rivals):
            front.append(cost)
            kept.append(place)
    return sorted(kept)


def missing(metrics: Mapping[str, Json], objectives: Sequence[Objective]) -> list[str]:
    """Return the names of the objectives that are not in ``metrics``."""
    return [objective.name for objective in objectives if objective.name not in metrics]


def no_numbers(metrics: Mapping[str, Json], objectives: Sequence[Objective]) -> dict[str, Json]:
    """Return the values of the objectives that are in ``metrics`` and no numbers (NaN is one, a bool is none)."""
    given = [objective for objective in objectives if objective.name in metrics]
    return {objective.name: metrics[objective.name] for objective in given if score(metrics, objective) is None}


def feasible(metrics: Mapping[str, Json], conditions: Sequence[str]) -> bool:
    """Tell whether ``metrics`` meet every condition; a condition on a metric that is missing, or NaN, is not met."""
    return violation(metrics, conditions) <= 0.0 if conditions else True


def violation(metrics: Mapping[str, Json], conditions: Sequence[str]) -> float:
    """Return by how much ``metrics`` break the conditions, summed up: 0 when they meet all, infinite when that is unknown."""
    return sum(max(one, 0.0) for one in violations(metrics, conditions))


def violations(metrics: Mapping[str, Json], conditions: Sequence[str]) -> list[float]:
    """Return how far ``metrics`` are from meeting each condition: 0 or less when they do, infinite when that is unknown."""
    return [_violation(metrics, _parsed(text)) for text in conditions]


def _violation(metrics: Mapping[str, Json], condition: Expression) -> float:
    for name in condition.names:
        if name not in metrics or metrics[name] != metrics[name]:
            return math.inf
    return condition.violation(metrics)


@lru_cache(maxsize=256)
def _parsed(text: str) -> Expression:
    return Expression(text)
