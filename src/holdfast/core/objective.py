"""Objectives: which metrics count, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

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


def missing(metrics: Mapping[str, Json], objectives: Sequence[Objective]) -> list[str]:
    """Return the names of the objectives that have no number in ``metrics`` (NaN is a number)."""
    return [objective.name for objective in objectives if score(metrics, objective) is None]
