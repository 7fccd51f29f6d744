"""Grid search: every combination once per sample, in declared order, the last parameter fastest."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from holdfast.core.counted import nth_value, values_of
from holdfast.core.errors import InvalidInput, SpecError
from holdfast.core.expression import Expression
from holdfast.core.space import Parameter, Space
from holdfast.core.trial import Trial
from holdfast.core.values import Config

MOST_STEPS = 1_000_000
"""Values that are tried at most to count the points that conditions and constraints allow."""


class GridProposer:
    """Gives its ``n``-th proposal the point ``n % points``: the samples of a point are whole passes apart.

    What was queued or merged is none of its proposals: it neither takes a point away nor adds one.

    A parameter that is inactive under a point's earlier values adds no combinations, so no point comes twice; a point that
    breaks a constraint (each of whose parameters is active there) is none. Points are counted, never listed: a grid of any size
    costs nothing until it is walked. Only the combinations of parameters that others, or constraints, refer to are gone
    through: SpecError when there are too many of them, or when no point is left.
    """

    size: int | None

    def __init__(self, space: Space, samples: int = 1, *, constraints: Sequence[str] = ()) -> None:
        self._space = space
        self._names = list(space.parameters)
        self._counts: dict[tuple[object, ...], int] = {}
        places = {name: place for place, name in enumerate(self._names)}
        self._decided: dict[int, list[Expression]] = {}
        """the constraints that can be judged once the parameter at a place has its value"""
        self._last_use: dict[str, int] = {}
        """the last place at which the value of a parameter matters"""
        for text in constraints:
            expression = Expression(text, self._names)
            last = max(places[name] for name in expression.names)
            self._decided.setdefault(last, []).append(expression)
            self._use(expression.names, last)
        for place, name in enumerate(self._names):
            self._use(space.conditional_on(name), place)
        self._needed = [
            [name for name in self._names[:place] if self._last_use.get(name, -1) >= place]
            for place in range(len(self._names) + 1)
        ]
        """the parameters before each place on whose values the number of combinations from there on depends"""
        self._steps = 0
        self._is_bounded = bool(constraints) or any(isinstance(parameter.when, str) for parameter in space.parameters.values())
        self.points = self._count(0, {})
        if self.points == 0:
            raise SpecError(f"no point of the grid meets the constraints ({'; '.join(constraints)}); loosen them")
        self.size = self.points * samples
        self._others: set[int] = set()

    def _use(self, names: frozenset[str], place: int) -> None:
        for name in names:
            self._last_use[name] = max(place, self._last_use.get(name, 0))

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
        if name not in self._last_use:
            index, rest = divmod(rest, self._count(place + 1, config))
            config[name] = nth_value(parameter, index)
            return rest
        for index in range(values_of(parameter)):
            config[name] = nth_value(parameter, index)
            below = self._count_below(place, config)
            if rest < below:
                break
            rest -= below
        return rest

    def _count(self, place: int, config: Config) -> int:
        """Return how many combinations of the parameters from ``place`` on there are under ``config``.

        Nothing calls itself: a space may have more parameters than the interpreter has levels of calls.
        """
        stack = [self._counting(place, config)]
        found: int | None = None
        while True:
            try:
                below = stack[-1].send(found)
            except StopIteration as done:
                stack.pop()
                found = done.value
                if not stack:
                    return int(done.value)
            else:
                stack.append(self._counting(below, config))
                found = None

    def _counting(self, place: int, config: Config) -> Generator[int, int | None, int]:
        """Count from ``place`` on; yields a later place whose count it needs, under ``config`` as it is then."""
        passed: list[tuple[tuple[object, ...], int]] = []
        """each place that was gone through, with the combinations before it"""
        factor, total = 1, None
        while total is None:
            key: tuple[object, ...] = (
                place,
                *((type(config[name]), config[name]) if name in config else None for name in self._needed[place]),
            )
            passed.append((key, factor))
            if key in self._counts:
                total = factor * self._counts[key]
            elif place == len(self._names):
                total = factor
            elif self._space.is_active(self._names[place], config):
                if self._names[place] in self._last_use:
                    total = factor * (yield from self._branches(place, config))
                else:
                    factor *= values_of(self._space.parameters[self._names[place]])
                    place += 1
            elif self._is_allowed(place, config):
                place += 1
            else:
                total = 0
        for key, before in passed:
            self._counts[key] = total // before
        return total

    def _branches(self, place: int, config: Config) -> Generator[int, int | None, int]:
        """Count under each value of a parameter whose value matters later."""
        name, parameter = self._parameter(place)
        total, values = 0, values_of(parameter)
        self._steps += values
        if self._is_bounded and self._steps > MOST_STEPS:
            raise SpecError(
                f"the grid has more than {MOST_STEPS:,} combinations of the parameters that its conditions and constraints"
                " name; use larger steps or fewer values, or another engine, such as random"
            )
        for index in range(values):
            config[name] = nth_value(parameter, index)
            if self._is_allowed(place, config):
                total += (yield place + 1) or 0
        config.pop(name)
        return total

    def _count_below(self, place: int, config: Config) -> int:
        """Return how many combinations there are after ``place``, whose parameter is decided by ``config``."""
        return self._count(place + 1, config) if self._is_allowed(place, config) else 0

    def _is_allowed(self, place: int, config: Config) -> bool:
        """Tell whether ``config``, which decides the parameter at ``place``, meets the constraints that end there."""
        return all(one.holds(config) for one in self._decided.get(place, ()) if one.applies(config))

    def _parameter(self, place: int) -> tuple[str, Parameter]:
        name = self._names[place]
        return name, self._space.parameters[name]
