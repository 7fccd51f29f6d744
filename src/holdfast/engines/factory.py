"""Which proposer a spec asks for, with all that stands around its engine; and whether it can be had at all."""

from __future__ import annotations

from typing import Any

from holdfast.core.errors import InvalidConfig, SpecError
from holdfast.core.ports import Proposer, RetryingProposer
from holdfast.core.search_section import is_own
from holdfast.core.spec import ExperimentSpec
from holdfast.core.values import Config
from holdfast.engines.choosing import chosen
from holdfast.engines.guard import Conditions, Guard, refuse_impossible
from holdfast.engines.options import check_dimensions, check_libraries, check_objectives, check_options
from holdfast.engines.proposing import Points, Repeats
from holdfast.engines.values import varied

QUASI = ("sobol", "halton")
RETRIES = {"random": 0, "sobol": 1000, "halton": 1000, "gp": 2}
"""How often an engine is asked again for a config that may be tried; where a proposal is dear, seldom."""
MODEL_RETRIES = 10


def make_proposer(spec: ExperimentSpec, seed: int, *, workdir: str = ".") -> Proposer:
    """Return a new proposer for ``spec``, which has observed nothing yet: the engine with all that stands around it.

    Only the engine that is asked for is imported; ``workdir`` is what the path of an own one is taken from.
    """
    spec = chosen(spec)
    return Repeats(Points(_guarded(spec, seed, workdir), completed_points(spec)), spec)


def size_of(spec: ExperimentSpec, seed: int, *, workdir: str = ".") -> int | None:
    """Return how many trials the engine of ``spec`` has to give, or None when there is no end of them."""
    if spec.search.engine == "grid" or is_own(spec.search.engine):
        return make_proposer(spec, seed, workdir=workdir).size
    return None


def check(spec: ExperimentSpec, *, workdir: str = ".") -> None:
    """Check what a spec says of its engine: options, libraries, points, constraints, an own engine's class.

    Raises SpecError, or MissingLibrary; writes nothing, and imports no engine but an own one.
    """
    spec = chosen(spec)
    points = completed_points(spec)
    proposed = spec.search.num_trials is None or spec.search.num_trials > len(points) * spec.search.repeats
    if proposed and spec.search.engine != "grid" and (problem := refuse_impossible(spec)) is not None:
        raise SpecError(f"constraints: {problem}")
    engine, options = spec.search.engine, spec.search.options
    if is_own(engine):
        from holdfast.engines.own import make_own

        _ = make_own(spec, spec.search.seed or 0, workdir=workdir).size
        return
    check_options(engine, options)
    check_objectives(engine, len(spec.objectives))
    check_dimensions(engine, len(varied(spec.space)))
    check_libraries(engine)
    if engine == "grid":
        size_of(spec, 0)  # a grid that its constraints leave empty, or that is too large to be counted


def completed_points(spec: ExperimentSpec) -> list[Config]:
    """Return the spec's points as configs of its space; SpecError for what is none, or breaks a constraint."""
    conditions = Conditions(spec)
    points = []
    for place, point in enumerate(spec.search.points):
        where = f"search.points[{place}]"
        try:
            config = spec.space.completed(point)
        except InvalidConfig as error:
            raise SpecError(f"{where}: {error}") from None
        if config is None:
            raise SpecError(f"{where} lacks {_lacking(spec, point)}, which has no default; add it to the point, or a default")
        if broken := conditions.broken(config):
            raise SpecError(f"{where} breaks the constraint {broken[0]!r}; change the point, or the constraint")
        points.append(config)
    return points


def _lacking(spec: ExperimentSpec, point: dict[str, Any]) -> str:
    """Return the first parameter that keeps ``point`` from being complete."""
    known: Config = {}
    for name, parameter in spec.space.parameters.items():
        if not spec.space.is_active(name, known):
            continue
        if name in point:
            known[name] = parameter.coerce(point[name])
        elif parameter.type == "constant":
            known[name] = parameter.value
        elif parameter.default is None:
            return repr(name)
        else:
            known[name] = parameter.coerce(parameter.default)
    return "a parameter"


def _guarded(spec: ExperimentSpec, seed: int, workdir: str) -> Proposer:
    """Return the engine, kept from configs that are not to be tried."""
    engine = spec.search.engine
    if is_own(engine):
        from holdfast.engines.own import make_own

        return make_own(spec, seed, workdir=workdir)
    if engine == "grid":
        from holdfast.engines.grid import GridProposer

        return GridProposer(spec.space, spec.search.samples, constraints=spec.constraints)
    inner: RetryingProposer
    if engine == "random":
        from holdfast.engines.random_engine import RandomProposer

        inner = RandomProposer(spec.space, seed)
    elif engine in QUASI:
        from holdfast.engines.quasi import QuasiProposer

        inner = QuasiProposer(spec.space, seed, kind=engine, **spec.search.options)
    else:
        from holdfast.engines.optuna_engine import make

        inner = make(spec, seed)
    models = engine not in ("random", *QUASI)
    return Guard(inner, spec, seed, retries=RETRIES.get(engine, MODEL_RETRIES), models=models)
