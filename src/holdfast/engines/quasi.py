"""Quasi-random search: the sequences of Sobol and Halton, which cover a space more evenly than independent draws do."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from holdfast.core.ports import Proposal
from holdfast.core.seeding import derive
from holdfast.core.space import Space
from holdfast.core.trial import Trial
from holdfast.engines.options import check_libraries
from holdfast.engines.values import config_at, varied

BLOCK = 64
"""Points that are computed at once; a power of 2, as Sobol's sequence wants it."""


class QuasiProposer:
    """Gives each proposal the next point of a sequence; every parameter has a dimension of its own, active or not.

    The place in the sequence is kept with the proposal, so that what was queued, or refused for a constraint, neither takes a
    point away nor brings one back.
    """

    size: int | None = None

    def __init__(self, space: Space, seed: int, *, kind: str, scramble: bool = True) -> None:
        self._space = space
        self._dimensions = {name: place for place, name in enumerate(varied(space))}
        self._sequence = _Sequence(kind, len(self._dimensions), derive(seed, kind), scramble=scramble)
        self._last = -1
        """the highest place that a trial has"""

    def observe(self, trial: Trial) -> None:
        if trial.number >= 0 and trial.state is not None:
            self._last = max(self._last, int(trial.state))

    def propose(self, number: int, *, retry: int = 0) -> Proposal:
        place = self._last + 1 + retry
        point = self._sequence.at(place) if self._dimensions else []
        shares = {name: point[dimension] for name, dimension in self._dimensions.items()}
        return Proposal(config=config_at(self._space, shares), state=str(place).encode())


class _Sequence:
    """The points of a sequence by their place. Going on costs the same at every place; going back begins anew."""

    def __init__(self, kind: str, dimensions: int, seed: int, *, scramble: bool) -> None:
        check_libraries(kind)
        self._class: Any = getattr(importlib.import_module("scipy.stats.qmc"), kind.capitalize())
        self._arguments = {"d": dimensions, "scramble": scramble}
        seeded = "rng" if "rng" in inspect.signature(self._class.__init__).parameters else "seed"  # before SciPy 1.15
        self._arguments[seeded] = seed
        self._engine: Any = None
        self._first = 0
        self._block: list[list[float]] = []

    def at(self, place: int) -> list[float]:
        """Return the point at ``place``, a number in [0, 1) for each dimension."""
        if self._engine is None or place < self._first:
            self._engine = self._class(**self._arguments)
            self._first, self._block = 0, []
        end = self._first + len(self._block)
        if place >= end:
            blocks = (place - end) // BLOCK
            if blocks:
                self._engine.fast_forward(blocks * BLOCK)
            self._first = end + blocks * BLOCK
            self._block = self._engine.random(BLOCK).tolist()
        return self._block[place - self._first]
