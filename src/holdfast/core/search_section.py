"""The spec's section ``search``: where configs come from, how many, and when there are enough."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from holdfast.core.space import Number, Section, Whole
from holdfast.core.spelling import hint
from holdfast.core.values import Scalar

ENGINES = ("auto", "random", "grid", "sobol", "halton", "tpe", "gp", "cmaes", "nsga2", "nsga3")
"""The engines that holdfast brings along."""

_OWN = re.compile(r"(?:[^:\s][^:]*\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*")

Engine = Annotated[
    str,
    WithJsonSchema({"anyOf": [{"enum": list(ENGINES)}, {"type": "string", "pattern": f"^{_OWN.pattern}$"}], "type": "string"}),
]


def is_own(engine: str) -> bool:
    """Tell whether ``engine`` names a user's class: ``file.py:Class`` or ``package.module:Class``."""
    return engine not in ENGINES


class SearchSection(Section):
    """How configs are proposed, and how many."""

    engine: Engine = Field(
        default="tpe", description="where proposals come from; or an own one, by file.py:Class or module:Class"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="of the engine")
    chosen: str = Field(default="", description="why auto chose this engine; written when the experiment is created")
    points: tuple[dict[str, Scalar], ...] = Field(
        default=(), description="configs that are tried first, each once; what one lacks has its parameter's default"
    )
    num_trials: Whole | None = Field(default=None, ge=0, description="trials in all; a grid's default is its size")
    samples: Whole = Field(default=1, ge=1, description="trials per point of a grid")
    repeats: Whole = Field(
        default=1, ge=1, description="trials per config, each with a seed of its own; the engine is told one result"
    )
    aggregate: Literal["mean", "median", "worst"] = Field(default="mean", description="the one result of a config's repeats")
    seed: Whole | None = Field(
        default=None, ge=0, lt=2**63, description="gives every other seed; drawn once and stored when absent"
    )
    max_concurrent: Whole = Field(default=1, ge=1, le=1000, description="trials that run at once")
    time_budget: Number | None = Field(default=None, gt=0, description="seconds of active time; no trial is started after it")
    target: Number | None = Field(default=None, description="stop proposing once the first objective is at least this good")
    plateau: Whole | None = Field(
        default=None, ge=1, description="stop proposing once so many trials have ended without a better value than before them"
    )
    min_delta: Number = Field(default=0.0, ge=0, description="by how much a value must be better to end a plateau")
    max_cost: Number | None = Field(
        default=None, gt=0, description="stop proposing once the trials' last values of cost_metric sum up to it"
    )
    cost_metric: str = Field(
        default="cost", min_length=1, description="what max_cost sums up: each trial reports what it has cost so far"
    )
    reference_point: dict[str, Number] | None = Field(
        default=None, description="a value per objective, beyond which nothing counts for the hypervolume; null: the worst seen"
    )

    @property
    def ends(self) -> bool:
        """Whether something is said that ends the search, whatever the engine."""
        limits = (self.num_trials, self.time_budget, self.target, self.plateau, self.max_cost)
        return any(limit is not None for limit in limits)

    @field_validator("engine")
    @classmethod
    def _known(cls, engine: str) -> str:
        if engine in ENGINES or _OWN.fullmatch(engine):
            return engine
        words = f"{', '.join(ENGINES)}, file.py:Class, package.module:Class"
        raise ValueError(f"{engine!r}{hint(engine, ENGINES)} is no engine; allowed: {words}")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.samples > 1 and self.engine != "grid":
            raise ValueError(f"samples is for a grid; with {self.engine} use repeats")
        if self.samples > 1 and self.repeats > 1:
            raise ValueError(
                "samples and repeats exclude each other: samples are whole passes over the grid, repeats run at once"
            )
        return self


class PopulationSection(Section):
    """Population based training: members that do badly go on from better ones' checkpoints with changed parameters.

    Jaderberg et al. 2017, arXiv:1711.09846. The trials of ``num_trials`` are the members; the engine gives their first
    configs.
    """

    interval: Whole = Field(ge=1, description="steps between two looks at the population")
    quantile: Number = Field(default=0.25, gt=0, le=0.5, description="so large a part is replaced, by members of the best part")
    resample: Number = Field(
        default=0.25, ge=0, le=1, description="probability that a parameter is drawn anew instead of perturbed"
    )
    factors: tuple[Number, ...] = Field(default=(0.8, 1.2), min_length=1, description="by one of which a number is multiplied")
    parameters: tuple[str, ...] = Field(default=(), description="those that may change; none named: all of them")
    metric: str | None = Field(
        default=None, min_length=1, description="what members are compared by; null: the first objective"
    )
    higher_is_better: bool | None = Field(
        default=None, description="null: as the objective of that name says, else the first one"
    )

    @field_validator("factors")
    @classmethod
    def _above_zero(cls, factors: tuple[float, ...]) -> tuple[float, ...]:
        if any(factor <= 0 for factor in factors):
            raise ValueError(f"factors must be above 0, not {list(factors)}; 0.8 and 1.2 are usual")
        return factors
