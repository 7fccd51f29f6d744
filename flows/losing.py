"""Trials on workers elsewhere, as a drive sees them: tasks that end or do not, workers that are lost, orders."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

from holdfast.core.errors import Conflict, Contention, HoldfastError, Infrastructure
from holdfast.core.loop import Ledger
from holdfast.core.trial import Outcome, Trial, TrialStatus
from holdfast.flows.lost import (
    MOST_LOSSES,
    SILENT_SECONDS,
    Flight,
    Losses,
    Refusals,
    Verdict,
    fatal,
    gone,
    judge,
    worker_words,
)
from holdfast.flows.lost_runs import LostRuns
from holdfast.flows.reconcile import persisted_outcome
from holdfast.flows.runners.port import End, Runner
from holdfast.flows.session import Session
from holdfast.storage.database import workers
from holdfast.storage.database.driver import Ending
from holdfast.tasks.workers.messages import Decision

AGAIN = "goes on elsewhere"
CRASHED = f"was lost {MOST_LOSSES} times in a row and came no further: it crashed"
RESULT_SECONDS = 5.0
"""How often it is looked for whether an attempt that its engine lost sight of has left its result."""


class Remote:
    """What a drive does about trials that other processes supervise; nothing where there are none."""

    def __init__(
        self,
        session: Session,
        say: Callable[[str], None],
        inflight: MutableMapping[Any, Flight],
        trials: Mapping[int, Trial],
        complete: Callable[[Trial], None],
        ledger: Ledger,
    ) -> None:
        self.is_used = session.spec.execution.is_remote
        self.refusals = Refusals(say)
        self._losses, self._troubles = Losses(), Losses()
        self._session, self._say = session, say
        self._inflight, self._trials = inflight, trials
        self._complete, self._ledger = complete, ledger
        self._runner: Runner | None = None
        self._told = Decision.CONTINUE
        self._ending = False
        self._runs = LostRuns()
        self._looked = time.monotonic()
        self._gone: set[int] = set()
        """workers (row ids) whose attempts were closed"""

    def start(self, runner: Runner) -> None:
        """Begin with an engine that is there, and whose workers were asked."""
        self._runner = runner

    def end(self) -> None:
        """Say the last words to Prefect."""
        self._runs.finish()

    def order(self, decision: Decision) -> None:
        """Tell every worker what to do; it hears of it with its next beat."""
        if not self.is_used or decision is self._told or self._session.keeper.is_lost:
            return
        with suppress(HoldfastError):  # taken over: workers hear of that, too; away: it is told again, or the lease ends
            self._session.driver.tell(decision.value)
            self._told = decision

    def withdraw(self) -> None:
        """Take back, once, what no worker has begun: it waits, unclaimed, for whoever goes on."""
        if not self.is_used or self._ending:
            return
        self._ending = True
        for number in self.refusals.waiting:
            self._let_wait(number)
        for flight in list(self._inflight.values()):
            if not flight.is_watched and self._trials[flight.number].status is TrialStatus.PENDING:
                self._take_back(flight)

    def _take_back(self, flight: Flight) -> None:
        if self._runner is not None:
            with suppress(HoldfastError):
                self._runner.withdraw(flight.future)

    def finish(self, run: Any, flight: Flight, end: End) -> None:
        """See to a task that ended, and is in flight no more: what its attempt is like, its rows say."""
        error = None
        if end.state is not None and end.state.is_completed():
            if self._is_over(flight) or self._settled(flight):
                return
            why = "its task ended and its result was not persisted"  # its worker was ended just then
        else:
            error = None if end.state is None else end.state.result(raise_on_failure=False)
            why = end.why or f"{type(error).__name__}: {error}"
        match judge(self._session.reader.trial(flight.number), flight.attempt, end.how, error):
            case Verdict.AGAIN if self._ending:
                self._let_wait(flight.number)
            case Verdict.AGAIN:
                self._ledger.begun -= 1  # it was not
                self._ledger.submitted(flight.number)  # until it is due again
                self.refusals.add(flight.number, why, running=self._runs_some())
            case Verdict.LOSE if isinstance(error, Infrastructure):
                self._trouble(run, flight, why)
            case Verdict.LOSE:
                self._close(run, flight, why)
            case Verdict.WATCH:
                flight.why = why
                self._inflight[run] = flight
            case _:
                pass

    def _let_wait(self, number: int) -> None:
        """Let a trial wait, unclaimed, which was handed out or was to be."""
        self.refusals.forget(number)
        self._hand_out(number)

    def _hand_out(self, number: int) -> None:
        """Let the loop submit a trial again, if nobody has begun it."""
        if self._trials[number].status is TrialStatus.PENDING:
            self._ledger.update(self._trials[number])

    def _is_over(self, flight: Flight) -> bool:
        """Tell whether an attempt has come to its end by its rows, as they were read last."""
        trial = self._trials[flight.number]
        return trial.attempt.number != flight.attempt or trial.attempt.outcome is not None

    def _settled(self, flight: Flight) -> bool:
        """Commit what an attempt came to before it was lost: its persisted result, or what a rule decided."""
        trial = self._session.reader.trial(flight.number)
        if trial is None or trial.attempt.number != flight.attempt or trial.attempt.outcome is not None:
            return True
        with suppress(Conflict, Contention):
            if persisted_outcome(self._session.opened.folder, trial) is not None:
                self._complete(trial)
                return True
            if self._session.reader.last_decisions().get(flight.row) == Decision.PRUNE:
                self._session.driver.end(flight.row, Ending(outcome=Outcome.PRUNED, note="decided before its worker was lost"))
                return True
        return False

    def _runs_some(self) -> bool:
        return any(self._trials[flight.number].status is TrialStatus.RUNNING for flight in self._inflight.values())

    def _trouble(self, run: Any, flight: Flight, why: str) -> None:
        """Close an attempt that storage, database or Prefect failed on its worker: no fault of its trial's, nor a dead worker.

        It waits before it is handed out again. Infrastructure when it had no luck anywhere.
        """
        if self._settled(flight):
            return
        count = self._troubles.add(self._trials[flight.number])
        if count >= MOST_LOSSES:
            raise Infrastructure(
                f"trial {flight.number} failed {count} times in a row for no reason of its own, wherever it ran; the search is "
                f"interrupted, mend this, then restore: {why}"
            )
        with suppress(Conflict):  # it has just ended
            self._session.driver.end(flight.row, Ending(outcome=Outcome.LOST, note=why))
        self._say(f"trial {flight.number}: its worker could not go on, it is handed out again: {why}")
        self.refusals.later(flight.number, count)
        self._runs.add(run, why)

    def _close(self, run: Any, flight: Flight, why: str) -> None:
        """Close an attempt whose worker is gone: lost, if it came to nothing; its trial waits again."""
        trial = self._session.reader.trial(flight.number)
        if not self._settled(flight) and trial is not None:
            is_last = self._losses.add(trial) >= MOST_LOSSES
            with suppress(Conflict):  # it has just ended
                ending = fatal(why) if is_last else Ending(outcome=Outcome.LOST, note=why)
                self._session.driver.end(flight.row, ending)
            self._say(f"trial {flight.number}: its worker was lost, it {CRASHED if is_last else AGAIN}: {why}")
        self._runs.add(run, why)

    def check(self) -> None:
        """Raise Infrastructure when the engine is gone; only rows tell of what it ran then."""
        if self._runner is None:
            return
        try:
            self._runner.look()
        except HoldfastError as error:
            self.unseen(str(error))
            raise

    def unseen(self, why: str) -> None:
        """Note that the engine is gone: whatever it ran, no task of it ends any more, and only rows tell of the attempts."""
        for flight in self._inflight.values():
            flight.why = flight.why or why

    def look(self) -> None:
        """Give up workers that are gone, take in what watched attempts came to, hand out what nobody began."""
        if not self.is_used or self._runner is None:
            return
        epoch = self._session.runtime.epoch
        database, experiment = self._session.opened.database, self._session.runtime.experiment
        rows = workers.every(database, experiment, epoch=epoch, unsettled=True)
        for row, why in gone(row for row in rows if row.id not in self._gone):
            its = {run: flight for run, flight in self._inflight.items() if self._worker(flight) == row.id}
            words = f"{worker_words(row)} is lost: {why}"
            closed = {flight.row for flight in its.values() if self._settled(flight)}
            before = {number: trial for number in (flight.number for flight in its.values()) if (trial := self._now(number))}
            endings = {
                flight.row: fatal(words)
                for flight in its.values()
                if flight.number in before and self._losses.is_last(before[flight.number])
            }
            silent = SILENT_SECONDS if row.silent >= SILENT_SECONDS else None
            lost = workers.lose(database, experiment, epoch, row.id, words, silent=silent, endings=endings)
            for number, _ in lost:
                if number in before:
                    self._losses.add(before[number])
            self._say_lost(words, lost, endings, worth_saying=bool(lost) or (row.left is None and silent is None))
            if row.left is not None or silent is None or lost:
                self._gone.add(row.id)  # what it had is closed, and it can claim nothing more
            closed |= {attempt for _, attempt in lost}
            for run, flight in its.items():
                if flight.row in closed:
                    del self._inflight[run]
                    self._take_back(flight)
                    self._runs.add(run, words)
        self._look_at_watched()
        self._look_at_ended()
        if not self._ending:
            for number in self.refusals.due():
                self._hand_out(number)

    def _say_lost(self, words: str, lost: list[tuple[int, int]], endings: Mapping[int, Ending], *, worth_saying: bool) -> None:
        parts = [words] if worth_saying else []
        for ends, what in ((False, AGAIN), (True, CRASHED)):
            numbers = [str(number) for number, attempt in lost if (attempt in endings) is ends]
            if numbers:
                parts.append(f"{'trials' if len(numbers) > 1 else 'trial'} {', '.join(numbers)} {what}")
        if parts:
            self._say("; ".join(parts))

    def _now(self, number: int) -> Trial | None:
        return self._session.reader.trial(number)

    def _look_at_ended(self) -> None:
        """Wait no longer for tasks that do not end, though their attempts have: the process may have died just then."""
        for run, flight in [item for item in self._inflight.items() if not item[1].is_watched and self._is_over(item[1])]:
            flight.over_since = flight.over_since or time.monotonic()
            if time.monotonic() - flight.over_since > SILENT_SECONDS:
                del self._inflight[run]
                self._take_back(flight)
                self._runs.add(run, "its attempt has ended, and it said nothing more")

    def _worker(self, flight: Flight) -> int | None:
        """Return the row id of the worker that runs an attempt, as the rows were read last; None: nobody, or it has ended."""
        attempt = self._trials[flight.number].attempt
        return attempt.worker if attempt.number == flight.attempt else None

    def _look_at_watched(self) -> None:
        reads = time.monotonic() - self._looked > RESULT_SECONDS
        if reads:
            self._looked = time.monotonic()
        for run, flight in [item for item in self._inflight.items() if item[1].is_watched]:
            if self._is_over(flight) or (reads and self._settled(flight)):
                del self._inflight[run]
            elif self._ending and self._trials[flight.number].status is TrialStatus.PENDING:
                del self._inflight[run]
                self._let_wait(flight.number)

    def drop(self) -> None:
        """Take back tasks of trials that were cancelled before anybody began them."""
        if not self.is_used:
            return
        for run, flight in list(self._inflight.items()):
            trial = self._trials[flight.number]
            if trial.status is TrialStatus.CANCELLED and not trial.attempt.claimed:
                del self._inflight[run]
                self._take_back(flight)
