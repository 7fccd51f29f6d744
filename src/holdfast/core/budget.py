"""The budget: how much more a search may start."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from holdfast.core.objective import Direction, Objective, feasible, score
from holdfast.core.space import Space
from holdfast.core.spec import ExperimentSpec
from holdfast.core.values import Metrics


def has_conditions(space: Space) -> bool:
    return any(parameter.when for parameter in space.parameters.values())


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits on a search; each is None when it is no limit."""

    num_trials: int | None
    """trials in all, queued ones included"""
    proposals: int | None = None
    """trials that the engine has to give (a grid's size): queued ones and the spec's points take none of them away"""
    time_budget: float | None = None
    """seconds of active time"""
    target: float | None = None
    plateau: int | None = None
    """so many scored trials in a row without a better value of the objective"""
    min_delta: float = 0.0
    """by how much a value must be better to end a plateau"""
    max_cost: float | None = None
    cost_metric: str = "cost"
    feasible: tuple[str, ...] = ()
    """conditions on the metrics of a trial whose value counts"""
    objective: Objective

    @classmethod
    def of(cls, spec: ExperimentSpec, *, grid_size: int | None = None) -> Self:
        """Return the budget of ``spec``; a grid (of ``grid_size`` trials, samples included) never has more than its size."""
        return cls(
            num_trials=spec.search.num_trials,
            proposals=grid_size,
            time_budget=spec.search.time_budget,
            target=spec.search.target,
            plateau=spec.search.plateau,
            min_delta=spec.search.min_delta,
            max_cost=spec.search.max_cost,
            cost_metric=spec.search.cost_metric,
            feasible=spec.feasible,
            objective=spec.goals[0],
        )

    def value(self, metrics: Metrics) -> float | None:
        """Return what a scored trial counts with: its finite value of the objective, or None, also when it is infeasible."""
        value = score(metrics, self.objective)
        return value if value is not None and math.isfinite(value) and feasible(metrics, self.feasible) else None

    def cost(self, metrics: Metrics) -> float:
        """Return what a trial has cost so far: its last value of the cost's metric; what is no positive number counts as 0."""
        value = score(metrics, Objective(name=self.cost_metric)) or 0.0
        return value if math.isfinite(value) and value > 0.0 else 0.0

    def flat(self, values: Iterable[float | None]) -> int:
        """Return how many of ``values`` (see :meth:`value`) came in a row, at the end, since the last one that was better.

        Better is what is better than the last one that counted by more than ``min_delta``. Before the first value that counts
        there is no plateau.
        """
        return self.level(values)[0]

    def level(self, values: Iterable[float | None], count: int = 0, best: float | None = None) -> tuple[int, float | None]:
        """Return what :meth:`flat` does, and the last value that was better; ``count`` and ``best`` are those so far."""
        margin = self.min_delta if self.objective.direction is Direction.MIN else -self.min_delta
        for value in values:
            if value is not None and (best is None or self.objective.better(value, best - margin)):
                best, count = value, 0
            elif best is not None:
                count += 1
        return count, best

    def closed(
        self, *, trials: int, proposed: int, active_seconds: float, best: float | None, flat: int = 0, cost: float = 0.0
    ) -> str | None:
        """Return why no further trial may be proposed, or None.

        ``proposed`` of the ``trials`` came from the proposer; ``flat`` is the plateau's length, ``cost`` that of all trials.
        """
        if self.num_trials is not None and trials >= self.num_trials:
            return "every trial of the budget was proposed"
        if self.proposals is not None and proposed >= self.proposals:
            return "every trial of the budget was proposed"
        if self.time_budget is not None and active_seconds >= self.time_budget:
            return f"the time budget of {self.time_budget:g} s is used up"
        if self.target is not None and best is not None and self.objective.reached(best, self.target):
            return f"the target {self.target:g} is reached"
        if self.plateau is not None and flat >= self.plateau:
            return f"the plateau of {self.plateau} trials is reached: none of the last {flat} was better than what came before"
        if self.max_cost is not None and cost >= self.max_cost:
            return f"the cost of {self.max_cost:g} is reached: the trials' {self.cost_metric} sums up to {cost:g}"
        return None
