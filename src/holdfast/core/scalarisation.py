"""Several objectives as one number, by weights: for the one trial that is to be taken from a front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from holdfast.core.errors import InvalidInput
from holdfast.core.objective import Direction, Objective

SCALARISATIONS = ("sum", "chebyshev")
"""How weighted objectives become one number."""

RHO = 0.05
"""What the sum counts beside the maximum of ``chebyshev``: it decides between points of one maximum, so that none of them is
dominated (the augmented form: Steuer and Choo 1983, Mathematical Programming 26)."""


def checked_weights(weights: Mapping[str, float], objectives: Sequence[Objective]) -> list[float]:
    """Return a weight per objective, the largest one 1; InvalidInput for what are no weights of them.

    An objective that is not named has the weight 0.
    """
    names = [objective.name for objective in objectives]
    allowed = f"give numbers of at least 0, one of them above it, to {', '.join(map(repr, names))}"
    if not isinstance(weights, Mapping):
        raise InvalidInput(f"weights is a {type(weights).__name__}; {allowed}, as in {{{names[0]!r}: 1.0}}")
    for name, weight in weights.items():
        if name not in names:
            raise InvalidInput(f"weights names {name!r}, which is no objective; {allowed}")
        number = not isinstance(weight, bool) and isinstance(weight, (int, float)) and abs(weight) <= 1e300
        if not number or weight < 0:
            raise InvalidInput(f"the weight of {name!r} is {weight!r}; {allowed}")
    found = [float(weights.get(name, 0.0)) for name in names]
    largest = max(found, default=0.0)
    if largest <= 0.0:
        raise InvalidInput(f"every weight is 0; {allowed}")
    return [weight / largest for weight in found]


def checked_scalarisation(scalarisation: str) -> str:
    """Return the name of a scalarisation; InvalidInput when it is none."""
    if scalarisation not in SCALARISATIONS:
        raise InvalidInput(f"scalarisation is {scalarisation!r}; allowed: {', '.join(SCALARISATIONS)}")
    return scalarisation


def scalarised(
    points: Sequence[Sequence[float]], objectives: Sequence[Objective], weights: Sequence[float], scalarisation: str = "sum"
) -> list[float]:
    """Return one number per point, less is better; ``weights`` are those of :func:`checked_weights`.

    Each objective is taken from 0, the best value among the points, to 1, the worst one (0 where all are equal). ``sum`` adds
    the weighted objectives up; ``chebyshev`` takes their maximum, plus :data:`RHO` times their sum: it finds points of a front
    that is not convex, too.
    """
    columns = (
        [_normalised(column, objective) for column, objective in zip(zip(*points, strict=True), objectives, strict=True)]
        if points
        else []
    )
    found = []
    for point in zip(*columns, strict=True):
        parts = [weight * value for weight, value in zip(weights, point, strict=True)]
        total = math.fsum(parts)
        found.append(total if scalarisation == "sum" else max(parts) + RHO * total)
    return found


def _normalised(column: Sequence[float], objective: Objective) -> list[float]:
    halves = [0.5 * value for value in column]  # of the whole ones the range may exceed that of floats
    low, high = min(halves), max(halves)
    span = high - low
    if span <= 0.0:
        return [0.0] * len(halves)
    if objective.direction is Direction.MIN:
        return [(value - low) / span for value in halves]
    return [(high - value) / span for value in halves]
