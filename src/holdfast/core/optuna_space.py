"""Optuna's distributions as parameters, by what they are called and say of themselves: Optuna is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.core.errors import InvalidInput
from holdfast.core.parameters import no_scalar


def parameters_of(distributions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return parameters by name; InvalidInput names a distribution that has no counterpart."""
    return {name: _parameter(name, distribution) for name, distribution in distributions.items()}


def _parameter(name: str, distribution: Any) -> dict[str, Any]:
    kinds = {base.__name__ for base in type(distribution).__mro__}
    if "CategoricalDistribution" in kinds:
        for choice in distribution.choices:
            if reason := no_scalar(choice):
                raise InvalidInput(
                    f"{name}: the choice {choice!r} is a {reason}; a choice is a finite number, text, true, false or null: "
                    "name each choice, and look the object up by its name in the trainable"
                )
        return {"type": "categorical", "choices": list(distribution.choices)}
    if "FloatDistribution" in kinds:
        found = {"type": "float", "low": float(distribution.low), "high": float(distribution.high)}
    elif "IntDistribution" in kinds:
        found = {"type": "int", "low": int(distribution.low), "high": int(distribution.high)}
    else:
        raise InvalidInput(
            f"{name} is a {type(distribution).__name__}; "
            "allowed are Optuna's FloatDistribution, IntDistribution and CategoricalDistribution"
        )
    if distribution.log:
        found["log"] = True
    elif distribution.step not in (None, 1) or (distribution.step == 1 and found["type"] == "float"):
        found["step"] = distribution.step
    return found
