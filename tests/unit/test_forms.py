"""What the flows' parameters look like to Prefect: its UI makes the form of it, its server checks with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, is_valid_schema, validate

from holdfast.core.errors import SpecError
from holdfast.core.spec import CHANGEABLE
from holdfast.flows import forms
from holdfast.flows.collect import collect
from holdfast.flows.restore import restore
from holdfast.flows.search import search
from holdfast.flows.trial import trial
from holdfast.flows.watch import watch
from holdfast.specfile import ExperimentSpec
from holdfast.testing.samples import sample_spec

FLOWS: dict[str, Any] = {"search": search, "restore": restore, "watch": watch, "collect": collect, "trial": trial}
SCHEMAS: dict[str, dict[str, Any]] = {name: parameter_schema(flow).model_dump() for name, flow in FLOWS.items()}


def check(name: str, parameters: dict[str, Any]) -> None:
    """Check as the server does before it makes a flow run: of what came by HTTP."""
    validate(json.loads(json.dumps(parameters)), SCHEMAS[name], raise_on_error=True)


def sections(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, section in [("", schema), *schema["definitions"].items()]:
        for name, field in section.get("properties", {}).items():
            yield f"{place}.{name}", field


SPEC: dict[str, Any] = {
    "name": "digits",
    "trainable": "train.py:train",
    "objectives": {"loss": "min"},
    "space": {"lr": {"type": "float", "low": "1e-5", "high": 0.1, "log": True}},
    "search": {"num_trials": 5},
}
CHOICE = {"model": {"type": "choice", "options": {"svm": {"C": {"type": "float", "low": 0, "high": 1}}, "none": {}}}}


@pytest.mark.parametrize("name", FLOWS)
def test_every_input_says_what_it_is(name: str) -> None:
    schema = SCHEMAS[name]
    is_valid_schema(schema)
    for place, field in sections(schema):
        assert field.get("title", "-")[0].isupper(), place
        assert "_" not in field["title"], place
        assert "position" in field, place
        assert field.get("description"), place
        assert not {"`", "null"} & {*field["description"], *field["description"].split()}, place
    for place, section in schema["definitions"].items():
        orders = [field["position"] for field in section["properties"].values()]
        assert len(set(orders)) == len(orders), place


def test_where_trials_run_is_asked_before_what_few_need() -> None:
    fields = SCHEMAS["search"]["definitions"]["ExecutionSection"]["properties"]
    names = ["runner", "address", "resources", "ship", "isolation", "deployment", "job_variables", "trials_per_run"]
    assert sorted(fields, key=lambda name: fields[name]["position"]) == names
    assert fields["ship"]["title"] == "Files that travel along"
    assert fields["trials_per_run"]["description"].endswith("empty: 10,000.")
    assert ExperimentSpec.parse(SPEC).execution.trials_per_run == 10_000


def test_no_input_is_one_that_the_form_cannot_show() -> None:
    """An object without known keys is shown as JSON where it has no default, and else not at all; null is sent as it is."""
    for schema in SCHEMAS.values():
        for place, field in sections(schema):
            kinds = [one for one in [field, *field.get("anyOf", [])] if "$ref" not in one]
            for kind in kinds:
                if kind.get("type") == "object" and "properties" not in kind:
                    assert not {"default", "anyOf"} & {*kind, *field}, place
            assert field.get("default", 0) is not None or {"type": "null", "title": "None"} in field.get("anyOf", ()), place
            assert all("title" in one or "$ref" in one for one in field.get("anyOf", [])), place


def test_no_input_shows_null_before_anybody_chose_it() -> None:
    for schema in SCHEMAS.values():
        for place, field in sections(schema):
            options = field.get("anyOf", [])
            assert "default" not in field or field["default"] is not None, place
            assert not options or options[0].get("type") != "null", place
            assert not any("$ref" in one and {"type": "null", "title": "None"} in options for one in options), place
    for bad in ({"interval": 0}, {"quantile": 0.2}, {"interval": 2, "intervall": 3}, [1]):
        with pytest.raises(ValidationError, match="spec"):
            check("search", {"spec": {**SPEC, "population": bad}})


def test_only_the_experiment_has_to_be_named() -> None:
    assert SCHEMAS["restore"]["required"] == ["path"]
    assert SCHEMAS["watch"]["required"] == ["storages"]
    assert SCHEMAS["search"]["required"] == ["spec"]
    assert "Not for people" in SCHEMAS["trial"]["properties"]["path"]["title"]
    with pytest.raises(SpecError, match=r"started by searches with execution\.runner: workpool"):
        forms.trial_form({"path": "/runs/digits", "uuid": "u", "epoch": 1, "trial": 0, "attempt": 1, "row": 1, "drive": None})
    by_field = SCHEMAS["search"]["definitions"]["ExperimentSpec"]
    assert by_field["required"] == ["name", "trainable", "objectives", "space"]
    for name in by_field["required"]:
        assert by_field["properties"][name]["examples"], name
    first = sorted(by_field["properties"], key=lambda name: by_field["properties"][name]["position"])[:5]
    assert first == ["name", "description", "trainable", "objectives", "space"]
    assert [option.get("title") for option in SCHEMAS["search"]["properties"]["spec"]["anyOf"]] == ["File or saved spec", None]
    assert by_field["title"] == "Field by field"


def every_default() -> dict[str, Any]:
    """Return a spec in which everything stands, as it is stored: null where nothing was said."""
    return ExperimentSpec.parse({**SPEC, "space": CHOICE}).stored()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("restore", {"path": "/runs/digits"}),
        ("restore", {"path": "block:lab/digits", "resume_errored": True, "policy": None, "changes": None, "database": None}),
        ("restore", {"path": "s3://b/x", "storage_options": {"endpoint_url": "http://h:9000", "client_kwargs": {"a": 1}}}),
        ("restore", {"path": "x", "policy": {"errored": "restart"}, "changes": dict.fromkeys(CHANGEABLE, 1)}),
        ("restore", {"path": "x", "policy": {}, "trainable": "/new/train.py:train", "database": "block:main"}),
        ("restore", {"path": "x", "database": "postgresql+psycopg://user@host:5432/name?sslmode=require"}),
        ("restore", {"path": "x", "database": "sqlite:////data/holdfast.db", "trainable": "package.module:train"}),
        ("watch", {"storages": ["/runs", "block:lab"], "database": None, "deployment": None, "storage_options": None}),
        ("watch", {"storages": ["s3://bucket/runs"], "deployment": "restore/restore", "at_once": 1, "dry_run": True}),
        ("search", {"spec": "digits.yaml"}),
        ("search", {"spec": "block:digits", "overrides": ["search.num_trials=5", "storage_options={}"]}),
        ("search", {"spec": "digits.yaml", "overrides": None}),
        ("search", {"spec": SPEC}),
        ("search", {"spec": {**SPEC, "space": CHOICE, "storage": "block:lab", "database": "block:main"}}),
        ("search", {"spec": {**SPEC, "search": {"engine": "own.py:Engine", "num_trials": None, "time_budget": 5}}}),
        ("search", {"spec": {**SPEC, "checkpoints": {"save_before": "01:00:00", "keep_last": None, "mode": "gap"}}}),
        ("search", {"spec": {**SPEC, "checkpoints": {"save_before": 5.5, "directory": None}}}),
        ("search", {"spec": {**SPEC, "population": {"interval": 2}, "stopping": {"also": [{"rule": "median"}]}}}),
        ("search", {"spec": {**SPEC, "population": None, "failure": {"retry_on": ["OSError"]}, "storage_options": {}}}),
        ("search", {"spec": every_default()}),
        ("search", {"spec": sample_spec().stored()}),
    ],
)
def test_the_server_takes_what_is_good(name: str, parameters: dict[str, Any]) -> None:
    check(name, parameters)
    form: Any = {"restore": forms.restore_form, "watch": forms.watch_form, "search": forms.search_form}[name]
    form(parameters)


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("restore", {}, "'path' is a required property"),
        ("restore", {"path": ""}, "path"),
        ("restore", {"path": "x", "force": "perhaps"}, "force"),
        ("restore", {"path": "x", "policy": {"errored": "retry"}}, r"policy.errored.*'retry' is not one of"),
        ("restore", {"path": "x", "policy": {"failed": "retry"}}, "'failed' was unexpected"),
        ("restore", {"path": "x", "changes": {"search.seed": 1}}, "'search.seed' is not one of"),
        ("restore", {"path": "x", "database": "postgresql://u:p@h/d"}, "database"),
        ("restore", {"path": "x", "database": "postgresql://u@h/d?password=p"}, "database"),
        ("restore", {"path": "x", "storage_options": {"secret": "p"}}, "storage_options"),
        ("restore", {"path": "x", "trainable": "train"}, "trainable"),
        ("watch", {"storages": []}, "storages"),
        ("watch", {"storages": "runs"}, "storages"),
        ("watch", {"storages": ["x"], "at_once": 0}, "at_once.*minimum"),
        ("watch", {"storages": ["x"], "deployment": "restore"}, "deployment"),
        ("search", {"spec": ""}, "spec"),
        ("search", {"spec": "x.yaml", "overrides": ["seed"]}, "overrides"),
        ("search", {"spec": {**SPEC, "search": {"num_trials": -1}}}, "spec"),
        ("search", {"spec": {**SPEC, "search": {"max_concurrent": 0}}}, "spec"),
        ("search", {"spec": {**SPEC, "search": {"time_budget": 0}}}, "spec"),
        ("search", {"spec": {**SPEC, "serach": {}}}, "spec"),
        ("search", {"spec": {**SPEC, "objectives": {}}}, "spec"),
        ("search", {"spec": {**SPEC, "objectives": {"loss": "least"}}}, "spec"),
        ("search", {"spec": {**SPEC, "space": {"x": {"type": "flaot", "low": 0, "high": 1}}}}, "spec"),
        ("search", {"spec": {**SPEC, "if_exists": "overwrite"}}, "spec"),
        ("search", {"spec": {**SPEC, "checkpoints": {"keep_last": 0}}}, "spec"),
        ("search", {"spec": {**SPEC, "database": "postgresql://u:p@h/d"}}, "spec"),
        ("search", {"spec": {**SPEC, "storage_options": {"token": "p"}}}, "spec"),
    ],
)
def test_the_server_refuses_what_is_wrong(name: str, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        check(name, parameters)


FORMS: dict[str, Any] = {"restore": forms.restore_form, "watch": forms.watch_form, "search": forms.search_form}


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("restore", {"path": ""}, "path is ''"),
        ("restore", {"path": "x", "force": "perhaps"}, "parameters: force is 'perhaps'; it must be true or false"),
        ("restore", {"path": "x", "changes": [1]}, r"parameters: changes is \[1\]; it must be a mapping"),
        ("restore", {"path": "x", "resume_errord": True}, "did you mean 'resume_errored'"),
        ("watch", {"storages": ["x"], "at_once": 0}, "at_once is 0"),
        ("search", {"spec": 5}, "spec is 5; give the path"),
        ("search", {"spec": " "}, "spec is empty"),
        ("search", {"spec": "x", "overrides": "search.seed=1"}, "overrides is 'search.seed=1'"),
    ],
)
def test_the_flow_refuses_in_a_sentence_what_comes_around_the_server(name: str, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as refused:
        FORMS[name](parameters)
    assert "\n" not in str(refused.value)
    assert "pydantic" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("restore", {"path": "x", "storage_options": {"client_kwargs": {"aws_secret_access_key": "hunter2"}}}),
        ("restore", {"path": "x", "storage_options": {"key": "hunter2"}}),
        ("restore", {"path": "x", "database": "postgresql+psycopg://u:hunter2@h/d"}),
        ("restore", {"path": "x", "database": "postgresql+psycopg://u@h/d?sslpassword=hunter2"}),
        ("watch", {"storages": ["s3://a:hunter2@bucket/x"]}),
        ("watch", {"storages": ["x"], "storage_options": {"connection_string": "hunter2"}}),
        ("search", {"spec": {**SPEC, "database": "postgresql://u:hunter2@h/d"}}),
        ("search", {"spec": {**SPEC, "storage_options": {"a": [{"token": "hunter2"}]}}}),
        ("search", {"spec": sample_spec(database="postgresql://u:hunter2@h/d")}),
        ("search", {"spec": "x.yaml", "overrides": ["database=postgresql://u:hunter2@h/d"]}),
        ("search", {"spec": "x.yaml", "overrides": ["storage_options.secret=hunter2"]}),
        ("search", {"spec": "x.yaml", "overrides": ["storage_options={secret: hunter2}"]}),
    ],
)
def test_secrets_are_refused_and_not_said_again(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="block Holdfast") as refused:
        FORMS[name](parameters)
    assert "hunter2" not in str(refused.value)


def test_python_callers_may_give_paths_and_specs() -> None:
    assert forms.restore_form({"path": Path("runs/exp")}).path == "runs/exp"
    assert forms.search_form({"spec": Path("exp.yaml")}).spec == "exp.yaml"
    spec = sample_spec()
    assert forms.search_form({"spec": spec}).spec is spec
