"""The engines that Optuna computes: their contract, and equality with a plain Optuna loop."""

import math
from dataclasses import replace

import optuna
import pytest
from optuna_kit import BOTH, LOSS, spec_of

from holdfast.core.errors import SpecError
from holdfast.core.seeding import proposal_seed
from holdfast.core.trial import TrialStatus
from holdfast.engines.optuna_engine import make
from holdfast.testing.proposers import SPACES, ProposerContract, changed, objective_of
from holdfast.testing.samples import sample_trial


class Contract(ProposerContract):
    def make(self, spec, seed):
        return make(spec, seed)

    def spec(self, space, objectives=None):
        return spec_of(self.engine, self.adapt(SPACES[space]), objectives)


class TestTPE(Contract):
    engine = "tpe"


class TestGP(Contract):
    engine = "gp"
    trials = 6  # two of them by the model

    def adapt(self, space):
        return dict(list(space.items())[:3])


class TestCMAES(Contract):
    engine = "cmaes"

    @pytest.mark.parametrize("space", ["mixed", "conditional"])
    def test_several_objectives(self, space):
        with pytest.raises(SpecError, match="cmaes pursues one objective, the spec has 2; use tpe, gp, nsga2, nsga3"):
            super().test_several_objectives(space)


class TestNSGA2(Contract):
    engine = "nsga2"


class TestNSGA3(Contract):
    engine = "nsga3"


# A plain Optuna loop

PLAIN = {
    "lr": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
    "act": {"type": "categorical", "choices": ["relu", "tanh", "elu"]},
    "depth": {"type": "int", "low": 1, "high": 40},
    "width": {"type": "int", "low": 8, "high": 512, "log": True},
    "drop": {"type": "float", "low": 0.0, "high": 0.5},
}
CONDITIONAL = {
    "x": {"type": "float", "low": -2.0, "high": 2.0},
    "opt": {"type": "categorical", "choices": ["sgd", "adam"]},
    "momentum": {"type": "float", "low": 0.0, "high": 0.9, "when": {"opt": "sgd"}},
    "beta": {"type": "float", "low": 0.8, "high": 0.999, "when": {"opt": "adam"}},
}
MODELS = {
    "tpe": lambda seed, options: optuna.samplers.TPESampler(seed=seed, **{"multivariate": True, **options}),
    "gp": lambda seed, options: optuna.samplers.GPSampler(seed=seed, **options),
    "cmaes": lambda seed, options: optuna.samplers.CmaEsSampler(seed=seed, **options),
    "nsga2": lambda seed, options: optuna.samplers.NSGAIISampler(seed=seed, **options),
    "nsga3": lambda seed, options: optuna.samplers.NSGAIIISampler(seed=seed, **options),
}


def suggested(trial, space):
    config = {}
    for name, parameter in space.items():
        if any(config.get(other) != value for other, value in parameter.get("when", {}).items()):
            continue
        if parameter["type"] == "categorical":
            config[name] = trial.suggest_categorical(name, parameter["choices"])
        else:
            suggest = trial.suggest_int if parameter["type"] == "int" else trial.suggest_float
            config[name] = suggest(name, parameter["low"], parameter["high"], log=parameter.get("log", False))
    return config


def results(config, objectives):
    """What a trial reports: its objectives, and a memory that is missing now and then."""
    value = objective_of(config)
    memory = {} if value > 0.9 else {"memory": 10 * math.cos(3 * value)}
    return {**{name: place + (value if name == "loss" else -(value**2)) for place, name in enumerate(objectives)}, **memory}


def plain(engine, space, objectives, options, count, concurrent, feasible):
    """The configs of a loop as Optuna's users write it, with a fresh sampler for each trial."""
    study = optuna.create_study(directions=["maximize" if goal == "max" else "minimize" for goal in objectives.values()])
    configs, running = [], []
    for number in range(count):
        study.sampler = MODELS[engine](proposal_seed(1, number), options)
        trial = study.ask()
        configs.append(suggested(trial, space))
        running.append((trial, configs[-1]))
        if len(running) < concurrent:
            continue
        ended, config = running.pop(0)
        found = results(config, objectives)
        if ended.number % 7 == 3:
            study.tell(ended, state=optuna.trial.TrialState.FAIL)
            continue
        if feasible:
            ended.set_constraint("0", found["memory"] - 5 if "memory" in found else 1.0 if engine == "gp" else math.inf)
        study.tell(ended, [found[name] for name in objectives])
    return configs


def ours(engine, space, objectives, options, count, concurrent, feasible):
    spec = spec_of(engine, space, objectives, options, feasible=["memory <= 5"] if feasible else [])
    proposer = make(spec, 1)
    configs, running = [], []
    for number in range(count):
        offered = proposer.propose(number)
        configs.append(offered.config)
        running.append(replace(sample_trial(number, TrialStatus.RUNNING, config=offered.config), state=offered.state))
        proposer.observe(running[-1])
        if len(running) == concurrent:
            ended = running.pop(0)
            status = TrialStatus.FAILED if ended.number % 7 == 3 else TrialStatus.COMPLETED
            proposer.observe(changed(ended, status, results(ended.config, objectives)))
    return configs


@pytest.mark.parametrize(
    ("engine", "space", "objectives", "options", "count", "concurrent", "feasible"),
    [
        ("tpe", PLAIN, LOSS, {}, 40, 1, False),
        ("tpe", PLAIN, LOSS, {"n_startup_trials": 5, "n_ei_candidates": 8}, 30, 3, False),
        ("tpe", PLAIN, LOSS, {"multivariate": False}, 25, 1, False),
        ("tpe", PLAIN, BOTH, {}, 30, 1, True),
        ("tpe", CONDITIONAL, LOSS, {"group": True}, 40, 1, False),
        ("gp", PLAIN, LOSS, {"n_startup_trials": 5}, 7, 1, False),
        ("gp", CONDITIONAL, LOSS, {"n_startup_trials": 4, "deterministic_objective": True}, 7, 2, True),
        ("gp", CONDITIONAL, BOTH, {"n_startup_trials": 4}, 6, 1, False),
        ("cmaes", PLAIN, LOSS, {}, 60, 1, False),
        ("cmaes", PLAIN, LOSS, {"popsize": 5, "sigma0": 0.2}, 60, 3, False),
        ("cmaes", PLAIN, LOSS, {"popsize": 5, "use_separable_cma": True, "n_startup_trials": 3}, 40, 1, False),
        ("cmaes", PLAIN, LOSS, {"popsize": 5, "with_margin": True}, 40, 2, False),
        ("cmaes", PLAIN, LOSS, {"popsize": 5, "lr_adapt": True}, 40, 1, False),
        ("cmaes", CONDITIONAL, LOSS, {"popsize": 4}, 40, 1, False),
        ("nsga2", PLAIN, LOSS, {"population_size": 6}, 50, 1, False),
        ("nsga2", PLAIN, BOTH, {"population_size": 6, "mutation_prob": 0.3, "crossover_prob": 0.7}, 60, 3, False),
        ("nsga2", CONDITIONAL, BOTH, {"population_size": 6, "swapping_prob": 0.2}, 60, 1, True),
        ("nsga3", PLAIN, BOTH, {"population_size": 6, "dividing_parameter": 2}, 60, 2, False),
        ("nsga3", PLAIN, BOTH, {"population_size": 6}, 50, 1, True),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::optuna.exceptions.ExperimentalWarning")
def test_proposals_equal_a_plain_loop(engine, space, objectives, options, count, concurrent, feasible, caplog):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        expected = plain(engine, space, objectives, options, count, concurrent, feasible)
    finally:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = ours(engine, space, objectives, options, count, concurrent, feasible)
    for number in range(count):
        assert found[number] == expected[number], number
    assert not caplog.records
