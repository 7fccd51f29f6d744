import math
import statistics
import sys
import time
import warnings

import pytest
from scipy.stats import qmc

from holdfast.core.errors import MissingLibrary, SpecError
from holdfast.core.ports import as_proposal
from holdfast.core.space import Space
from holdfast.core.trial import TrialStatus
from holdfast.engines.factory import check, make_proposer
from holdfast.engines.quasi import BLOCK, QuasiProposer
from holdfast.engines.values import config_at
from holdfast.testing.proposers import SPACES, ProposerContract, changed, config_of, proposed, rebuilt
from holdfast.testing.samples import sample_spec, sample_trial

PLANE = {"x": {"type": "float", "low": 0.0, "high": 1.0}, "y": {"type": "float", "low": 0.0, "high": 1.0}}


class TestSobol(ProposerContract):
    engine = "sobol"

    def make(self, spec, seed):
        return make_proposer(spec, seed)


class TestHalton(ProposerContract):
    engine = "halton"

    def make(self, spec, seed):
        return make_proposer(spec, seed)


def spec_of(engine, space=PLANE, **search):
    return sample_spec(space=space, search={"engine": engine, "num_trials": 9, "seed": 1, **search})


def run(proposer, count, trials=None):
    """Let ``count`` trials be proposed and end; return their configs."""
    trials = {} if trials is None else trials
    found = []
    for _ in range(count):
        number = len(trials)
        trials[number] = changed(proposed(number, proposer.propose(number)), TrialStatus.COMPLETED, {"loss": 1.0})
        proposer.observe(trials[number])
        found.append(trials[number].config)
    return found


@pytest.mark.parametrize("engine", ["sobol", "halton"])
def test_it_covers_the_plane_more_evenly_than_chance_and_differs_by_seed(engine):
    points = [list(config.values()) for config in run(make_proposer(spec_of(engine), 1), 128)]
    random = [list(config.values()) for config in run(make_proposer(spec_of("random"), 1), 128)]
    assert qmc.discrepancy(points) < 0.3 * qmc.discrepancy(random)
    assert points != [list(config.values()) for config in run(make_proposer(spec_of(engine), 2), 128)]


@pytest.mark.parametrize(("engine", "kind"), [("sobol", qmc.Sobol), ("halton", qmc.Halton)])
def test_unscrambled_it_is_the_sequence_itself_block_after_block(engine, kind):
    count = 2 * BLOCK + 3
    found = run(make_proposer(spec_of(engine, options={"scramble": False}), 1), count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = kind(d=2, scramble=False).random(count)
    assert [tuple(config.values()) for config in found] == [pytest.approx(tuple(point)) for point in expected]


@pytest.mark.parametrize("engine", ["sobol", "halton"])
def test_what_comes_between_takes_no_point_and_brings_none_back(engine):
    alone = run(make_proposer(spec_of(engine), 1), 12)
    proposer, trials, found = make_proposer(spec_of(engine), 1), {}, []
    for number in range(16):
        if number % 4 == 1:
            trials[number] = sample_trial(number, config={"x": 0.5, "y": 0.5}, source="queued", group=number)
            proposer.observe(trials[number])
            assert rebuilt(lambda: make_proposer(spec_of(engine), 1), trials).propose(number + 1) == proposer.propose(
                number + 1
            )
        else:
            found += run(proposer, 1, trials)
    assert found == alone


def test_points_that_break_a_constraint_are_passed_over_and_do_not_come_back():
    spec = sample_spec(space=PLANE, constraints=["x + y < 0.3"], search={"engine": "sobol", "num_trials": 9, "seed": 1})
    proposer = make_proposer(spec, 1)
    found = run(proposer, 10)
    free = QuasiProposer(spec.space, 1, kind="sobol")
    everything = [free.propose(0, retry=place).config for place in range(1000)]
    assert found == [config for config in everything if config["x"] + config["y"] < 0.3][:10]


@pytest.mark.parametrize("engine", ["sobol", "halton"])
def test_a_long_sequence_is_taken_up_anywhere_and_costs_no_more(engine):
    space = Space.model_validate(SPACES["numbers"])
    proposer = QuasiProposer(space, 1, kind=engine)
    late = QuasiProposer(space, 1, kind=engine)
    late.observe(sample_trial(0, config={}).__class__(**{**vars(sample_trial(0)), "state": b"20000"}))
    assert late.propose(1) == proposer.propose(0, retry=20001)
    assert late.propose(1).state == b"20001"
    assert proposer.propose(0) == QuasiProposer(space, 1, kind=engine).propose(0)  # back to the beginning
    costs = []
    for place in range(20001, 20001 + 10 * BLOCK):
        start = time.perf_counter()
        late.propose(1, retry=place - 20001)
        costs.append(time.perf_counter() - start)
    assert statistics.median(costs) < 0.5e-3


@pytest.mark.parametrize("engine", ["sobol", "halton"])
def test_nothing_is_said_to_the_user(engine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make_proposer(spec_of(engine, SPACES["conditional"]), 1), BLOCK + 2)


def test_shares_are_of_logs_and_of_counts():
    space = Space.model_validate(SPACES["numbers"])
    low, middle, high = (config_at(space, dict.fromkeys(space.parameters, share)) for share in (0.0, 0.5, 1.0))
    assert low == {"lr": pytest.approx(1e-5), "drop": 0.0, "width": 16, "depth": 1, "fixed": 2.0}
    assert middle == {"lr": pytest.approx(1e-3), "drop": 0.3, "width": 58, "depth": 6, "fixed": 2.0}
    assert high == {"lr": pytest.approx(1e-1), "drop": 0.5, "width": 100, "depth": 64, "fixed": 2.0}
    assert config_at(space, {}) == low
    choices = [config_at(Space.model_validate(SPACES["mixed"]), {"act": share})["act"] for share in (0.0, 0.2, 0.99)]
    assert choices == ["relu", 1, None]
    assert math.isclose(config_at(Space.model_validate(PLANE), {"x": 0.25})["x"], 0.25)


def test_a_space_of_more_dimensions_than_the_sequence_has_is_refused_beforehand():
    space = {f"p{place}": {"type": "float", "low": 0.0, "high": 1.0} for place in range(21_202)}
    with pytest.raises(SpecError, match="sobol has 21,201 dimensions at most, the space needs 21,202; use halton"):
        check(sample_spec(space=space, search={"engine": "sobol", "num_trials": 2}))
    space["p0"] = {"type": "constant", "value": 1}
    check(sample_spec(space=space, search={"engine": "sobol", "num_trials": 2}))


def test_options_and_a_missing_library_are_refused_beforehand(monkeypatch):
    check(spec_of("sobol", options={"scramble": False}))
    with pytest.raises(
        SpecError,
        match=r"search\.options\.scrambled \(did you mean 'scramble'\?\) is no option of the engine sobol",
    ):
        check(spec_of("sobol", options={"scrambled": False}))
    with pytest.raises(SpecError, match=r"search\.options\.scramble is 'no'; allowed: true or false"):
        check(spec_of("halton", options={"scramble": "no"}))
    for engine in ("random", "grid"):
        with pytest.raises(SpecError, match=f"search.options.a is no option of the engine {engine}; its options: none"):
            check(spec_of(engine, {"x": {"type": "int", "low": 0, "high": 1}}, options={"a": 1}))
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats.qmc", None)
    with pytest.raises(MissingLibrary, match=r"pip install 'holdfast\[quasi\]'"):
        make_proposer(spec_of("sobol"), 1)
    assert config_of(as_proposal(make_proposer(spec_of("random"), 1).propose(0)))


def test_a_library_that_is_not_there_is_found_missing_without_importing_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingLibrary, match=r"search.engine halton needs scipy.*pip install 'holdfast\[quasi\]'"):
        check(spec_of("halton"))
