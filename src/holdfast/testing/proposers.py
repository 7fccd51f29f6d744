"""The contract of a proposer, executable: subclass :class:`ProposerContract` and say how yours is made.

class TestMine(ProposerContract):
    engine = "random"           # any engine whose spec fits yours; it decides what a spec may leave out

    def make(self, spec, seed):
        return MyProposer(spec.space, seed)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from holdfast.core.choices import expanded
from holdfast.core.ports import Proposal, Proposer
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import Trial, TrialStatus
from holdfast.core.values import Config, Metrics, Scalar
from holdfast.testing.samples import sample_spec, sample_trial

SPACES: dict[str, dict[str, Any]] = {
    "one": {"x": {"type": "float", "low": -1.0, "high": 1.0}},
    "numbers": {
        "lr": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
        "drop": {"type": "float", "low": 0.0, "high": 0.5, "step": 0.1},
        "width": {"type": "int", "low": 16, "high": 100, "step": 7},
        "depth": {"type": "int", "low": 1, "high": 64, "log": True},
        "fixed": {"type": "float", "low": 2.0, "high": 2.0, "step": 1.0},
    },
    "mixed": {
        "act": {"type": "categorical", "choices": ["relu", 1, 1.0, True, "1", None]},
        "layers": {"type": "int", "low": 1, "high": 3},
        "kind": {"type": "constant", "value": "mlp"},
    },
    "conditional": {
        "opt": {"type": "categorical", "choices": ["sgd", "adam", "none"]},
        "momentum": {"type": "float", "low": 0.0, "high": 0.9, "when": {"opt": "sgd"}},
        "beta": {"type": "float", "low": 0.8, "high": 0.999, "when": {"opt": ["adam"]}},
        "warm": {"type": "categorical", "choices": [True, False], "when": {"opt": ["sgd", "adam"]}},
        "steps": {"type": "int", "low": 1, "high": 100, "log": True, "when": {"warm": True}},
    },
    "empty": {},
    "nested": expanded(
        {
            "model": {
                "type": "choice",
                "options": {
                    "svm": {
                        "C": {"type": "float", "low": 1e-3, "high": 1e3, "log": True},
                        "kernel": {
                            "type": "choice",
                            "options": {"rbf": {"gamma": {"type": "float", "low": 0.0, "high": 1.0}}, "linear": {}},
                        },
                        "degree": {"type": "int", "low": 1, "high": 3, "when": "C > 1 and kernel == 'linear'"},
                    },
                    "forest": {"trees": {"type": "int", "low": 10, "high": 500, "log": True}},
                    "none": {},
                },
            },
            "size": {"type": "categorical", "choices": ["small", "medium", "large"], "ordered": True},
            "layers": {"type": "int", "low": 1, "high": 4},
            "drop": {"type": "float", "low": 0.0, "high": 0.5, "when": "layers >= 2 and model != 'none'"},
            "rates": {"type": "categorical", "choices": [1, 2.5, 10], "ordered": True, "when": "size in ('medium', 'large')"},
        }
    ),
}
"""Spaces of every kind of parameter; the names are the parameters of the tests."""


def _no_trials() -> dict[int, Trial]:
    return {}


def objective_of(config: Config) -> float:
    """Return a deterministic value of any config."""
    total = 0.0
    for place, name in enumerate(sorted(config)):
        value = config[name]
        total += float(value) if isinstance(value, (int, float)) else len(str(value))
        total += place * 0.01
    return math.sin(total) + total * 0.01


def ending(number: int, config: Config) -> tuple[TrialStatus, Metrics]:
    """Return how a simulated trial ends: mostly with a value, now and then failed, NaN, pruned or cancelled."""
    value = objective_of(config)
    match number % 11:
        case 3:
            return TrialStatus.FAILED, {"loss": value}
        case 5:
            return TrialStatus.COMPLETED, {"loss": math.nan, "size": 1.0}
        case 7:
            return TrialStatus.PRUNED, {"loss": value, "size": -value}
        case 9:
            return TrialStatus.CANCELLED, {}
        case _:
            return TrialStatus.COMPLETED, {"loss": value, "size": -value}


def config_of(offered: Proposal | Mapping[str, Scalar]) -> Config:
    """Return the config of what a proposer offers."""
    return dict(offered.config if isinstance(offered, Proposal) else offered)


def state_of(offered: Proposal | Mapping[str, Scalar]) -> bytes | None:
    """Return what a proposer wants to find again with what it offers."""
    return offered.state if isinstance(offered, Proposal) else None


def proposed(number: int, offered: Proposal | Mapping[str, Scalar]) -> Trial:
    """Return the waiting trial that becomes of what a proposer offers."""
    trial = replace(sample_trial(number, config=config_of(offered)), state=state_of(offered))
    if not isinstance(offered, Proposal):
        return trial
    return replace(trial, source=offered.source, group=offered.group, repeat=offered.repeat)


def changed(trial: Trial, status: TrialStatus, metrics: Metrics | None = None, attempt: int = 1) -> Trial:
    """Return ``trial`` in another status: the same config, state and place in a group."""
    now = sample_trial(trial.number, status, config=trial.config, metrics=metrics, attempt=attempt, source=trial.source)
    return replace(now, state=trial.state, group=trial.group, repeat=trial.repeat)


def _size_of(proposer: Proposer) -> int | None:
    """Return how many proposals there are; an engine of one's own need not say."""
    return getattr(proposer, "size", None)


Simulation = Generator[None, Proposer | None, None]


def rebuilt(make: Callable[[], Proposer], trials: Mapping[int, Trial]) -> Proposer:
    """Return a new proposer that has observed ``trials`` as after a restart."""
    proposer = make()
    for number in sorted(trials):
        proposer.observe(trials[number])
    return proposer


def simulate(proposer: Proposer, trials: dict[int, Trial], *, until: int, concurrent: int) -> Simulation:
    """Run a search on ``trials``, in place, and end them in an order that depends on what is stored alone.

    Yields before each proposal, for a look at the state; a proposer that is sent in takes over, as after a restart.
    """

    def change(trial: Trial) -> None:
        trials[trial.number] = trial
        proposer.observe(trial)

    def running() -> list[int]:
        return [number for number, trial in trials.items() if trial.status is TrialStatus.RUNNING]

    while len(trials) < until or running():
        if len(running()) < concurrent and len(trials) < until:
            successor = yield
            proposer = successor or proposer
            number = len(trials)
            change(proposed(number, proposer.propose(number)))
            change(changed(trials[number], TrialStatus.RUNNING))
            continue
        now = running()
        number = now[len(trials) % len(now)]
        status, metrics = ending(number, trials[number].config)
        change(changed(trials[number], status, metrics))


class ProposerContract:
    """What every proposer keeps. Override ``make``; ``adapt`` when some parameters do not suit it."""

    engine = "random"
    trials = 24
    """per simulated search; a model needs enough to leave its start-up"""

    settings: Mapping[str, Any] = {}  # replaced, never changed
    """further keys of every spec, such as ``{"search": {"repeats": 2}}``"""

    def make(self, spec: ExperimentSpec, seed: int) -> Proposer:
        raise NotImplementedError("the subclass gives it")

    def adapt(self, space: dict[str, Any]) -> dict[str, Any]:
        return space

    def spec(self, space: str, objectives: Mapping[str, str] | None = None) -> ExperimentSpec:
        search = {"engine": self.engine, "num_trials": self.trials, "seed": 1, **self.settings.get("search", {})}
        sections = {**self.settings, "search": search, "objectives": dict(objectives or {"loss": "min"})}
        return sample_spec(space=self.adapt(SPACES[space]), **sections)

    def whole(self, spec: ExperimentSpec, concurrent: int = 1) -> dict[int, Trial]:
        """Return the trials of an uninterrupted search."""
        trials: dict[int, Trial] = {}
        proposer = self.make(spec, 1)
        for _ in simulate(proposer, trials, until=self.limit(proposer), concurrent=concurrent):
            pass
        return trials

    def limit(self, proposer: Proposer) -> int:
        size = _size_of(proposer)
        return self.trials if size is None else min(self.trials, size)

    @pytest.mark.parametrize("space", SPACES)
    def test_configs_are_valid(self, space: str) -> None:
        spec = self.spec(space)
        for trial in self.whole(spec).values():
            valid = spec.space.validate_config(trial.config)
            assert list(valid.items()) == list(trial.config.items())
            assert [type(value) for value in valid.values()] == [type(value) for value in trial.config.values()]

    @pytest.mark.parametrize("concurrent", [1, 2])
    @pytest.mark.parametrize("space", SPACES)
    def test_a_rebuilt_one_proposes_the_same_at_every_point(self, space: str, concurrent: int) -> None:
        spec = self.spec(space)
        proposer, trials = self.make(spec, 1), _no_trials()
        for _ in simulate(proposer, trials, until=self.limit(proposer), concurrent=concurrent):
            number = len(trials)
            assert rebuilt(lambda: self.make(spec, 1), trials).propose(number) == proposer.propose(number), number

    @pytest.mark.parametrize("concurrent", [1, 2])
    def test_killed_at_every_point_it_ends_with_the_same_configs(self, concurrent: int) -> None:
        spec = self.spec("conditional")
        expected = {number: trial.config for number, trial in self.whole(spec, concurrent).items()}
        for killed in range(0, len(expected), 2):
            proposer, trials = self.make(spec, 1), _no_trials()
            steps = simulate(proposer, trials, until=len(expected), concurrent=concurrent)
            next(steps)
            while True:
                try:
                    steps.send(rebuilt(lambda: self.make(spec, 1), trials) if len(trials) == killed else None)
                except StopIteration:
                    break
            assert {number: trial.config for number, trial in trials.items()} == expected, killed

    @pytest.mark.parametrize("space", ["mixed", "conditional"])
    def test_several_objectives(self, space: str) -> None:
        spec = self.spec(space, {"loss": "min", "size": "max"})
        proposer, trials = self.make(spec, 1), _no_trials()
        for _ in simulate(proposer, trials, until=self.limit(proposer), concurrent=2):
            number = len(trials)
            assert rebuilt(lambda: self.make(spec, 1), trials).propose(number) == proposer.propose(number), number

    def test_asking_changes_nothing(self) -> None:
        spec = self.spec("conditional")
        proposer, trials = self.make(spec, 1), _no_trials()
        for _ in simulate(proposer, trials, until=self.limit(proposer), concurrent=2):
            random.seed(len(trials))
            first = proposer.propose(len(trials))
            random.seed(0)
            assert proposer.propose(len(trials)) == first

    def test_the_order_of_endings_does_not_matter(self) -> None:
        spec = self.spec("numbers")
        trials = self.whole(spec)
        number = len(trials) - 1
        first, second = trials[number - 2], trials[number - 1]
        found = []
        for ended in ([first, second], [second, first]):
            proposer = rebuilt(lambda: self.make(spec, 1), {key: trials[key] for key in range(number - 2)})
            for trial in (first, second):
                proposer.observe(changed(trial, TrialStatus.RUNNING))
            for trial in ended:
                proposer.observe(trial)
            found.append(proposer.propose(number))
        assert found[0] == found[1]

    def test_retries_and_reruns_are_followed(self) -> None:
        """A trial that waits for its next attempt, one that failed and then succeeds, and one that ended and runs again."""
        spec = self.spec("conditional")
        trials = self.whole(spec)
        proposer = rebuilt(lambda: self.make(spec, 1), trials)
        number = len(trials)
        size = _size_of(proposer)
        if size is not None and number >= size:
            trials.pop(number := number - 1)
            proposer = rebuilt(lambda: self.make(spec, 1), trials)
        proposer.propose(number)
        again = (TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.COMPLETED)
        for key in (3, 4, 5):
            for status in again:
                metrics = {"loss": -5.0, "size": 1.0} if status is TrialStatus.COMPLETED else {}
                trials[key] = changed(trials[key], status, metrics, attempt=2)
                proposer.observe(trials[key])
                assert rebuilt(lambda: self.make(spec, 1), trials).propose(number) == proposer.propose(number), (key, status)
