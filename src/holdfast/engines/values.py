"""Values by their share of a parameter's range: what sequences of numbers from 0 to 1 are as configs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from holdfast.core.counted import is_counted, nth_value, values_of
from holdfast.core.space import FloatParameter, IntParameter, Parameter, Space
from holdfast.core.values import Config, Scalar


def varied(space: Space) -> list[str]:
    """Return the parameters of ``space`` that have more than one value, in order."""
    return [name for name, one in space.parameters.items() if not (is_counted(one) and values_of(one) == 1)]


def config_at(space: Space, shares: Mapping[str, float]) -> Config:
    """Return the config whose values lie at ``shares`` of their parameters' ranges, from 0 to 1; 0 where one is missing.

    Shares are of the logarithm where a parameter has ``log``, and of the number of values where these are counted. Those of
    inactive parameters count for nothing.
    """
    config: Config = {}
    for name, parameter in space.parameters.items():
        if space.is_active(name, config):
            config[name] = value_at(parameter, shares.get(name, 0.0))
    return space.validate_config(config)


def value_at(parameter: Parameter, share: float) -> Scalar:
    """Return the value of ``parameter`` below which the part ``share``, in [0, 1], of its range lies."""
    if isinstance(parameter, IntParameter) and parameter.log:
        exact = _between_logs(parameter.low - 0.5, parameter.high + 0.5, share)
        return min(max(round(exact), parameter.low), parameter.high)
    if is_counted(parameter):
        count = values_of(parameter)
        return nth_value(parameter, min(int(share * count), count - 1))
    assert isinstance(parameter, FloatParameter)
    if parameter.log:
        value = _between_logs(parameter.low, parameter.high, share)
    else:
        value = (1.0 - share) * parameter.low + share * parameter.high
    return min(max(value, parameter.low), parameter.high)


def _between_logs(low: float, high: float, share: float) -> float:
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
