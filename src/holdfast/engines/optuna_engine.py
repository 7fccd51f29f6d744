"""TPE by Optuna, over an in-memory study that is rebuilt from the stored trials. The one module that imports Optuna.

The study never owns a proposal: a throw-away trial is handed to the sampler, so that asking changes nothing. Constants,
and float parameters whose low equals high, stand outside the study. Categorical values stand in it by their index
(Optuna takes 1 and True for one choice; of ordered ones that is a number), stepped numbers too (Optuna moves ``high`` onto
a step).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from holdfast.core.budget import has_conditions, values_of
from holdfast.core.objective import Direction, Objective, scores
from holdfast.core.seeding import proposal_seed
from holdfast.core.space import CategoricalParameter, ConstantParameter, FloatParameter, IntParameter, Parameter, Space
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ACTIVE, SCORED, Trial
from holdfast.core.values import Config, Scalar
from holdfast.engines.values import index_of, is_counted, nth_value


def make(spec: ExperimentSpec, seed: int) -> TPEProposer:
    """Return a proposer of the spec's engine."""
    return TPEProposer(spec.space, spec.goals, seed)


@dataclass(frozen=True)
class _Standing:
    """What the study is to hold of a trial."""

    config: Config
    state: TrialState
    values: list[float] | None


class TPEProposer:
    """Proposes by a multivariate TPE with the constant liar, from a fresh sampler for every trial."""

    size: int | None = None

    def __init__(self, space: Space, objectives: Sequence[Objective], seed: int) -> None:
        self._space = space
        self._objectives = tuple(objectives)
        self._seed = seed
        self._group = has_conditions(space)
        self._distributions = {
            name: distribution
            for name, parameter in space.parameters.items()
            if (distribution := distribution_of(parameter)) is not None
        }
        self._standings: dict[int, _Standing] = {}
        self._merged = 0
        """how many of them have numbers below 0"""
        self._study: _Study | None = None

    def observe(self, trial: Trial) -> None:
        standing = self._standing(trial)
        before = self._standings.get(trial.number)
        if standing == before:
            return
        if before is None and trial.number < 0:
            self._merged += 1
            self._study = None  # it comes before all others
        expected = before is not None or trial.number == len(self._standings) - self._merged
        self._standings[trial.number] = standing
        if self._study is None:
            return
        if not expected or not self._study.follow(trial.number + self._merged, before, standing):
            self._study = None

    def propose(self, number: int, *, retry: int = 0) -> Config:
        with _quiet():
            if self._study is None:
                self._study = self._rebuilt()
            sampler = optuna.samplers.TPESampler(
                seed=proposal_seed(self._seed + retry, number), multivariate=True, group=self._group, constant_liar=True
            )
            config = self._study.sample(sampler, self._space, self._distributions)
        return self._space.validate_config(config)

    def _standing(self, trial: Trial) -> _Standing:
        if trial.status in ACTIVE:
            return _Standing(trial.config, TrialState.RUNNING, None)
        values = scores(trial.metrics, self._objectives) if trial.status in SCORED else None
        return _Standing(trial.config, TrialState.FAIL if values is None else TrialState.COMPLETE, values)

    def _rebuilt(self) -> _Study:
        study = _Study(self._objectives, self._distributions, self._space)
        for number in sorted(self._standings):
            study.add(self._standings[number])
        return study


class _Study:
    """An Optuna study of our trials in their order, merged ones first, and one whose only trial lends its id to samplers."""

    def __init__(self, objectives: Sequence[Objective], distributions: dict[str, BaseDistribution], space: Space) -> None:
        self._storage = optuna.storages.InMemoryStorage()
        self._distributions = distributions
        self._space = space
        self._count = 0
        minimize, maximize = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
        directions = [minimize if objective.direction is Direction.MIN else maximize for objective in objectives]
        optuna.create_study(storage=self._storage, study_name="trials", directions=directions)
        self._id = self._storage.get_study_id_from_name("trials")
        optuna.create_study(storage=self._storage, study_name="scratch")
        self._scratch = self._storage.create_new_trial(self._storage.get_study_id_from_name("scratch"))

    def add(self, standing: _Standing) -> None:
        """Append the next trial."""
        params = {
            name: encode(self._space.parameters[name], standing.config[name])
            for name in self._distributions
            if name in standing.config
        }
        trial = create_trial(
            state=standing.state,
            values=standing.values,
            params=params,
            distributions={name: self._distributions[name] for name in params},
        )
        self._storage.create_new_trial(self._id, template_trial=trial)
        self._count += 1

    def follow(self, place: int, before: _Standing | None, now: _Standing) -> bool:
        """Take over a change; False when only a rebuild can (a trial that had ended in the study runs again)."""
        if before is None:
            self.add(now)
            return True
        if before.state is not TrialState.RUNNING or before.config != now.config:
            return False
        identity = self._storage.get_trial_id_from_study_id_trial_number(self._id, place)
        self._storage.set_trial_state_values(identity, now.state, now.values)
        return True

    def sample(self, sampler: optuna.samplers.BaseSampler, space: Space, distributions: dict[str, BaseDistribution]) -> Config:
        """Return the config that ``sampler`` gives the next trial; the study stays as it was."""
        study = optuna.load_study(study_name="trials", storage=self._storage, sampler=sampler)  # with no cached trials
        trial = copy.copy(self._storage.get_trial(self._scratch))
        trial.number = self._count
        relative_space = sampler.infer_relative_search_space(study, trial)
        relative = sampler.sample_relative(study, trial, relative_space)
        config: Config = {}
        for name, parameter in space.parameters.items():
            if not space.is_active(name, config):
                continue
            if name not in distributions:
                config[name] = nth_value(parameter, 0)
                continue
            raw = relative[name] if name in relative else sampler.sample_independent(study, trial, name, distributions[name])
            config[name] = decode(parameter, raw)
        return config


def by_index(parameter: Parameter) -> bool:
    """Tell whether values of ``parameter`` stand in the study by their index."""
    if isinstance(parameter, IntParameter):
        return parameter.step not in (None, 1)
    return not isinstance(parameter, FloatParameter) or parameter.step is not None


def distribution_of(parameter: Parameter) -> BaseDistribution | None:
    """Return how ``parameter`` stands in the study, or None when it has only one value."""
    if is_counted(parameter) and values_of(parameter) == 1:
        return None
    match parameter:
        case CategoricalParameter(choices=choices, ordered=False):
            return CategoricalDistribution(range(len(choices)))
        case IntParameter() if not by_index(parameter):
            return IntDistribution(parameter.low, parameter.high, log=parameter.log)
        case FloatParameter() if not by_index(parameter):
            return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
        case _:
            return IntDistribution(0, values_of(parameter) - 1)


def encode(parameter: Parameter, value: Scalar) -> Any:
    """Return a config's value as it stands in the study."""
    if isinstance(parameter, CategoricalParameter):
        return next(index for index, choice in enumerate(parameter.choices) if type(choice) is type(value) and choice == value)
    if isinstance(parameter, (IntParameter, FloatParameter)) and by_index(parameter):
        assert isinstance(value, (int, float))
        return index_of(parameter, value)
    return value


def decode(parameter: Parameter, raw: Any) -> Scalar:
    """Return what stands in the study as a config's value, within the bounds."""
    if by_index(parameter) or isinstance(parameter, (CategoricalParameter, ConstantParameter)):
        return nth_value(parameter, int(raw))
    kind = int if isinstance(parameter, IntParameter) else float
    return min(max(kind(raw), parameter.low), parameter.high)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from announcing studies and experimental arguments, here only."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
