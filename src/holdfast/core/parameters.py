"""The kinds of parameters that a search space is made of, each with its own domain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from holdfast.core.expression import Expression
from holdfast.core.values import Scalar, dumps

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
    when: Condition | str | None = Field(
        default=None,
        description="active only while each named parameter has the value, or one of the values; or a condition: layers >= 2",
    )

    @field_validator("when", mode="before")
    @classmethod
    def _some_condition(cls, when: Any) -> Any:
        if isinstance(when, str):
            Expression(when)
        elif isinstance(when, Mapping):
            for name, wanted in when.items():
                for value in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
                    if reason := no_scalar(value):
                        raise ValueError(f"{name} must be a value or a list of values, not {reason}")
        elif when is not None:
            raise ValueError(f"{when!r} is neither a mapping such as {{opt: sgd}} nor a condition such as 'layers >= 2'")
        return when

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
                raise ValueError(
                    "log and step exclude each other; drop one, or list the values: type: categorical, ordered: true"
                )
        if step is not None and step <= 0:
            raise ValueError(f"step must be above 0, not {step}")
        if step is not None and not _is_finite((high - low) / step):
            raise ValueError(f"step ({step!r:.24}) is too small for a range of {high - low!r:.24}; make it larger, or drop it")
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


def same(left: Scalar, right: Scalar) -> bool:
    """Compare with types: 1, 1.0 and True are three values."""
    return type(left) is type(right) and left == right


def no_scalar(value: object) -> str | None:
    """Return what ``value`` is when it is no value of a parameter (a list, NaN), else None."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return None if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


class CategoricalParameter(_Parameter):
    """One of several values."""

    type: Literal["categorical"] = "categorical"
    choices: tuple[Scalar, ...]
    ordered: bool = Field(default=False, description="the choices stand in their order: engines may take neighbours for alike")
    default: Scalar = None

    @field_validator("choices", mode="before")
    @classmethod
    def _keep_types(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            for item in value:
                if reason := no_scalar(item):
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
        if any(same(value, choice) for choice in self.choices):
            return None
        return f"is none of the choices {list(self.choices)}"


class ConstantParameter(_Parameter):
    """One fixed value, part of every config."""

    type: Literal["constant"] = "constant"
    value: Scalar

    @field_validator("value", mode="before")
    @classmethod
    def _keep_type(cls, value: Any) -> Any:
        if reason := no_scalar(value):
            raise ValueError(f"must be a finite number, a string, true, false or null, not {reason}")
        return value

    def problem(self, value: Scalar) -> str | None:
        return None if same(value, self.value) else f"is not the constant {self.value!r}"


Parameter = Annotated[
    FloatParameter | IntParameter | CategoricalParameter | ConstantParameter,
    Field(discriminator="type"),
]
