"""What ``search.options`` may hold for each engine, and what an engine needs; told without importing any library of theirs."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.core.errors import MissingLibrary, SpecError
from holdfast.core.search_section import is_own
from holdfast.core.spelling import hint


@dataclass(frozen=True)
class Option:
    """One option: its type, its range (both ends allowed), and whether null stands for the library's own default."""

    kind: type[bool] | type[int] | type[float]
    low: float = -math.inf
    high: float = math.inf
    optional: bool = False

    def problem(self, value: object) -> str | None:
        """Return what is wrong with ``value``, or None."""
        if value is None and self.optional:
            return None
        return None if self._fits(value) else f"allowed: {self}"

    def _fits(self, value: object) -> bool:
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        if not isinstance(value, (int, float)) or (self.kind is int and not isinstance(value, int)):
            return False
        return self.low <= value <= self.high and abs(value) < math.inf

    def __str__(self) -> str:
        words = {bool: "true or false", int: "a whole number", float: "a number"}[self.kind]
        if self.high < math.inf:
            words += f" in [{self.low:g}, {self.high:g}]"
        elif self.low > -math.inf:
            words += f" from {self.low:g} on"
        return f"{words}, or null" if self.optional else words


_COUNT = Option(int, low=0)
_SWITCH = Option(bool)
_SHARE = Option(float, low=0.0, high=1.0)
_GENETIC = {
    "population_size": Option(int, low=2),
    "mutation_prob": Option(float, low=0.0, high=1.0, optional=True),
    "crossover_prob": _SHARE,
    "swapping_prob": _SHARE,
}

OPTIONS: dict[str, dict[str, Option]] = {
    "sobol": {"scramble": _SWITCH},
    "halton": {"scramble": _SWITCH},
    "tpe": {
        "n_startup_trials": _COUNT,
        "n_ei_candidates": Option(int, low=1),
        "multivariate": _SWITCH,
        "group": _SWITCH,
    },
    "gp": {"n_startup_trials": Option(int, low=1), "deterministic_objective": _SWITCH},
    "cmaes": {
        "n_startup_trials": _COUNT,
        "sigma0": Option(float, low=1e-10, optional=True),
        "popsize": Option(int, low=4, optional=True),
        "use_separable_cma": _SWITCH,
        "with_margin": _SWITCH,
        "lr_adapt": _SWITCH,
    },
    "nsga2": _GENETIC,
    "nsga3": {**_GENETIC, "dividing_parameter": Option(int, low=1)},
}
"""The options of each engine that has some."""

_EXCLUDED = {
    "tpe": (("group", "multivariate"),),
    "cmaes": (("use_separable_cma", "with_margin"), ("lr_adapt", "use_separable_cma"), ("lr_adapt", "with_margin")),
}
"""Pairs that exclude each other; of tpe, group excludes multivariate: false."""

LIBRARIES: dict[str, tuple[str, ...]] = {
    "sobol": ("scipy",),
    "halton": ("scipy",),
    "gp": ("torch", "scipy"),
    "cmaes": ("cmaes",),
}
"""What an engine imports beyond what is always installed."""

EXTRAS = {"sobol": "quasi", "halton": "quasi", "gp": "gp", "cmaes": "cmaes"}
"""The extra that has it."""

MOST_DIMENSIONS = {"sobol": 21_201}
"""Parameters of more than one value that an engine can have at most: its table of directions ends there."""

SINGLE_OBJECTIVE = frozenset({"cmaes"})
"""Engines that know one objective only."""


def check_options(engine: str, options: Mapping[str, Any]) -> None:
    """Check ``search.options``; SpecError, with what is allowed, when ``engine`` does not take them. A user's own takes any."""
    if is_own(engine):
        return
    allowed = OPTIONS.get(engine, {})
    for name, value in options.items():
        if name not in allowed:
            words = ", ".join(allowed) or "none"
            near = hint(str(name), allowed)
            raise SpecError(f"search.options.{name}{near} is no option of the engine {engine}; its options: {words}")
        if reason := allowed[name].problem(value):
            raise SpecError(f"search.options.{name} is {value!r}; {reason}")
    for one, other in _EXCLUDED.get(engine, ()):
        if options.get(one) and (not options.get(other, True) if engine == "tpe" else options.get(other)):
            given = f"{one}: true and {other}: {str(options[other]).lower()}"
            raise SpecError(f"search.options: {given} exclude each other; drop one")


def check_objectives(engine: str, count: int) -> None:
    """Check that ``engine`` can pursue ``count`` objectives at once; SpecError names engines that do."""
    if count > 1 and engine in SINGLE_OBJECTIVE:
        raise SpecError(
            f"search.engine {engine} pursues one objective, the spec has {count}; use tpe, gp, nsga2, nsga3, or one objective"
        )


def check_dimensions(engine: str, count: int) -> None:
    """Check that ``engine`` can vary ``count`` parameters at once; SpecError names engines that do."""
    if count > (most := MOST_DIMENSIONS.get(engine, count)):
        raise SpecError(
            f"search.engine {engine} has {most:,} dimensions at most, the space needs {count:,}; use halton, random, or fewer"
            " parameters"
        )


def absent(engine: str) -> list[str]:
    """Return what ``engine`` imports and is not installed; nothing is imported for it."""
    return [name for name in LIBRARIES.get(engine, ()) if importlib.util.find_spec(name) is None]


def check_libraries(engine: str) -> None:
    """Check that what ``engine`` imports is installed; MissingLibrary names the extra that has it."""
    if lacking := absent(engine):
        names, extra = " and ".join(lacking), EXTRAS[engine]
        raise MissingLibrary(f"search.engine {engine} needs {names}, not installed here: pip install 'holdfast[{extra}]'")
