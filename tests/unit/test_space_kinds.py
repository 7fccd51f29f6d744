import pickle
import warnings

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

import holdfast
from holdfast.core.budget import has_conditions
from holdfast.core.choices import expanded
from holdfast.core.errors import InvalidConfig, InvalidInput, SpecError
from holdfast.core.space import Space, config_digest
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import TrialStatus
from holdfast.engines.factory import make_proposer
from holdfast.engines.optuna_engine import decode, distribution_of, encode
from holdfast.engines.random_engine import RandomProposer
from holdfast.specfile import ExperimentSpec as FileSpec
from holdfast.testing.proposers import SPACES
from holdfast.testing.samples import sample_spec, sample_trial

UNIT = {"type": "float", "low": 0.0, "high": 1.0}
WHOLE = {"type": "int", "low": 1, "high": 9}
MODEL = {
    "type": "choice",
    "options": {
        "svm": {
            "C": UNIT,
            "kernel": {"type": "choice", "options": {"rbf": {"gamma": UNIT}, "linear": None}, "default": "rbf"},
            "degree": {**WHOLE, "when": {"kernel": "linear"}},
            "tol": {**UNIT, "when": "C > 0.5 and kernel.rbf.gamma < lr"},
        },
        "forest": {"trees": WHOLE},
        "none": {},
    },
}
FLAT = {
    "lr": UNIT,
    "model": {"type": "categorical", "choices": ["svm", "forest", "none"]},
    "model.svm.C": {**UNIT, "when": {"model": "svm"}},
    "model.svm.kernel": {
        "type": "categorical",
        "choices": ["rbf", "linear"],
        "default": "rbf",
        "when": {"model": "svm"},
    },
    "model.svm.kernel.rbf.gamma": {**UNIT, "when": {"model.svm.kernel": "rbf"}},
    "model.svm.degree": {**WHOLE, "when": {"model": "svm", "model.svm.kernel": "linear"}},
    "model.svm.tol": {**UNIT, "when": "model == 'svm' and (model.svm.C > 0.5 and model.svm.kernel.rbf.gamma < lr)"},
    "model.forest.trees": {**WHOLE, "when": {"model": "forest"}},
}


def space_of(**parameters):
    return Space.model_validate(parameters)


# nested choices


def test_a_choice_becomes_flat_parameters():
    nested, flat = space_of(lr=UNIT, model=MODEL), Space.model_validate(FLAT)
    assert list(nested.parameters) == list(FLAT)
    assert nested == flat
    assert nested.difference(flat) == []
    assert expanded(FLAT) == FLAT
    assert expanded(expanded({"lr": UNIT, "model": MODEL})) == expanded({"lr": UNIT, "model": MODEL})


def test_what_is_stored_is_flat_and_comes_back():
    spec = sample_spec(space={"lr": UNIT, "model": MODEL}, constraints=["model.svm.C < lr"])
    stored = spec.stored()
    assert list(stored["space"]) == list(FLAT)
    again = ExperimentSpec.parse({**stored, "storage": "./runs"})
    assert again.space == spec.space
    assert again.stored() == stored
    assert pickle.loads(pickle.dumps(spec)).space == spec.space


@pytest.mark.parametrize(
    ("config", "nested"),
    [
        ({"lr": 0.5, "model": "none"}, {"lr": 0.5, "model": "none"}),
        ({"lr": 0.5, "model": "forest", "model.forest.trees": 3}, {"lr": 0.5, "model": {"forest": {"trees": 3}}}),
        (
            {"lr": 0.5, "model": "svm", "model.svm.C": 0.25, "model.svm.kernel": "linear", "model.svm.degree": 2},
            {"lr": 0.5, "model": {"svm": {"C": 0.25, "kernel": "linear", "degree": 2}}},
        ),
        (
            {
                "lr": 0.5,
                "model": "svm",
                "model.svm.C": 0.75,
                "model.svm.kernel": "rbf",
                "model.svm.kernel.rbf.gamma": 0.25,
                "model.svm.tol": 0.1,
            },
            {"lr": 0.5, "model": {"svm": {"C": 0.75, "kernel": {"rbf": {"gamma": 0.25}}, "tol": 0.1}}},
        ),
    ],
)
def test_configs_of_a_choice(config, nested):
    space = space_of(lr=UNIT, model=MODEL)
    assert space.validate_config(dict(reversed(config.items()))) == config
    assert holdfast.nested(config) == nested
    assert holdfast.nested(dict(reversed(config.items()))) == nested


def test_nested_leaves_other_dots_alone():
    config = {"a.b": 1, "a": "b", "opt": "v1.5", "opt.v1.5.x": 2, "opt.v1": 3, "n": 3, "n.3.x": 4, "none": None}
    assert holdfast.nested(config) == {
        "a.b": 1, "a": "b", "opt": {"v1.5": {"x": 2}}, "opt.v1": 3, "n": {3: {"x": 4}}, "none": None,
    }  # fmt: skip
    assert holdfast.nested({}) == {}


def test_a_condition_on_a_choice_is_one_on_all_that_is_inside():
    deep = {"type": "categorical", "choices": [True, False]}
    space = space_of(deep=deep, lr=UNIT, model={**MODEL, "when": {"deep": True}})
    assert list(space.validate_config({"deep": False, "lr": 0.5})) == ["deep", "lr"]
    with pytest.raises(InvalidConfig, match="inactive"):
        space.validate_config({"deep": False, "lr": 0.5, "model.svm.C": 0.5})


def test_names_are_looked_for_from_the_inside_out():
    space = space_of(
        x=WHOLE,
        y=WHOLE,
        outer={
            "type": "choice",
            "options": {
                "a": {
                    "x": WHOLE,
                    "inner": {"type": "choice", "options": {"b": {"p": {**UNIT, "when": "x > 3 and y > 3"}, "q q": UNIT}}},
                    "pi": WHOLE,
                    "r": {**UNIT, "when": "pi > 4 and `inner.b.q q` < .5"},
                }
            },
        },
    )
    assert space.parameters["outer.a.inner.b.p"].when == "outer.a.inner == 'b' and (outer.a.x > 3 and y > 3)"
    assert space.parameters["outer.a.r"].when == "outer == 'a' and (outer.a.pi > 4 and `outer.a.inner.b.q q` < 0.5)"
    assert space.conditional_on("outer.a.r") == {"outer", "outer.a.pi", "outer.a.inner.b.q q"}


def test_option_names_of_any_text():
    for option in ["it's", 'say "x"', "a`b", "größe", "", "1", "true", "a.b", "\\n", "x\ny"]:
        space = space_of(m={"type": "choice", "options": {option: {"a": WHOLE, "b": {**UNIT, "when": {"a": 3}}}}})
        config = {"m": option, f"m.{option}.a": 3, f"m.{option}.b": 0.5}
        assert space.validate_config(config) == config
        assert holdfast.nested(config) == {"m": {option: {"a": 3, "b": 0.5}}}


def _deep(levels):
    return UNIT if levels == 0 else {"type": "choice", "options": {"o": {"c": _deep(levels - 1)}}}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"m": {"type": "choice"}}, "space: m: options must name each option"),
        ({"m": {"type": "choice", "options": {}}}, "options must name each option"),
        ({"m": {"type": "choice", "options": ["a", "b"]}}, "options must name each option"),
        ({"m": {"type": "choice", "options": {"a": 3}}}, "option a must be a mapping of parameters by name, or empty, not 3"),
        ({"m": {"type": "choice", "options": {"a": UNIT}}}, "an option holds parameters by name"),
        ({"m": {"type": "choice", "options": {1: {}}}}, "the option 1 is no string; put quotes around it"),
        ({"m": {"type": "choice", "options": {"a": {1: UNIT}}}}, "the name 1 is no string; put quotes around it"),
        ({"m": {"type": "choice", "options": {"a": {}}, "log": True}}, "unknown key 'log' of a choice (allowed: default"),
        ({"m": {"type": "choice", "options": {"a": {}}, "default": "b"}}, "default 'b' is none of the choices ['a']"),
        ({"m": MODEL, "model": WHOLE, "m.svm.C": UNIT}, "m.svm.C is there twice"),
        ({"m.svm.C": UNIT, "m": MODEL, "lr": UNIT}, "m.svm.C is there twice"),
        (
            {"m": {"type": "choice", "options": {"a": {"x": {**UNIT, "when": {"m": "a"}}}}}},
            "m: option a: a when names 'm', which it stands under anyway",
        ),
        (
            {"m": {"type": "choice", "options": {"a": {"x": {**UNIT, "when": "y < 3"}, "y": WHOLE}}}},
            "m.a.x: when names 'm.a.y', which is declared later",
        ),
        ({"m": {"type": "choice", "options": {"a": {"x": {**UNIT, "when": "z < 3"}}}}}, "m.a.x: when names 'z', which is no"),
        ({"m": {"type": "choice", "options": {"a": {"x": {**UNIT, "when": 3}}}}}, "space.m.a.x.when: 3 is neither a mapping"),
        ({"m": _deep(30)}, "nested more than 20 levels deep"),
        ({"m": {"type": "choise"}}, "space.m.type is 'choise' (did you mean 'choice'?)"),
    ],
)
def test_bad_choices_are_refused(space, message):
    with pytest.raises(SpecError) as caught:
        sample_spec(space=space)
    assert message in str(caught.value)


def test_an_error_inside_a_choice_has_its_line():
    text = """\
name: a
trainable: t.py:f
objectives: {loss: min}
search: {num_trials: 1}
constraints:
  - gama < 3
space:
  model:
    type: choice
    options:
      svm:
        kernel:
          type: choice
          options:
            rbf:
              gamma:
                type: float
                low: 0
                high: 1
"""
    assert FileSpec.from_text(text.replace("gama", "model.svm.kernel.rbf.gamma"), source="a.yaml").space
    with pytest.raises(
        SpecError, match=r"with --set space.model.options.svm.kernel=3: .*kernel is 3; an option holds parameters"
    ):
        FileSpec.from_text(text, source="a.yaml", overrides=["space.model.options.svm.kernel=3"])
    changed = ["constraints=[]", "space.model.options.svm.kernel.options.rbf.gamma.high=2"]
    assert FileSpec.from_text(text, overrides=changed).space.parameters["model.svm.kernel.rbf.gamma"].high == 2
    with pytest.raises(SpecError, match=r"a.yaml, line 5: constraints\[0\]: 'gama < 3' names 'gama'.*which is no parameter"):
        FileSpec.from_text(text, source="a.yaml")
    with pytest.raises(
        SpecError, match=r"a.yaml, line 19: unknown key 'space.model.svm.kernel.rbf.gamma.hgih'; did you mean 'high'"
    ):
        FileSpec.from_text(text.replace("high", "hgih"), source="a.yaml")
    with pytest.raises(SpecError, match=r"a.yaml, line 6: constraints\[0\]: 'gama <' is no expression"):
        FileSpec.from_text(text.replace("gama < 3", "gama <"), source="a.yaml")


def test_parameters_made_in_python_may_stand_in_a_choice():
    from holdfast.core.parameters import FloatParameter

    space = space_of(m={"type": "choice", "options": {"a": {"x": FloatParameter(low=0, high=1)}}})
    assert space.parameters["m.a.x"].when == {"m": "a"}


# conditions that are expressions


CONDITIONAL = {
    "layers": WHOLE,
    "act": {"type": "categorical", "choices": ["relu", "tanh"], "when": {"layers": [2, 3, 4]}},
    "drop": {**UNIT, "when": "layers >= 2 and act == 'relu'"},
    "alt": {**UNIT, "when": "drop > 0.5 or layers == 1"},
}


@pytest.mark.parametrize(
    ("config", "active"),
    [
        ({"layers": 1}, ["layers", "alt"]),
        ({"layers": 5}, ["layers"]),
        ({"layers": 2, "act": "tanh"}, ["layers", "act"]),
        ({"layers": 2, "act": "relu", "drop": 0.25}, ["layers", "act", "drop"]),
        ({"layers": 2, "act": "relu", "drop": 0.75}, ["layers", "act", "drop", "alt"]),
    ],
)
def test_a_comparison_with_an_inactive_parameter_is_not_met(config, active):
    space = space_of(**CONDITIONAL)
    assert [name for name in space.parameters if space.is_active(name, {**config, "alt": 0.5})] == active
    assert list(space.validate_config(config | ({"alt": 0.5} if "alt" in active else {}))) == active
    if "alt" not in active:
        with pytest.raises(InvalidConfig, match="'alt', which is inactive here"):
            space.validate_config({**config, "alt": 0.5})
    assert has_conditions(space)
    assert space.conditional_on("alt") == {"drop", "layers"}


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("later > 1", "declared later; move 'later' above 'x'"),
        ("x > 1", "declared later"),
        ("other > 1", "'other', which is no parameter; allowed: layers, act"),
        ("layers > 'a'", "layers is a number and 'a' is text, which cannot be compared"),
        ("act > 3", "cannot be compared"),
        ("act == 3", "cannot be compared"),
        ("act == 'rellu'", "act is never 'rellu' (did you mean 'relu'?)"),
        ("act in ('relu', 'gelu')", "act is never 'gelu'"),
        ("layers in ('relu', 'tanh')", "layers is a number, which is never in"),
        ("layers == 12", "layers is never 12, which is outside [1, 9]"),
        ("layers in 3", "3 is a number, which holds nothing"),
        ("-act == 3", "act is text, which cannot be computed with"),
        ("sqrt(act) > 3", "act is text, which cannot be computed with"),
        ("act + 'x' == 'relux'", "cannot be computed with"),
        ("1 < 2", "names no parameter"),
        ("layers", "is no condition"),
        ("layers >", "is no expression"),
        ("", "is no expression"),
    ],
)
def test_bad_expressions_are_refused(when, message):
    with pytest.raises(ValidationError) as caught:
        space_of(layers=WHOLE, act=CONDITIONAL["act"], x={**UNIT, "when": when}, later=WHOLE)
    assert message in str(caught.value)


def test_what_may_be_true_is_allowed():
    mixed = {"type": "categorical", "choices": ["a", 1, True, None]}
    for when in ("m > 1", "m == 'a'", "m == null", "m in ('a', 1.0)", "m < 'b'", "m + 1 > 2", "c == 'x'", "max(m, 2) > 2"):
        assert space_of(m=mixed, c={"type": "constant", "value": "x"}, y={**UNIT, "when": when})


def test_a_condition_by_a_name_that_is_no_identifier_or_a_constant():
    space = space_of(**{"learning-rate": UNIT, "pi": WHOLE, "x": {**UNIT, "when": "`learning-rate` < .5 and pi == 4"}})
    assert space.is_active("x", {"learning-rate": 0.25, "pi": 4})
    assert not space.is_active("x", {"learning-rate": 0.25, "pi": 3})
    assert not space.is_active("x", {"learning-rate": 0.25})


@pytest.mark.parametrize("kind", ["int", "float"])
def test_log_with_a_step_names_the_way_out(kind):
    with pytest.raises(SpecError, match="drop one, or list the values: type: categorical, ordered: true"):
        sample_spec(space={"x": {"type": kind, "low": 2, "high": 64, "log": True, "step": 2}})


# identity


def test_what_was_stored_before_is_the_same():
    """New keys of parameters have defaults, which neither a difference nor a config's identity sees."""
    old = {"a": {"type": "categorical", "choices": ["x", "y"], "default": None, "when": None}}
    assert (
        Space.model_validate(old).difference(space_of(a={"type": "categorical", "choices": ["x", "y"], "ordered": False})) == []
    )
    assert config_digest({"a": "x"}) == config_digest(space_of(**old).validate_config({"a": "x"}))
    lines = space_of(**old).difference(space_of(a={**old["a"], "ordered": True}))
    assert len(lines) == 1
    assert '"ordered":true' in lines[0]


# ordered choices


def test_ordered_choices_are_whole_numbers_to_a_model():
    sizes = space_of(s={"type": "categorical", "choices": ["small", "medium", "large"], "ordered": True}).parameters["s"]
    assert distribution_of(sizes) == IntDistribution(0, 2)
    assert [decode(sizes, encode(sizes, choice)) for choice in sizes.choices] == ["small", "medium", "large"]
    plain = space_of(s={"type": "categorical", "choices": ["small", "medium"]}).parameters["s"]
    assert isinstance(distribution_of(plain), CategoricalDistribution)
    one = space_of(s={"type": "categorical", "choices": ["small"], "ordered": True}).parameters["s"]
    assert distribution_of(one) is None


def test_a_model_goes_to_the_good_end_of_ordered_choices():
    choices = [2**power for power in range(4, 14)]
    spec = sample_spec(
        space={"size": {"type": "categorical", "choices": choices, "ordered": True}}, search={"engine": "tpe", "num_trials": 99}
    )
    proposer = make_proposer(spec, 1)
    found = []
    for number in range(40):
        config = proposer.propose(number)
        loss = abs(choices.index(config["size"]) - 8)
        proposer.observe(sample_trial(number, TrialStatus.COMPLETED, config=config, metrics={"loss": float(loss)}))
        found.append(loss)
    assert sum(found[20:]) < sum(found[:10]) * 2


# Optuna's distributions


def all_distributions():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "f": FloatDistribution(-1.0, 2.0),
            "f log": FloatDistribution(1e-5, 1e-1, log=True),
            "f step": FloatDistribution(0.0, 1.0, step=0.3),
            "f one": FloatDistribution(0, 10, step=1),
            "f still": FloatDistribution(2.0, 2.0),
            "i": IntDistribution(-3, 7),
            "i log": IntDistribution(1, 1000, log=True),
            "i step": IntDistribution(16, 100, step=7),
            "c": CategoricalDistribution(["a", 1, 2.5, True, None]),
            "old f": optuna.distributions.UniformDistribution(0.0, 1.0),
            "old log": optuna.distributions.LogUniformDistribution(0.1, 1.0),
            "old step": optuna.distributions.DiscreteUniformDistribution(0.0, 1.0, 0.25),
            "old i": optuna.distributions.IntUniformDistribution(0, 9, 3),
            "old i log": optuna.distributions.IntLogUniformDistribution(1, 9),
        }


def test_every_distribution_of_optuna_has_a_parameter():
    distributions = all_distributions()
    space = holdfast.Space.from_optuna(distributions)
    assert list(space.parameters) == list(distributions)
    assert space.parameters["f step"].high == pytest.approx(0.9)
    assert (space.parameters["f one"].step, space.parameters["i"].step, space.parameters["i log"].log) == (1.0, None, True)
    for number in range(50):
        config = RandomProposer(space, 1).propose(number)
        for name, distribution in distributions.items():
            assert distribution._contains(distribution.to_internal_repr(config[name])), name
    back = {name: distribution_of(parameter) for name, parameter in space.parameters.items()}
    for name in ("f", "f log", "i", "i log", "old f", "old log"):
        kind = FloatDistribution if "f" in name.split() or name == "old log" else IntDistribution
        given = distributions[name]
        assert back[name] == kind(given.low, given.high, log=given.log), name
    assert sample_spec(space=space).space == space


def test_the_trials_of_a_study_have_a_place_in_its_space():
    def objective(trial):
        kind = trial.suggest_categorical("kind", ["a", "b"])
        total = trial.suggest_float("x", 0, 1, step=0.1) + trial.suggest_int("n", 1, 100, log=True)
        return total + trial.suggest_float("lr", 1e-5, 1, log=True) + (kind == "a")

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        study.optimize(objective, n_trials=20)
    finally:
        optuna.logging.set_verbosity(verbosity)
    space = Space.from_optuna(study.best_trial.distributions)
    for trial in study.trials:
        assert space.validate_config(trial.params) == trial.params


class Strange:
    low, high = 0, 1


@pytest.mark.parametrize(
    ("distributions", "message"),
    [
        ({"x": Strange()}, "x is a Strange; allowed are Optuna's FloatDistribution"),
        ({"x": 3}, "x is a int"),
        ({"x": CategoricalDistribution([float("nan")])}, "x: the choice nan"),
        ({"x": CategoricalDistribution(["a", "a"])}, 'x: .*names "a" more than once'),
        ({"x": FloatDistribution(-1.7e308, 1.7e308)}, "x: .*too far apart"),
        (optuna.samplers.RandomSampler(), "expected distributions by name"),
    ],
)
def test_a_distribution_without_a_counterpart_is_named(distributions, message):
    with pytest.raises(InvalidInput, match=message):
        Space.from_optuna(distributions)


def test_choices_that_are_no_scalars_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distribution = CategoricalDistribution([(1, 2), (3, 4)])
    with pytest.raises(InvalidInput, match=r"x: the choice \(1, 2\) is a tuple.*look the object up by its name"):
        Space.from_optuna({"x": distribution})


def test_the_spaces_of_the_contract_hold_the_new_kinds():
    space = Space.model_validate(SPACES["nested"])
    configs = [RandomProposer(space, 1).propose(number) for number in range(200)]
    assert set().union(*configs) == set(space.parameters)
