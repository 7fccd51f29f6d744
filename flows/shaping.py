"""The JSON schema of a spec as a form: pydantic's own, with titles, an order, and inputs for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from holdfast.core.parameters import Parameter

Schema = dict[str, Any]
Resolve = Callable[[Schema], Schema]

_FIRST = ("name", "description", "trainable", "objectives", "space", "search", "storage", "if_exists")
"""What comes first in the form; the rest stands in the spec's own order."""

_ORDERS = {
    "ExecutionSection": (
        *("runner", "address", "resources", "ship", "isolation"),
        *("deployment", "job_variables", "trials_per_run"),  # what few need comes last
    )
}
"""The order of a section's inputs where the spec has another one."""

_HIDDEN = {("CheckpointConfig", "directory"), ("SearchSection", "chosen")}
"""Allowed, but nothing that a person would fill in."""

_TITLES = {
    "if_exists": "If the name is taken",
    "storage": "Storage",
    "cpu": "CPU threads",
    "gpu": "GPUs",
    "num_trials": "Number of trials",
    "max_concurrent": "Trials at once",
    "keep_top_k": "Keep the best",
    "also": "Further rules",
    "merge": "Merge experiments",
    "after": "Restore after",
    "options": "Options of the engine",
    "runner": "Where trials run",
    "address": "Address of the cluster",
    "ship": "Files that travel along",
    "deployment": "Deployment of a trial",
    "trials_per_run": "Trials per flow run",
    "custom": "Other resources",
}

_DESCRIPTIONS = {
    "name": "Names the experiment's folder in the storage. {date} stands for the date that the run was scheduled for.",
    "trainable": "What is tuned: /path/train.py:function, package.module:function, or a class in either.",
    "storage": "Where experiments live: a folder, s3://bucket/prefix, or block:NAME of a saved HoldfastStorage.",
    "database": "Empty: what HOLDFAST_DATABASE_URL says where it runs, else a SQLite file. Else block:NAME of a saved "
    "HoldfastDatabase, or a URL without a password.",
    "storage_options": 'Of an object store, such as {"endpoint_url": "..."}; no credentials: save those in a HoldfastStorage.',
    "objectives": 'Metrics that count, each min or max, such as {"loss": "min"}; the first one decides what is best.',
    "space": 'Parameters by name, such as {"lr": {"type": "float", "low": 1e-5, "high": 0.1, "log": true}, '
    '"layers": {"type": "int", "low": 1, "high": 4}, "act": {"type": "categorical", "choices": ["relu", "tanh"]}}.',
    "keep_top_k": "Keep the best so many of each trial; empty: 1.",
    "keep_last": "Keep the newest so many of each trial; empty: 2.",
    "options": 'What the engine takes, such as {"n_startup_trials": 20} of tpe.',
    "population": 'Population based training, such as {"interval": 5}, in steps; empty: trials are on their own.',
    "runner": "threads: on this machine; dask or ray: on a cluster; workpool: each trial is a flow run of its own.",
    "address": "Of a running cluster: tcp://host:8786 with dask, ray://host:10001 or auto with ray; empty: one for the run.",
    "ship": "Files and folders below the working directory that workers need; the trainable's own file always travels.",
    "deployment": "With workpool: what runs a trial, FLOW/DEPLOYMENT.",
    "job_variables": 'With workpool: of each trial\'s flow run, such as {"image": "me/train:1"}.',
    "trials_per_run": "The search goes on in a new flow run after so many trials have begun in one; empty: 10,000.",
    "custom": 'With dask and ray: what their workers were started with, by their names for it, such as {"licence": 1}.',
    "isolation": "process: in a process of its own; inline: for trainables that use Prefect.",
}

_EXAMPLES: dict[str, list[Any]] = {
    "name": ["digits", "nightly-{date}"],
    "trainable": ["/data/train.py:train", "package.module:train"],
    "objectives": [{"loss": "min"}, {"accuracy": "max", "seconds": "min"}],
    "space": [{"lr": {"type": "float", "low": 1e-5, "high": 0.1, "log": True}}],
    "storage": ["/data/experiments", "block:lab"],
    "database": ["block:main", "postgresql+psycopg://user@host/name"],
    "constraints": [["lr * batch < 1"]],
    "feasible": [["memory <= 16"]],
    "population": [{"interval": 5, "quantile": 0.25}],
    "address": ["tcp://scheduler:8786", "ray://head:10001", "auto"],
    "ship": [["model.py", "data/"]],
}

_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def shape_spec(schema: Schema, resolve: Resolve) -> None:
    """Change the schema of a spec, and those that it refers to, into what makes a good form. In place."""
    _shape(schema, resolve, set())
    schema["title"] = "Field by field"
    schema["description"] = "A search in full; what is left empty is as by default."
    properties = schema["properties"]
    ordered = [*_FIRST, *(name for name in properties if name not in _FIRST)]
    for position, name in enumerate(ordered):
        properties[name]["position"] = position
        if name in _DESCRIPTIONS:
            properties[name]["description"] = _DESCRIPTIONS[name]
        if name in _EXAMPLES:
            properties[name]["examples"] = _EXAMPLES[name]
    kinds = [*_kinds(), "choice"]
    properties["space"] = {
        **{key: properties["space"][key] for key in ("position", "description", "examples")},
        "title": "Space",
        "type": "object",
        "additionalProperties": {
            "type": "object",
            "properties": {"type": {"type": "string", "enum": kinds}},
            "required": ["type"],
        },
    }
    properties["objectives"] |= {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {"type": "string", "enum": ["min", "max"]},
    }


def _kinds() -> list[str]:
    return [str(kind.model_fields["type"].default) for kind in get_args(get_args(Parameter)[0])]


def _shape(schema: Schema, resolve: Resolve, seen: set[int]) -> None:
    if id(schema) in seen or "properties" not in schema:
        return
    seen.add(id(schema))
    kind = schema.get("title", "")
    schema["description"] = schema.get("description", "").partition("\n\n")[0].replace("`", "")
    properties: dict[str, Schema] = schema["properties"]
    first = _ORDERS.get(kind, ())
    properties |= {name: properties.pop(name) for name in [*first, *properties] if name in properties}
    hidden = [name for name in properties if (kind, name) in _HIDDEN]
    for position, (name, given) in enumerate([*properties.items()]):
        for below in _referred(given, resolve):
            _shape(below, resolve, seen)
        found = _field(name, given, resolve)
        properties[name] = {**found, "position": position}
    for name in hidden:
        schema.setdefault("patternProperties", {})[f"^{name}$"] = {}
        del properties[name]


def _field(name: str, given: Schema, resolve: Resolve) -> Schema:
    """Return the schema of one field: an input that is empty for what is not given, in place of a choice with null."""
    found = dict(given)
    found["title"] = _TITLES.get(name, name.replace("_", " ").capitalize())
    if text := _DESCRIPTIONS.get(name) or _said(found.get("description", "")):
        found["description"] = text
    if name in _EXAMPLES:
        found["examples"] = _EXAMPLES[name]
    options = found.get("anyOf")
    if options is not None:
        options = [_bounded(option) for option in options]
        others = [option for option in options if option.get("type") != "null"]
        has_null = len(others) < len(options)
        reference = len(others) == 1 and "$ref" in others[0]
        if name == "engine":
            del found["type"]
            found["anyOf"] = [
                {**others[0], "type": "string", "title": "Of holdfast"},
                {**others[1], "title": "Your own class"},
            ]
        elif reference:
            del found["anyOf"]
            found |= _whole(resolve(others[0]))
        elif has_null and len(others) == 1:
            del found["anyOf"]
            found.pop("default", None)
            found |= others[0]
    found = _bounded(found)
    if name == "save_before":
        found = {key: value for key, value in found.items() if key not in ("type", "exclusiveMinimum")}
        found["anyOf"] = [
            {"type": "number", "exclusiveMinimum": 0, "title": "Seconds"},
            {"type": "string", "title": "hours:minutes:seconds"},
            {"type": "null", "title": "None"},
        ]
    if "$ref" in found:
        found.pop("default", None)  # each field below has its own
        found.setdefault("description", _said(resolve({"$ref": found["$ref"]}).get("description", "").partition("\n\n")[0]))
    elif found.get("type") == "object":
        found.pop("default", None)  # what is empty is edited as JSON, what holds {} is not shown at all
    return found


def _whole(section: Schema) -> Schema:
    """Return the schema of a section that is left out as a whole, or filled in as JSON.

    A choice with null shows nothing but that it is one, and a section's own inputs would send their defaults: it would count.
    """
    members = {f"^{name}$": member for name, member in section["properties"].items()}
    kept = {key: section[key] for key in ("required",) if key in section}
    return {"type": "object", "patternProperties": members, "additionalProperties": False, **kept}


def _said(text: str) -> str:
    """Return a description as somebody reads it who sees an input, and neither YAML nor Python."""
    text = re.sub(r"\bnull\b", "empty", text.replace("`", ""))
    text = re.sub(r"^false:", "Off:", text)
    return text if re.match(r"[a-z_]+(, [a-z_]+)*: ", text) and not text.startswith("empty:") else text[:1].upper() + text[1:]


def _bounded(schema: Schema) -> Schema:
    """Return a schema whose bounds JSON Schema knows: behind a validator of ours pydantic leaves them by its own names."""
    return {_BOUNDS.get(key, key): value for key, value in schema.items()}


def _referred(schema: Mapping[str, Any], resolve: Resolve) -> list[Schema]:
    """Return the definitions that a field's schema refers to."""
    found: list[Schema] = []
    for value in schema.values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                found += [resolve(one)] if "$ref" in one else _referred(one, resolve)
    if "$ref" in schema:
        found.append(resolve(dict(schema)))
    return found
