"""Population based training: who goes on from whom after a generation, and with what. Pure, over the stored reports.

A generation is ``interval`` steps of every member. What is decided at its end depends on the members' configs and values at
that step and on seeds alone: not on how many members ran at once, or on crashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Self

from holdfast.core.counted import index_of, nth_value, values_of
from holdfast.core.expression import Expression
from holdfast.core.objective import Direction, Objective, goal_of, score
from holdfast.core.search_section import PopulationSection
from holdfast.core.seeding import derive
from holdfast.core.space import CategoricalParameter, ConstantParameter, FloatParameter, IntParameter, Parameter, Space
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import Trial
from holdfast.core.values import Config, Scalar

TRIES = 20
"""How often a config is perturbed anew while it breaks a constraint; then the donor's stays as it is."""

Draw = Callable[[Parameter, Random], Scalar]
"""Gives a parameter a new value: ``engines.random_engine.draw``."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A member that goes on from another one's checkpoint, with the other's config perturbed."""

    trial: int
    donor: int
    """the other one's number"""
    step: int
    """of the checkpoint"""
    config: Config
    changes: dict[str, tuple[Scalar, Scalar]] = field(default_factory=dict)
    """what differs from the donor's config: (there, here); None for a parameter that is inactive"""

    @property
    def note(self) -> str:
        """The change in words: ``goes on from trial 3 at step 9: lr 0.1 -> 0.08``."""
        words = f"goes on from trial {self.donor} at step {self.step}"
        return f"{words}: {described(self.changes)}" if self.changes else words


def described(changes: Mapping[str, Sequence[Scalar]]) -> str:
    """Return changes of parameters as words: ``lr 0.1 -> 0.08, layers 2 -> 3``."""
    return ", ".join(f"{name} {_shown(before)} -> {_shown(after)}" for name, (before, after) in changes.items())


def _shown(value: Scalar) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "none" if value is None else str(value)


@dataclass(frozen=True)
class Population:
    """The rules of one experiment's population."""

    settings: PopulationSection
    space: Space
    constraints: tuple[Expression, ...]
    objective: Objective
    """what members are compared by"""
    seed: int
    last: int | None = None
    """steps of a trial in all; None: trials end by themselves"""

    @classmethod
    def of(cls, spec: ExperimentSpec, seed: int) -> Self | None:
        """Return the population of ``spec``, or None when its trials are on their own."""
        if spec.population is None:
            return None
        return cls(
            settings=spec.population,
            space=spec.space,
            constraints=tuple(Expression(text, spec.space.parameters) for text in spec.constraints),
            objective=goal_of(spec.population.metric, spec.population.higher_is_better, spec.goals),
            seed=seed,
            last=spec.stopping.max_steps,
        )

    def end(self, generation: int) -> int:
        """Return the last step of a generation (from 0)."""
        return (generation + 1) * self.settings.interval - 1

    def holds(self, step: int, generation: int) -> bool:
        """Tell whether a member that has done ``step`` has come to the end of ``generation``, and has more to do."""
        return step >= self.end(generation) and (self.last is None or step + 1 < self.last)

    def evolved(self, generation: int, members: Sequence[Trial], draw: Draw) -> list[Change]:
        """Return what becomes of ``members``, who wait at the end of ``generation``: who changes, in number order.

        The worst ``quantile`` of them, but at least one of two, go on from members of the best ``quantile``. Ties go by
        number; NaN, infinite and missing values are worst, and nobody goes on from a member that has none. A member that has
        passed over the last step of the generation takes no part: it has neither a value nor a checkpoint there.
        """
        order = ranking([trial for trial in members if trial.step == self.end(generation)], self.objective)
        count = max(1, math.floor(self.settings.quantile * len(order))) if len(order) > 1 else 0
        donors = [trial for trial in order[:count] if value_of(trial, self.objective) is not None]
        if not donors:
            return []
        changes = []
        for trial in sorted(order[len(order) - count :], key=lambda one: one.number):
            random = Random(derive(self.seed, "exploit", generation, trial.number))
            donor = donors[int(random.random() * len(donors))]
            config = self.explore(donor.config, draw, derive(self.seed, "explore", generation, trial.number))
            changes.append(
                Change(
                    trial=trial.number,
                    donor=donor.number,
                    step=self.end(generation),
                    config=config,
                    changes=difference(donor.config, config),
                )
            )
        return changes

    def explore(self, config: Config, draw: Draw, seed: int) -> Config:
        """Return ``config`` with its parameters perturbed or drawn anew; it keeps the space's conditions and constraints."""
        for attempt in range(TRIES):
            explored = self.space.validate_config(self._explored(config, draw, Random(derive(seed, attempt))))
            if all(not condition.applies(explored) or condition.holds(explored) for condition in self.constraints):
                return explored
        return dict(config)

    def _explored(self, config: Config, draw: Draw, random: Random) -> Config:
        explored: Config = {}
        for name, parameter in self.space.parameters.items():
            if not self.space.is_active(name, explored):
                continue
            if name not in config:  # active only now
                explored[name] = draw(parameter, random)
            elif isinstance(parameter, ConstantParameter) or not self._may_change(name):
                explored[name] = config[name]
            elif random.random() < self.settings.resample:
                explored[name] = draw(parameter, random)
            else:
                factor = self.settings.factors[int(random.random() * len(self.settings.factors))]
                explored[name] = perturbed(parameter, config[name], factor)
        return explored

    def _may_change(self, name: str) -> bool:
        return not self.settings.parameters or name in self.settings.parameters


def ends_generation(settings: PopulationSection | None, step: int, last: int | None = None) -> bool:
    """Tell whether members wait for each other after ``step``; not after the last one of a trial of ``last`` steps."""
    return settings is not None and (step + 1) % settings.interval == 0 and (last is None or step + 1 < last)


def value_of(trial: Trial, objective: Objective) -> float | None:
    """Return the value that a member is ranked by; None when there is no finite one."""
    value = score(trial.metrics, objective)
    return value if value is not None and math.isfinite(value) else None


def ranking(members: Sequence[Trial], objective: Objective) -> list[Trial]:
    """Return the members, the best first; equal ones by number, those without a finite value last."""

    def place(trial: Trial) -> tuple[float, int]:
        value = value_of(trial, objective)
        if value is None:
            return math.inf, trial.number
        return (value if objective.direction is Direction.MIN else -value), trial.number

    return sorted(members, key=place)


def difference(before: Mapping[str, Scalar], after: Mapping[str, Scalar]) -> dict[str, tuple[Scalar, Scalar]]:
    """Return the parameters that differ, with both values; None stands for one that is inactive."""
    names = [*after, *(name for name in before if name not in after)]
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] or type(pair[0]) is not type(pair[1])}


def perturbed(parameter: Parameter, value: Scalar, factor: float) -> Scalar:
    """Return ``value`` times ``factor`` within the bounds; a whole number moves by 1 at least.

    A stepped number, and an ordered choice, moves to a neighbour: up with a factor of 1 or more. Other choices stay.
    """
    match parameter:
        case CategoricalParameter(ordered=True):
            place = next(index for index, choice in enumerate(parameter.choices) if parameter_same(choice, value))
            return parameter.choices[_neighbour(place, len(parameter.choices), up=factor >= 1)]
        case FloatParameter() | IntParameter() if parameter.step not in (None, 1):
            return _stepped(parameter, value, up=factor >= 1)
        case IntParameter():
            assert isinstance(value, int)
            exact = value * factor
            moved = round(exact) if math.isfinite(exact) else value
            if moved == value and factor != 1:
                moved = value + (1 if (factor > 1) == (value >= 0) else -1)
            return min(max(moved, parameter.low), parameter.high)
        case FloatParameter():
            assert isinstance(value, int | float)
            return min(max(float(value) * factor, parameter.low), parameter.high)
        case _:
            return value


def parameter_same(left: Scalar, right: Scalar) -> bool:
    """Compare with types: 1, 1.0 and True are three values."""
    return type(left) is type(right) and left == right


def _neighbour(place: int, count: int, *, up: bool) -> int:
    """Return the place beside ``place``: at an end the one that there is."""
    beside = place + 1 if up else place - 1
    if not 0 <= beside < count:
        beside = 2 * place - beside
    return min(max(beside, 0), count - 1)


def _stepped(parameter: FloatParameter | IntParameter, value: Scalar, *, up: bool) -> Scalar:
    assert isinstance(value, int | float)
    place = _neighbour(index_of(parameter, value), values_of(parameter), up=up)
    return nth_value(parameter, place)
