"""Which proposer a spec asks for."""

from __future__ import annotations

from holdfast.core.errors import SpecError
from holdfast.core.ports import Proposer
from holdfast.core.spec import ExperimentSpec


def make_proposer(spec: ExperimentSpec, seed: int) -> Proposer:
    """Return a new proposer for ``spec``; it has observed nothing yet. Only the engine that is asked for is imported."""
    match spec.search.engine:
        case "grid":
            from holdfast.engines.grid import GridProposer

            return GridProposer(spec.space, spec.search.samples)
        case "random":
            from holdfast.engines.random_engine import RandomProposer

            return RandomProposer(spec.space, seed)
        case "tpe" | "gp" | "cmaes" | "nsga2" | "nsga3":
            from holdfast.engines.optuna_engine import make

            return make(spec, seed)
        case engine:
            raise SpecError(f"search.engine {engine!r} is not there yet; use random, grid, tpe, gp, cmaes, nsga2 or nsga3")
