"""Parameters whose values can be counted, and those values: exact, so that 0.1 and two steps of 0.1 is 0.3."""

from __future__ import annotations

import math
from decimal import Decimal

from holdfast.core.parameters import CategoricalParameter, ConstantParameter, FloatParameter, IntParameter, Parameter
from holdfast.core.values import Scalar


def is_counted(parameter: Parameter) -> bool:
    """Tell whether ``parameter`` has a known number of values, :func:`values_of` of them."""
    return not isinstance(parameter, FloatParameter) or parameter.step is not None or parameter.low == parameter.high


def values_of(parameter: Parameter) -> int:
    """Return how many values a grid gives ``parameter``."""
    match parameter.type:
        case "categorical":
            return len(parameter.choices)
        case "int":
            return (parameter.high - parameter.low) // (parameter.step or 1) + 1
        case "float":
            if parameter.step is None:
                return 1
            return math.floor((parameter.high - parameter.low) / parameter.step + 1e-9) + 1
        case _:
            return 1


def nth_value(parameter: Parameter, index: int) -> Scalar:
    """Return value ``index`` (from 0) of a counted parameter, in ascending or declared order."""
    match parameter:
        case CategoricalParameter():
            return parameter.choices[index]
        case ConstantParameter():
            return parameter.value
        case IntParameter():
            return parameter.low + index * (parameter.step or 1)
        case FloatParameter(step=None):
            return parameter.low
        case FloatParameter(step=step):
            return min(float(Decimal(str(parameter.low)) + index * Decimal(str(step))), parameter.high)


def index_of(parameter: FloatParameter | IntParameter, value: float) -> int:
    """Return the index of the value of a stepped parameter that is nearest to ``value``."""
    index = round((value - parameter.low) / (parameter.step or 1))
    return min(max(index, 0), values_of(parameter) - 1)
