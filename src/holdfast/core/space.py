"""The search space: typed parameters, conditions between them, and a config's one canonical form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, field_validator, model_validator

from holdfast.core.errors import InvalidConfig
from holdfast.core.values import Config, Scalar, digest, dumps

Condition = dict[str, Scalar | list[Scalar]]


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number")
    return value


Whole = Annotated[int, BeforeValidator(_no_truth_value)]
Number = Annotated[float, BeforeValidator(_no_truth_value)]


class Section(BaseModel):
    """A frozen part of a spec: unknown keys and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Parameter(Section):
    when: Condition | None = Field(
        default=None, description="active only while each named parameter has the value, or one of the values"
    )

    def accepts(self, value: Scalar) -> bool:
        """Tell whether ``value`` lies in the parameter's domain."""
        return self.problem(value) is None

    def problem(self, value: Scalar) -> str | None:
        """Return what is wrong with ``value``, or None."""
        raise NotImplementedError  # abstract: each kind below has its own

    def coerce(self, value: Scalar) -> Scalar:
        """Return ``value`` in the parameter's declared type (an int given for a float becomes one)."""
        return value


class _Numeric(_Parameter):
    @model_validator(mode="after")
    def _bounds(self) -> Self:
        low, high, step = (getattr(self, name) for name in ("low", "high", "step"))
        if low > high:
            raise ValueError(f"low ({low}) is above high ({high}); swap them")
        if not _is_finite(high - low):  # samplers and grids need the width as a float
            raise ValueError(f"low ({low!r:.24}) and high ({high!r:.24}) are too far apart; narrow them")
        if getattr(self, "log", False):
            if low <= 0:
                raise ValueError(f"log: true needs low above 0, not {low}; raise low or drop log")
            if step is not None and (isinstance(self, FloatParameter) or step != 1):
                raise ValueError("log and step exclude each other; drop one")
        if step is not None and step <= 0:
            raise ValueError(f"step must be above 0, not {step}")
        default = getattr(self, "default", None)
        if default is not None and (reason := self.problem(default)):
            raise ValueError(f"default {default!r} {reason}")
        return self


class FloatParameter(_Numeric):
    """A real number in [low, high]."""

    type: Literal["float"] = "float"
    low: Number
    high: Number
    log: bool = False
    step: Number | None = None
    default: Number | None = None

    def problem(self, value: Scalar) -> str | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            return "is no finite number"
        if not self.low <= value <= self.high:
            return f"is outside [{self.low}, {self.high}]"
        if self.step is not None:
            steps = (value - self.low) / self.step
            if abs(steps - round(steps)) > 1e-6:
                return f"is not {self.low} plus a multiple of the step {self.step}"
        return None

    def coerce(self, value: Scalar) -> Scalar:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) and _is_finite(value) else value


class IntParameter(_Numeric):
    """A whole number in [low, high]."""

    type: Literal["int"] = "int"
    low: Whole
    high: Whole
    log: bool = False
    step: Whole | None = None
    default: Whole | None = None

    def problem(self, value: Scalar) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return "is no whole number"
        if not self.low <= value <= self.high:
            return f"is outside [{self.low}, {self.high}]"
        if self.step is not None and (value - self.low) % self.step:
            return f"is not {self.low} plus a multiple of the step {self.step}"
        return None

    def coerce(self, value: Scalar) -> Scalar:
        return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the range of floats
        return False


def _same(left: Scalar, right: Scalar) -> bool:
    """Compare with types: 1, 1.0 and True are three values."""
    return type(left) is type(right) and left == right


def _no_scalar(value: object) -> str | None:
    """Return what ``value`` is when it is no value of a parameter (a list, NaN), else None."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return None if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


class CategoricalParameter(_Parameter):
    """One of several values."""

    type: Literal["categorical"] = "categorical"
    choices: tuple[Scalar, ...]
    default: Scalar = None

    @field_validator("choices", mode="before")
    @classmethod
    def _keep_types(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            for item in value:
                if reason := _no_scalar(item):
                    raise ValueError(f"each choice must be a finite number, a string, true, false or null, not {reason}")
        return value

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.choices:
            raise ValueError("choices is empty; name at least one value")
        keys = [dumps(choice) for choice in self.choices]
        doubled = sorted({key for key in keys if keys.count(key) > 1})
        if doubled:
            raise ValueError(f"choices names {', '.join(doubled)} more than once; name each value once")
        if self.default is not None and not self.accepts(self.default):
            raise ValueError(f"default {self.default!r} is none of the choices {list(self.choices)}")
        return self

    def problem(self, value: Scalar) -> str | None:
        if any(_same(value, choice) for choice in self.choices):
            return None
        return f"is none of the choices {list(self.choices)}"


class ConstantParameter(_Parameter):
    """One fixed value, part of every config."""

    type: Literal["constant"] = "constant"
    value: Scalar

    @field_validator("value", mode="before")
    @classmethod
    def _keep_type(cls, value: Any) -> Any:
        if reason := _no_scalar(value):
            raise ValueError(f"must be a finite number, a string, true, false or null, not {reason}")
        return value

    def problem(self, value: Scalar) -> str | None:
        return None if _same(value, self.value) else f"is not the constant {self.value!r}"


Parameter = Annotated[
    FloatParameter | IntParameter | CategoricalParameter | ConstantParameter,
    Field(discriminator="type"),
]


class Space(RootModel[dict[str, Parameter]]):
    """Parameters by name, in declared order; may be empty."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="after")
    def _conditions(self) -> Self:
        seen: dict[str, _Parameter] = {}
        for name, parameter in self.root.items():
            for other, wanted in (parameter.when or {}).items():
                if other not in self.root:
                    raise ValueError(
                        f"{name}: when names {other!r}, which is no parameter; allowed: {', '.join(seen) or 'none'}"
                    )
                if other not in seen:
                    raise ValueError(f"{name}: when names {other!r}, which is declared later; move {other!r} above {name!r}")
                for value in wanted if isinstance(wanted, list) else [wanted]:
                    if reason := seen[other].problem(seen[other].coerce(value)):
                        raise ValueError(f"{name}: when asks {other} = {value!r}, which {reason}")
            seen[name] = parameter
        return self

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        return self.root

    def is_active(self, name: str, config: Mapping[str, Scalar]) -> bool:
        """Tell whether parameter ``name`` is part of a config that begins with ``config``."""
        for other, wanted in (self.root[name].when or {}).items():
            if other not in config:
                return False
            allowed = wanted if isinstance(wanted, list) else [wanted]
            if not any(_same(config[other], self.root[other].coerce(value)) for value in allowed):
                return False
        return True

    def validate_config(self, config: Mapping[str, Scalar]) -> Config:
        """Return ``config`` in declared order and types; InvalidConfig for unknown, missing or out-of-domain values."""
        result: Config = {}
        for name, parameter in self.root.items():
            if not self.is_active(name, result):
                if name in config:
                    raise InvalidConfig(f"config names {name!r}, which is inactive here (when: {parameter.when}); leave it out")
                continue
            if name not in config:
                raise InvalidConfig(f"config lacks {name!r}; it needs {', '.join(self.root)}")
            value = parameter.coerce(config[name])
            if reason := parameter.problem(value):
                raise InvalidConfig(f"config: {name} = {config[name]!r} {reason}")
            result[name] = value
        self._refuse_unknown(config)
        return result

    def _refuse_unknown(self, config: Mapping[str, Scalar]) -> None:
        unknown = sorted(map(repr, set(config) - set(self.root)))
        if unknown:
            raise InvalidConfig(f"config names {', '.join(unknown)}; allowed: {', '.join(self.root) or 'nothing'}")

    def completed(self, config: Mapping[str, Scalar]) -> Config | None:
        """Return another space's ``config`` in this one: what it lacks has its default, or is a constant's value.

        None when an active parameter that it lacks has no default; InvalidConfig for what has no place here.
        """
        known: Config = {}
        lacking = False
        for name, parameter in self.root.items():
            if not self.is_active(name, known):
                continue
            if name in config:
                known[name] = parameter.coerce(config[name])
            elif isinstance(parameter, ConstantParameter):
                known[name] = parameter.value
            elif parameter.default is not None:
                known[name] = parameter.coerce(parameter.default)
            else:
                lacking = True
        if not lacking:
            return self.validate_config({**config, **known})
        self._refuse_unknown(config)
        for name, value in known.items():
            if reason := self.root[name].problem(value):
                raise InvalidConfig(f"config: {name} = {value!r} {reason}")
        return None

    def difference(self, other: Space) -> list[str]:
        """Return one line for each parameter that differs from ``other`` (ours first), in declared order; [] when equal."""
        lines = []
        for name in dict.fromkeys([*self.root, *other.root]):
            ours, theirs = self.root.get(name), other.root.get(name)
            if ours != theirs or dumps(_form(ours)) != dumps(_form(theirs)):
                lines.append(f"{name}: {_show(ours)} / {_show(theirs)}")
        return lines


def _form(parameter: Parameter | None) -> dict[str, Any] | None:
    return None if parameter is None else parameter.model_dump(mode="json", exclude_defaults=True)


def _show(parameter: Parameter | None) -> str:
    return "absent" if parameter is None else f"{parameter.type} {dumps(_form(parameter))}"


def config_text(config: Mapping[str, Scalar]) -> str:
    """Return the canonical JSON of a validated config: equal configs, equal text, whatever their key order.

    InvalidConfig when something in it is no value of any parameter.
    """
    for name, value in config.items():
        what = _no_scalar(value) or _no_text(name) or _no_text(value)
        if what is not None or not isinstance(name, str):
            raise InvalidConfig(
                f"parameter {name!r} is {what or 'not named by text'}; "
                "allowed are finite numbers, true, false, null and Unicode text"
            )
    return dumps(dict(config))


def _no_text(value: object) -> str | None:
    """Return a string that is no Unicode (an undecodable file name, say), else None."""
    return repr(value) if isinstance(value, str) and not value.isascii() and _has_surrogates(value) else None


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def config_digest(config: Mapping[str, Scalar]) -> str:
    """Return the identity of a validated config."""
    return digest(config_text(config))
