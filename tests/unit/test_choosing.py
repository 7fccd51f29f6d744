import pytest

from holdfast.core.errors import SpecError
from holdfast.engines.choosing import choose, chosen, is_installed
from holdfast.engines.factory import check, make_proposer
from holdfast.testing.proposers import ProposerContract
from holdfast.testing.samples import sample_spec


class TestAuto(ProposerContract):
    engine = "auto"
    trials = 9

    def make(self, spec, seed):
        return make_proposer(spec, seed)


FLOATS = {name: {"type": "float", "low": 0.0, "high": 1.0} for name in "xyz"}
FINITE = {"n": {"type": "int", "low": 1, "high": 4}, "act": {"type": "categorical", "choices": ["relu", "tanh", "elu"]}}
CONDITIONAL = {
    "opt": {"type": "int", "low": 0, "high": 1},
    "rate": {"type": "float", "low": 0.0, "high": 1.0, "when": {"opt": 1}},
}
WIDE = {f"p{place}": {"type": "float", "low": 0.0, "high": 1.0} for place in range(30)}
MANY = {"search": {"num_trials": 5000}}
TWO = {"objectives": {"loss": "min", "size": "max"}}


def spec_of(space, search=None, **sections):
    return sample_spec(space=space, search={"engine": "auto", "num_trials": 40, "seed": 1, **(search or {})}, **sections)


@pytest.mark.parametrize(
    ("spec", "absent", "engine", "words"),
    [
        (spec_of(FINITE), (), "grid", "40 configs are enough to try each of the 12 of the space"),
        (spec_of(FINITE, {"num_trials": 12}), (), "grid", "12 configs"),
        (spec_of(FINITE, {"num_trials": 11}), (), "tpe", "categorical or conditional"),
        (spec_of(FINITE, {"num_trials": 30, "repeats": 3}), (), "tpe", "categorical"),
        (spec_of(FINITE, {"num_trials": 36, "repeats": 3}), (), "grid", "12 configs"),
        (spec_of(FLOATS, {"num_trials": 9}), (), "sobol", "9 configs are too few for a model to learn from"),
        (spec_of(FLOATS, {"num_trials": 9}), ("sobol",), "random", "sobol needs holdfast[quasi], which is not installed"),
        (spec_of(FLOATS), (), "gp", "40 configs of 3 numeric parameters suit a Gaussian process"),
        (spec_of(FLOATS), ("gp",), "tpe", "gp needs holdfast[gp], which is not installed"),
        (spec_of(FLOATS, {"num_trials": 500}), (), "tpe", "neither few enough for gp nor many enough for cmaes"),
        (spec_of(FLOATS, **MANY), (), "cmaes", "5000 configs of 3 numeric parameters"),
        (spec_of(FLOATS, **MANY), ("cmaes",), "tpe", "cmaes needs holdfast[cmaes]"),
        (spec_of(FLOATS, **MANY, feasible=["memory < 3"]), (), "tpe", "neither"),
        (spec_of({"x": FLOATS["x"]}, **MANY), (), "tpe", "neither"),
        (spec_of(WIDE), (), "tpe", "neither"),
        (spec_of(CONDITIONAL), (), "tpe", "conditional"),
        (spec_of(FLOATS, {"num_trials": None, "time_budget": 60}), (), "tpe", "no num_trials"),
        (spec_of(FLOATS, **TWO), (), "tpe", "2 objectives, and too few configs"),
        (spec_of(FLOATS, **MANY, **TWO), (), "nsga2", "2 objectives and 5000 configs"),
    ],
)
def test_what_auto_chooses_and_why(spec, absent, engine, words):
    choice = choose(spec, lambda name: name not in absent)
    assert choice.engine == engine
    assert words in choice.reason
    assert choose(spec, lambda name: name not in absent) == choice


def test_the_choice_is_written_into_the_spec_once():
    spec = chosen(spec_of(FINITE))
    assert spec.search.engine == "grid"
    assert spec.search.chosen == "auto chose grid: 40 configs are enough to try each of the 12 of the space"
    assert chosen(spec) is spec
    other = spec.model_copy(update={"search": spec.search.model_copy(update={"num_trials": 3})})
    assert chosen(other).search.engine == "grid"  # another budget changes nothing any more


def test_options_of_auto_are_refused():
    with pytest.raises(SpecError, match=r"search\.options are those of one engine, and auto chooses it"):
        check(spec_of(FLOATS, {"options": {"scramble": False}}))


def test_what_is_installed_is_found_without_importing_it(monkeypatch):
    asked = []
    monkeypatch.setattr("importlib.util.find_spec", asked.append)
    assert is_installed("tpe")
    assert not is_installed("gp")
    assert asked == ["torch", "scipy"]
