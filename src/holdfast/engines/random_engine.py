"""Random search: each config is a pure function of the seed and the trial's number."""

from __future__ import annotations

from random import Random

from holdfast.core.counted import is_counted, nth_value, values_of
from holdfast.core.seeding import derive, proposal_seed
from holdfast.core.space import IntParameter, Parameter, Space
from holdfast.core.trial import Trial
from holdfast.core.values import Config, Scalar
from holdfast.engines.values import value_at


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
    if is_counted(parameter) and not (isinstance(parameter, IntParameter) and parameter.log):
        count = values_of(parameter)
        return nth_value(parameter, random.getrandbits(count.bit_length() + 32) % count)
    return value_at(parameter, random.random())
