"""The search space: typed parameters, conditions between them, and a config's one canonical form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict, PrivateAttr, RootModel, ValidationError, model_validator

from holdfast.core.choices import expanded
from holdfast.core.conditions import problem_of
from holdfast.core.errors import InvalidConfig, InvalidInput
from holdfast.core.expression import Expression
from holdfast.core.optuna_space import parameters_of
from holdfast.core.parameters import (
    CategoricalParameter,
    Condition,
    ConstantParameter,
    FloatParameter,
    IntParameter,
    Number,
    Parameter,
    Section,
    Whole,
    no_scalar,
    same,
)
from holdfast.core.values import Config, Scalar, digest, dumps

__all__ = [
    "CategoricalParameter",
    "ConstantParameter",
    "FloatParameter",
    "IntParameter",
    "Number",
    "Parameter",
    "Section",
    "Space",
    "Whole",
    "config_digest",
    "config_text",
]


class Space(RootModel[dict[str, Parameter]]):
    """Parameters by name, in declared order; may be empty."""

    model_config = ConfigDict(frozen=True)

    _expressions: dict[str, Expression] = PrivateAttr(default_factory=dict)
    """the conditions of parameters whose ``when`` is an expression"""

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, raw: Any) -> Any:
        return expanded(raw) if isinstance(raw, Mapping) else raw

    @model_validator(mode="after")
    def _conditions(self) -> Self:
        seen: dict[str, Parameter] = {}
        for name, parameter in self.root.items():
            if isinstance(parameter.when, str):
                self._expressions[name] = self._expression(name, parameter.when, seen)
            else:
                self._check_values(name, parameter.when or {}, seen)
            seen[name] = parameter
        return self

    def _expression(self, name: str, when: str, seen: Mapping[str, Parameter]) -> Expression:
        expression = Expression(when, self.root)
        for other in sorted(expression.names):
            self._check_name(name, other, seen)
        if reason := problem_of(expression, seen):
            raise ValueError(f"{name}: when: {reason}")
        return expression

    def _check_values(self, name: str, when: Condition, seen: Mapping[str, Parameter]) -> None:
        for other, wanted in when.items():
            self._check_name(name, other, seen)
            for value in wanted if isinstance(wanted, list) else [wanted]:
                if reason := seen[other].problem(seen[other].coerce(value)):
                    raise ValueError(f"{name}: when asks {other} = {value!r}, which {reason}")

    def _check_name(self, name: str, other: str, seen: Mapping[str, Parameter]) -> None:
        if other not in self.root:
            raise ValueError(f"{name}: when names {other!r}, which is no parameter; allowed: {', '.join(seen) or 'none'}")
        if other not in seen:
            raise ValueError(f"{name}: when names {other!r}, which is declared later; move {other!r} above {name!r}")

    @classmethod
    def from_optuna(cls, distributions: Mapping[str, Any]) -> Self:
        """Return the space of Optuna's ``distributions`` (of a trial, say); InvalidInput for one that has no counterpart."""
        if not isinstance(distributions, Mapping):
            raise InvalidInput(
                f"expected distributions by name, such as study.best_trial.distributions, not {distributions!r:.60}"
            )
        try:
            return cls.model_validate(parameters_of(distributions))
        except ValidationError as error:
            reasons = (f"{'.'.join(map(str, found['loc'][:1]))}: {found['msg']}" for found in error.errors(include_url=False))
            raise InvalidInput("; ".join(reasons)) from None

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        return self.root

    def conditional_on(self, name: str) -> frozenset[str]:
        """Return the parameters that decide whether ``name`` is active."""
        return self._expressions[name].names if name in self._expressions else frozenset(self.root[name].when or ())

    def is_active(self, name: str, config: Mapping[str, Scalar]) -> bool:
        """Tell whether parameter ``name`` is part of a config that begins with ``config``."""
        when = self.root[name].when
        if isinstance(when, str):
            return self._expressions[name].holds(config)
        for other, wanted in (when or {}).items():
            if other not in config:
                return False
            allowed = wanted if isinstance(wanted, list) else [wanted]
            if not any(same(config[other], self.root[other].coerce(value)) for value in allowed):
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
        what = no_scalar(value) or _no_text(name) or _no_text(value)
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
