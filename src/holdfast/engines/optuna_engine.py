"""TPE, GP, CMA-ES and NSGA by Optuna, over a study in memory that shows the stored trials. The one module that imports it.

Each proposal has a fresh sampler with a seed of its own. The study never owns a proposal: what the sampler writes while it
samples (CMA-ES its optimizer, NSGA its generations and parents) is taken aside, so that asking changes nothing, and becomes the
proposal's state. That comes back with the trial, and stands in the study from then on.

Constants, and float parameters whose low equals high, stand outside the study. Categorical values stand in it by their index
(Optuna takes 1 and True for one choice), stepped numbers too (Optuna moves ``high`` onto a step). A trial's id there is its
number; its number there is its place among all trials, merged ones first, as in a study without gaps.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.trial import FrozenTrial, TrialState

from holdfast.core.budget import has_conditions
from holdfast.core.counted import index_of, is_counted, nth_value, values_of
from holdfast.core.objective import Direction, scores, violations
from holdfast.core.ports import Proposal
from holdfast.core.seeding import proposal_seed
from holdfast.core.space import CategoricalParameter, ConstantParameter, FloatParameter, IntParameter, Parameter
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ACTIVE, SCORED, Trial
from holdfast.core.values import Config, Metrics, Scalar
from holdfast.engines import state
from holdfast.engines.options import check_libraries, check_objectives, check_options

log = logging.getLogger(__name__)

LARGEST = 1e60
"""Values beyond it count as it: a model of values computes with their squares and products."""
FINEST = 10_000
"""Gp and cmaes list every value of a whole number; one of more values is a real number to them, and rounded."""

_LISTING = frozenset({"gp", "cmaes"})
_KEEPING = frozenset({"cmaes", "nsga2", "nsga3"})
"""Engines whose samplers keep something; what TPE and GP note is in the trial's config."""
_CONSTRAINED = frozenset({"tpe", "gp", "nsga2", "nsga3"})
_PARENTS = ":parent:"
STUDY = "trials"
_TROUBLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def make(spec: ExperimentSpec, seed: int) -> OptunaProposer:
    """Return a proposer of the spec's engine: tpe, gp, cmaes, nsga2 or nsga3.

    SpecError for options and objectives that it does not take; MissingLibrary.
    """
    engine = spec.search.engine
    check_options(engine, spec.search.options)
    check_objectives(engine, len(spec.objectives))
    check_libraries(engine)
    return OptunaProposer(spec, seed)


@dataclass(frozen=True)
class _Standing:
    """What the study is to hold of a trial."""

    config: Config
    status: TrialState
    values: list[float] | None
    violations: tuple[float, ...]
    kept: bytes | None


class OptunaProposer:
    """Proposes by one of Optuna's samplers, a fresh one for every trial."""

    size: int | None = None

    def __init__(self, spec: ExperimentSpec, seed: int) -> None:
        self._space = spec.space
        self._objectives = spec.goals
        self._seed = seed
        self._engine = spec.search.engine
        self._options = dict(spec.search.options)
        self._feasible = spec.feasible if self._engine in _CONSTRAINED else ()
        finest = FINEST if self._engine in _LISTING else None
        self._distributions = {
            name: distribution
            for name, parameter in spec.space.parameters.items()
            if (distribution := distribution_of(parameter, finest)) is not None
        }
        self._by_names: dict[tuple[str, ...], dict[str, BaseDistribution]] = {}
        self._lasting: BaseSampler | None = None
        self._standings: dict[int, _Standing] = {}
        self._kept: dict[int, tuple[state.Attributes, state.Attributes]] = {}
        minimize, maximize = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
        with _quiet():
            self._study = _Study([minimize if goal.direction is Direction.MIN else maximize for goal in self._objectives])

    def observe(self, trial: Trial) -> None:
        number, standing = trial.number, self._standing(trial)
        before = self._standings.get(number)
        if standing == before:
            return
        if standing.kept is not None and (before is None or before.kept != standing.kept):
            self._kept[number] = state.unpack(standing.kept, f"trial {number}")
        attributes, shared = ({}, {}) if standing.kept is None else self._kept[number]
        self._standings[number] = standing
        self._study.put(number, self._row(number, standing, attributes), shared)

    def _row(self, number: int, standing: _Standing, attributes: state.Attributes) -> FrozenTrial:
        """Return a trial as the study holds it, without its place."""
        config, parameters = standing.config, self._space.parameters
        params = {name: encode(parameters[name], config[name]) for name in self._distributions if name in config}
        conditions = {f"constraints:{place}": value for place, value in enumerate(standing.violations)}
        return FrozenTrial(
            trial_id=number,
            number=-1,
            state=standing.status,
            value=None,
            values=standing.values,
            params=params,
            distributions=self._distributions_of(params),
            system_attrs={**attributes, **conditions},
            user_attrs={},
            intermediate_values={},
            datetime_start=None,
            datetime_complete=None,
        )

    def propose(self, number: int, *, retry: int = 0) -> Proposal:
        """Return the config and the state of trial ``number``; each ``retry`` from 1 on is another draw for it."""
        with _quiet():
            sampler = self._seeded(proposal_seed(self._seed, number, retry))
            self._study.open()
            config = self._sample(sampler, number)
            written = self._study.close()
        kept = state.pack(*written) if self._engine in _KEEPING else None
        return Proposal(config=self._space.validate_config(config), state=kept)

    def _seeded(self, seed: int) -> BaseSampler:
        """Return a sampler that has sampled nothing yet. One that remembers nothing but its generators is only seeded again."""
        if self._engine not in _KEEPING:
            return self._sampler(seed)
        if self._lasting is None:
            self._lasting = self._sampler(seed)
        _reseed(self._lasting, seed)
        return self._lasting

    def _sampler(self, seed: int) -> BaseSampler:
        options = self._options
        match self._engine:
            case "tpe":
                multivariate = options.get("multivariate", True)
                defaults = {"multivariate": multivariate, "group": multivariate and has_conditions(self._space)}
                return optuna.samplers.TPESampler(seed=seed, constant_liar=True, **{**defaults, **options})
            case "gp":
                return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False, **options)
            case "cmaes":
                return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False, **options)
            case "nsga2":
                return optuna.samplers.NSGAIISampler(seed=seed, **options)
            case "nsga3":
                return optuna.samplers.NSGAIIISampler(seed=seed, **options)
            case engine:
                raise AssertionError(f"{engine} is no engine of Optuna")

    def _sample(self, sampler: BaseSampler, number: int) -> Config:
        """Return the config that ``sampler`` gives the next trial."""
        view = optuna.load_study(study_name=STUDY, storage=self._study, sampler=sampler)  # with no cached trials
        trial = self._row(number, _Standing({}, TrialState.RUNNING, None, (), None), {})
        trial.number = len(self._study)
        try:
            relative = sampler.sample_relative(view, trial, self._relative_space(sampler, view, trial))
        except _TROUBLE as error:  # its numerics gave up, on values of 1e-300 and 1e60, say: the search goes on
            log.warning("%s draws the config of trial %d at random: %s: %s", sampler, number, type(error).__name__, error)
            self._study.open()
            relative = {}
        config: Config = {}
        for name, parameter in self._space.parameters.items():
            if not self._space.is_active(name, config):
                continue
            if name not in self._distributions:
                config[name] = nth_value(parameter, 0)
                continue
            raw = relative.get(name)
            if raw is None or not math.isfinite(raw):
                raw = sampler.sample_independent(view, trial, name, self._distributions[name])
            config[name] = decode(parameter, raw)
        return config

    def _relative_space(self, sampler: BaseSampler, view: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return what ``sampler`` samples as a whole: what every result has, as ``infer_relative_search_space`` says.

        A fresh sampler would look through all trials for that.
        """
        if isinstance(sampler, optuna.samplers.TPESampler) and not self._options.get("multivariate", True):
            return {}
        if isinstance(sampler, optuna.samplers.TPESampler) and self._options.get("group", has_conditions(self._space)):
            return sampler.infer_relative_search_space(view, trial)  # it keeps the groups
        found = {name: self._distributions[name] for name in self._study.common()}
        if self._engine == "cmaes":
            return {name: one for name, one in found.items() if not isinstance(one, CategoricalDistribution)}
        return found

    def _standing(self, trial: Trial) -> _Standing:
        kept = trial.state if trial.number >= 0 and self._engine in _KEEPING else None
        if trial.status in ACTIVE:
            return _Standing(trial.config, TrialState.RUNNING, None, (), kept)
        values = scores(trial.metrics, self._objectives) if trial.status in SCORED else None
        if values is None:
            return _Standing(trial.config, TrialState.FAIL, None, (), kept)
        values = [min(max(value, -LARGEST), LARGEST) for value in values]
        return _Standing(trial.config, TrialState.COMPLETE, values, self._violations(trial.metrics), kept)

    def _violations(self, metrics: Metrics) -> tuple[float, ...]:
        """Return how far a result is from meeting each condition; one that cannot be told is broken."""
        found = violations(metrics, self._feasible)
        unknown = 1.0 if self._engine == "gp" else math.inf  # a model of violations takes no infinity
        return tuple(min(max(value, -LARGEST), LARGEST) if math.isfinite(value) else unknown for value in found)

    def _distributions_of(self, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """Return the distributions of a trial's parameters: one dict for all trials with the same ones."""
        names = tuple(params)
        if names not in self._by_names:
            self._by_names[names] = {name: self._distributions[name] for name in names}
        return self._by_names[names]


class _Study(optuna.storages.InMemoryStorage):
    """A storage of one study that shows our trials to samplers, and takes what they write aside."""

    def __init__(self, directions: Sequence[optuna.study.StudyDirection]) -> None:
        super().__init__()
        self.create_new_study(directions, STUDY)
        self._rows: dict[int, FrozenTrial] = {}
        self._listed: list[FrozenTrial] | None = []
        """the rows by number; None: to be sorted anew"""
        self._last = -math.inf
        self._results: Counter[str] = Counter()
        """how many results have each parameter"""
        self._completed = 0
        self._shares: dict[int, Mapping[str, Any]] = {}
        """what the proposal of each trial wrote to the study"""
        self._shared: dict[str, Any] | None = None
        """all of it, as samplers may see it now; None: to be put together anew"""
        self._parents: set[int] = set()
        self._written: tuple[dict[str, Any], dict[str, Any]] = ({}, {})

    def put(self, number: int, row: FrozenTrial, shared: Mapping[str, Any]) -> None:
        """Take in a trial as it stands, and what its proposal wrote to the study."""
        before = self._rows.get(number)
        for found, sign in ((before, -1), (row, 1)):
            if found is not None and found.state is TrialState.COMPLETE:
                self._completed += sign
                for name in found.params:
                    self._results[name] += sign
        self._rows[number] = row
        if self._listed is not None and before is not None:
            row.number = before.number
            self._listed[row.number] = row
        elif self._listed is not None and number > self._last:
            row.number = len(self._listed)
            self._listed.append(row)
        else:  # it comes before others
            self._listed = None
        self._last = max(self._last, number)
        if shared:
            self._shares[number] = shared
        elif number in self._shares:
            del self._shares[number]
            self._shared = None
        if shared or number in self._parents:
            self._shared = None

    def __len__(self) -> int:
        return len(self._rows)

    def common(self) -> list[str]:
        """Return the parameters that every result has, sorted."""
        return sorted(name for name, count in self._results.items() if count == self._completed > 0)

    def open(self) -> None:
        """Begin to take aside what a sampler writes, from nothing."""
        self._written = ({}, {})

    def close(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Forget what was written to the trial and to the study since :meth:`open`; return it."""
        written = self._written
        self.open()
        return written

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._written[0][key] = value

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._written[1][key] = value

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        if self._shared is None:
            self._shared = self._put_together()
        return {**self._shared, **self._written[1]}

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        if self._listed is None:
            self._listed = [self._rows[number] for number in sorted(self._rows)]
            for place, row in enumerate(self._listed):
                row.number = place
        found = [row for row in self._listed if states is None or row.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def _put_together(self) -> dict[str, Any]:
        """Return what proposals wrote, the first one's word counting; parents that have no result any more are left out."""
        found: dict[str, Any] = {}
        for number in sorted(self._shares):
            for key, value in self._shares[number].items():
                found.setdefault(key, value)
        for key in [key for key in found if _PARENTS in key]:
            self._parents.update(found[key])
            rows = [self._rows.get(number) for number in found[key]]
            found[key] = [row._trial_id for row in rows if row is not None and row.state is TrialState.COMPLETE]
        return found


def by_index(parameter: Parameter) -> bool:
    """Tell whether values of ``parameter`` stand in the study by their index."""
    if isinstance(parameter, IntParameter):
        return parameter.step not in (None, 1)
    return not isinstance(parameter, FloatParameter) or parameter.step is not None


def distribution_of(parameter: Parameter, finest: int | None = None) -> BaseDistribution | None:
    """Return how ``parameter`` stands in the study, or None when it has only one value.

    A whole number of more than ``finest`` values is a real number there.
    """
    if is_counted(parameter) and values_of(parameter) == 1:
        return None
    match parameter:
        case CategoricalParameter(choices=choices, ordered=False):
            return CategoricalDistribution(range(len(choices)))
        case IntParameter() if not by_index(parameter):
            found = IntDistribution(parameter.low, parameter.high, log=parameter.log)
        case FloatParameter() if not by_index(parameter):
            return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
        case _:
            found = IntDistribution(0, values_of(parameter) - 1)
    if finest is not None and found.high - found.low >= finest:
        return FloatDistribution(float(found.low), float(found.high), log=found.log)
    return found


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
        return nth_value(parameter, round(raw))
    value = round(raw) if isinstance(parameter, IntParameter) else float(raw)
    return min(max(value, parameter.low), parameter.high)


def _reseed(sampler: BaseSampler, seed: int) -> None:
    """Seed all generators of ``sampler`` as its constructor does: making them anew reads the system's randomness each time."""
    for part in vars(sampler).values():
        if isinstance(part, LazyRandomState):
            part.rng.seed(seed)
        elif isinstance(part, BaseSampler):
            _reseed(part, seed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from announcing studies and experimental arguments, and what it computes with from warning; here only."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
