import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from holdfast.core.budget import has_conditions
from holdfast.core.counted import values_of
from holdfast.core.errors import InvalidConfig, SpecError
from holdfast.core.space import Space, config_digest, config_text
from holdfast.core.trial import TrialStatus
from holdfast.engines.factory import make_proposer
from holdfast.testing.proposers import config_of
from holdfast.testing.samples import sample_spec, sample_trial

SPACE = {
    "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
    "drop": {"type": "float", "low": 0.0, "high": 0.5, "step": 0.1},
    "layers": {"type": "int", "low": 1, "high": 9, "step": 2},
    "act": {"type": "categorical", "choices": ["relu", 1, 1.0, True, None]},
    "beta": {"type": "float", "low": 0.8, "high": 0.99, "when": {"act": "relu"}},
    "kind": {"type": "constant", "value": "mlp"},
}
CONFIG = {"lr": 0.01, "drop": 0.3, "layers": 3, "act": "relu", "beta": 0.9, "kind": "mlp"}


def space_of(**parameters):
    return Space.model_validate(parameters)


def test_a_valid_config_comes_back_in_declared_order_and_type():
    space = Space.model_validate(SPACE)
    found = space.validate_config({**dict(reversed(CONFIG.items())), "drop": 0, "layers": 3.0})
    assert list(found) == list(SPACE)
    assert (found["drop"], type(found["drop"])) == (0.0, float)
    assert (found["layers"], type(found["layers"])) == (3, int)
    assert has_conditions(space)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1.0}, r"lr = 1.0 is outside \[0.0001, 0.1\]"),
        ({"lr": True}, "no finite number"),
        ({"lr": float("nan")}, "no finite number"),
        ({"drop": 0.15}, "multiple of the step 0.1"),
        ({"layers": 2}, "multiple of the step 2"),
        ({"layers": 2.5}, "no whole number"),
        ({"act": False}, "none of the choices"),
        ({"act": "1"}, "none of the choices"),
        ({"act": None}, "'beta', which is inactive"),
        ({"kind": "cnn"}, "constant 'mlp'"),
        ({"extra": 1}, "names 'extra'; allowed: lr, drop"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(InvalidConfig, match=message):
        Space.model_validate(SPACE).validate_config({**CONFIG, **change})


def test_a_missing_value_is_named():
    with pytest.raises(InvalidConfig, match="lacks 'lr'"):
        Space.model_validate(SPACE).validate_config({})
    assert space_of().validate_config({}) == {}


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"type": "float", "low": 2, "high": 1}, "swap them"),
        ({"type": "float", "low": 0, "high": 1, "log": True}, "raise low or drop log"),
        ({"type": "float", "low": 1, "high": 2, "log": True, "step": 0.1}, "exclude each other"),
        ({"type": "int", "low": 1, "high": 9, "log": True, "step": 2}, "exclude each other"),
        ({"type": "int", "low": 1, "high": 9, "step": 0}, "step must be above 0"),
        ({"type": "float", "low": 0, "high": 1e300, "step": 1e-300}, "is too small for a range of"),
        ({"type": "int", "low": True, "high": 9}, "true is no number"),
        ({"type": "int", "low": 1, "high": 9, "default": 10}, "default 10 is outside"),
        ({"type": "categorical", "choices": []}, "choices is empty"),
        ({"type": "categorical", "choices": ["a", "a"]}, 'names "a" more than once'),
        ({"type": "categorical", "choices": [[1]]}, "not list"),
        ({"type": "categorical", "choices": [float("inf")]}, "not inf"),
        ({"type": "categorical", "choices": ["a"], "default": "b"}, "none of the choices"),
        ({"type": "constant", "value": float("nan")}, "not nan"),
    ],
)
def test_bad_parameters_are_refused(parameter, message):
    with pytest.raises(ValidationError, match=message):
        space_of(x=parameter)


def test_values_keep_their_types():
    space = Space.model_validate(SPACE)
    assert [type(choice) for choice in space.parameters["act"].choices] == [str, int, float, bool, type(None)]
    for choice in (1, 1.0, True):
        found = space.validate_config({**{key: value for key, value in CONFIG.items() if key != "beta"}, "act": choice})
        assert type(found["act"]) is type(choice)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({"c": 1}, "'c', which is no parameter"),
        ({"b": 1}, "declared later; move 'b' above 'a'"),
        ({"z": 7}, r"which is outside \[0, 5\]"),
        ({"z": [1, 7]}, r"which is outside \[0, 5\]"),
    ],
)
def test_bad_conditions_are_refused(when, message):
    whole = {"type": "int", "low": 0, "high": 5}
    with pytest.raises(ValidationError, match=message):
        space_of(z=whole, a={**whole, "when": when}, b=whole)


def test_conditions_chain():
    space = space_of(
        a={"type": "categorical", "choices": [True, False]},
        b={"type": "int", "low": 1, "high": 2, "when": {"a": True}},
        c={"type": "constant", "value": 0, "when": {"b": [2]}},
    )
    assert space.validate_config({"a": False}) == {"a": False}
    assert space.validate_config({"a": True, "b": 2, "c": 0}) == {"a": True, "b": 2, "c": 0}
    with pytest.raises(InvalidConfig, match="inactive"):
        space.validate_config({"a": False, "c": 0})


def test_the_difference_names_both_sides():
    ours, theirs = (
        space_of(**SPACE),
        space_of(**{**SPACE, "lr": {"type": "float", "low": 1e-4, "high": 1.0}, "new": SPACE["kind"]}),
    )
    lines = ours.difference(theirs)
    assert [line.split(":")[0] for line in lines] == ["lr", "new"]
    assert "0.1" in lines[0]
    assert "1.0" in lines[0]
    assert "absent" in lines[1]
    assert ours.difference(space_of(**SPACE)) == []
    left, right = ({"x": {"type": "constant", "value": value}} for value in (1, True))
    assert space_of(**left).difference(space_of(**right))


@given(st.permutations(list(CONFIG)))
def test_identity_does_not_depend_on_key_order(names):
    shuffled = {name: CONFIG[name] for name in names}
    assert config_text(shuffled) == config_text(CONFIG)
    assert config_digest(shuffled) == config_digest(CONFIG)


def test_identity_tells_types_apart():
    assert len({config_digest({"x": value}) for value in (1, 1.0, True, "1")}) == 4


@pytest.mark.parametrize(
    ("parameter", "count"),
    [
        (SPACE["drop"], 6),
        (SPACE["layers"], 5),
        (SPACE["act"], 5),
        (SPACE["kind"], 1),
        ({"type": "int", "low": 0, "high": 9}, 10),
    ],
)
def test_how_many_values_a_grid_has(parameter, count):
    assert values_of(space_of(x={key: value for key, value in parameter.items() if key != "when"}).parameters["x"]) == count


@pytest.mark.parametrize(
    "parameter",
    [
        {"type": "float", "low": -1e308, "high": 1e308},
        {"type": "float", "low": -1.7e308, "high": 1.7e308, "step": 1e300},
        {"type": "int", "low": 0, "high": 10**400},
        {"type": "int", "low": -(10**308), "high": 10**308},
    ],
)
def test_bounds_further_apart_than_a_float_reaches_are_refused(parameter):
    with pytest.raises(SpecError, match=r"space\.x: .*too far apart; narrow them"):
        sample_spec(space={"x": parameter}, search={"engine": "tpe", "num_trials": 1})


@pytest.mark.parametrize("engine", ["tpe", "random"])
def test_the_widest_bounds_can_be_searched(engine):
    spec = sample_spec(space={"x": {"type": "float", "low": -8e307, "high": 8e307}}, search={"engine": engine, "num_trials": 1})
    proposer = make_proposer(spec, 1)
    for number in range(14):
        config = config_of(proposer.propose(number))
        proposer.observe(sample_trial(number, TrialStatus.COMPLETED, config=config, metrics={"loss": config["x"] / 1e300}))


WITH_DEFAULTS = {
    "act": {"type": "categorical", "choices": ["relu", "tanh"], "default": "relu"},
    "beta": {"type": "float", "low": 0.0, "high": 1.0, "when": {"act": "relu"}, "default": 0.5},
    "gamma": {"type": "float", "low": 0.0, "high": 1.0, "when": {"act": "tanh"}},
    "kind": {"type": "constant", "value": None},
    "x": {"type": "float", "low": 0.0, "high": 4.0},
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"x": 1}, {"act": "relu", "beta": 0.5, "kind": None, "x": 1.0}),
        ({"x": 1.0, "act": "tanh", "gamma": 0.25}, {"act": "tanh", "gamma": 0.25, "kind": None, "x": 1.0}),
        ({"x": 1.0, "act": "tanh"}, None),
        ({"act": "relu", "beta": 0.25, "kind": None}, None),
        ({}, None),
    ],
)
def test_a_config_of_another_space_is_completed(config, expected):
    found = space_of(**WITH_DEFAULTS).completed(config)
    assert found == expected
    assert found is None or [type(value) for value in found.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"x": 5.0}, "x = 5.0 is outside"),
        ({"x": 1.0, "other": 1, "act": "tanh"}, "'other'"),
        ({"x": 1.0, "act": "tanh", "gamma": 0.5, "beta": 0.5}, "'beta', which is inactive"),
        ({"act": "gelu"}, "act = 'gelu' is none of"),
        ({"beta": 2.0}, "beta = 2.0"),
        ({"x": 1.0, "kind": 0}, "kind = 0"),
    ],
)
def test_a_config_that_has_no_place_in_the_space_is_refused_also_when_it_lacks_something(config, message):
    with pytest.raises(InvalidConfig, match=message):
        space_of(**WITH_DEFAULTS).completed(config)
