"""Grid search: every combination once per sample, in declared order, the last parameter fastest."""

from __future__ import annotations

from holdfast.core.budget import values_of
from holdfast.core.errors import InvalidInput
from holdfast.core.space import Parameter, Space
from holdfast.core.trial import Trial
from holdfast.core.values import Config, dumps
from holdfast.engines.values import nth_value


class GridProposer:
    """Gives its ``n``-th proposal the point ``n % points``: the samples of a point are whole passes apart.

    What was queued or merged is none of its proposals: it neither takes a point away nor adds one.

    A parameter that is inactive under a point's earlier values adds no combinations, so no point comes twice. Points are
    counted, never listed: a grid of any size costs nothing until it is walked.
    """

    size: int | None

    def __init__(self, space: Space, samples: int = 1) -> None:
        self._space = space
        self._names = list(space.parameters)
        self._counts: dict[str, int] = {}
        self._referred = {other for parameter in space.parameters.values() for other in parameter.when or {}}
        self.points = self._count(0, {})
        self.size = self.points * samples
        self._others: set[int] = set()

    def observe(self, trial: Trial) -> None:
        if trial.number >= 0 and trial.source != "proposed":
            self._others.add(trial.number)

    def propose(self, number: int) -> Config:
        place = number - sum(other < number for other in self._others)
        if self.size is None or not 0 <= place < self.size:
            raise InvalidInput(f"the grid has {self.size} trials, numbered from 0; there is no number {place}")
        rest = place % self.points
        config: Config = {}
        for place, name in enumerate(self._names):
            if self._space.is_active(name, config):
                rest = self._choose(place, config, rest)
        return self._space.validate_config(config)

    def _choose(self, place: int, config: Config, rest: int) -> int:
        """Give the parameter at ``place`` the value that combination ``rest`` has; return its number under that value."""
        name, parameter = self._parameter(place)
        if name not in self._referred:
            index, rest = divmod(rest, self._count(place + 1, config))
            config[name] = nth_value(parameter, index)
            return rest
        for index in range(values_of(parameter)):
            config[name] = nth_value(parameter, index)
            below = self._count(place + 1, config)
            if rest < below:
                break
            rest -= below
        return rest

    def _count(self, place: int, config: Config) -> int:
        """Return how many combinations of the parameters from ``place`` on there are under ``config``."""
        if place == len(self._names):
            return 1
        key = f"{place}:{dumps({name: value for name, value in config.items() if name in self._referred})}"
        if key not in self._counts:
            self._counts[key] = self._count_anew(place, config)
        return self._counts[key]

    def _count_anew(self, place: int, config: Config) -> int:
        name, parameter = self._parameter(place)
        if not self._space.is_active(name, config):
            return self._count(place + 1, config)
        if name not in self._referred:
            return values_of(parameter) * self._count(place + 1, config)
        return sum(
            self._count(place + 1, {**config, name: nth_value(parameter, index)}) for index in range(values_of(parameter))
        )

    def _parameter(self, place: int) -> tuple[str, Parameter]:
        name = self._names[place]
        return name, self._space.parameters[name]
