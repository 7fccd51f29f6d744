"""Stopping rules: pure functions of the stored reports that say when a trial is not worth its next step.

After step s, s + 1 steps are done; all numbers of steps here are steps done. A decision looks at the canonical reports that
were committed before, and at the report that is decided about: never at clocks, the order in which trials ended, or earlier
decisions. A report without the rule's metric, or with something else than a number there, is not decided about. NaN
counts as the worst value.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from holdfast.core.history import History, Series
from holdfast.core.objective import Direction, Objective, goal_of
from holdfast.core.stopping_section import RuleSection, StoppingSection


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What every rule has."""

    goal: Objective
    """the metric, and which way is better"""
    min_steps: int

    def decide(self, history: History, trial: int, step: int) -> str | None:
        """Return why the trial ends after its report of ``step``, which is its newest in ``history``, or None."""
        own = history.of(self.goal.name, trial)
        if not own.steps or own.steps[-1] != step:
            return None
        return self._judge(history, trial, own, own.before(step), step + 1)

    def _judge(self, history: History, trial: int, own: Series, before: int, done: int) -> str | None:
        """Decide about the newest value of ``own``: ``done`` steps are done, and ``before`` were at the report before it."""
        raise NotImplementedError  # abstract: each rule below has its own

    def cost(self, value: float) -> float:
        """Return a value such that less is better."""
        if math.isnan(value):
            return math.inf
        return value if self.goal.direction is Direction.MIN else -value

    def _value(self, cost: float) -> float:
        """Return the value that has this cost."""
        return cost if self.goal.direction is Direction.MIN else -cost

    def _ended(self, name: str, done: int, why: str) -> str:
        return f"stopped by {name} after step {done - 1}: {self.goal.name} {why}"


@dataclass(frozen=True, kw_only=True)
class Asha(Rule):
    """Asynchronous successive halving: of those that come to a rung, one of ``reduction_factor`` goes on.

    Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", MLSys; here in the stopping form, in which a trial
    is judged once, when it comes to a rung, and never waits: as Ray Tune's ``ASHAScheduler`` and Optuna's
    ``SuccessiveHalvingPruner`` do it. Rungs are at ``min_steps * reduction_factor ** k`` steps, below ``max_steps`` where that
    is given. Of n trials with a value at the rung, the own one included, it goes on among the best
    max(1, n // reduction_factor); equal values go on together. A trial that reports at sparse steps is judged by its first
    report at or beyond the rung. NaN never goes on.
    """

    reduction_factor: int
    max_steps: int | None

    def _judge(self, history: History, trial: int, own: Series, before: int, done: int) -> str | None:
        value = own.values[-1]
        for rung in self._rungs(trial, before, done):
            at_rung = (series.since(rung - 1) for number, series in history.trials(self.goal.name) if self._with(trial, number))
            costs = sorted(self.cost(found) for found in at_rung if found is not None)
            best = max(1, len(costs) // self.reduction_factor)
            cut = costs[best - 1]
            if math.isnan(value) or self.cost(value) > cut:
                why = f"{value:.6g} is not among the best {best} of {len(costs)} at {rung} steps{self._words(trial)}"
                return self._ended(self._name, done, f"{why}, the last of which is {self._value(cut):.6g}")
        return None

    @property
    def _name(self) -> str:
        return "asha"

    def _rungs(self, trial: int, before: int, done: int) -> Iterator[int]:
        """Yield the rungs that the newest report has come to."""
        rung = self._first(trial)
        while rung <= done and (self.max_steps is None or rung < self.max_steps):
            if rung > before:
                yield rung
            rung *= self.reduction_factor

    def _first(self, trial: int) -> int:
        return self.min_steps

    def _with(self, trial: int, other: int) -> bool:
        """Tell whether two trials are compared."""
        return True

    def _words(self, trial: int) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class Hyperband(Asha):
    """Hyperband: brackets of successive halving that differ in how early they begin to stop trials.

    Li et al. 2018, "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization", JMLR 18; asynchronous as in Li et
    al. 2020. Bracket b has its first rung at ``min_steps * reduction_factor ** b``, and there are as many as fit into
    ``max_steps``. A trial's bracket follows from its number alone: a checksum, weighted by the number of configs that Hyperband
    starts in each bracket, which is what Optuna's ``HyperbandPruner`` does. Only trials of one bracket are compared.
    """

    @cached_property
    def _weights(self) -> tuple[int, ...]:
        count, rung = 1, self.min_steps * self.reduction_factor
        while self.max_steps is not None and rung <= self.max_steps:
            count, rung = count + 1, rung * self.reduction_factor
        return tuple(math.ceil(count * self.reduction_factor**left / (left + 1)) for left in range(count - 1, -1, -1))

    def bracket(self, trial: int) -> int:
        """Return the bracket of a trial: 0 is the one that stops the most."""
        place = binascii.crc32(f"hyperband_{trial}".encode()) % sum(self._weights)
        for number, weight in enumerate(self._weights):
            place -= weight
            if place < 0:
                return number
        raise AssertionError("the place is below the sum of the weights")

    @property
    def _name(self) -> str:
        return "hyperband"

    def _first(self, trial: int) -> int:
        return self.min_steps * int(self.reduction_factor ** self.bracket(trial))

    def _with(self, trial: int, other: int) -> bool:
        return self.bracket(trial) == self.bracket(other)

    def _words(self, trial: int) -> str:
        return f" in bracket {self.bracket(trial)}"


@dataclass(frozen=True, kw_only=True)
class Percentile(Rule):
    """A trial whose best value so far is worse than a percentile of the others' values at the same step ends.

    The median is the rule of Golovin et al. 2017, "Google Vizier: A Service for Black-Box Optimization", KDD, in the form of
    Optuna's ``MedianPruner`` and ``PercentilePruner``: values at the step itself, no running averages. Others are all trials
    that have reported that very step, whether they have ended or not: at least ``startup_trials`` of them. Percentiles
    are interpolated linearly, as numpy does it.
    """

    name: str
    percentile: float
    startup_trials: int
    interval: int

    def _judge(self, history: History, trial: int, own: Series, before: int, done: int) -> str | None:
        if not _due(before, done, self.min_steps, self.interval):
            return None
        at_step = history.at(self.goal.name, done - 1)
        others = sorted(self.cost(value) for number, value in at_step.items() if number != trial)
        if len(others) < self.startup_trials:
            return None
        best = min(self.cost(value) for value in own.values)
        cut = percentile_of(others, self.percentile)
        if not best > cut and not all(map(math.isnan, own.values)):
            return None
        shown = self._value(best) if math.isfinite(best) else own.values[-1]
        what = "median" if self.name == "median" else f"best {self.percentile:g} %"
        why = f"at best {shown:.6g} so far, {self._value(cut):.6g} is the {what} of {len(others)} others"
        return self._ended(self.name, done, why)


@dataclass(frozen=True, kw_only=True)
class Patience(Rule):
    """A trial without a better value in ``patience`` steps ends.

    Prechelt 1998, "Early Stopping - But When?", as in Keras's ``EarlyStopping``: a value counts as better when it is better
    than the last one that counted by more than ``min_delta``. Optuna's ``PatientPruner`` without another pruner decides
    alike with a patience of one less, where no two values are equal and ``min_delta`` is 0.
    """

    patience: int
    min_delta: float

    def _judge(self, history: History, trial: int, own: Series, before: int, done: int) -> str | None:
        if done < self.min_steps:
            return None
        best, since = self.cost(own.values[0]), own.steps[0]
        for step, value in zip(own.steps, own.values, strict=True):
            cost = self.cost(value)
            if cost < best - self.min_delta:
                best, since = cost, step
        waited = done - 1 - since
        if waited < self.patience:
            return None
        than = f"{self._value(best):.6g} of step {since}"
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return self._ended("patience", done, f"{own.values[-1]:.6g}, not better than {than}{by} for {waited} steps")


@dataclass(frozen=True, kw_only=True)
class Threshold(Rule):
    """A trial whose value leaves the range, or is NaN, ends: as with Optuna's ``ThresholdPruner``."""

    lower: float | None
    upper: float | None
    interval: int

    def _judge(self, history: History, trial: int, own: Series, before: int, done: int) -> str | None:
        if not _due(before, done, self.min_steps, self.interval):
            return None
        value = own.values[-1]
        if math.isnan(value):
            return self._ended("threshold", done, "is NaN")
        if self.lower is not None and value < self.lower:
            return self._ended("threshold", done, f"{value:.6g} is below {self.lower:g}")
        if self.upper is not None and value > self.upper:
            return self._ended("threshold", done, f"{value:.6g} is above {self.upper:g}")
        return None


def _due(before: int, done: int, first: int, interval: int) -> bool:
    """Tell whether a report is the first one at or beyond a multiple of ``interval``, and not before ``first``."""
    return done >= first and done // interval > before // interval


def percentile_of(ordered: Sequence[float], percentile: float) -> float:
    """Return a percentile of ascending values, interpolated linearly with numpy's own arithmetic."""
    place = (len(ordered) - 1) * (percentile / 100.0)
    below = math.floor(place)
    part = place - below
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    if part == 0.0 or low == high:
        return low
    if math.isinf(low) or math.isinf(high):
        return high  # between a number and none: fewer trials end
    return high - (high - low) * (1.0 - part) if part >= 0.5 else low + (high - low) * part


@dataclass(frozen=True)
class Rules:
    """A spec's rules: the first one that ends a trial counts."""

    rules: tuple[Rule, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that the history must hold."""
        return tuple(dict.fromkeys(rule.goal.name for rule in self.rules))

    def __bool__(self) -> bool:
        return bool(self.rules)

    def decide(self, history: History, trial: int, step: int) -> str | None:
        """Return why the trial ends after its report of ``step``, which is its newest in ``history``, or None."""
        return next((reason for rule in self.rules if (reason := rule.decide(history, trial, step))), None)


def make(stopping: StoppingSection, objectives: Sequence[Objective]) -> Rules:
    """Return the rules of a spec with these objectives."""
    sections: tuple[RuleSection, ...] = () if stopping.rule == "none" else (stopping, *stopping.also)
    return Rules(tuple(_rule(section, objectives, stopping.max_steps) for section in sections))


def _rule(section: RuleSection, objectives: Sequence[Objective], max_steps: int | None) -> Rule:
    goal, least = goal_of(section.metric, section.higher_is_better, objectives), section.min_steps
    match section.rule:
        case "asha":
            return Asha(goal=goal, min_steps=least, reduction_factor=section.reduction_factor, max_steps=max_steps)
        case "hyperband":
            return Hyperband(goal=goal, min_steps=least, reduction_factor=section.reduction_factor, max_steps=max_steps)
        case "median" | "percentile":
            return Percentile(
                goal=goal,
                min_steps=least,
                name=section.rule,
                percentile=50.0 if section.rule == "median" else section.percentile,
                startup_trials=section.startup_trials,
                interval=section.interval,
            )
        case "patience":
            return Patience(goal=goal, min_steps=least, patience=section.patience, min_delta=section.min_delta)
        case "threshold":
            return Threshold(goal=goal, min_steps=least, lower=section.lower, upper=section.upper, interval=section.interval)
        case "none":
            raise AssertionError("none is no rule")
