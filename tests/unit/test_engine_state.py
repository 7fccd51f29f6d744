"""What samplers keep in trials comes back and runs no code; histories that no sampler expects; conditions on metrics."""

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
from optuna_kit import BOTH, ENGINES, KEEPING, LOSS, SMALL, simulated, spec_of

from holdfast.core.errors import Corrupt, NewerFormat
from holdfast.core.ports import Proposal
from holdfast.core.seeding import proposal_seed
from holdfast.core.trial import TrialStatus
from holdfast.engines.optuna_engine import make
from holdfast.engines.state import pack, unpack
from holdfast.testing.proposers import changed, objective_of, rebuilt
from holdfast.testing.samples import sample_trial


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


GOING_ON = {"cmaes": (LOSS, 30), "nsga2": (BOTH, 30), "gp": (LOSS, 6)}
"""Objectives and trials of each engine that another process goes on with."""


def test_another_process_goes_on_the_same(tmp_path):
    stored, expected = {}, ""
    for engine, (objectives, count) in GOING_ON.items():
        _, live, stored[engine] = simulated(engine, count, objectives=objectives, space="conditional")
        expected += f"{live.propose(count)}\n"
    (tmp_path / "trials").write_bytes(pickle.dumps(stored))
    code = (
        "import pickle, sys; from test_engine_state import *\n"
        "for engine, trials in pickle.loads(open(sys.argv[1], 'rb').read()).items():\n"
        "    spec = spec_of(engine, 'conditional', GOING_ON[engine][0])\n"
        "    print(rebuilt(lambda: make(spec, 1), trials).propose(len(trials)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "trials")],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "3", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found == expected


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


def test_a_condition_on_a_metric_that_is_missing_is_not_met_even_where_the_rest_would_decide():
    def found(rest):
        proposer = make(spec_of("tpe", "numbers", feasible=["memory <= 16 or fast == 1"]), 1)
        for number in range(20):
            config = proposer.propose(number).config
            metrics = {"loss": objective_of(config)} | (rest if number % 2 else {"memory": 1})
            proposer.observe(sample_trial(number, TrialStatus.COMPLETED, config=config, metrics=metrics))
        return [proposer.propose(number).config for number in range(20, 24)]

    assert found({"fast": 1}) == found({"fast": 0}) != found({"fast": 1, "memory": 1})


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
