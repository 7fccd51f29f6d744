"""What a restore is asked to do, and what it changes of a stored spec. Imports no Prefect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.core.errors import SpecError
from holdfast.core.resume import ResumePolicy
from holdfast.core.space import Space
from holdfast.core.spec import CHANGEABLE, ExperimentSpec
from holdfast.core.values import Json
from holdfast.engines.own import engine_name
from holdfast.locate import Opened

NESTED = ("execution.resources", "execution.job_variables")
"""What may be changed as a whole, or one of its keys alone: ``execution.resources.gpu``."""


@dataclass(frozen=True, kw_only=True)
class RestoreRequest:
    """What a restore was asked to do."""

    path: str | Path
    policy: ResumePolicy = field(default_factory=ResumePolicy)
    trainable: str | None = None
    changes: Mapping[str, Json] = field(default_factory=dict)
    """new values by key, such as search.num_trials"""
    space: Space | None = None
    """compared with the experiment's, as are the objectives"""
    objectives: Mapping[str, str] | None = None
    engine: str | None = None
    """where the same engine of the user's own is now"""
    references: Mapping[str, Any] | None = None
    database: str | None = None
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    new_trials: bool = True
    force: bool = False
    continues: tuple[str, int] | None = None
    """UUID and epoch of the drive that it goes on with in a new flow run, as that drive wanted"""


def changed_spec(opened: Opened, request: RestoreRequest) -> tuple[ExperimentSpec, dict[str, Json]]:
    """Return the spec under the request, and what changes; SpecError for what a restore may not change."""
    stored = opened.spec
    data = {**stored.stored(), "storage": stored.storage, "storage_options": stored.storage_options}
    changes: dict[str, Json] = {}
    for key, value in request.changes.items():
        _set(data, key, value)
    spec = type(stored).parse(data, source="--set")
    before, after = stored.stored(), spec.stored()
    for key in request.changes:
        values = [_value(before, key), _value(after, key)]
        if values[0] != values[1]:
            changes[key] = values
    if request.trainable is not None and request.trainable != stored.trainable:
        renamed = spec.model_copy(update={"trainable": request.trainable})
        if renamed.trainable_name != stored.trainable_name:
            raise SpecError(
                f"the experiment's trainable is {stored.trainable_name}, the one given is {renamed.trainable_name}; "
                "a restore runs the same trainable: give that one, or start a new experiment"
            )
        spec = renamed
        changes["trainable"] = [stored.trainable, request.trainable]
    if request.engine is not None and request.engine != stored.search.engine:
        if engine_name(request.engine) != engine_name(stored.search.engine):
            raise SpecError(
                f"the experiment's engine is {stored.search.engine}, the one given is {request.engine}; a restore keeps it: "
                "give that one, or start a new experiment"
            )
        spec = spec.model_copy(update={"search": spec.search.model_copy(update={"engine": request.engine})})
        changes["search.engine"] = [stored.search.engine, request.engine]
    if request.space is not None and (lines := stored.space.difference(request.space)):
        raise SpecError("the space differs from the experiment's (stored / given); a restore keeps it:\n" + "\n".join(lines))
    if request.objectives is not None and list(request.objectives.items()) != list(stored.objectives.items()):
        raise SpecError(
            "the objectives differ from the experiment's; a restore keeps them: "
            f"stored {_goals(stored.objectives)}, given {_goals(request.objectives)}"
        )
    if request.references is not None:
        spec = spec.model_copy(update={"references": dict(request.references)})
    return spec, changes


def _set(data: dict[str, Any], key: str, value: Json) -> None:
    """Set a dotted key in a stored spec, of which nothing is changed in place; SpecError for what a restore keeps."""
    first, *rest = key.split(".")
    if key not in CHANGEABLE and not key.startswith(tuple(f"{name}." for name in NESTED)):
        raise SpecError(f"a restore cannot change {key!r}; allowed: {', '.join(CHANGEABLE)}")
    place = data[first] = dict(data[first])
    for name in rest[:-1]:
        found = place.get(name) or {}
        if not isinstance(found, Mapping):
            raise SpecError(f"a restore cannot change {key!r}: {name} has no keys")
        place[name] = dict(found)
        place = place[name]
    place[rest[-1]] = value


def _value(data: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        data = data.get(name) if isinstance(data, Mapping) else None  # type: ignore[assignment]  # the last one is a value
    return data


def _goals(objectives: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{name}: {direction}" for name, direction in objectives.items()) + "}"
