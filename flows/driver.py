"""Carries out what the loop decides: proposes, submits trial tasks to Prefect, commits their ends."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture

from holdfast.core import faults
from holdfast.core.budget import Budget
from holdfast.core.errors import Conflict, Contention, EngineError, Exhausted, HoldfastError, Infrastructure
from holdfast.core.loop import Done, Evolve, Ledger, Propose, Submit, Wait, actions, is_continued
from holdfast.core.population import Population
from holdfast.core.ports import Proposer, as_proposal
from holdfast.core.space import config_digest
from holdfast.core.trial import ErrorInfo, Outcome, Trial, TrialStatus
from holdfast.core.values import dumps
from holdfast.engines.factory import make_proposer
from holdfast.engines.random_engine import draw
from holdfast.flows.losing import Remote
from holdfast.flows.lost import Flight
from holdfast.flows.prefect_runs import Wishes, wish_behind
from holdfast.flows.runners.choosing import place_of, runner_of
from holdfast.flows.runners.port import Runner
from holdfast.flows.session import Session
from holdfast.flows.signals import Deferred
from holdfast.report.observer import Observer
from holdfast.settings import settings
from holdfast.storage.database import requests
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.reads import ALL
from holdfast.tasks import runtime as runtimes
from holdfast.tasks.results import WorkerResults, results_in
from holdfast.tasks.trial import run_trial
from holdfast.tasks.workers.messages import Decision

INLINE_SECONDS = 1.0
"""How long code in threads of this process is waited for that has to end now."""
REMOTE_SECONDS = 15.0
"""How long workers that were told to end everything are waited for; one that is cut off never hears of it."""
TICK_SECONDS = 1.0
"""How often requests from outside are looked for while nothing ends."""


def run_of(future: PrefectFuture[Any]) -> Any:
    """Return the task run of a future."""
    return future.task_run_id


class Unwanted(BaseException):
    """A person ended the flow run in Prefect."""


STOPPED = "stopped on request"


class Drive:
    """One run of the loop over a session."""

    def __init__(self, session: Session, observer: Observer, wishes: Wishes, signals: Deferred) -> None:
        self._session = session
        self._observer = observer
        self._wishes = wishes
        self._driver = session.driver
        self._runtime = session.runtime
        spec = session.spec
        self._proposer: Proposer = make_proposer(spec, session.opened.record.seed, workdir=session.opened.record.workdir)
        self.ledger = Ledger(
            budget=Budget.of(spec, grid_size=self._proposer.size),
            max_concurrent=spec.search.max_concurrent,
            population=Population.of(spec, session.opened.record.seed),
            generation=session.reader.generations() if spec.population is not None else 0,
            delay=spec.failure.delay,
            clock=time.monotonic,
            fail_fast=spec.failure.fail_fast,
            exhausted=not session.new_trials,
            per_run=spec.execution.trials_per_run,
        )
        self._trials: dict[int, Trial] = {}
        self._states: dict[int, bytes] = {}
        """what the engine kept with its proposals, by the trial's number"""
        self._inflight: dict[Any, Flight] = {}
        """by task run"""
        self._heeded: set[Any] = set()
        """task runs whose cancellation was passed on"""
        self._done: queue.SimpleQueue[PrefectFuture[Any] | None] = queue.SimpleQueue()
        """tasks that have ended; None: a signal came"""
        self._signals = signals
        signals.wake = lambda: self._done.put(None)
        self._seq = -1
        self._place = place_of(session) if spec.execution.is_remote else None
        self._task = run_trial.with_options()
        local = results_in(session.opened.folder)
        here = self._place is None
        self._task.result_storage = local if here else WorkerResults(experiment=self._runtime.uuid, epoch=self._runtime.epoch)
        self._ticked = time.monotonic()
        self._runner: Runner
        self._remote = Remote(session, observer.say, self._inflight, self._trials, self._complete, self.ledger)

    def run(self) -> str:
        """Drive the experiment to the end of its budget; return why it ended. Raises what interrupted it."""
        runtimes.register(self._runtime)
        try:
            self._states = self._session.reader.states()
            self._runtime.learn()
            self._take_in(self._session.followed.look(), fresh=False)
            self._wishes.start(lambda: list(self._inflight))
            with ExitStack() as stack:
                self._runner = self._started(stack)
                try:
                    return self._loop()
                except BaseException as error:
                    try:
                        self._wind_down(wanted=not isinstance(error, Unwanted))
                    finally:
                        if self._session.stuck:
                            stack.pop_all()  # the runner's end would wait for its threads for ever
                    wish = str(error) if isinstance(error, Unwanted) else wish_behind(error, self._wishes)
                    if wish is None:
                        raise
                    return wish
        finally:
            self._remote.end()
            runtimes.unregister(self._runtime)

    def _started(self, stack: ExitStack) -> Runner:
        """Return the runner, started, once its workers were asked; nothing is claimed before that."""
        with self._signals.opened():
            runner = runner_of(self._session.spec, self._place)
            stack.enter_context(runner)
            if self._place is not None:
                runner.check(self._place)
        self._remote.start(runner)
        return runner

    def _loop(self) -> str:
        while True:
            reason = self._until_done()
            if self._inflight:  # a task whose attempt has ended already is about to end, too
                self._wait(None)
                continue
            seen = self._seq
            self._refresh()
            if self._seq == seen:  # nothing was queued since the last look
                if not is_continued(reason):
                    faults.point("search.finished")
                return reason

    def _until_done(self) -> str:
        for action in actions(self.ledger, lambda: datetime.now(UTC)):
            self._signals.check()
            if self._wishes.stop is not None:
                raise Unwanted(self._wishes.stop)
            match action:
                case Submit(trial=number):
                    self._submit(number)
                case Propose(number=number):
                    self._propose(number)
                case Evolve(generation=generation):
                    self._evolve(generation)
                case Wait(until=until):
                    self._wait(until)
                case Done(reason=reason):
                    return reason
            if time.monotonic() - self._ticked > TICK_SECONDS:
                self._tick()
        raise AssertionError("the loop ends with Done")

    def _propose(self, number: int) -> None:
        try:
            with self._signals.opened():
                proposal = as_proposal(self._proposer.propose(number))
        except Exhausted as error:
            self.ledger.exhausted, self.ledger.exhaustion = True, str(error)
            return
        with suppress(Conflict):  # a trial was queued meanwhile: it comes first, and the next proposal knows of it
            self._driver.propose(
                proposal.config,
                number=number,
                source=proposal.source,
                group=proposal.group,
                repeat=proposal.repeat,
                state=proposal.state,
            )
            if proposal.state is not None:
                self._states[number] = proposal.state
            faults.point("proposal.committed")
        self._refresh()

    def _evolve(self, generation: int) -> None:
        """Decide and commit who goes on from whom, now that every member waits at the end of a generation."""
        population = self.ledger.population
        assert population is not None
        faults.point("population.gathered")
        changes = population.evolved(generation, [self._trials[number] for number in sorted(self.ledger.held)], draw)
        self._driver.evolve(generation, changes)
        faults.point("population.evolved")
        for change in changes:
            self._observer.say(f"generation {generation}: trial {change.trial} {change.note}")
        self.ledger.evolved()
        self._refresh()

    def _submit(self, number: int) -> None:
        trial = self._trials[number]
        parameters: dict[str, Any] = {
            "experiment": self._session.spec.name,
            "trial": number,
            "attempt": trial.attempt.number,
            "config": dumps(dict(trial.config)),
            "identity": self._runtime.uuid,
            "row": trial.attempt.id,
        }
        if self._place is not None:
            parameters |= {"place": self._place, "engine": self._session.spec.execution.runner}
        self._session.journal.flush()  # the path knows a trial before its files come
        future = self._runner.submit(self._task, parameters)
        self._inflight[run_of(future)] = Flight(number, trial.attempt.number, trial.attempt.id, future)
        self.ledger.submitted(number)
        self.ledger.begun += 1
        future.add_done_callback(lambda _: self._done.put(future))

    def _wait(self, until: datetime | None) -> None:
        seconds = TICK_SECONDS
        if until is not None:
            seconds = min(seconds, max((until - datetime.now(UTC)).total_seconds(), 0.0))
        try:
            future = self._done.get(timeout=seconds)
        except queue.Empty:
            self._tick()
        else:
            if future is None:
                self._signals.check()
            else:
                self._finish(future)

    def _finish(self, future: PrefectFuture[Any]) -> None:
        """Commit the end of a trial's task."""
        flight = self._inflight.pop(run_of(future), None)
        if flight is None:
            return  # its attempt was closed meanwhile: what its task still says counts no more
        try:
            end = self._runner.ended(future)
        except BaseException as error:
            self._inflight[run_of(future)] = flight
            if isinstance(error, Infrastructure):
                self._remote.unseen(str(error))
            raise
        if end.is_suspended:
            self._wishes.suspended()
        if self._remote.is_used:
            if end.is_unwanted and self._wishes.stop is None:
                self._pass_on(run_of(future), flight.number)
                self._cancel()
            self._refresh()
            self._remote.finish(run_of(future), flight, end)
        elif end.state is not None:
            self._locally(self._trials[flight.number], flight.attempt, end.state)
        else:
            return  # the task did not begin
        self._refresh()

    def _locally(self, trial: Trial, attempt: int, state: Any) -> None:
        if state.is_completed() and getattr(state.data, "is_persisted", True):
            self._complete(trial)
        elif state.is_completed():
            raise self._not_persisted(trial)
        else:
            self._failed(trial, attempt, state)

    def _complete(self, trial: Trial) -> None:
        folder = self._session.opened.folder
        faults.point("result.persisted")
        result = folder.result(trial.number, trial.attempt.number)
        if result is None or result.get("config") != config_digest(trial.config):
            raise self._not_persisted(trial)
        ending = Ending(
            outcome=Outcome(str(result["outcome"])),
            metrics=result.get("metrics"),
            result=folder.result_name(trial.number, trial.attempt.number),
        )
        self._driver.end(trial.attempt.id, ending)
        faults.point("trial.completed")

    @staticmethod
    def _not_persisted(trial: Trial) -> EngineError:
        return EngineError(
            f"trial {trial.number} ended, but Prefect did not persist its result (is the storage full or read-only?); "
            "the search is interrupted, so that nothing is lost: mend the storage and restore"
        )

    def _failed(self, trial: Trial, attempt: int, state: Any) -> None:
        """See to a task that ended without a result: most often its attempt has its outcome already."""
        if self._runtime.lost is not None:
            raise self._runtime.lost
        self._session.keeper.check()
        stored = self._session.reader.trial(trial.number)
        if stored is None or stored.attempt.number != attempt or stored.attempt.outcome is not None:
            return
        error = state.result(raise_on_failure=False)
        if isinstance(error, Contention) or stored.status is TrialStatus.PENDING:
            raise error if isinstance(error, HoldfastError) else EngineError(f"trial {trial.number} was not started: {error}")
        info = ErrorInfo(kind=type(error).__name__, message=str(error))
        pruned = self._session.reader.last_decisions().get(stored.attempt.id) == Decision.PRUNE
        self._driver.end(stored.attempt.id, Ending(outcome=Outcome.PRUNED if pruned else Outcome.CRASHED, error=info))

    def _refresh(self) -> None:
        """Take in every row that changed."""
        changed = self._session.reader.trials(since=self._seq, first=-ALL)
        self._session.followed.take(changed)
        self._take_in(changed, fresh=True)

    def _take_in(self, trials: Sequence[Trial], *, fresh: bool) -> None:
        inflight = {(flight.number, flight.attempt) for flight in self._inflight.values()}
        for trial in trials:
            self._seq = max(self._seq, trial.seq)
            if trial.number < 0:
                self._learn(trial)
                continue
            before = self._trials.get(trial.number)
            self._trials[trial.number] = trial
            self.ledger.update(trial, fresh=fresh)
            if trial.status is TrialStatus.RUNNING:
                self._remote.refusals.begun(trial.number)
            if trial.status is not TrialStatus.PENDING:
                self._remote.refusals.forget(trial.number)
            elif (trial.number, trial.attempt.number) in inflight or trial.number in self._remote.refusals.waiting:
                # Handed to a runner and not claimed yet. A next attempt that waits after a retry, or for its population, is
                # another matter: its task has ended, or is about to.
                self.ledger.submitted(trial.number)
            state = self._states.get(trial.number)
            seen = trial if trial.first is None else replace(trial, config=trial.first)  # what was proposed
            self._proposer.observe(seen if state is None else replace(seen, state=state))
            if before is None or before.status is not trial.status or before.attempt.number != trial.attempt.number:
                self._observer.trial(trial)
        if self.ledger.budget.max_cost is not None:  # reports do not change a trial's row
            for flight in self._inflight.values():
                running = self._session.reader.trial(flight.number)
                if running is not None:
                    self.ledger.spent(running)

    def _learn(self, trial: Trial) -> None:
        """Let the proposer know of a trial that was merged from another experiment: it is none of this one's own."""
        config = self._session.spec.space.completed(trial.config)
        if config is not None:
            self._proposer.observe(replace(trial, config=config))

    def _tick(self) -> None:
        """Look at the lease, the clock, and what people ask for."""
        self._ticked = time.monotonic()
        keeper = self._session.keeper
        keeper.check()
        if self._runtime.lost is not None:
            raise self._runtime.lost
        self.ledger.active_seconds = keeper.active_seconds_now()
        if (keeper.stop_requested or self._session.reader.stop_requested()) and self.ledger.halt is None:
            self.ledger.halt = STOPPED
        self._refresh()
        self._heed()
        self._cancel()
        self._remote.check()
        self._remote.look()
        self._session.journal.try_flush()
        if self.ledger.halt is not None:
            self._order(Decision.PREEMPT)
            self._remote.withdraw()

    def _order(self, decision: Decision) -> None:
        """Tell everything that runs, here and on workers elsewhere, what to do."""
        self._runtime.order(decision)
        self._remote.order(decision)

    def _heed(self) -> None:
        """Pass on what people ask Prefect for: the end of the search, or of single trials."""
        if self._wishes.stop is not None:
            raise Unwanted(self._wishes.stop)
        for run in self._wishes.cancelled & self._inflight.keys() - self._heeded:
            self._pass_on(run, self._inflight[run].number)

    def _pass_on(self, run: Any, number: int) -> None:
        """Cancel a trial whose run somebody has cancelled in Prefect."""
        if run in self._heeded:
            return
        self._heeded.add(run)
        with suppress(Conflict):  # it has just ended
            requests.request_cancel(self._session.opened.database, self._session.opened.record.id, number)
            self._observer.say(f"trial {number}: its run was cancelled in Prefect")

    def _cancel(self) -> None:
        asked = self._session.reader.cancel_requests()
        self._runtime.cancelled = asked
        waiting = [number for number in asked if number in self.ledger.waiting or number in self.ledger.held]
        if self._remote.is_used:  # what no worker has begun may wait for one for long
            waiting += [
                number for number in asked if number in self._trials and self._trials[number].status is TrialStatus.PENDING
            ]
        if waiting:
            rows = self._session.reader.trial_ids()
            for number in dict.fromkeys(waiting):
                with suppress(Conflict) if self._remote.is_used else nullcontext():  # begun at this moment
                    self._driver.cancel(rows[number])
            self._refresh()
            self._remote.drop()

    def _wind_down(self, *, wanted: bool = True) -> None:
        """Let running trials save and stop within the grace period, and end those that do not.

        When the flow run is not ``wanted`` in Prefect any more, SIGTERM says the same again: a worker sends it.
        """
        fenced = self._session.keeper.is_lost
        grace = settings().grace_seconds
        deadline = time.monotonic() + grace
        self._order(Decision.KILL if fenced else Decision.PREEMPT)
        with suppress(HoldfastError):
            self._remote.withdraw()
        if self._inflight and not fenced:
            with suppress(OSError):  # the terminal may be gone
                self._observer.say(f"interrupted: running trials have {grace:g} s to save and stop; Ctrl-C ends them at once")
        try:
            try:
                self._drain(lambda: time.monotonic() > deadline)
            except TerminationSignal:
                if wanted:
                    raise
                self._drain(lambda: time.monotonic() > deadline)
        finally:
            self._order(Decision.KILL)
            inline = self._session.spec.execution.isolation == "inline"  # the code runs in our threads, which cannot be ended
            patience = INLINE_SECONDS if inline else REMOTE_SECONDS if self._remote.is_used else math.inf
            deadline = time.monotonic() + patience
            try:
                with suppress(KeyboardInterrupt):
                    self._drain(lambda: time.monotonic() > deadline)
            finally:
                if inline and self._inflight:
                    self._abandon(fenced=fenced)
                elif self._inflight and not fenced:
                    with suppress(OSError):
                        self._observer.say(
                            f"{len(self._inflight)} trials did not answer; a restore finds out what became of them"
                        )

    def _abandon(self, *, fenced: bool) -> None:
        """Close the attempts whose code does not stop: what it still reports before this process ends counts no more."""
        self._session.stuck = [str(run) for run in self._inflight]
        self._observer.say("the code of running trials does not stop (isolation: inline): this process ends by force")
        decisions: dict[int, str] = {}
        with suppress(HoldfastError):
            decisions = {} if fenced else self._session.reader.last_decisions()
        for flight in () if fenced else self._inflight.values():
            trial = self._trials[flight.number]
            if trial.attempt.number != flight.attempt:
                continue
            outcome = Outcome.CANCELLED if flight.number in self._runtime.cancelled else Outcome.PREEMPTED
            if decisions.get(trial.attempt.id) == Decision.PRUNE:
                outcome = Outcome.PRUNED
            with suppress(HoldfastError):  # it has ended meanwhile, or was not claimed yet
                self._driver.end(trial.attempt.id, Ending(outcome=outcome, note="it did not stop when it was told to"))

    def _drain(self, expired: Callable[[], bool]) -> None:
        while self._inflight and not expired():
            self._signals.check()
            with suppress(queue.Empty, HoldfastError):
                future = self._done.get(timeout=0.2)
                if future is not None:
                    self._finish(future)
            if self._remote.is_used and time.monotonic() - self._ticked > TICK_SECONDS:
                self._ticked = time.monotonic()
                with suppress(HoldfastError):
                    self._refresh()
                    self._remote.look()
