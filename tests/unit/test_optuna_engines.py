"""The engines that Optuna computes: their contract, equality with a plain Optuna loop, state, hostile histories, options."""

import importlib.util
import json
import logging
import math
import os
import pickle
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from holdfast.core.errors import Corrupt, MissingLibrary, NewerFormat, SpecError
from holdfast.core.ports import Proposal
from holdfast.core.seeding import proposal_seed
from holdfast.core.trial import TrialStatus
from holdfast.engines import options as options_module
from holdfast.engines.options import OPTIONS, check_libraries, check_objectives, check_options
from holdfast.engines.optuna_engine import make
from holdfast.engines.state import pack, unpack
from holdfast.testing.proposers import SPACES, ProposerContract, changed, objective_of, rebuilt, simulate
from holdfast.testing.samples import sample_spec, sample_trial

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported; its threads get in the way of others

SMALL = {
    "tpe": {},
    "gp": {"n_startup_trials": 4},
    "cmaes": {"popsize": 4},
    "nsga2": {"population_size": 4},
    "nsga3": {"population_size": 4},
}
"""Options with which a few trials leave the start-up and see several generations."""
ENGINES = tuple(SMALL)
KEEPING = ("cmaes", "nsga2", "nsga3")
LOSS, BOTH = {"loss": "min"}, {"loss": "min", "size": "max"}


def spec_of(engine, space="mixed", objectives=None, options=None, **changes):
    return sample_spec(
        space=SPACES[space] if isinstance(space, str) else space,
        objectives=objectives or LOSS,
        search={"engine": engine, "num_trials": 500, "options": SMALL[engine] if options is None else options},
        **changes,
    )


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
        ("gp", PLAIN, LOSS, {"n_startup_trials": 5}, 9, 1, False),
        ("gp", CONDITIONAL, LOSS, {"n_startup_trials": 4, "deterministic_objective": True}, 7, 2, True),
        ("gp", CONDITIONAL, BOTH, {"n_startup_trials": 4}, 8, 1, False),
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


def simulated(engine, count, *, space="numbers", concurrent=2, objectives=None, options=None, **changes):
    """A search of ``count`` trials: the proposer, and the trials as they are stored."""
    spec = spec_of(engine, space, objectives, options, **changes)
    proposer, trials = make(spec, 1), {}
    for _ in simulate(proposer, trials, until=count, concurrent=concurrent):
        pass
    return spec, proposer, trials


# State


@pytest.mark.parametrize("engine", KEEPING)
def test_what_a_sampler_keeps_is_needed_and_comes_back(engine):
    spec, live, trials = simulated(engine, 40)
    generations = [value for trial in trials.values() for value in generation_of(trial)]
    assert max(generations) >= 3, "several generations"
    number = len(trials)
    offered = live.propose(number)
    assert rebuilt(lambda: make(spec, 1), trials).propose(number) == offered
    without = {key: replace(trial, state=None) for key, trial in trials.items()}
    assert rebuilt(lambda: make(spec, 1), without).propose(number) != offered


def generation_of(trial):
    return [] if trial.state is None else [value for key, value in unpack(trial.state, "x")[0].items() if "generation" in key]


@pytest.mark.parametrize(("engine", "median", "most"), [("cmaes", 60, 2500), ("nsga2", 60, 300), ("nsga3", 60, 300)])
def test_state_is_small(engine, median, most):
    _, _, trials = simulated(engine, 60)
    sizes = sorted(len(trial.state) for trial in trials.values() if trial.state is not None)
    assert sizes[len(sizes) // 2] <= median
    assert sizes[-1] <= most


@pytest.mark.parametrize("engine", ["tpe", "gp"])
def test_engines_that_need_no_state_keep_none(engine):
    _, _, trials = simulated(engine, 12 if engine == "tpe" else 5)
    assert {trial.state for trial in trials.values()} == {None}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_retry_is_another_draw_and_changes_nothing(engine):
    spec, live, trials = simulated(engine, 18) if engine != "gp" else simulated(engine, 5, space="one")
    number = len(trials)
    first = live.propose(number)
    again = [live.propose(number, retry=retry) for retry in range(4)]
    assert again[0] == first
    assert len({json.dumps(offered.config) for offered in again}) == 4
    assert live.propose(number) == first
    assert rebuilt(lambda: make(spec, 1), trials).propose(number, retry=2) == again[2]


def test_seeds_of_retries():
    assert proposal_seed(7, 3, 0) == proposal_seed(7, 3)
    assert len({proposal_seed(7, number, retry) for number in range(20) for retry in range(20)}) == 400


@pytest.mark.parametrize("engine", ["cmaes", "nsga2", "gp"])
def test_another_process_goes_on_the_same(engine, tmp_path):
    count = 6 if engine == "gp" else 30
    _, live, trials = simulated(engine, count, objectives=LOSS if engine != "nsga2" else BOTH, space="conditional")
    (tmp_path / "trials").write_bytes(pickle.dumps(trials))
    code = (
        "import pickle, sys; from test_optuna_engines import *; engine = sys.argv[1];"
        "spec = spec_of(engine, 'conditional', LOSS if engine != 'nsga2' else BOTH);"
        "trials = pickle.loads(open(sys.argv[2], 'rb').read());"
        "print(rebuilt(lambda: make(spec, 1), trials).propose(len(trials)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, engine, str(tmp_path / "trials")],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "3", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found == f"{live.propose(count)}\n"


@pytest.mark.parametrize("engine", KEEPING)
@pytest.mark.parametrize("objectives", [LOSS, BOTH], ids=["one", "two"])
def test_parents_and_optimizers_of_trials_that_run_again_or_fail(engine, objectives):
    if engine == "cmaes":
        objectives = LOSS
    spec, live, trials = simulated(engine, 24, objectives=objectives, space="conditional")
    number = len(trials)
    for key in range(number):
        for status in (TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.FAILED):
            trials[key] = changed(trials[key], status, attempt=2)
            live.observe(trials[key])
        assert live.propose(number) == rebuilt(lambda: make(spec, 1), trials).propose(number), key
    for key in range(number):
        trials[key] = changed(trials[key], TrialStatus.COMPLETED, {"loss": 1.0, "size": float(key)}, attempt=3)
        live.observe(trials[key])
    assert live.propose(number) == rebuilt(lambda: make(spec, 1), trials).propose(number)


@pytest.mark.parametrize("engine", ENGINES)
def test_queued_and_merged_trials_have_no_state(engine):
    """They stand between, and before, the proposals; a merge while it runs is as one before a restart."""
    space, count = ("one", 8) if engine == "gp" else ("numbers", 24)
    spec = spec_of(engine, space)
    source, trials, live = make(spec_of("tpe", space), 9), {}, make(spec, 1)

    def ended(number, offered, origin):
        status, loss = (
            (TrialStatus.FAILED, math.nan) if number % 5 == 4 else (TrialStatus.COMPLETED, objective_of(offered.config))
        )
        trial = sample_trial(number, status, config=offered.config, metrics={"loss": loss}, source=origin)
        trials[number] = replace(trial, state=offered.state)
        live.observe(trials[number])

    def equal(number):
        assert rebuilt(lambda: make(spec, 1), trials).propose(number) == live.propose(number), number

    for number in range(count):
        equal(number)
        origin = "queued" if number % 3 == 1 else "proposed"
        offered = live.propose(number) if origin == "proposed" else Proposal(config=source.propose(number).config)
        ended(number, offered, origin)
    before = live.propose(count)
    for number in range(-3, 0):
        ended(number, source.propose(100 + number), "merged")
        equal(count)
    assert engine not in ("tpe", "cmaes") or live.propose(count) != before  # to NSGA they belong to no generation


# Hostile state


def test_state_goes_and_comes():
    trial, study = {"a": 1, "x": [0.1, -1e-300, 1e308]}, {"b": [1, -2]}
    assert unpack(pack(trial, study), "trial 1") == (trial, study)
    assert pack({}, {}) is None


@pytest.mark.parametrize(
    "bytes_", [b"", b"\x00", b"\x01", b"\x01junk", pack({"a": 1}, {})[:-4], b"\x01" + zlib.compress(b"[1, 2]"), b"\x00abc"]
)
@pytest.mark.parametrize("engine", KEEPING)
def test_a_damaged_state_is_refused_and_nothing_changes(engine, bytes_):
    _, live, _ = simulated(engine, 12)
    before = live.propose(12)
    with pytest.raises(Corrupt, match="state of trial 12 is not what holdfast wrote"):
        live.observe(replace(sample_trial(12, config=before.config), state=bytes_))
    assert live.propose(12) == before


def test_a_newer_state_is_refused():
    with pytest.raises(NewerFormat, match="trial 3 has version 2, this holdfast knows 1: upgrade"):
        unpack(b"\x02" + pack({"a": 1}, {})[1:], "trial 3")


class Evil:
    def __reduce__(self):
        return (os.mkdir, (EVIL_FOLDER,))


EVIL_FOLDER = "made-by-a-pickle"


@pytest.mark.parametrize("part", [Evil(), [1, 2], "text", {"cma": Evil()}])
def test_a_pickle_that_is_no_optimizer_is_refused_before_it_runs(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = pickle.dumps(part).hex()
    half = len(digits) // 4 * 2
    state = pack({"cma:generation": 1, "cma:optimizer:0": digits[:half], "cma:optimizer:1": digits[half:]}, {})
    _, live, trials = simulated("cmaes", 8)
    with pytest.raises(Corrupt, match=r"trial 0 is not what holdfast wrote: it (names|holds)"):
        live.observe(replace(trials[0], state=state))
    live.propose(8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keys", [("cma:optimizer:1",), ("cma:optimizer:0", "sepcma:optimizer:0"), ("cma:optimizer",)])
def test_an_optimizer_in_odd_pieces_is_refused(keys):
    with pytest.raises(Corrupt):
        unpack(pack(dict.fromkeys(keys, pickle.dumps(Evil()).hex()), {}), "trial 0")


@pytest.mark.parametrize("options", [{}, {"use_separable_cma": True}, {"with_margin": True}, {"lr_adapt": True}])
def test_every_optimizer_of_cmaes_is_known(options):
    _, _, trials = simulated("cmaes", 20, options={"popsize": 4, **options})
    kept = [unpack(trial.state, "x")[0] for trial in trials.values() if trial.state is not None]
    assert any("optimizer:0" in key for attributes in kept for key in attributes)


# Hostile histories

VALUES = {
    "equal": lambda number: {"loss": 1.0, "size": 1.0},
    "nan": lambda number: {"loss": math.nan, "size": math.nan},
    "infinite": lambda number: {"loss": math.inf if number % 2 else -math.inf, "size": 1.0},
    "huge": lambda number: {"loss": (-1.0) ** number * 1.7e308, "size": 10**400 if number % 3 else 1e-320},
    "tiny": lambda number: {"loss": number * 1e-310, "size": -number * 1e-310},
    "mixed": lambda number: {"loss": 1e200 if number == 3 else float(number), "size": float(-number)},
    "missing": lambda number: {"size": 3.0} if number % 2 else {},
    "text": lambda number: {"loss": "none", "size": True},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("values", VALUES)
def test_no_history_stops_a_sampler(engine, values, caplog):
    count = 6 if engine == "gp" else 18
    for space in ("one", "empty") if engine == "gp" else ("one", "mixed", "empty"):
        for objectives in [LOSS] if engine == "cmaes" else [LOSS, BOTH]:
            spec = spec_of(engine, space, objectives, feasible=["memory <= 1", "size < 2"])
            proposer = make(spec, 1)
            for number in range(count):
                offered = proposer.propose(number)
                assert spec.space.validate_config(offered.config) == offered.config
                status = TrialStatus.PRUNED if number % 5 == 1 else TrialStatus.COMPLETED
                metrics = VALUES[values](number)
                metrics |= {"memory": (math.inf, -1.0, 1e300, math.nan)[number % 4]} if number % 3 else {}
                ended = sample_trial(number, status, config=offered.config, metrics=metrics)
                proposer.observe(replace(ended, state=offered.state))
    assert not caplog.records


@pytest.mark.parametrize("engine", ENGINES)
def test_a_history_without_results(engine):
    proposer = make(spec_of(engine, "numbers"), 1)
    for number in range(12):
        offered = proposer.propose(number)
        proposer.observe(replace(sample_trial(number, TrialStatus.FAILED, config=offered.config), state=offered.state))
    assert proposer.propose(12)


@pytest.mark.parametrize("engine", ["gp", "cmaes"])
@pytest.mark.parametrize("options", [{}, {"with_margin": True}])
def test_whole_numbers_of_any_range_fit_into_memory(engine, options):
    if engine == "gp" and options:
        options = {"deterministic_objective": True}
    space = {
        "wide": {"type": "int", "low": -(10**15), "high": 10**15},
        "logged": {"type": "int", "low": 1, "high": 10**12, "log": True},
        "stepped": {"type": "float", "low": 0.0, "high": 1e6, "step": 0.001},
        "few": {"type": "int", "low": 0, "high": 9},
    }
    spec = spec_of(engine, space, options={**SMALL[engine], **options})
    proposer = make(spec, 1)
    for number in range(7 if engine == "gp" else 16):
        offered = proposer.propose(number)
        assert spec.space.validate_config(offered.config) == offered.config
        ended = sample_trial(
            number, TrialStatus.COMPLETED, config=offered.config, metrics={"loss": float(offered.config["few"])}
        )
        proposer.observe(replace(ended, state=offered.state))


def test_a_sampler_that_gives_up_is_replaced_by_a_draw_and_that_is_said(monkeypatch, caplog):
    spec, live, _ = simulated("nsga2", 12)

    def broken(self, *arguments):
        raise FloatingPointError("nothing adds up")

    monkeypatch.setattr(optuna.samplers.NSGAIISampler, "sample_relative", broken)
    with caplog.at_level(logging.WARNING):
        offered = live.propose(12)
    assert "draws the config of trial 12 at random: FloatingPointError: nothing adds up" in caplog.text
    assert spec.space.validate_config(offered.config) == offered.config
    assert offered.state is None


def test_optuna_warns_nobody(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"sigma0": 0.1, "with_margin": True}, {"use_separable_cma": True}):
            simulated("cmaes", 12, space="one", options={"popsize": 4, **options})
    assert capfd.readouterr() == ("", "")


# Feasibility


@pytest.mark.parametrize("engine", ["tpe", "gp", "nsga2", "nsga3"])
def test_conditions_on_metrics_reach_the_sampler(engine):
    """The best values lie where the condition is broken: proposals keep away from there, and from where it is unknown."""
    space = {"x": {"type": "float", "low": 0.0, "high": 1.0}, "y": {"type": "float", "low": 0.0, "high": 1.0}}

    def found(feasible, known):
        spec = spec_of(engine, space, feasible=feasible)
        proposer, count = make(spec, 1), 8 if engine == "gp" else 60
        configs = []
        for number in range(count):
            offered = proposer.propose(number)
            x = offered.config["x"]
            metrics = {"loss": -x} | ({"memory": 10 * x} if known or x <= 0.5 else {})
            ended = sample_trial(number, TrialStatus.COMPLETED, config=offered.config, metrics=metrics)
            proposer.observe(replace(ended, state=offered.state))
            configs.append(x)
        late = configs[count // 2 :]
        return sum(x > 0.5 for x in late) / len(late)

    free = found([], True)
    assert found(["memory <= 5"], True) < free
    assert found(["memory <= 5"], False) < free


# Options and libraries


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        (
            "tpe",
            {"n_startup_trial": 3},
            r"n_startup_trial \(did you mean 'n_startup_trials'\?\) is no option of the engine tpe",
        ),
        ("tpe", {"n_startup_trials": -1}, "n_startup_trials is -1; allowed: a whole number from 0 on"),
        ("tpe", {"n_startup_trials": True}, "n_startup_trials is True; allowed: a whole number"),
        ("tpe", {"n_ei_candidates": 2.0}, "n_ei_candidates is 2.0; allowed: a whole number from 1 on"),
        ("tpe", {"multivariate": 1}, "multivariate is 1; allowed: true or false"),
        ("tpe", {"group": True, "multivariate": False}, "group: true and multivariate: false exclude each other"),
        ("tpe", {"seed": 1}, "seed.* is no option of the engine tpe; its options: n_startup_trials"),
        ("gp", {"n_startup_trials": 0}, "from 1 on"),
        ("gp", {"deterministic_objective": None}, "deterministic_objective is None; allowed: true or false"),
        ("cmaes", {"sigma0": math.inf}, "sigma0 is inf"),
        ("cmaes", {"sigma0": 0}, "sigma0 is 0"),
        ("cmaes", {"popsize": 3}, "popsize is 3; allowed: a whole number from 4 on, or null"),
        ("cmaes", {"use_separable_cma": True, "with_margin": True}, "exclude each other; drop one"),
        ("cmaes", {"lr_adapt": True, "with_margin": True}, "exclude each other"),
        ("cmaes", {"lr_adapt": True, "use_separable_cma": True}, "exclude each other"),
        ("nsga2", {"population_size": 1}, "from 2 on"),
        ("nsga2", {"mutation_prob": 1.5}, r"mutation_prob is 1.5; allowed: a number in \[0, 1\], or null"),
        ("nsga2", {"dividing_parameter": 3}, "no option of the engine nsga2"),
        ("nsga3", {"dividing_parameter": 0}, "from 1 on"),
        ("nsga3", {"crossover_prob": "0.5"}, "crossover_prob is '0.5'"),
        ("random", {"seed": 1}, "no option of the engine random; its options: none"),
    ],
)
def test_wrong_options_are_refused(engine, options, message):
    with pytest.raises(SpecError, match=message):
        check_options(engine, options)
    if engine in ENGINES:
        with pytest.raises(SpecError, match=message):
            make(spec_of(engine, "one", options=options), 1)


EVERY = {bool: True, int: 5, float: 0.5}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_option_is_taken(engine):
    for name, option in OPTIONS[engine].items():
        for value in [EVERY[option.kind]] + [None] * option.optional:
            check_options(engine, {name: value})
            make(spec_of(engine, "mixed", options={name: value}), 1).propose(0)
    check_options("file.py:Mine", {"anything": object()})


def test_absent_libraries_are_named_with_their_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        options_module.importlib.util, "find_spec", lambda name: None if name in ("torch", "scipy", "cmaes") else find(name)
    )
    with pytest.raises(MissingLibrary, match=r"gp needs torch and scipy, not installed here: pip install 'holdfast\[gp\]'"):
        check_libraries("gp")
    with pytest.raises(MissingLibrary, match=r"cmaes needs cmaes, .* 'holdfast\[cmaes\]'"):
        make(spec_of("cmaes"), 1)
    for engine in ("tpe", "nsga2", "nsga3", "random", "mine.py:Mine"):
        check_libraries(engine)


def test_several_objectives_are_checked():
    with pytest.raises(SpecError, match="one objective, the spec has 2; use tpe"):
        check_objectives("cmaes", 2)
    for engine in ENGINES:
        check_objectives(engine, 1)
        if engine != "cmaes":
            check_objectives(engine, 3)


def test_checks_import_no_library():
    code = (
        "import sys; from holdfast.engines.options import *; check_options('gp', {'n_startup_trials': 3});"
        "check_libraries('gp'); check_libraries('cmaes'); check_objectives('nsga2', 2);"
        "assert not {'optuna', 'torch', 'scipy', 'cmaes', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
