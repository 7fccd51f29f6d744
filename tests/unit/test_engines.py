import logging
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import InvalidInput
from holdfast.core.space import Space
from holdfast.core.trial import TrialStatus
from holdfast.core.values import dumps
from holdfast.engines.factory import make_proposer
from holdfast.engines.grid import GridProposer
from holdfast.engines.optuna_engine import make
from holdfast.engines.random_engine import RandomProposer
from holdfast.testing.proposers import SPACES, ProposerContract, config_of, objective_of, rebuilt
from holdfast.testing.samples import sample_spec, sample_trial


class TestRandom(ProposerContract):
    engine = "random"

    def make(self, spec, seed):
        return make_proposer(spec, seed)


class TestTPE(ProposerContract):
    engine = "tpe"

    def make(self, spec, seed):
        return make_proposer(spec, seed)


class TestGrid(ProposerContract):
    engine = "grid"

    def make(self, spec, seed):
        return make_proposer(spec, seed)

    def adapt(self, space):
        return {name: self._stepped(parameter) for name, parameter in space.items()}

    def _stepped(self, parameter):
        if parameter["type"] != "float" or "step" in parameter:
            return parameter
        width = parameter["high"] - parameter["low"]
        return {key: value for key, value in parameter.items() if key != "log"} | {"step": width / 3}


def space_of(**parameters):
    return Space.model_validate(parameters)


# random


def test_random_differs_by_seed_and_number_and_covers_the_space():
    space = Space.model_validate(SPACES["numbers"])
    draws = [RandomProposer(space, 1).propose(number) for number in range(400)]
    assert draws[0] != RandomProposer(space, 2).propose(0)
    assert len({dumps(draw) for draw in draws}) == 400
    assert {draw["drop"] for draw in draws} == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    assert {draw["width"] for draw in draws} == set(range(16, 101, 7))
    logs = [math.log10(draw["lr"]) for draw in draws]
    assert statistics.mean(logs) == pytest.approx(-3, abs=0.25)
    assert sum(draw["depth"] <= 8 for draw in draws) > 150  # log: as many below 8 as above


def test_random_draws_are_the_same_for_ever():
    """A restore may happen under a newer Python or holdfast; a change here breaks every unfinished search."""
    proposer = RandomProposer(Space.model_validate(SPACES["conditional"]), 7)
    assert proposer.propose(0) == {"opt": "adam", "beta": pytest.approx(0.9468083406910948, rel=1e-15), "warm": False}
    assert proposer.propose(1) == {"opt": "sgd", "momentum": pytest.approx(0.48300799877), "warm": True, "steps": 13}


@pytest.mark.parametrize(("engine", "limit"), [("random", 0.4e-3), ("grid", 0.4e-3)])
def test_cost_of_a_proposal_does_not_grow(engine, limit):
    space = {
        "a": {"type": "int", "low": 1, "high": 100_000},
        "b": {"type": "categorical", "choices": ["x", "y"]},
        "c": {"type": "float", "low": 0.0, "high": 1.0, "step": 0.125},
    }
    proposer = make_proposer(sample_spec(space=space, search={"engine": engine, "num_trials": 5000}), 1)
    costs = []
    for number in range(3000):
        start = time.perf_counter()
        config = proposer.propose(number)
        for status in (TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.COMPLETED):
            proposer.observe(sample_trial(number, status, config=config))
        costs.append(time.perf_counter() - start)
    assert statistics.median(costs[-500:]) < limit


bounds = st.tuples(st.integers(-(10**6), 10**6), st.integers(0, 10**6)).map(lambda pair: (pair[0], pair[0] + pair[1]))
parameters = st.one_of(
    bounds.map(lambda pair: {"type": "int", "low": pair[0], "high": pair[1]}),
    st.tuples(bounds, st.integers(1, 1000)).map(
        lambda item: {"type": "int", "low": item[0][0], "high": item[0][1], "step": item[1]}
    ),
    st.tuples(st.integers(1, 1000), st.integers(0, 10**9)).map(
        lambda pair: {"type": "int", "low": pair[0], "high": sum(pair), "log": True}
    ),
    st.tuples(st.floats(-1e9, 1e9), st.floats(0, 1e9)).map(lambda pair: {"type": "float", "low": pair[0], "high": sum(pair)}),
    st.tuples(st.floats(1e-300, 1e3), st.floats(1, 1e9)).map(
        lambda pair: {"type": "float", "low": pair[0], "high": pair[0] * pair[1], "log": True}
    ),
    st.tuples(st.integers(-100, 100), st.integers(0, 100), st.sampled_from([0.1, 0.25, 0.3, 1e-3, 7.0])).map(
        lambda item: {"type": "float", "low": item[0] / 10, "high": (item[0] + item[1]) / 10, "step": item[2]}
    ),
    st.lists(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3)), min_size=1, max_size=5, unique_by=dumps
    ).map(lambda choices: {"type": "categorical", "choices": choices}),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), parameters, min_size=1), st.integers(0, 2**40))
def test_random_configs_fit_any_space(raw, seed):
    space = Space.model_validate(raw)
    for number in range(3):
        config = RandomProposer(space, seed).propose(number)
        assert space.validate_config(config) == config


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), parameters, min_size=1))
def test_tpe_configs_fit_any_space(raw):
    spec = sample_spec(space=raw, search={"engine": "tpe", "num_trials": 20})
    proposer = make(spec, 1)
    for number in range(14):
        config = config_of(proposer.propose(number))
        assert spec.space.validate_config(config) == config
        proposer.observe(sample_trial(number, TrialStatus.COMPLETED, config=config, metrics={"loss": objective_of(config)}))


# TPE


def tpe(trials, *, objectives=None, space="numbers"):
    spec = sample_spec(
        space=SPACES[space], objectives=objectives or {"loss": "min"}, search={"engine": "tpe", "num_trials": 99}
    )
    return rebuilt(lambda: make(spec, 1), trials)


def finished(count, value=lambda config: abs(math.log10(config["lr"]) + 2), space="numbers"):
    source = RandomProposer(Space.model_validate(SPACES[space]), 3)
    configs = [source.propose(number) for number in range(count)]
    return {
        number: sample_trial(number, TrialStatus.COMPLETED, config=config, metrics={"loss": value(config)})
        for number, config in enumerate(configs)
    }


def test_tpe_follows_the_objective_in_its_direction():
    trials = finished(60)
    low = tpe(trials).propose(60).config["lr"]
    high = tpe(trials, objectives={"loss": "max"}).propose(60).config["lr"]
    assert abs(math.log10(low) + 2) < abs(math.log10(high) + 2)


@pytest.mark.parametrize(
    ("status", "loss", "counts"),
    [
        (TrialStatus.COMPLETED, 0.0, True),
        (TrialStatus.PRUNED, 0.0, True),
        (TrialStatus.COMPLETED, math.nan, False),
        (TrialStatus.COMPLETED, math.inf, False),
        (TrialStatus.FAILED, 0.0, False),
        (TrialStatus.TIMED_OUT, 0.0, False),
        (TrialStatus.CANCELLED, 0.0, False),
        (TrialStatus.SKIPPED, 0.0, False),
    ],
)
def test_what_counts_as_a_result(status, loss, counts):
    """With nine results TPE still draws at random; the tenth makes it a model."""
    trials = finished(9)
    config = trials[0].config
    without = tpe({**trials, 9: sample_trial(9, TrialStatus.CANCELLED, config=config)}).propose(10)
    with_it = tpe({**trials, 9: sample_trial(9, status, config=config, metrics={"loss": loss})}).propose(10)
    assert (with_it != without) is counts


def test_running_trials_are_kept_away_from():
    trials = finished(30)
    plain = tpe({**trials, 30: sample_trial(30, TrialStatus.FAILED, config=trials[3].config)})
    busy = tpe({**trials, 30: sample_trial(30, TrialStatus.RUNNING, config=plain.propose(31).config)})
    waiting = tpe({**trials, 30: sample_trial(30, TrialStatus.PENDING, config=plain.propose(31).config)})
    assert busy.propose(31) != plain.propose(31)
    assert busy.propose(31) == waiting.propose(31)


def test_an_errored_trial_that_succeeds_later_is_a_success():
    trials = {**finished(15), 15: sample_trial(15, TrialStatus.FAILED, config={**finished(1)[0].config, "lr": 0.01})}
    proposer = tpe(trials)
    failed = proposer.propose(16)
    for status in (TrialStatus.PENDING, TrialStatus.RUNNING):
        proposer.observe(sample_trial(15, status, config=trials[15].config, attempt=2))
    trials[15] = sample_trial(15, TrialStatus.COMPLETED, config=trials[15].config, metrics={"loss": -9.0}, attempt=2)
    proposer.observe(trials[15])
    assert proposer.propose(16) == tpe(trials).propose(16) != failed


def test_another_process_proposes_the_same():
    code = (
        "from test_engines import finished, tpe; trials = finished(25, lambda config: float(len(config)), space='conditional');"
        "print([tpe(trials, space='conditional').propose(25) for _ in range(2)])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_optuna_keeps_quiet_and_its_settings_stay(capfd):
    import optuna

    before = optuna.logging.get_verbosity()
    handlers = list(logging.getLogger("optuna").handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tpe(finished(12, lambda config: 1.0, space="conditional"), space="conditional").propose(12)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == before
    assert logging.getLogger("optuna").handlers == handlers


@pytest.mark.parametrize("engine", ["random", "grid"])
def test_only_tpe_imports_optuna(engine):
    code = (
        "import sys; from holdfast.testing.samples import sample_spec; from holdfast.engines.factory import make_proposer;"
        f"make_proposer(sample_spec(space={{}}, search={{'engine': {engine!r}, 'num_trials': 3}}), 1).propose(0);"
        "assert 'optuna' not in sys.modules and 'numpy' not in sys.modules"
    )
    source = code.replace("from holdfast.testing.samples import sample_spec", SPEC_WITHOUT_TEST_KIT)
    subprocess.run([sys.executable, "-c", source], check=True)


SPEC_WITHOUT_TEST_KIT = (
    "from holdfast.core.spec import ExperimentSpec;"
    "sample_spec = lambda **k: ExperimentSpec.parse({'name': 'a', 'trainable': 'a:b', 'objectives': {'loss': 'min'}, **k})"
)


# grid


def test_grid_order_and_samples():
    space = space_of(
        a={"type": "int", "low": 1, "high": 2},
        b={"type": "categorical", "choices": ["x", "y"]},
        c={"type": "float", "low": 0.1, "high": 0.3, "step": 0.1},
    )
    grid = GridProposer(space, samples=2)
    points = [tuple(grid.propose(number).values()) for number in range(grid.size)]
    assert grid.size == 24
    assert points[:4] == [(1, "x", 0.1), (1, "x", 0.2), (1, "x", 0.3), (1, "y", 0.1)]
    assert points[:12] == points[12:]
    assert len(set(points)) == 12
    assert [grid.propose(17) for _ in range(2)] == [grid.propose(5)] * 2
    for number in (-1, 24):
        with pytest.raises(InvalidInput, match="24 trials"):
            grid.propose(number)


def test_grid_collapses_inactive_branches():
    grid = GridProposer(
        space_of(
            opt={"type": "categorical", "choices": ["sgd", "adam", "none"]},
            momentum={"type": "float", "low": 0.0, "high": 1.0, "step": 0.5, "when": {"opt": "sgd"}},
            warm={"type": "categorical", "choices": [True, False], "when": {"opt": ["sgd", "adam"]}},
            steps={"type": "int", "low": 1, "high": 2, "when": {"warm": True}},
            last={"type": "int", "low": 0, "high": 1},
        )
    )
    points = [grid.propose(number) for number in range(grid.size)]
    assert grid.size == (3 * (2 + 1) + (2 + 1) + 1) * 2
    assert len({dumps(point) for point in points}) == grid.size
    assert [point["last"] for point in points] == [0, 1] * (grid.size // 2)
    assert points[-2:] == [{"opt": "none", "last": 0}, {"opt": "none", "last": 1}]


def test_an_empty_grid_has_one_point_and_a_vast_one_is_not_listed():
    assert GridProposer(space_of(), samples=3).size == 3
    wide = {f"p{place}": {"type": "int", "low": 1, "high": 1000} for place in range(20)}
    grid = GridProposer(Space.model_validate(wide))
    assert grid.size == 1000**20
    assert set(grid.propose(grid.size - 1).values()) == {1000}


# Trials that were not proposed


@pytest.mark.parametrize("samples", [1, 2])
def test_queued_trials_neither_lose_nor_double_a_grid_point(samples):
    space = space_of(
        a={"type": "categorical", "choices": ["x", "y"]}, n={"type": "int", "low": 1, "high": 3, "when": {"a": "y"}}
    )
    alone = GridProposer(space, samples)
    expected = [alone.propose(number) for number in range(alone.size)]
    for pattern in range(2**6):
        grid, trials, found = GridProposer(space, samples), {}, []
        for number in range(200):
            queued = number < 12 and bool(pattern >> (number % 6) & 1)
            if not queued and len(found) == grid.size:
                break
            config = {"a": "x"} if queued else grid.propose(number)
            found += [] if queued else [config]
            trials[number] = sample_trial(number, config=config, source="queued" if queued else "proposed")
            grid.observe(trials[number])
            if len(found) < grid.size:
                assert rebuilt(lambda: GridProposer(space, samples), trials).propose(number + 1) == grid.propose(number + 1)
        assert found == expected


def merged_trials(spec, count=14):
    whole = rebuilt(lambda: make_proposer(spec, 99), {})
    found = {}
    for number in range(-count, 0):
        config = config_of(whole.propose(count + number))
        status, loss = (TrialStatus.FAILED, None) if number % 5 == 0 else (TrialStatus.COMPLETED, objective_of(config))
        metrics = {} if loss is None else {"loss": loss}
        found[number] = sample_trial(number, status, config=config, metrics=metrics, source="merged")
    return found


def test_merged_trials_warm_tpe_up_and_are_known_after_a_restart():
    spec = sample_spec(space=SPACES["conditional"], search={"engine": "tpe", "num_trials": 20, "seed": 3})
    merged = merged_trials(spec)
    cold, warm = make(spec, 3), rebuilt(lambda: make(spec, 3), merged)
    cold_configs, warm_configs, trials = [], [], dict(merged)
    for number in range(8):
        for proposer, configs in ((cold, cold_configs), (warm, warm_configs)):
            configs.append(config_of(proposer.propose(number)))
        assert rebuilt(lambda: make(spec, 3), trials).propose(number).config == warm_configs[-1]
        for status in (TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.COMPLETED):
            metrics = {"loss": objective_of(warm_configs[-1])} if status is TrialStatus.COMPLETED else {}
            trials[number] = sample_trial(number, status, config=warm_configs[-1], metrics=metrics)
            warm.observe(trials[number])
            cold.observe(sample_trial(number, status, config=cold_configs[-1], metrics=metrics))
    assert cold_configs != warm_configs


def test_a_merge_while_tpe_runs_is_as_one_before_a_restart():
    spec = sample_spec(space=SPACES["mixed"], search={"engine": "tpe", "num_trials": 20, "seed": 3})
    trials = {}
    live = make(spec, 3)
    for number in range(12):
        config = config_of(live.propose(number))
        trials[number] = sample_trial(number, TrialStatus.COMPLETED, config=config, metrics={"loss": objective_of(config)})
        live.observe(trials[number])
    before = live.propose(12)
    for number, trial in merged_trials(spec).items():
        trials[number] = trial
        live.observe(trial)
    assert live.propose(12) == rebuilt(lambda: make(spec, 3), trials).propose(12) != before


@pytest.mark.parametrize("engine", ["random", "grid"])
def test_merged_trials_change_no_draw_and_no_grid(engine):
    space = {"n": {"type": "int", "low": 0, "high": 9}}
    spec = sample_spec(space=space, search={"engine": engine, "num_trials": 5, "seed": 3})
    alone = make_proposer(spec, 3)
    warm = make_proposer(spec, 3)
    for number in range(-4, 0):
        warm.observe(sample_trial(number, TrialStatus.COMPLETED, config={"n": 1}, metrics={"loss": 1.0}, source="merged"))
    assert [warm.propose(number) for number in range(5)] == [alone.propose(number) for number in range(5)]
