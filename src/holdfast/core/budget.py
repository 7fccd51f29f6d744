"""The budget: how much more a search may start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from holdfast.core.objective import Objective
from holdfast.core.space import Parameter, Space
from holdfast.core.spec import ExperimentSpec


def values_of(parameter: Parameter) -> int:
    """Return how many values a grid gives ``parameter``."""
    match parameter.type:
        case "categorical":
            return len(parameter.choices)
        case "int":
            return (parameter.high - parameter.low) // (parameter.step or 1) + 1
        case "float":
            if parameter.step is None:
                return 1
            return math.floor((parameter.high - parameter.low) / parameter.step + 1e-9) + 1
        case _:
            return 1


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
    objective: Objective

    @classmethod
    def of(cls, spec: ExperimentSpec, *, grid_size: int | None = None) -> Self:
        """Return the budget of ``spec``; a grid (of ``grid_size`` trials, samples included) never has more than its size."""
        return cls(
            num_trials=spec.search.num_trials,
            proposals=grid_size,
            time_budget=spec.search.time_budget,
            target=spec.search.target,
            objective=spec.goals[0],
        )

    def closed(self, *, trials: int, proposed: int, active_seconds: float, best: float | None) -> str | None:
        """Return why no further trial may be proposed, or None; ``proposed`` of the ``trials`` came from the proposer."""
        if self.num_trials is not None and trials >= self.num_trials:
            return "every trial of the budget was proposed"
        if self.proposals is not None and proposed >= self.proposals:
            return "every trial of the budget was proposed"
        if self.time_budget is not None and active_seconds >= self.time_budget:
            return f"the time budget of {self.time_budget:g} s is used up"
        if self.target is not None and best is not None and self.objective.reached(best, self.target):
            return f"the target {self.target:g} is reached"
        return None
