"""The search loop: what to do next, decided from what is stored alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from operator import itemgetter

from holdfast.core.budget import Budget
from holdfast.core.objective import score
from holdfast.core.population import Population
from holdfast.core.trial import ACTIVE, ERRORED, SCORED, Trial, TrialStatus
from holdfast.core.waitlist import Waitlist

CONTINUED = "continued"
"""How the reason begins for which a flow run ended that another one goes on from."""
LONGEST_DELAY = 1e9
"""Seconds; a date can hold them."""


@dataclass(frozen=True)
class Submit:
    """Run the waiting attempt of a trial."""

    trial: int


@dataclass(frozen=True)
class Propose:
    """Ask the proposer for the config of the next trial."""

    number: int


@dataclass(frozen=True)
class Wait:
    """Nothing can be started now; wait for a trial to end, and no longer than until a waiting one is due."""

    until: datetime | None = None


@dataclass(frozen=True)
class Done:
    """The search ends."""

    reason: str


@dataclass(frozen=True)
class Evolve:
    """Every member of the population waits at the end of a generation: decide who goes on from whom."""

    generation: int


Action = Submit | Propose | Evolve | Wait | Done


@dataclass
class Ledger:
    """The loop's projection of the stored trials; ``update`` keeps it up to date with each changed row."""

    budget: Budget
    max_concurrent: int
    delay: Callable[[int], float] = lambda failures: 0.0
    """seconds that a trial waits for its next attempt after so many failures"""
    clock: Callable[[], float] = lambda: 0.0
    """seconds of a clock that is never set: what retries wait for at most is counted by it"""
    fail_fast: bool = False
    exhausted: bool = False
    """the proposer has nothing more, or no new trials are wanted"""
    exhaustion: str = "nothing is left to do"
    """why it is exhausted"""
    halt: str | None = None
    """why the search must end now, whatever is left to do"""
    active_seconds: float = 0.0
    best: float | None = None
    statuses: dict[int, TrialStatus] = field(default_factory=dict)
    waiting: Waitlist = field(default_factory=Waitlist)
    retries: dict[int, tuple[int, float]] = field(default_factory=dict)
    """waiting trials that have failed: the attempt that waits, and when it is due by ``clock`` at the latest"""
    running: set[int] = field(default_factory=set)
    counts: Counter[TrialStatus] = field(default_factory=Counter)
    _flat: int | None = 0
    """the length of the plateau; None: to be counted anew"""
    _top: float | None = None
    """the value that none on the plateau was better than"""
    _last: int = -1
    """when the last trial ended that is counted there"""
    highest: int = -1
    """the last trial's number"""
    proposed: int = 0
    """how many of the trials came from the engine: neither from the queue nor from the spec's points"""
    costs: dict[int, float] = field(default_factory=dict)
    """what each trial has cost so far, where that is limited"""
    _cost: Fraction = Fraction(0)
    """their sum: exact, so that it does not depend on the order in which they came"""
    values: dict[int, tuple[int, float | None]] = field(default_factory=dict)
    """when each scored trial ended, and the value that it counts with, where a plateau ends the search"""
    population: Population | None = None
    generation: int = 0
    """of a population: how many generations have been evolved"""
    held: dict[int, int] = field(default_factory=dict)
    """members that wait at the end of the generation, with their steps"""
    per_run: int | None = None
    """so many attempts may begin in one flow run"""
    begun: int = 0
    """attempts that were handed to a runner in this one"""

    def update(self, trial: Trial, *, fresh: bool = True) -> None:
        """Take in a trial's row; ``fresh`` rows changed in this run (an old error does not fail fast again)."""
        before = self.statuses.get(trial.number)
        if before is not None:
            self.counts[before] -= 1
        elif trial.source == "proposed":
            self.proposed += 1
        self.statuses[trial.number] = trial.status
        self.counts[trial.status] += 1
        self.highest = max(self.highest, trial.number)
        self.running.discard(trial.number)
        self.waiting.discard(trial.number)
        retry = self.retries.pop(trial.number, None)
        if self.values.pop(trial.number, None) is not None:
            self._flat = None
        self.spent(trial)
        self.held.pop(trial.number, None)
        if trial.status is TrialStatus.PENDING and trial.step is not None and self._ends(trial.step):
            self.held[trial.number] = trial.step
        elif trial.status is TrialStatus.PENDING:
            self._wait(trial, retry)
        elif trial.status is TrialStatus.RUNNING:
            self.running.add(trial.number)
        elif trial.status in SCORED:
            self._score(trial)
        elif trial.status in ERRORED and fresh and self.fail_fast and self.halt is None:
            self.halt = f"trial {trial.number} errored and fail_fast is set"

    def submitted(self, number: int) -> None:
        """Note that a waiting trial was handed to a runner; its claim follows."""
        self.waiting.discard(number)
        self.retries.pop(number, None)
        self.running.add(number)

    def _wait(self, trial: Trial, known: tuple[int, float] | None) -> None:
        """Note when a waiting trial is due; a retry that is ``known`` does not begin to wait anew when its row changes."""
        attempt = trial.attempt
        if attempt.reason != "retry" or attempt.created is None:
            self.waiting.put(trial.number, trial.ts_start)
            return
        delay = min(self.delay(trial.failures), LONGEST_DELAY) if trial.failures else 0.0
        self.waiting.put(trial.number, attempt.created + timedelta(seconds=delay))
        latest = self.clock() + delay
        self.retries[trial.number] = known if known is not None and known[0] == attempt.number else (attempt.number, latest)

    def due(self, number: int, now: datetime) -> datetime | None:
        """Return when a trial that waits for its time is due, or None when it is.

        A retry is due by the clock on the wall, but never later than its delay after it was first seen: that clock may have
        been set back.
        """
        start = self.waiting.timed[number]
        if start <= now:
            return None
        if number not in self.retries:
            return start
        left = self.retries[number][1] - self.clock()
        return None if left <= 0 else min(start, now + timedelta(seconds=left))

    def spent(self, trial: Trial) -> None:
        """Note what a trial has cost so far."""
        if self.budget.max_cost is not None:
            before = self.costs.get(trial.number, 0.0)
            self.costs[trial.number] = now = self.budget.cost(trial.metrics)
            if now != before:
                self._cost += Fraction(now) - Fraction(before)

    def closed(self) -> str | None:
        """Return why no further trial may be proposed, or None."""
        if self._flat is None:
            ended = sorted(self.values.values(), key=itemgetter(0))
            self._last = ended[-1][0] if ended else -1
            self._flat, self._top = self.budget.level(value for _, value in ended)
        return self.budget.closed(
            trials=self.total,
            proposed=self.proposed,
            active_seconds=self.active_seconds,
            best=self.best,
            flat=self._flat,
            cost=float(self._cost),
        )

    def _ends(self, step: int) -> bool:
        """Tell whether a member that waits after ``step`` waits for the others."""
        return self.population is not None and self.population.holds(step, self.generation)

    def evolved(self) -> None:
        """Note that a generation was evolved: its members go on."""
        self.generation += 1
        for number in [number for number, step in self.held.items() if not self._ends(step)]:
            del self.held[number]
            self.waiting.put(number, None)

    def _score(self, trial: Trial) -> None:
        raw = score(trial.metrics, self.budget.objective)
        value = self.budget.value(trial.metrics)
        if self.budget.plateau is not None and raw is not None and math.isfinite(raw):
            ended = trial.seq if trial.ended_seq is None else trial.ended_seq
            self.values[trial.number] = (ended, value)
            if self._flat is not None and ended > self._last:  # as nearly always: it comes behind those that are counted
                self._last = ended
                self._flat, self._top = self.budget.level([value], self._flat, self._top)
            else:
                self._flat = None
        if value is None:
            return
        if self.best is None or self.budget.objective.better(value, self.best):
            self.best = value

    @property
    def is_spent(self) -> bool:
        """Whether nothing more may begin in this flow run."""
        return self.per_run is not None and self.begun >= self.per_run

    @property
    def total(self) -> int:
        return len(self.statuses)

    @property
    def unfinished(self) -> int:
        return sum(self.counts[status] for status in ACTIVE)


def continued(begun: int) -> str:
    """Say why a flow run ends though its search goes on."""
    trials = "1 trial has" if begun == 1 else f"{begun} trials have"
    return f"{CONTINUED}: {trials} begun in this flow run"


def is_continued(ended: str | None) -> bool:
    """Tell whether a drive ended only to go on in another flow run."""
    return ended is not None and ended.startswith(f"{CONTINUED}: ")


def decide(ledger: Ledger, now: datetime) -> Action:
    """Return the next action: waiting trials by number first, then proposals, never more than ``max_concurrent`` at once.

    A queued trial or a retry runs once it is due, also when the number of trials is used up; the search waits for one that
    is due later before it is done. Only a halt, and a time budget that is used up, leave waiting trials as they are.

    In a flow run in which no more may begin, what runs ends first: then all is decided as ever, but for the first trial that
    would run, which is left to the next flow run.
    """
    if ledger.halt is not None:
        return Wait() if ledger.running else Done(ledger.halt)
    if ledger.is_spent and ledger.running:
        return Wait()
    closed = ledger.closed()
    out_of_time = closed is not None and ledger.budget.time_budget is not None
    out_of_time = out_of_time and ledger.active_seconds >= (ledger.budget.time_budget or 0.0)
    if len(ledger.running) >= ledger.max_concurrent:
        return Wait()
    first = None if out_of_time else ledger.waiting.first()
    starts = {} if out_of_time else {number: ledger.due(number, now) for number in ledger.waiting.timed}
    due = [number for number, start in starts.items() if start is None]
    if first is not None:
        due.append(first)
    if due:
        return Done(continued(ledger.begun)) if ledger.is_spent else Submit(min(due))
    if closed is None and not ledger.exhausted:
        return Propose(ledger.highest + 1)
    if ledger.held and not (ledger.running or ledger.retries or out_of_time):  # who else is due later has not begun
        return Evolve(ledger.generation)
    if out_of_time and not ledger.running and (ledger.waiting or ledger.held):
        return Done(f"the time budget of {ledger.budget.time_budget:g} s is used up")  # also where every trial was proposed
    if ledger.running or starts:
        return Wait(until=min((start for start in starts.values() if start is not None), default=None))
    return Done(closed or ledger.exhaustion)


def actions(ledger: Ledger, now: Callable[[], datetime]) -> Iterator[Action]:
    """Yield one action after the other, decided anew each time from the ledger, until the search is done."""
    while True:
        action = decide(ledger, now())
        yield action
        if isinstance(action, Done):
            return
