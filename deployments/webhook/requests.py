"""What a delivery may ask for: the native form of a body, its JSON schema, and what templates make of a foreign one.

Whatever a body says is read by one list of names; nothing in it can name code, a database or options of a storage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from holdfast.core.resume import Rerun
from holdfast.core.search_section import SearchSection
from holdfast.deployments.webhook.problems import Problem

if TYPE_CHECKING:
    from holdfast.deployments.webhook.config import Hook
    from holdfast.deployments.webhook.templates import Template

_FLAGS = {
    "resume_unfinished": "go on with unfinished trials from their newest checkpoints; else leave them out",
    "resume_errored": "go on with errored trials from their newest checkpoints; else keep them as they are",
    "restart_errored": "begin errored trials again at step 0; else keep them as they are",
}
_CLASSES = ("unfinished", "errored", "finished")
_BOOLEANS = (*_FLAGS, "new_trials", "force")
_WHOLE = ("search.num_trials",)
MOST_ERRORS = 10
_NAMED = {"type": "string", "minLength": 1, "maxLength": 1024}


def names_of(hook: Hook) -> list[str]:
    """Return the parameters that a delivery of a hook may have, those of groups as GROUP.NAME."""
    if hook.runs == "search":
        return ["spec", *(f"overrides.{key}" for key in hook.allow.overrides)]
    found = ["experiment", *_FLAGS, *(f"policy.{name}" for name in _CLASSES)]
    found += ["new_trials"] if hook.allow.new_trials else []
    found += ["force"] if hook.allow.force else []
    return [*found, *(f"changes.{key}" for key in hook.allow.changes)]


def schema_of(hook: Hook) -> dict[str, Any]:
    """Return the JSON schema of the native form of a hook's bodies."""
    properties: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name in names_of(hook):
        group, dot, key = name.partition(".")
        if dot:
            groups.setdefault(group, {})[key] = _group_member(hook, group, key)
        else:
            properties[name] = _member(name)
    for group, members in groups.items():
        properties[group] = {"type": "object", "properties": members, "additionalProperties": False}
    schema: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "required": [name for name in ("experiment", "spec") if name in properties and name not in hook.defaults],
        "additionalProperties": False,
    }
    if hook.runs == "restore":
        both = {name: {"const": True} for name in ("resume_errored", "restart_errored")}
        flags = [{"required": [name]} for name in _FLAGS]
        schema["allOf"] = [
            {"not": {"properties": both, "required": [*both]}, "description": "resume_errored or restart_errored, not both"},
            {
                "not": {"required": ["policy"], "anyOf": flags},
                "description": "policy, or the flags that it stands for, not both",
            },
        ]
    return schema


def _member(name: str) -> dict[str, Any]:
    if name == "experiment":
        words = "its name below one of the receiver's roots, or its whole path or URL there"
        return {**_NAMED, "description": words, "examples": ["digits"]}
    if name == "spec":
        return {
            **_NAMED,
            "description": "a file below the receiver's folders of specs, or block:NAME",
            "examples": ["digits.yaml"],
        }
    words = {**_FLAGS, "new_trials": "propose new trials up to the budget", "force": "take over from who drives it"}[name]
    return {"type": "boolean", "description": words}


def _group_member(hook: Hook, group: str, key: str) -> dict[str, Any]:
    if group == "policy":
        return {"type": "string", "enum": [str(one) for one in Rerun]}
    if group == "changes":
        most = hook.allow.changes[key]
        if key in _WHOLE:
            return {"type": "integer", "minimum": 0, "maximum": int(most)}
        return {"type": "number", "exclusiveMinimum": 0, "maximum": most}
    own: dict[str, dict[str, Any]] = {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9 _-]{0,99}$"},
        "description": {"type": "string", "maxLength": 1000},
        "if_exists": {"type": "string", "enum": ["fail", "restore", "new"]},
    }
    if key in own:
        return own[key]
    described = SearchSection.model_json_schema()["properties"][key.partition(".")[2]]
    return {name: value for name, value in described.items() if name not in ("title", "default")}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a delivery asks for, checked as far as that goes without looking at files."""

    name: str
    """of the experiment, or the spec"""
    flags: dict[str, Any] = field(default_factory=dict)
    """parameters of the flow, but for where the experiment is"""
    overrides: tuple[str, ...] = ()
    """of a spec, as KEY=VALUE"""

    @property
    def forces(self) -> bool:
        return bool(self.flags.get("force"))


class Form:
    """Reads the bodies of one hook."""

    def __init__(self, hook: Hook, templates: Mapping[str, Template]) -> None:
        from jsonschema import Draft202012Validator

        self.hook = hook
        self.schema = schema_of(hook)
        self._validator = Draft202012Validator(self.schema)
        self._templates = templates

    def ignores(self, values: Mapping[str, Any]) -> bool:
        """Tell whether the hook's condition leaves a delivery out."""
        when = self._templates.get("when")
        return when is not None and not when.truth(values)

    def wanted(self, values: Mapping[str, Any]) -> Wanted:
        """Return what the delivery with these values asks for; a Problem (422) when it does not say it well."""
        said = values["body"] if self.hook.parameters is None else self._mapped(values)
        if isinstance(said, dict):
            said = self._with_defaults(said)
        self._check(said)
        return self._wanted(said)

    def _mapped(self, values: Mapping[str, Any]) -> dict[str, Any]:
        said: dict[str, Any] = {}
        for key in self.hook.parameters or {}:
            template = self._templates[f"parameters.{key}"]
            if key in _BOOLEANS:
                _put(said, key, template.truth(values))
                continue
            text = template.text(values)
            if text:
                _put(said, key, text if key in ("experiment", "spec") or key.startswith("policy.") else _value(text))
        return said

    def _with_defaults(self, said: dict[str, Any]) -> dict[str, Any]:
        whole: dict[str, Any] = {}
        # Flags and a policy say the same: a delivery that gives the one does without the defaults of the other.
        left_out = [name for name in _FLAGS if name in said] if "policy" not in said else [*_FLAGS]
        for key, value in self.hook.defaults.items():
            if key not in left_out and not (key.startswith("policy.") and left_out and "policy" not in said):
                _put(whole, key, value)
        for key, value in said.items():
            both = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = {**whole[key], **value} if both else value
        return whole

    def _check(self, said: Any) -> None:
        found = islice(self._validator.iter_errors(said), MOST_ERRORS)
        errors = [{"pointer": _pointer(error.absolute_path), "detail": _says(error)} for error in found]
        if errors:
            raise Problem(
                422, "not-as-asked-for", "; ".join(f"{one['pointer']} {one['detail']}" for one in errors), errors=errors
            )

    def _wanted(self, said: Mapping[str, Any]) -> Wanted:
        if self.hook.runs == "search":
            overrides = []
            for key, value in said.get("overrides", {}).items():
                if isinstance(value, str) and any(ord(letter) < 32 for letter in value):
                    raise Problem(422, "not-as-asked-for", f"#/overrides/{key} has a control character")
                overrides.append(f"{key}={json.dumps(_whole(value), ensure_ascii=False)}")
            return Wanted(name=said["spec"], overrides=tuple(overrides))
        flags = {key: value for key, value in said.items() if key != "experiment"}
        if "changes" in flags:
            flags["changes"] = {
                key: int(value) if key in _WHOLE else value for key, value in flags["changes"].items() if value is not None
            }
        return Wanted(name=said["experiment"], flags={key: value for key, value in flags.items() if value != {}})


def _whole(value: Any) -> Any:
    """Return 3 for 3.0, which JSON schemas take for a whole number, too."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _put(said: dict[str, Any], key: str, value: Any) -> None:
    group, dot, rest = key.partition(".")
    if dot:
        said.setdefault(group, {})[rest] = value
    else:
        said[key] = value


def _value(text: str) -> Any:
    """Read what a template made for a number; anything else stays text."""
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def _pointer(path: Any) -> str:
    return "#" + "".join(f"/{part}" for part in path)


def _says(error: Any) -> str:
    """Say what is wrong without quoting the body."""
    match error.validator:
        case "required":
            lacking = [name for name in error.validator_value if name not in error.instance]
            return f"lacks {', '.join(lacking)}"
        case "additionalProperties":
            return f"has a key that is not allowed here; allowed: {', '.join(error.schema['properties'])}"
        case "type":
            return f"must be of type {error.validator_value}"
        case "enum" | "const":
            return f"must be one of {', '.join(map(str, error.validator_value))}"
        case "not":
            return f"must have {error.schema['description']}"
        case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" | "minLength" | "maxLength" | "pattern":
            return f"must have {error.validator} {error.validator_value}"
        case _:
            return "is not as the schema says"
