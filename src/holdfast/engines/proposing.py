"""What stands around every engine: repeats of a config, and the spec's points. Rebuilt from the stored trials, as engines are.

Outermost are the repeats, so that points are repeated, too: all that is inside of them sees one trial per config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from holdfast.core.expression import Expression
from holdfast.core.objective import Objective, score, scores, violation
from holdfast.core.ports import Proposal, Proposer, as_proposal
from holdfast.core.ranking import aggregate
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ACTIVE, SCORED, UNFINISHED, Trial, TrialStatus
from holdfast.core.values import Config, Json, Metrics, Scalar

PRESET = "preset"
QUEUED = "queued"


class Points:
    """Proposes the spec's points first, each once, then what the engine does; the engine is told of them as of queued trials.

    The trials whose source is ``preset`` are the points that were tried, in their order: no other state is needed.
    """

    def __init__(self, inner: Proposer, points: Sequence[Config]) -> None:
        self._inner = inner
        self._points = points
        self._tried: set[int] = set()

    @property
    def size(self) -> int | None:
        return self._inner.size

    def observe(self, trial: Trial) -> None:
        if trial.number >= 0 and trial.source == PRESET:
            self._tried.add(trial.number)
        self._inner.observe(trial)

    def propose(self, number: int) -> Proposal:
        place = len(self._tried)
        if place < len(self._points):
            return Proposal(config=dict(self._points[place]), source=PRESET)
        return as_proposal(self._inner.propose(number))


class Repeats:
    """Turns the trials of one config into one trial for what is inside: with dense numbers, and their aggregated metrics.

    A group that was proposed has ``repeats`` members, one from the queue as many as were queued. Until all of them are there
    and have ended, the group is RUNNING. The inner proposer is told of changes when it is asked next, in number order.
    """

    def __init__(self, inner: Proposer, spec: ExperimentSpec) -> None:
        self._inner = inner
        self._repeats = spec.search.repeats
        self._aggregate = Aggregate(spec)
        self._groups: dict[int, dict[int, Trial]] = {}
        """members by number, by the number of the first"""
        self._others = 0
        """members that are not the first of their group"""
        self._changed: set[int] = set()
        self._places: dict[int, int] = {}
        """the inner number of each group that the inner proposer knows"""
        self._incomplete: set[int] = set()
        """groups that were proposed and lack members"""

    @property
    def size(self) -> int | None:
        return None if self._inner.size is None else self._inner.size * self._repeats

    def observe(self, trial: Trial) -> None:
        if trial.number < 0:
            self._inner.observe(trial)
            return
        first = trial.number if trial.group is None else trial.group
        members = self._groups.setdefault(first, {})
        self._others += trial.number != first and trial.number not in members
        members[trial.number] = trial
        self._changed.add(first)
        if len(members) < self._expected(members[first]):
            self._incomplete.add(first)
        else:
            self._incomplete.discard(first)

    def propose(self, number: int) -> Proposal | Mapping[str, Scalar]:
        if self._incomplete:
            return self._missing(min(self._incomplete))
        for first in sorted(self._changed):
            self._inner.observe(self._as_one(first))
        self._changed.clear()
        offered = as_proposal(self._inner.propose(number - self._others))
        if self._repeats > 1:
            return replace(offered, group=number, repeat=0)
        return offered.config if offered == Proposal(config=offered.config) else offered

    def _expected(self, first: Trial) -> int:
        """Return how many members a group has, by its first."""
        return self._repeats if first.source != QUEUED and first.group is not None else 1

    def _missing(self, first: int) -> Proposal:
        members = self._groups[first]
        known = {trial.repeat for trial in members.values()}
        repeat = next(place for place in range(len(members) + 1) if place not in known)
        return Proposal(config=dict(members[first].config), source=members[first].source, group=first, repeat=repeat)

    def _as_one(self, first: int) -> Trial:
        """Return a group as the one trial that it is for the inner proposer."""
        members = self._groups[first]
        place = self._places.setdefault(first, len(self._places))
        trial = members[first]
        if len(members) == 1 and self._expected(trial) == 1:
            return trial if trial.number == place else replace(trial, number=place, group=None)
        whole = len(members) >= self._expected(trial)
        status, metrics = self._aggregate(list(members.values())) if whole else (TrialStatus.RUNNING, Metrics())
        return replace(trial, number=place, group=None, repeat=0, status=status, metrics=metrics)


class Aggregate:
    """What a group of trials of one config comes to, as one trial.

    Mean and median are over the members that have a finite value of every objective; the worst of a group with a member that
    failed, or ended without such a value, is a failure. Members that were cancelled or skipped say nothing.
    """

    def __init__(self, spec: ExperimentSpec) -> None:
        self._how = spec.search.aggregate
        self._goals = spec.goals
        self._conditions = spec.feasible
        known = {goal.name for goal in self._goals}
        self._others = sorted({name for text in self._conditions for name in Expression(text).names} - known)
        """metrics in conditions that are no objectives"""

    def __call__(self, members: Sequence[Trial]) -> tuple[TrialStatus, Metrics]:
        """Return the group's status and metrics."""
        if any(trial.status in ACTIVE for trial in members):
            return TrialStatus.RUNNING, {}
        asked = [trial for trial in members if trial.status not in UNFINISHED and trial.status is not TrialStatus.CANCELLED]
        good = [trial for trial in asked if trial.status in SCORED and scores(trial.metrics, self._goals) is not None]
        if not asked:
            return TrialStatus.CANCELLED, {}
        if not good or (self._how == "worst" and len(good) < len(asked)):
            return TrialStatus.FAILED, {}
        completed = any(trial.status is TrialStatus.COMPLETED for trial in good)
        metrics: Metrics = {goal.name: self._of(goal, good) for goal in self._goals}
        return (TrialStatus.COMPLETED if completed else TrialStatus.PRUNED), {**metrics, **self._conditioned(good)}

    def _of(self, goal: Objective, good: Sequence[Trial]) -> float:
        values = [value for trial in good if (value := score(trial.metrics, goal)) is not None]
        return aggregate(values, self._how, goal)

    def _conditioned(self, good: Sequence[Trial]) -> Metrics:
        """Return the metrics that conditions of ``feasible`` name; the worst member is furthest from meeting them."""
        if not self._others:
            return {}
        worst = max(good, key=lambda trial: violation(trial.metrics, self._conditions))
        found: dict[str, Json] = {}
        for name in self._others:
            goal = Objective(name=name)
            values = [value for trial in good if (value := score(trial.metrics, goal)) is not None]
            if self._how != "worst" and len(values) == len(good) and all(map(math.isfinite, values)):
                found[name] = aggregate(values, self._how, goal)
            elif name in worst.metrics:  # also what is no number: it has no mean
                found[name] = worst.metrics[name]
        return found
