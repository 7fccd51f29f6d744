"""Random search: each config is a pure function of the seed and the trial's number."""

from __future__ import annotations

import math
from random import Random

from holdfast.core.budget import values_of
from holdfast.core.seeding import derive, proposal_seed
from holdfast.core.space import FloatParameter, IntParameter, Parameter, Space
from holdfast.core.trial import Trial
from holdfast.core.values import Config, Scalar
from holdfast.engines.values import is_counted, nth_value


class RandomProposer:
    """Proposes independent draws, uniform or log-uniform, whatever was observed."""

    size: int | None = None

    def __init__(self, space: Space, seed: int) -> None:
        self._space = space
        self._seed = seed

    def observe(self, trial: Trial) -> None:
        """Nothing that was tried changes a draw."""

    def propose(self, number: int, *, retry: int = 0) -> Config:
        seed = proposal_seed(self._seed, number) if retry == 0 else derive(self._seed, "proposal", number, retry)
        return self._space.validate_config(drawn(self._space, seed))


def drawn(space: Space, seed: int) -> Config:
    """Return an independent draw of a config."""
    random = Random(seed)
    config: Config = {}
    for name, parameter in space.parameters.items():
        if space.is_active(name, config):
            config[name] = draw(parameter, random)
    return config


def draw(parameter: Parameter, random: Random) -> Scalar:
    """Return one value of ``parameter``; only ``random()`` and ``getrandbits()`` are used, which no Python release changes."""
    if isinstance(parameter, IntParameter) and parameter.log:
        exact = log_uniform(parameter.low - 0.5, parameter.high + 0.5, random)
        return min(max(round(exact), parameter.low), parameter.high)
    if is_counted(parameter):
        count = values_of(parameter)
        return nth_value(parameter, random.getrandbits(count.bit_length() + 32) % count)
    assert isinstance(parameter, FloatParameter)
    if parameter.log:
        value = log_uniform(parameter.low, parameter.high, random)
    else:
        share = random.random()
        value = (1.0 - share) * parameter.low + share * parameter.high
    return min(max(value, parameter.low), parameter.high)


def log_uniform(low: float, high: float, random: Random) -> float:
    return math.exp(math.log(low) + random.random() * (math.log(high) - math.log(low)))
