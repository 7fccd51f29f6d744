"""What ``engine: auto`` chooses, and why: a pure function of the spec and of what is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from holdfast.core.errors import SpecError
from holdfast.core.space import CategoricalParameter, ConstantParameter, FloatParameter, IntParameter
from holdfast.core.spec import ExperimentSpec
from holdfast.engines.guard import configs_of
from holdfast.engines.options import EXTRAS, absent

FEW = 10
"""With fewer configs than this a model has no time to learn."""
GP_CONFIGS = 200
"""The cost of a Gaussian process grows with the cube of their number."""
GP_PARAMETERS = 20
CMAES_CONFIGS = 1000
NSGA_CONFIGS = 1000


@dataclass(frozen=True)
class Choice:
    """An engine and the reason for it."""

    engine: str
    reason: str


def is_installed(engine: str) -> bool:
    """Tell whether the libraries of ``engine`` are there; imports none of them."""
    return not absent(engine)


def choose(spec: ExperimentSpec, installed: Callable[[str], bool] = is_installed) -> Choice:
    """Return the engine for a spec, from its space, objectives and number of trials."""
    trials, repeats = spec.search.num_trials, spec.search.repeats
    budget = None if trials is None else -(-trials // repeats)
    size = configs_of(spec.space)
    configs = f"{budget} configs"
    if size is not None and budget is not None and size <= budget:
        return Choice("grid", f"{configs} are enough to try each of the {size} of the space")
    if budget is not None and budget < FEW:
        return _if(installed, "sobol", "random", f"{configs} are too few for a model to learn from")
    if len(spec.objectives) > 1:
        if budget is not None and budget >= NSGA_CONFIGS:
            return Choice("nsga2", f"{len(spec.objectives)} objectives and {configs} suit an evolution of populations")
        return Choice("tpe", f"{len(spec.objectives)} objectives, and too few configs for an evolution of populations")
    parameters = [parameter for parameter in spec.space.parameters.values() if not isinstance(parameter, ConstantParameter)]
    if any(isinstance(parameter, CategoricalParameter) or parameter.when for parameter in parameters):
        return Choice("tpe", "the space has categorical or conditional parameters")
    if budget is None:
        return Choice("tpe", "no num_trials says how many configs there will be, and it does well with few and with many")
    numbers = f"{configs} of {len(parameters)} numeric parameters"
    if budget <= GP_CONFIGS and len(parameters) <= GP_PARAMETERS:
        return _if(installed, "gp", "tpe", f"{numbers} suit a Gaussian process")
    continuous = [one for one in parameters if isinstance(one, FloatParameter | IntParameter)]
    if budget >= CMAES_CONFIGS and len(continuous) > 1 and not spec.feasible:
        return _if(installed, "cmaes", "tpe", f"{numbers} suit an evolution strategy")
    return Choice("tpe", f"{numbers} are neither few enough for gp nor many enough for cmaes")


def _if(installed: Callable[[str], bool], wanted: str, other: str, reason: str) -> Choice:
    """Choose an engine if its libraries are there."""
    if installed(wanted):
        return Choice(wanted, reason)
    return Choice(other, f"{reason}, but {wanted} needs holdfast[{EXTRAS[wanted]}], which is not installed")


S = TypeVar("S", bound=ExperimentSpec)


def chosen(spec: S) -> S:
    """Return the spec with the engine that auto chooses, and the reason; any other spec as it is. SpecError for options."""
    if spec.search.engine != "auto":
        return spec
    if spec.search.options:
        raise SpecError("search.options are those of one engine, and auto chooses it; name the engine, or leave options out")
    choice = choose(spec)
    words = f"auto chose {choice.engine}: {choice.reason}"
    return spec.model_copy(update={"search": spec.search.model_copy(update={"engine": choice.engine, "chosen": words})})
