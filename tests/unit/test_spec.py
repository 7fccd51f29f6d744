import pytest

from holdfast.core.errors import SpecError
from holdfast.core.spec import CHANGEABLE, LOCATION_FIELDS, ExperimentSpec, known_keys
from holdfast.core.spelling import nearest
from holdfast.testing.samples import sample_spec

DATA = {
    "name": "digits",
    "trainable": "train.py:train",
    "objectives": {"loss": "min", "acc": "max"},
    "space": {"lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}},
    "search": {"num_trials": 20, "seed": 7},
}


def problem(**changes):
    with pytest.raises(SpecError) as refused:
        ExperimentSpec.parse({**DATA, **changes}, source="digits.yaml")
    assert refused.value.exit_code == 2
    return str(refused.value)


def test_a_spec_comes_back_from_what_is_stored():
    spec = ExperimentSpec.parse({**DATA, "database": "postgresql://user:secret@host/db"})
    stored = spec.stored()
    assert not LOCATION_FIELDS & set(stored)
    assert "secret" not in str(stored)
    again = ExperimentSpec.parse({**stored, "database": spec.database})
    assert again == spec
    assert [objective.name for objective in again.goals] == ["loss", "acc"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"lr": {**DATA["space"]["lr"], "lgo": True}}}, "unknown key 'space.lr.lgo'; did you mean 'log'?"),
        ({"serach": {}}, "unknown key 'serach'; did you mean 'search'?"),
        ({"search": {"num_trials": 1, "sede": 1}}, "unknown key 'search.sede'; did you mean 'seed'?"),
        ({"search": {"num_trials": "many"}}, "search.num_trials is 'many'; it must be a whole number"),
        ({"search": {"num_trials": True}}, "search.num_trials: true is no number"),
        ({"search": {"num_trials": -1}}, "search.num_trials is -1; input should be greater than or equal to 0"),
        (
            {"search": {"num_trials": 1, "engine": "tep"}},
            "search.engine: 'tep' (did you mean 'tpe'?) is no engine; allowed: auto, random, grid",
        ),
        ({"search": None}, "search is empty; it must be a mapping of keys"),
        (
            {"search": {}},
            "search.num_trials is absent; only a grid, or one of time_budget, target, plateau, max_cost, can do without",
        ),
        ({"objectives": {}}, "objectives is empty; name at least one"),
        ({"objectives": {"loss": "mni"}}, "objectives.loss is 'mni' (did you mean 'min'?); allowed: min, max"),
        ({"objectives": ["loss"]}, "objectives is ['loss']; it must be a mapping of keys"),
        ({"space": {"lr": {"type": "float", "low": 2, "high": 1}}}, "space.lr: low (2.0) is above high (1.0); swap them"),
        ({"space": {"lr": {"type": "flaot"}}}, "space.lr.type is 'flaot' (did you mean 'float'?); allowed: float, int"),
        ({"space": {"lr": {"low": 0}}}, "space.lr has no type; allowed: float, int, categorical, choice, constant"),
        ({"space": {"lr": 0.1}}, "space.lr is 0.1; it must be a mapping such as {type: float"),
        ({"space": {"float": {"type": "float", "low": 0}}}, "space.float.high is missing; add it"),
        ({"space": {"act": {"type": "categorical", "choices": "ab"}}}, "space.act.choices is 'ab'; it must be a list"),
        ({"space": {1: {"type": "constant", "value": 1}}}, "key 1 is no string; put quotes around it"),
        ({"name": "a/b"}, "name: a name becomes a folder"),
        ({"name": ""}, "name: a name becomes a folder"),
        ({"name": 3}, "name is 3; it must be a string"),
        ({"name": "x" * 201}, "at most 200 bytes"),
        ({"trainable": "train.py"}, "trainable: 'train.py' is not of the form train.py:train"),
        ({"storage": " "}, "storage: the storage is empty"),
        ({"search": {"num_trials": 3, "target": 0.1}}, "search.target needs exactly one objective"),
        ({"search": {"engine": "grid"}}, "space.lr is continuous; a grid needs step: or type: categorical"),
        ({"checkpoints": {"keep_last": 0}}, "checkpoints.keep_last is 0"),
        ({"stopping": {"rule": "asha", "metric": ""}}, "stopping.metric is ''; it must not be empty"),
        ({"search": {"num_trials": 1, "cost_metric": ""}}, "search.cost_metric is ''; it must not be empty"),
        ({"search": {"num_trials": 4}, "population": {"interval": 2, "metric": ""}}, "population.metric is ''; it must not be"),
        (
            {"stopping": {"rule": "asha", "min_steps": 9, "max_steps": 9}},
            "stopping: min_steps (9) of asha is not below max_steps (9): it would have no rung and never end a trial",
        ),
        (
            {"stopping": {"rule": "patience", "max_steps": 2, "also": [{"rule": "hyperband", "min_steps": 3}]}},
            "stopping: min_steps (3) of hyperband is not below max_steps (2)",
        ),
        (
            {"stopping": {"rule": "asha", "also": [{"rule": "median", "intervall": 3}]}},
            "unknown key 'stopping.also.0.intervall'; did you mean 'interval'? (allowed in stopping.also.0: higher_is_better,",
        ),
        ({"failure": {"trial_timeout": float("inf")}}, "failure.trial_timeout is inf; it must be a finite number"),
    ],
)
def test_messages(changes, message):
    found = problem(**changes)
    assert found.startswith("digits.yaml: ")
    assert message in found


def test_every_problem_has_a_line_and_each_only_one():
    found = problem(name="/", objectives={}, search={"num_trials": "x"}).splitlines()
    assert len(found) == 2  # what concerns the whole spec is looked at once its parts are right
    with pytest.raises(SpecError, match="expected a mapping of keys such as name and trainable, found list"):
        ExperimentSpec.parse([])


def test_a_source_may_depend_on_the_key():
    with pytest.raises(SpecError, match=r"^at search\.seed: search\.seed is 'x'"):
        ExperimentSpec.parse(
            {**DATA, "search": {"num_trials": 1, "seed": "x"}}, source=lambda location: f"at {'.'.join(map(str, location))}"
        )


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("lgo", ["low", "log"], "log"),
        ("hihg", ["high", "log"], "high"),
        ("sede", ["samples", "seed"], "seed"),
        ("zzz", ["low"], None),
        ("Name", ["name"], "name"),
    ],
)
def test_the_nearest_word(word, known, expected):
    assert nearest(word, known) == expected


def test_keys_that_users_name_are_free():
    assert known_keys(ExperimentSpec, ["space"]) == []
    assert known_keys(ExperimentSpec, ["objectives"]) == []
    assert "log" in known_keys(ExperimentSpec, ["space", "lr", "float"])
    assert known_keys(ExperimentSpec, ["execution", "resources"]) == ["cpu", "custom", "gpu"]
    for path in CHANGEABLE:
        section, key = path.split(".")
        assert key in known_keys(ExperimentSpec, [section])


def test_the_trainable_keeps_its_name_wherever_it_lies():
    for trainable in ("train.py:train", "/any/where/train.py:train", "package.train:train"):
        assert sample_spec(trainable=trainable).trainable_name == "train:train"


@pytest.mark.parametrize("limit", [{"time_budget": 5}, {"target": 0.1}, {"plateau": 3}, {"max_cost": 10}])
def test_a_search_needs_one_end_and_any_will_do(limit):
    assert ExperimentSpec.parse({**DATA, "objectives": {"loss": "min"}, "search": limit}).search.num_trials is None
