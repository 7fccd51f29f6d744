"""The spec: the frozen description of an experiment, and readable reasons when it is wrong."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from holdfast.core.checkpoint_config import SEARCH_DEFAULTS, CheckpointConfig, for_search
from holdfast.core.conditions import problem_of
from holdfast.core.errors import SpecError
from holdfast.core.execution_section import ExecutionSection
from holdfast.core.expression import Expression
from holdfast.core.failure_section import FailureSection, RecoverySection
from holdfast.core.objective import Direction, Objective
from holdfast.core.search_section import PopulationSection, SearchSection
from holdfast.core.space import Section, Space
from holdfast.core.spelling import hint, nearest
from holdfast.core.stopping_section import StoppingSection

LOCATION_FIELDS = {"storage", "storage_options", "database"}
"""Where an experiment lives is no part of what it is; a database URL, which may hold a password, is stored nowhere."""

CHANGEABLE = (
    "search.num_trials",
    "search.time_budget",
    "search.max_concurrent",
    "search.target",
    "search.plateau",
    "search.max_cost",
    *(f"failure.{name}" for name in FailureSection.model_fields),
    *(f"recovery.{name}" for name in RecoverySection.model_fields),
    *(f"execution.{name}" for name in ExecutionSection.model_fields),
)
"""What a restore may change; each change is recorded in the audit."""


def _condition(text: str) -> str:
    Expression(text)
    return text


Condition = Annotated[str, AfterValidator(_condition)]
_NAME_FORBIDDEN = re.compile(r"[/\\\x00-\x1f\x7f]")


class ExperimentSpec(Section):
    """One search, described in full. Frozen once an experiment was created from it."""

    name: str = Field(description="names the folder in the storage; may hold {date}")
    trainable: str = Field(description="file.py:function, package.module:function, or a class in either")
    storage: str = Field(
        default="./runs",
        description="the folder that experiments live in (relative: to the spec's file), or s3://bucket/prefix",
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="of an object store: what fsspec takes; stored nowhere"
    )
    database: str | None = Field(
        default=None,
        repr=False,
        description="SQLAlchemy URL; null: HOLDFAST_DATABASE_URL; else holdfast.db in the storage, or for an object store a "
        "SQLite file of this host",
    )
    description: str = Field(default="", description="for people")
    if_exists: Literal["fail", "restore", "new"] = Field(
        default="fail", description="when the name is taken: refuse, go on with it, or take name-2, name-3 ..."
    )
    objectives: dict[str, Direction] = Field(
        description="metrics that count, each min or max; the first one decides what is best"
    )
    space: Space = Field(description="parameters by name: float, int, categorical, choice or constant")
    merge: tuple[str, ...] = Field(
        default=(), description="names or UUIDs of experiments in the same database whose trials warm this one up"
    )
    constraints: tuple[Condition, ...] = Field(
        default=(), description="conditions on the parameters, such as lr * batch < 1; no config that breaks one is proposed"
    )
    feasible: tuple[Condition, ...] = Field(
        default=(), description="conditions on the metrics, such as memory <= 16; a trial that breaks one is never best"
    )
    search: SearchSection = SearchSection()
    population: PopulationSection | None = Field(
        default=None, description="population based training; null: trials are on their own"
    )
    stopping: StoppingSection = StoppingSection()
    checkpoints: Annotated[CheckpointConfig, BeforeValidator(for_search)] = CheckpointConfig(**SEARCH_DEFAULTS)
    failure: FailureSection = FailureSection()
    recovery: RecoverySection = RecoverySection()
    execution: ExecutionSection = ExecutionSection()
    references: dict[str, Any] = Field(default_factory=dict, description="handed to trials; no part of a config's identity")

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not name.strip() or name in (".", "..") or name.startswith((".", "-")) or _NAME_FORBIDDEN.search(name):
            raise ValueError("a name becomes a folder: no slash or control character, not empty, not starting with . or -")
        if len(name.encode()) > 200:
            raise ValueError(f"a name has at most 200 bytes, this one {len(name.encode())}")
        return name

    @field_validator("trainable")
    @classmethod
    def _two_parts(cls, trainable: str) -> str:
        target, _, attribute = trainable.rpartition(":")
        if not target or not attribute.isidentifier():
            raise ValueError(f"{trainable!r} is not of the form train.py:train or package.module:train")
        return trainable

    @field_validator("storage")
    @classmethod
    def _some_storage(cls, storage: str) -> str:
        if not storage.strip():
            raise ValueError("the storage is empty; name a folder")
        return storage

    @field_validator("merge")
    @classmethod
    def _each_once(cls, merge: tuple[str, ...]) -> tuple[str, ...]:
        for name in merge:
            if not name.strip():
                raise ValueError("merge holds an empty name; name experiments")
            if merge.count(name) > 1:
                raise ValueError(f"merge names {name!r} more than once; name each experiment once")
        return merge

    @field_validator("constraints")
    @classmethod
    def _on_parameters(cls, texts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        space = info.data.get("space")  # absent when it is wrong itself
        if not isinstance(space, Space):
            return texts
        for place, text in enumerate(texts):
            if reason := problem_of(Expression(text, space.parameters), space.parameters):
                raise ValueError(f"constraints[{place}]: {reason}")
        return texts

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.checkpoints.directory is not None:
            raise ValueError(
                "checkpoints.directory is for a CheckpointStore; a search keeps its checkpoints in its path, which is enough"
                " to restore it then: leave it out, or set storage"
            )
        if not self.objectives:
            raise ValueError("objectives is empty; name at least one, such as {loss: min}")
        if self.search.target is not None and len(self.objectives) > 1:
            raise ValueError("search.target needs exactly one objective")
        if self.search.reference_point is not None:
            _check_reference_point(self.search.reference_point, list(self.objectives))
        if self.search.engine == "grid":
            for name, parameter in self.space.parameters.items():
                if parameter.type == "float" and parameter.step is None:
                    raise ValueError(f"space.{name} is continuous; a grid needs step: or type: categorical")
        elif not self.search.ends:
            raise ValueError(
                "search.num_trials is absent; only a grid, or one of time_budget, target, plateau, max_cost, can do without"
            )
        if self.population is not None:
            self._check_population(self.population)
        return self

    def _check_population(self, population: PopulationSection) -> None:
        search, last = self.search, self.stopping.max_steps
        if search.num_trials is None or search.num_trials < 2:
            raise ValueError(f"search.num_trials is {search.num_trials}; a population has as many members: give 2 or more")
        if search.repeats > 1 or search.samples > 1:
            raise ValueError("search.repeats and search.samples make no sense in a population, whose configs change; drop them")
        if not self.checkpoints.saves:
            raise ValueError("population needs checkpoints, which members go on from; drop checkpoints.enabled and mode: none")
        if last is not None and last <= population.interval:
            raise ValueError(
                f"population.interval ({population.interval}) is not below stopping.max_steps ({last}): no generation would end"
            )
        unknown = sorted(set(population.parameters) - set(self.space.parameters))
        if unknown:
            raise ValueError(
                f"population.parameters names {', '.join(unknown)}; allowed: {', '.join(self.space.parameters) or 'none'}"
            )

    @property
    def goals(self) -> tuple[Objective, ...]:
        """The objectives in declared order."""
        return tuple(Objective(name=name, direction=direction) for name, direction in self.objectives.items())

    @property
    def trainable_name(self) -> str:
        """The trainable's own name, wherever its file lies: ``train:train`` for ``/any/train.py:train``."""
        target, _, attribute = self.trainable.rpartition(":")
        stem = PurePath(target).stem if target.endswith(".py") else target.rpartition(".")[2]
        return f"{stem}:{attribute}"

    def stored(self) -> dict[str, Any]:
        """Return the spec as it is stored: JSON values, without locations and credentials."""
        return self.model_dump(mode="json", exclude=LOCATION_FIELDS)

    @classmethod
    def parse(cls, data: Any, *, source: Source = "spec") -> Self:
        """Return the spec in ``data``; SpecError names ``source``, the key, what is allowed and the remedy."""
        if not isinstance(data, Mapping):
            found = type(data).__name__
            raise SpecError(f"{_at(source, ())}: expected a mapping of keys such as name and trainable, found {found}")
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise SpecError(explain(error, cls, source=source)) from None


def _check_reference_point(point: Mapping[str, float], objectives: Sequence[str]) -> None:
    """Refuse, with a ValueError, a reference point that does not give exactly the objectives a value."""
    if len(objectives) == 1:
        raise ValueError("search.reference_point is for several objectives, the spec has one; leave it out")
    if set(point) != set(objectives):
        raise ValueError(
            f"search.reference_point gives a value to {', '.join(point) or 'nothing'}; it must name exactly the objectives:"
            f" {', '.join(objectives)}"
        )


Source = str | Callable[[Sequence[int | str]], str]
"""Where a spec came from, or a function that says it for the location of each key."""


def explain(error: ValidationError, model: type[BaseModel], *, source: Source) -> str:
    """Turn pydantic's report into one line per problem: source, key, what was given, what is allowed."""
    lines = [f"{_at(source, _location(found['loc']))}: {_line(found, model)}" for found in error.errors(include_url=False)]
    return "\n".join(dict.fromkeys(lines))


def _at(source: Source, location: Sequence[int | str]) -> str:
    return source if isinstance(source, str) else source(location)


_DISCRIMINATORS = ("float", "int", "categorical", "choice", "constant")
_REMEDIES = {
    "model_type": "it must be a mapping of keys; leave it out for the defaults",
    "model_attributes_type": "it must be a mapping such as {type: float, low: 0, high: 1}",
    "dict_type": "it must be a mapping of keys",
    "tuple_type": "it must be a list such as [relu, tanh]",
    "string_type": "it must be a string; put quotes around it",
    "string_too_short": "it must not be empty",
    "int_parsing": "it must be a whole number",
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_parsing": "it must be a number",
    "float_type": "it must be a number",
    "finite_number": "it must be a finite number",
    "bool_parsing": "it must be true or false",
    "bool_type": "it must be true or false",
}


def _location(raw: Sequence[int | str]) -> tuple[int | str, ...]:
    """Return where an error lies, in the user's keys: without the tags that pydantic adds for members of a union."""
    if raw and raw[0] == "space" and len(raw) > 2 and raw[2] != "[key]":
        return tuple(part for place, part in enumerate(raw) if place != 2)
    return tuple(raw)


def _line(detail: ErrorDetails, model: type[BaseModel]) -> str:
    location = _location(detail["loc"])
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(location, model, detail["loc"])
        case "missing":
            return f"{key} is missing; add it"
        case "value_error":
            reason = str(detail["ctx"]["error"])
            return f"{key}: {reason}" if key and not reason.startswith(f"{key}[") else reason
        case "union_tag_not_found" | "union_tag_invalid":
            found = detail["input"].get("type") if isinstance(detail["input"], Mapping) else detail["input"]
            given = f"{key}.type is {_short(found)}" if found is not None else f"{key} has no type"
            return f"{given}{hint(found, _DISCRIMINATORS)}; allowed: {', '.join(_DISCRIMINATORS)}"
        case "literal_error" | "enum":
            allowed = re.findall(r"'([^']*)'", str(detail["ctx"]["expected"]))
            return f"{key} is {_short(detail['input'])}{hint(detail['input'], allowed)}; allowed: {', '.join(allowed)}"
        case kind if kind == "invalid_key" or location[-1:] == ("[key]",):
            return f"key {_short(detail['input'])} is no string; put quotes around it"
        case kind:
            reason = _REMEDIES.get(kind, detail["msg"][0].lower() + detail["msg"][1:])
            return f"{key} is {_short(detail['input'])}; {reason}"


def _short(value: object) -> str:
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_key(location: Sequence[int | str], model: type[BaseModel], raw: Sequence[int | str]) -> str:
    known = known_keys(model, raw[:-1])
    parent = ".".join(str(part) for part in location[:-1])
    name = ".".join(str(part) for part in location)
    near = nearest(str(location[-1]), known)
    words = f"; did you mean {near!r}?" if near else ""
    return f"unknown key {name!r}{words} (allowed{' in ' + parent if parent else ''}: {', '.join(known)})"


def known_keys(model: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    """Return the keys that ``model`` allows at ``location`` (a pydantic error location, discriminator tags included)."""
    here: Any = model
    for part in location:
        here = _step_into(here, str(part))
    if not isinstance(here, type) or not issubclass(here, BaseModel) or "root" in here.model_fields:
        return []  # a value, or a mapping whose keys the user names
    return sorted(here.model_fields)


def _step_into(annotation: Any, part: str) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        if part in fields:
            return fields[part].annotation
        return _step_into(fields["root"].annotation, part) if "root" in fields else None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _step_into(arguments[0], part)
    if origin in (typing.Union, types.UnionType):
        for member in arguments:
            kind = getattr(member, "model_fields", {}).get("type")
            if kind is not None and kind.default == part:
                return member
    if origin is tuple:
        return arguments[0]
    return arguments[1] if origin is dict else None
