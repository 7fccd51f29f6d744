"""Trials as flow runs of a deployment on a work pool: Prefect's workers start a job for each."""

from __future__ import annotations

import contextvars
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.futures import PrefectConcurrentFuture, PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Crashed, Failed, Pending, Scheduled
from prefect.tasks import Task

from holdfast.core.errors import (
    Corrupt,
    DatabaseError,
    EngineError,
    HoldfastError,
    Infrastructure,
    SpecError,
    StorageError,
    Unfit,
)
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import TrialStatus
from holdfast.flows.naming import STALE, TAG, experiment_tag, trial_tag
from holdfast.flows.pooled import parameters, told_of
from holdfast.flows.prefect_runs import AWAY, LAST_SECONDS, PAGE, close_open_tasks, impatient_client, this_run
from holdfast.flows.runners.deployed import Deployed, check_deployment, checked
from holdfast.flows.runners.port import End, How
from holdfast.report.observer import watching
from holdfast.storage.database.engine import connect
from holdfast.storage.database.reads import Reader
from holdfast.tasks.place import Place
from holdfast.tasks.trial import PREEMPTED

POLL_SECONDS = 2.0
"""How often Prefect is asked about all runs that have not ended."""
AGAIN_SECONDS = 0.5
"""Before the last round is tried again."""
LATE_SECONDS = 60.0
"""How long a run may wait for a worker, or for its job to begin, before somebody is told."""
STUCK_SECONDS = 900.0
"""How long a run that a worker took may go without its attempt being claimed: then it is given up, and handed out again."""
_ANSWERS = (ObjectNotFound, PrefectHTTPStatusError)
"""What Prefect's API says of one run, while it is there for the others."""
_DELETED = "its flow run was deleted in Prefect"
_ERRORS: tuple[type[HoldfastError], ...] = (Unfit, SpecError, StorageError, DatabaseError, Corrupt)
"""What ends a run before its attempt begins, as the name of its state says."""


class RunFuture(PrefectConcurrentFuture[Any]):
    """The end of a trial's flow run; its task run stands for it in the search's flow run."""

    @property
    def state(self) -> State[Any]:
        found = self.wrapped_future
        return found.result() if found.done() else Pending()  # Prefect is not asked: the runner's thread does that


@dataclass(eq=False)
class _Run:
    """A flow run of an attempt, made or still to be."""

    future: RunFuture
    trial: int
    attempt: int
    row: int
    task: Task[..., Any]
    key: str
    flow_run: uuid.UUID | None = None
    state: State[Any] | None = None
    """as it was seen last"""
    made: float = field(default_factory=time.monotonic)
    taken: float | None = None
    """since when a worker has had it, as it was seen; None: it waits for one"""
    is_claimed: bool = False
    """whether its attempt was found claimed, or over, after it had seemed stuck"""
    is_withdrawn: bool = False

    def see(self, state: State[Any] | None) -> None:
        """Note its state."""
        self.state = state
        if state is None or state.is_scheduled():
            self.taken = None
        elif self.taken is None:
            self.taken = time.monotonic()

    @property
    def has_begun(self) -> bool:
        return self.state is not None and not (self.state.is_scheduled() or self.state.is_pending())

    def end(self, state: State[Any]) -> None:
        if not self.future.wrapped_future.done():
            self.future.wrapped_future.set_result(state)


class WorkPoolRunner:
    """Runs each attempt of a trial as a flow run of a deployment; one thread asks Prefect about all of them."""

    def __init__(self, spec: ExperimentSpec, place: Place) -> None:
        self._spec = spec
        self._place = place
        self._told = told_of(place.location, place.options, place.database)
        self._deployed: Deployed | None = None
        self._search: uuid.UUID | None = None
        self._lock = threading.Lock()
        self._runs: list[_Run] = []
        """those that have not ended"""
        self._submitted: dict[int, int] = {}
        """how often each attempt's row was handed over: a run that ended without having begun it has used up its key"""
        self._wake, self._ended = threading.Event(), threading.Event()
        self._until = math.inf
        """until when the last round is tried again, by the monotonic clock"""
        self._is_late = self._is_slow = False
        self._former: uuid.UUID | None = None
        """the id of the deployment that is looked up again"""
        self._crashed: list[uuid.UUID] = []
        """flow runs whose process died"""
        self._said: set[str] = set()
        """what was said of the deployment since a run of it could be made"""
        self._error: Exception | None = None
        """what nobody expected in the thread"""
        self._thread: threading.Thread | None = None
        self._say: Callable[[str], object] = lambda text: None

    def __enter__(self) -> Self:
        logger, caller = get_run_logger(), watching.get()

        def say(text: str) -> None:
            logger.warning("%s", text)
            if caller is not None:
                with suppress(OSError):  # the terminal may be gone
                    caller.say(text)

        self._say, self._search = say, this_run()
        context = contextvars.copy_context()  # which API it is
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="holdfast-workpool", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        self._until = time.monotonic() + LAST_SECONDS
        self._ended.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(3 * LAST_SECONDS)
        return None

    def check(self, place: Place) -> None:
        """Refuse a deployment that cannot run trials; each run looks by itself whether its job can."""
        self._deployed = check_deployment(self._spec.execution.deployment, self._told)

    def submit(self, task: Task[..., Any], parameters: dict[str, Any]) -> PrefectFuture[Any]:
        """Let a flow run be made for an attempt, and return its future; an API that is away delays it."""
        row = int(parameters["row"])
        times = self._submitted[row] = self._submitted.get(row, 0) + 1
        # The next flow run of this process goes on in the same epoch, with attempts that runs of the last one did not begin.
        search = "" if self._search is None else f"{self._search}-"
        key = f"holdfast-{self._place.uuid}-{self._place.epoch}-{search}{row}" + (f"-{times}" if times > 1 else "")
        future = RunFuture(uuid.uuid4(), Future())
        run = _Run(future, int(parameters["trial"]), int(parameters["attempt"]), row, task, key)
        with self._lock:
            self._runs.append(run)
        self._wake.set()
        return future

    def withdraw(self, future: PrefectFuture[Any]) -> None:
        """Cancel a run that no worker has begun."""
        with self._lock:
            for run in self._runs:
                if run.future is future:
                    run.is_withdrawn = True
        self._wake.set()

    def ended(self, future: PrefectFuture[Any]) -> End:
        """Say how a flow run ended; Crashed is what Prefect calls one whose process is gone."""
        state = future.state
        if state.is_crashed():
            return End(how=How.LOST, why=f"its flow run crashed in Prefect: {state.message}")
        if state.is_cancelled() and state.name != PREEMPTED:
            why = state.message or "its flow run was cancelled in Prefect"
            return End(how=How.UNCLEAR, why=why, is_unwanted=state.name != STALE)
        return End(how=How.STATE, state=state)

    def look(self) -> None:
        """Raise Infrastructure when the thread failed: an API that is away comes back, a missing worker may be started."""
        if self._error is not None:
            raise Infrastructure(
                "the runs of trials cannot be looked after any more "
                f"({type(self._error).__name__}: {self._error}); the search is interrupted, mend this, then restore"
            ) from self._error

    # In the thread

    def _work(self) -> None:
        try:
            with impatient_client() as client:
                self._go_round(client)
        except Exception as error:  # noqa: BLE001  # a search that waits for its runs would wait for ever: look() raises it
            self._error = self._error or error

    def _go_round(self, client: SyncPrefectClient) -> None:
        looked = time.monotonic()
        while True:
            self._wake.wait(AGAIN_SECONDS if self._ended.is_set() else max(looked + POLL_SECONDS - time.monotonic(), 0.0))
            self._wake.clear()
            is_last = self._ended.is_set()
            steps = [*([self._withdraw_all, self._close_late] if is_last else []), self._make, self._cancel]
            if time.monotonic() - looked >= POLL_SECONDS or is_last:
                looked = time.monotonic()
                steps += [self._look, self._give_up]
            is_clean = True
            for step in steps:
                is_clean = self._is_done(step, client) and is_clean
                if is_last and not is_clean:
                    break
            if is_last and (is_clean or time.monotonic() > self._until):
                return
            self._tell()

    def _is_done(self, step: Callable[[SyncPrefectClient], None], client: SyncPrefectClient) -> bool:
        """Do a step, which keeps no other one from being done; tell whether the API was there."""
        try:
            step(client)
        except _ANSWERS:
            pass
        except AWAY:  # asked again, for as long as the search waits
            return False
        except Exception as error:  # noqa: BLE001  # the search is interrupted, and what waits still withdrawn
            self._error = self._error or error
        return True

    @contextmanager
    def _alone(self, run: _Run) -> Iterator[None]:
        """Keep what Prefect says of one run from the others: one that is gone has ended, another is asked about again."""
        try:
            yield
        except ObjectNotFound:
            run.end(Crashed(message=_DELETED))
        except PrefectHTTPStatusError:
            pass

    def _open(self) -> list[_Run]:
        with self._lock:
            self._runs = [run for run in self._runs if not run.future.wrapped_future.done()]
            return list(self._runs)

    def _make(self, client: SyncPrefectClient) -> None:
        """Make the flow runs that were asked for; what was withdrawn before is not made at all."""
        for run in self._open():
            if run.flow_run is not None or run.is_withdrawn:
                continue
            if (deployed := self._found(client)) is None:
                return
            try:
                made = self._made(client, run, deployed)
            except PrefectHTTPStatusError as error:
                if error.response.status_code == 404:
                    self._former, self._deployed = deployed.id, None
                    if (found := self._found(client)) is not None and found.id == deployed.id:
                        self._once(f"no run of {found.name} can be made: Prefect answers {error.response.text[:500]}")
                    elif found is not None:
                        self._wake.set()  # made anew: no need to wait
                    return
                if error.response.status_code not in (400, 403, 409, 422):
                    continue
                # It will be refused the next time, too: parameters that an older deployment does not know, say.
                deployment = self._spec.execution.deployment
                answer = error.response.text[:500]
                words = f"Prefect refused a run of {deployment}: {answer}; `holdfast deploy` brings it up to date"
                run.end(Failed(message=words, data=EngineError(words)))
                continue
            run.flow_run, run.made = made.id, time.monotonic()
            run.see(made.state)
            self._said.clear()

    def _found(self, client: SyncPrefectClient) -> Deployed | None:
        """Return the deployment, looked up when it is not known; None, said once, when no run of it would begin."""
        if self._deployed is None:
            try:
                self._deployed = checked(client, self._spec.execution.deployment, self._told)
            except SpecError as error:
                self._once(f"no further trial begins until this is mended, the search waits: {error}")
                return None
            if self._former not in (None, self._deployed.id):
                self._say(f"the deployment {self._deployed.name!r} was made anew; trials run as runs of the new one")
            self._former = None
        return self._deployed

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def _made(self, client: SyncPrefectClient, run: _Run, deployed: Deployed) -> FlowRun:
        name = f"{self._place.name}/trial-{run.trial}#{run.attempt}"
        tags = (TAG, experiment_tag(self._place.name), trial_tag(run.trial))
        parent = run.future.task_run_id if self._search is not None else None
        if self._search is not None:  # what stands for the flow run in the search's; the server lets it follow
            client.create_task_run(
                run.task, self._search, run.key, id=parent, name=name, state=Pending(), extra_tags=tags, task_inputs={}
            )
        return client.create_flow_run_from_deployment(
            deployed.id,
            parameters=parameters(self._place, self._told, trial=run.trial, attempt=run.attempt, row=run.row),
            state=Scheduled(),
            name=name,
            tags=tags,
            idempotency_key=run.key,
            parent_task_run_id=parent,
            job_variables=dict(self._spec.execution.job_variables) or None,
        )

    def _close_late(self, client: SyncPrefectClient) -> None:
        """Close what crashed runs had begun once more: Prefect may have heard of it only after they had ended."""
        for page in _pages(self._crashed):
            close_open_tasks(client, page, "its process is gone")

    def _withdraw_all(self, client: SyncPrefectClient) -> None:
        """Withdraw what has not begun; what was given up though it had begun is not to run for ever in Prefect."""
        for run in self._open():
            if run.is_withdrawn and run.has_begun and run.flow_run is not None:
                state: State[Any] = Crashed(message="the search gave it up: its worker was lost, or it came too late")
                with self._alone(run):
                    client.set_flow_run_state(run.flow_run, state)
                    close_open_tasks(client, [run.flow_run], "its worker was lost")
            run.is_withdrawn = True

    def _cancel(self, client: SyncPrefectClient) -> None:
        state: State[Any] = Cancelled(name=STALE, message="the search does not wait for this run any more")
        for run in self._open():
            if run.is_withdrawn and run.flow_run is None:
                run.end(state)
            elif run.is_withdrawn and run.flow_run is not None and not run.has_begun:
                with self._alone(run):
                    run.see(client.read_flow_run(run.flow_run).state)
                    if not run.has_begun:  # should it begin at this moment, the claim is what it does not get
                        client.set_flow_run_state(run.flow_run, state)

    def _look(self, client: SyncPrefectClient) -> None:
        """Ask about every run that was made and has not ended, and let the futures of those that have end."""
        runs = {run.flow_run: run for run in self._open() if run.flow_run is not None}
        for page in _pages(list(runs)):
            wanted = FlowRunFilter(id=FlowRunFilterId(any_=page))
            found = {one.id: one for one in client.read_flow_runs(flow_run_filter=wanted, limit=PAGE)}
            for identity in page:
                with self._alone(runs[identity]):
                    self._take_in(client, runs[identity], found.get(identity))

    def _take_in(self, client: SyncPrefectClient, run: _Run, one: FlowRun | None) -> None:
        state = Crashed(message=_DELETED) if one is None else one.state
        run.see(state)
        if state is None or not state.is_final():
            return
        if one is not None and state.is_crashed():
            # Its process died without a word: what it had begun in Prefect would run for ever there.
            close_open_tasks(client, [one.id], f"its process is gone: {state.message}")
            self._crashed.append(one.id)
            self._say(f"trial {run.trial}: its flow run {one.name} crashed in Prefect: {state.message}")
        run.end(_with_error(state))

    def _give_up(self, client: SyncPrefectClient) -> None:
        """End the runs that a worker took long ago and whose attempts nobody has claimed: that worker, or the job, is gone.

        Should one begin after all, the claim decides, as ever.
        """
        now = time.monotonic()
        open_runs = [run for run in self._open() if run.taken is not None and not run.is_claimed]
        stuck = [run for run in open_runs if now - (run.taken or now) > STUCK_SECONDS]
        if not stuck:
            return
        database = connect(self._place.database)
        try:
            reader = Reader(database, self._place.experiment)
            for run in stuck:
                with suppress(DatabaseError):  # the driver says what is to be said of that
                    trial = reader.trial(run.trial)
                    waits = trial is not None and trial.attempt.id == run.row and trial.status is TrialStatus.PENDING
                    run.is_claimed = not waits
                    if waits:
                        with self._alone(run):
                            self._end_stuck(client, run)
        finally:
            database.close()

    def _end_stuck(self, client: SyncPrefectClient, run: _Run) -> None:
        if run.flow_run is None or run.state is None:
            return
        words = f"a worker took it more than {STUCK_SECONDS:g} s ago, and its trial has not begun: worker or job are gone"
        # What somebody has cancelled stays cancelled: nobody is there to do it.
        state: State[Any] = Cancelled(message=words) if run.state.is_cancelling() else Crashed(message=words)
        if client.set_flow_run_state(run.flow_run, state).status is not SetStateStatus.ACCEPT:
            return  # it has just ended, which the next look sees
        close_open_tasks(client, [run.flow_run], words)
        run.end(_with_error(state))

    def _tell(self) -> None:
        """Say once that runs wait for a worker that does not come, or for jobs; once more when one has come meanwhile."""
        runs = self._open()
        now = time.monotonic()
        slow = [run for run in runs if run.taken is not None and not run.has_begun and now - run.taken > LATE_SECONDS]
        if slow and not self._is_slow:
            self._say(
                f"{len(slow)} trials were taken by a worker more than {LATE_SECONDS:g} s ago, and their jobs have not begun; "
                "look after the pool's workers and where they start jobs (images, quotas, hosts); what has not begun after "
                f"{STUCK_SECONDS:g} s is handed out again"
            )
        self._is_slow = bool(slow)
        late = [run for run in runs if run.state is not None and run.state.is_scheduled() and now - run.made > LATE_SECONDS]
        if not late:
            self._is_late = False
        elif not self._is_late and not any(run.made > late[0].made and run.has_begun for run in runs):
            self._is_late = True
            pool = self._deployed.pool if self._deployed is not None else "the deployment's"
            self._say(
                f"{len(late)} trials have waited for a worker of the work pool {pool!r} for more than {LATE_SECONDS:g} s; "
                f"start one with `prefect worker start --pool {pool}`, or look whether the pool is paused or at its limit "
                "(the search's own run counts in it); the search goes on waiting"
            )


def _pages(identities: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(identities), PAGE):
        yield list(identities[start : start + PAGE])


def _with_error(state: State[Any]) -> State[Any]:
    """Return a final state with the error of ours that it names, as the task of another engine would have it."""
    if not state.is_failed():  # a result is in the path; Prefect's own asks for one in the state
        return state.model_copy(update={"data": {} if state.is_completed() else None})
    kind: type[HoldfastError] = {one.__name__: one for one in _ERRORS}.get(state.name or "", EngineError)
    return state.model_copy(update={"data": kind(state.message or "its flow run failed")})
