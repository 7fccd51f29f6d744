"""Configs that are not to be tried: those that break a constraint, those that failed, and those that run already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum
from functools import cached_property

from holdfast.core.counted import is_counted
from holdfast.core.errors import EngineError, Exhausted, SpecError
from holdfast.core.expression import Expression
from holdfast.core.objective import scores
from holdfast.core.ports import Proposal, RetryingProposer, as_proposal
from holdfast.core.seeding import derive
from holdfast.core.space import Space
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ACTIVE, ERRORED, SCORED, Trial
from holdfast.core.values import Config, Scalar, dumps
from holdfast.engines.grid import GridProposer
from holdfast.engines.random_engine import drawn

DRAWS = 10_000
"""Independent draws by which a spec is checked for a config that meets its constraints."""
MOST_DRAWS = 200_000
"""Independent draws at most for a config: what the check has found by few of its draws is there to be found again."""
ENOUGH = 1000
"""Configs that meet the constraints, and were all tried already, after which no other one is looked for."""
LISTED = 10_000
"""Configs at most that a space may have to be listed."""


class Conditions:
    """The spec's constraints; one that names an inactive parameter says nothing."""

    def __init__(self, spec: ExperimentSpec) -> None:
        self._expressions = [Expression(text, spec.space.parameters) for text in spec.constraints]

    def __bool__(self) -> bool:
        return bool(self._expressions)

    def broken(self, config: Mapping[str, Scalar]) -> list[str]:
        """Return the constraints that ``config`` breaks."""
        return [one.text for one in self._expressions if one.applies(config) and not one.holds(config)]

    def unmet(self, breaks: Counter[str], tried: int) -> str:
        """Return the words for ``tried`` configs of which none met all constraints; ``breaks`` counts those that broke each."""
        never = [one.text for one in self._expressions if breaks[one.text] == tried]
        what = f"{never[0]!r} was never met" if never else "they were never met together"
        remedy = "relax it, or widen the space" if never else "relax one of them, or widen the space"
        return f"no config meets the constraints: {what} by {tried:,} configs; {remedy}"


class _Verdict(Enum):
    FREE = "free"
    BUSY = "busy"
    FAILED = "failed"
    BROKEN = "broken"


class Guard:
    """Asks an engine again, and then the dice, until a config may be tried.

    Not to be tried are: what breaks a constraint; what failed, or ended without a finite value of every objective, and never
    succeeded; and, around a model (``models``), what runs or waits already. In a space whose configs can be listed the last
    ones are tried again when nothing else is left, and when all have failed there is nothing more to propose.
    """

    def __init__(self, inner: RetryingProposer, spec: ExperimentSpec, seed: int, *, retries: int, models: bool) -> None:
        self._inner = inner
        self._space = spec.space
        self._conditions = Conditions(spec)
        self._goals = spec.goals
        self._seed = seed
        self._retries = retries
        self._models = models
        self._known: dict[int, tuple[Config, str, _Verdict | None]] = {}
        """config, its text and what the trial says of it, by number; FREE: it succeeded"""
        self._counts: dict[_Verdict, Counter[str]] = {verdict: Counter() for verdict in _Verdict}

    @property
    def size(self) -> int | None:
        return self._inner.size

    def observe(self, trial: Trial) -> None:
        before = self._known.get(trial.number)
        verdict = self._said(trial)
        if before is None or before[2] is not verdict or before[0] != trial.config:
            text = dumps(dict(trial.config))
            if before is not None and before[2] is not None:
                self._counts[before[2]][before[1]] -= 1
            if verdict is not None:
                self._counts[verdict][text] += 1
            self._known[trial.number] = (trial.config, text, verdict)
        self._inner.observe(trial)

    def propose(self, number: int) -> Proposal:
        busy: Proposal | None = None
        for retry in range(self._retries + 1):
            asked = self._inner.propose(number) if retry == 0 else self._inner.propose(number, retry=retry)
            offered = as_proposal(asked)
            match self._judged(offered.config):
                case _Verdict.FREE:
                    return offered
                case _Verdict.BUSY:
                    busy = busy or offered
        return self._listed(number, busy) if self._every is not None else self._drawn(number, busy)

    def _said(self, trial: Trial) -> _Verdict | None:
        """Return what a trial says of its config: None when nothing (it was cancelled, say)."""
        if trial.status in ACTIVE:
            return _Verdict.BUSY
        if trial.status in SCORED:
            return _Verdict.FAILED if scores(trial.metrics, self._goals) is None else _Verdict.FREE
        return _Verdict.FAILED if trial.status in ERRORED else None

    def _judged(self, config: Mapping[str, Scalar]) -> _Verdict:
        if self._conditions and self._conditions.broken(config):
            return _Verdict.BROKEN
        return self._standing(dumps(dict(config)))

    def _standing(self, text: str) -> _Verdict:
        if self._counts[_Verdict.FAILED][text] > 0 and self._counts[_Verdict.FREE][text] == 0:
            return _Verdict.FAILED
        return _Verdict.BUSY if self._models and self._counts[_Verdict.BUSY][text] > 0 else _Verdict.FREE

    @cached_property
    def _every(self) -> list[tuple[str, Config]] | None:
        """Every config that meets the constraints, or None when there are too many to list."""
        size = configs_of(self._space)
        if size is None or size > LISTED:
            return None
        grid = GridProposer(self._space)
        configs = [grid.propose(place) for place in range(size)]
        allowed = [config for config in configs if not self._conditions.broken(config)]
        if not allowed:
            breaks = Counter(text for config in configs for text in self._conditions.broken(config))
            raise EngineError(self._conditions.unmet(breaks, len(configs)))
        return [(dumps(dict(config)), config) for config in allowed]

    def _listed(self, number: int, busy: Proposal | None) -> Proposal:
        """Choose among all configs: one that may be tried, else one that runs already."""
        standings = [(self._standing(text), config) for text, config in self._every or ()]
        for wanted in (_Verdict.FREE, _Verdict.BUSY):
            if wanted is _Verdict.BUSY and busy is not None:
                return busy
            configs = [config for standing, config in standings if standing is wanted]
            if configs:
                return Proposal(config=dict(configs[derive(self._seed, "guard", number) % len(configs)]))
        raise Exhausted(f"each of the {len(standings)} configs that the space and the constraints allow was tried and failed")

    def _drawn(self, number: int, busy: Proposal | None) -> Proposal:
        """Draw until a config may be tried; else take one that runs already."""
        breaks: Counter[str] = Counter()
        failed = met = draws = 0
        while met < ENOUGH and draws < (MOST_DRAWS if busy is None else DRAWS):
            config = drawn(self._space, derive(self._seed, "guard", number, draws))
            draws += 1
            broken = self._conditions.broken(config)
            breaks.update(broken)
            standing = _Verdict.BROKEN if broken else self._standing(dumps(dict(config)))
            if standing is _Verdict.FREE:
                return Proposal(config=config)
            if standing is _Verdict.BUSY and busy is None:
                busy = Proposal(config=config)
            failed += standing is _Verdict.FAILED
            met += standing is not _Verdict.BROKEN
        if busy is not None:
            return busy
        if failed:
            raise Exhausted(f"of {draws:,} configs that were drawn, each one that meets the constraints was tried and failed")
        raise EngineError(self._conditions.unmet(breaks, draws))


def configs_of(space: Space) -> int | None:
    """Return how many configs a space has; None when a parameter is continuous, or they are too many to be counted."""
    if not all(is_counted(parameter) for parameter in space.parameters.values()):
        return None
    try:
        return GridProposer(space).size
    except SpecError:  # too many to be counted
        return None


def refuse_impossible(spec: ExperimentSpec) -> str | None:
    """Return why no config of the space meets the constraints, as far as that can be told beforehand, or None."""
    conditions = Conditions(spec)
    if not conditions:
        return None
    size = configs_of(spec.space)
    breaks: Counter[str] = Counter()
    count = size if size is not None and size <= LISTED else DRAWS
    grid = GridProposer(spec.space) if count == size else None
    for attempt in range(count):
        config = drawn(spec.space, derive(0, "check", attempt)) if grid is None else grid.propose(attempt)
        broken = conditions.broken(config)
        if not broken:
            return None
        breaks.update(broken)
    return conditions.unmet(breaks, count)
