"""Prefect's view of runs: what people ask of it is heeded, and the runs of dead processes are ended in it.

Prefect's states are a view: whatever fails here stops nothing, and nothing here makes a search wait for an API that is away.
"""

from __future__ import annotations

import contextvars
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import httpx
from prefect import flow_engine
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
    TaskRunFilterId,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, State, StateType
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
from prefect.context import SettingsContext, get_settings_context
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError, TerminationSignal
from prefect.logging.handlers import APILogWorker
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Crashed

from holdfast.core.trial import Attempt, Outcome
from holdfast.flows.naming import LEFT_EVENT, STALE, TAG, experiment_tag, trial_tag
from holdfast.storage.database.reads import Drove
from holdfast.tasks.trial import PREEMPTED, run_trial

POLL_SECONDS = 3.0
"""How often Prefect is asked what people want of this run."""
ANSWER_SECONDS = 5.0
"""What the API gets to answer one request."""
LAST_SECONDS = 3.0
"""How long the end of a search waits for Prefect at each of its steps."""
BUSY_SECONDS = 2.5
"""How long a server that is there and busy is asked once more why a search was ended."""
CLOSING_SECONDS = 60.0
"""How long the runs of dead processes are looked for; what the server was not told of by then never comes."""
RETRY_SECONDS = 1.0
LATE_SECONDS = 10.0
"""After this long, a task run that the server was not told of is made there, in its final state."""
BUSY_TRIES = 3
PAGE = 200
"""Runs that the API returns at once, at most."""

CANCELLED = "stopped: cancelled in Prefect"
SUSPENDED = "stopped: suspended in Prefect"

SUSPENDED_STATE = "Suspended"

OWN_STATES = (PREEMPTED, STALE)
"""Names of states of the type CANCELLED that runs of trials give themselves: nobody's wish."""

_TASKS: dict[str, Any] = {"sort": TaskRunSort.ID_DESC, "limit": PAGE}
AWAY = (ObjectNotFound, PrefectHTTPStatusError, httpx.HTTPError, OSError)
_OPEN = [kind for kind in StateType if kind not in TERMINAL_STATES]


def _hasty() -> SettingsContext:
    """Return Prefect's settings, but for the repetition of requests.

    Copied: ``temporary_settings`` makes all of them anew, which takes a fifth of a second of computing.
    """
    now = get_settings_context()
    client = now.settings.client.model_copy(update={"max_retries": 0})
    return SettingsContext(profile=now.profile, settings=now.settings.model_copy(update={"client": client}))


@contextmanager
def impatient_client() -> Iterator[SyncPrefectClient]:
    """Return a client that answers or raises within seconds: Prefect's own repeats a request for a minute."""
    with (
        _hasty(),
        get_client(httpx_settings={"timeout": ANSWER_SECONDS}, sync_client=True) as client,
    ):
        yield client


def this_run() -> uuid.UUID | None:
    """Return the id of the flow run that this is called in."""
    found = flow_run.id
    return None if found is None else uuid.UUID(str(found))


@contextmanager
def ended_at_once() -> Iterator[None]:
    """In the body let a flow run's end not wait for the thread of its heartbeats, which sleeps a second at a time.

    As Prefect itself has it where a flow is a coroutine function: the thread sees that it is over before it says anything more.
    """
    beats: Any = flow_engine._send_heartbeats
    if isinstance(beats, partial):  # another search of this process does so already
        yield
        return
    flow_engine._send_heartbeats = partial(beats, join_on_exit=False)
    try:
        yield
    finally:
        flow_engine._send_heartbeats = beats


def times_run() -> int | None:
    """Return how many times this flow run has been run (Prefect's Retry runs it again); None when the API is away."""
    own = this_run()
    return None if own is None else _answer(lambda client: int(client.read_flow_run(own).run_count))


def tell_left() -> None:
    """Say that this flow run's process ends though the run does not: from now on its silence is no death.

    Its last heartbeat may have come after it was suspended, and nothing else is told of a process that ends so.
    """
    own = this_run()
    if own is None:
        return
    with suppress(Exception):  # words about what is stored
        related = [{"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}]
        emit_event(LEFT_EVENT, resource={"prefect.resource.id": f"prefect.flow-run.{own}"}, related=related)


T = TypeVar("T")


def _answer(ask: Callable[[SyncPrefectClient], T]) -> T | None:
    """Return what the API answers: a busy one is asked a few times, one that is away once; None when it does not answer."""
    for _ in range(BUSY_TRIES):
        with suppress(httpx.HTTPError, OSError), impatient_client() as client:
            try:
                return ask(client)
            except PrefectHTTPStatusError:
                time.sleep(RETRY_SECONDS)
                continue
            except ObjectNotFound:
                return None
        return None
    return None


class Wishes:
    """What people ask Prefect for while a search runs, looked for by a thread of its own.

    The tasks are asked about before the flow run: when the flow run is cancelled, Prefect marks every task of it as
    cancelled, too, and that must not end a single trial for good.
    """

    def __init__(self) -> None:
        self.stop: str | None = None
        """why the search is to stop: CANCELLED or SUSPENDED"""
        self.state: State[Any] | None = None
        """the flow run's state that says so"""
        self.cancelled: frozenset[uuid.UUID] = frozenset()
        """task runs whose trials are to be cancelled"""
        self.is_away = False
        """whether the last question was not answered"""
        self.is_busy = False
        """whether it was put off, or is not answered yet: by a server that is there"""
        self._run = this_run()
        self._above: list[uuid.UUID] | None = None
        self._inflight: Callable[[], Collection[uuid.UUID]] = tuple
        self._wake, self._ended = threading.Event(), threading.Event()
        self._looks = threading.Condition()
        self._begun = self._done = 0
        context = contextvars.copy_context()  # which API it is
        self._thread = threading.Thread(target=context.run, args=(self._watch,), name="holdfast-prefect", daemon=True)

    def start(self, inflight: Callable[[], Collection[uuid.UUID]]) -> None:
        """Begin to look; ``inflight`` returns the task runs that are under way."""
        self._inflight = inflight
        if self._run is not None:
            self._thread.start()

    def ask(self, seconds: float = LAST_SECONDS) -> None:
        """Look once more, now, and wait for the answer; not for long."""
        if not self._thread.is_alive():
            return
        with self._looks:
            wanted = self._begun + 1
            self._wake.set()
            if not self._looks.wait_for(lambda: self._done >= wanted, seconds):
                self.is_away = self.is_busy = True

    def end(self) -> None:
        """Stop looking."""
        self._ended.set()
        self._wake.set()

    def suspended(self) -> None:
        """Note that Prefect itself said that the flow run is suspended."""
        self.stop = self.stop or SUSPENDED

    def _watch(self) -> None:
        with impatient_client() as client:
            while not self._ended.is_set():
                self._wake.wait(POLL_SECONDS)
                self._wake.clear()
                if self._ended.is_set():
                    return
                with self._looks:
                    self._begun += 1
                try:
                    self._look(client)
                    self.is_away = self.is_busy = False
                except AWAY as error:  # a busy server still answers
                    self.is_away = not isinstance(error, PrefectHTTPStatusError | ObjectNotFound)
                    self.is_busy = _is_later(error)
                with self._looks:
                    self._done = self._begun
                    self._looks.notify_all()

    def _look(self, client: SyncPrefectClient) -> None:
        assert self._run is not None
        tasks, found = list(self._inflight()), []
        for start in range(0, len(tasks), PAGE):
            state = TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.CANCELLED, StateType.CANCELLING]))
            wanted = TaskRunFilter(id=TaskRunFilterId(any_=tasks[start : start + PAGE]), state=state)
            found += client.read_task_runs(task_run_filter=wanted, **_TASKS)
        if self._above is None:
            self._above = _runs_above(client, self._run)
        now, above = client.read_flow_run(self._run).state, [client.read_flow_run(run).state for run in self._above]
        if ended := [state for state in (now, *above) if state is not None and (state.is_cancelling() or state.is_cancelled())]:
            self.state, self.stop = ended[0], CANCELLED
        elif now is not None and now.is_paused() and now.name == SUSPENDED_STATE:
            self.state, self.stop = now, SUSPENDED
        else:  # what a stopped attempt's own task says of itself is nobody's wish
            self.cancelled |= {run.id for run in found if run.state_name not in OWN_STATES}


def _is_later(error: Exception) -> bool:
    """Tell whether a server that answers so, or not in time, may answer a moment later."""
    if isinstance(error, PrefectHTTPStatusError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, httpx.TimeoutException)


def _runs_above(client: SyncPrefectClient, run: uuid.UUID) -> list[uuid.UUID]:
    """Return the flow runs that one is a part of, in one process: who cancels one of them cancels all that it consists of."""
    found: list[uuid.UUID] = []
    with suppress(ObjectNotFound):
        while (below := client.read_flow_run(run)).deployment_id is None and below.parent_task_run_id is not None:
            above = client.read_task_run(below.parent_task_run_id).flow_run_id
            if above is None or above in found:
                break
            found.append(run := above)
    return found


def wish_behind(error: BaseException, wishes: Wishes | None = None) -> str | None:
    """Say which wish SIGTERM is the messenger of, or None: a worker sends it to a run that is cancelled in Prefect.

    ``wishes`` are those that are being looked for, if any are. A busy server is asked again for BUSY_SECONDS: what a person
    cancelled would otherwise be taken for an interrupted search, which may be restored.
    """
    if not isinstance(error, TerminationSignal):
        return None
    looking = wishes or Wishes()
    if wishes is None:
        looking.start(tuple)
    deadline = time.monotonic() + BUSY_SECONDS
    while looking.stop is None:
        looking.ask()
        if not looking.is_busy or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS / 10)
    if wishes is None:
        looking.end()
    return CANCELLED if looking.stop == CANCELLED else None


def hasten(wishes: Wishes) -> None:
    """See to it that the end of the flow run does not wait for an API that is away."""
    wishes.ask()
    for worker in (EventsWorker, APILogWorker):
        with suppress(Exception):  # words about a run; SIGTERM ends this process before Prefect sends them by itself
            worker.drain_all(timeout=0.1 if wishes.is_away else LAST_SECONDS)
    if wishes.is_away:
        # Until the end of this flow run, which sets its final state; whoever called the flow has a context of their own.
        _hasty().__enter__()


@dataclass(frozen=True)
class DeadRuns:
    """What a crash left open in Prefect."""

    experiment: str
    """its name"""
    drives: Sequence[Drove] = ()
    """the flow runs that drove in epochs that are over"""
    attempts: Sequence[Attempt] = ()
    """as they were closed"""
    message: str = "its process died; the experiment was restored"

    def flows(self) -> dict[uuid.UUID, int | None]:
        """Return the flow runs, each with the last of its own runs that drove."""
        found: dict[uuid.UUID, int | None] = {}
        for drive in self.drives:
            found.setdefault(uuid.UUID(drive.flow_run), drive.times)
        return found

    def tasks(self) -> dict[uuid.UUID, Attempt]:
        """Return the attempts by their task runs: only those that a drive of this very experiment began.

        The rows of a copy name the original's runs, too, and the original may be alive.
        """
        known = {drive.flow_run for drive in self.drives}
        return {uuid.UUID(a.task_run_id): a for a in self.attempts if a.task_run_id and a.flow_run_id in known}


@dataclass
class Closing:
    """Puts dead runs into a final state, in a thread of its own.

    A server records task runs late, or, when their process died with what it had to say, never. Those are made, in their final
    state: what comes after that is older, and the server leaves the newer state as it is.
    """

    dead: DeadRuns
    own: uuid.UUID | None = field(default_factory=this_run)
    _ended: threading.Event = field(default_factory=threading.Event)
    _known: set[uuid.UUID] = field(default_factory=set)
    """flow runs that the server knows"""
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; what this very flow run left when it was run before is closed at once, before it begins anything itself."""
        flows, tasks = self.dead.flows(), self.dead.tasks()
        if not flows:
            return
        if self.own in flows:
            del flows[self.own]
            own = self.own
            _answer(lambda client: self._close_open(client, [own]))
        if flows or tasks:
            run = contextvars.copy_context().run
            self._thread = threading.Thread(target=run, args=(self._work, flows, tasks), name="holdfast-closing", daemon=True)
            self._thread.start()

    def finish(self, seconds: float = ANSWER_SECONDS) -> None:
        """Wait for it, not for long, and end it."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def _work(self, flows: Mapping[uuid.UUID, int | None], tasks: dict[uuid.UUID, Attempt]) -> None:
        began = time.monotonic()
        deadline, is_last = began + CLOSING_SECONDS, False
        with impatient_client() as client:
            while time.monotonic() < deadline:
                if self._ended.is_set() and not is_last:
                    is_last, deadline = True, time.monotonic() + ANSWER_SECONDS
                with suppress(*AWAY):
                    self._close_tasks(client, tasks)
                    self._close_open(client, self._close_flows(client, flows))
                    # A server that does not know a flow run, such as another embedded one, never hears of its tasks either.
                    strangers = flows.keys() - self._known
                    tasks = {run: a for run, a in tasks.items() if uuid.UUID(str(a.flow_run_id)) not in strangers}
                    if is_last or time.monotonic() > began + LATE_SECONDS:
                        self._make_tasks(client, tasks)
                    if is_last or not tasks:
                        return
                if is_last:
                    time.sleep(RETRY_SECONDS / 2)
                else:
                    self._ended.wait(RETRY_SECONDS)

    def _close_flows(self, client: SyncPrefectClient, flows: Mapping[uuid.UUID, int | None]) -> list[uuid.UUID]:
        """Close flow runs; return those that are dead for certain: none that was begun again since."""
        dead, ids = [], list(flows)
        for start in range(0, len(ids), PAGE):
            wanted = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + PAGE]))
            for run in client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.ID_DESC, limit=PAGE):
                self._known.add(run.id)
                times = flows[run.id]
                if times is not None and run.run_count != times:
                    continue
                if run.state is not None and run.state.is_scheduled():
                    continue  # about to be begun again
                dead.append(run.id)
                if run.state is None or not (run.state.is_final() or run.state.name == SUSPENDED_STATE):
                    cancelled = run.state is not None and run.state.is_cancelling()
                    state = Cancelled if cancelled else Crashed
                    # Its worker may say so at this moment: by force, a second Crashed would call automations twice.
                    forced = run.state is None or not run.state.is_running()
                    client.set_flow_run_state(run.id, state(message=self.dead.message), force=forced)
        return dead

    def _close_open(self, client: SyncPrefectClient, flows: Sequence[uuid.UUID]) -> None:
        """Close every run below dead flow runs that has no final state: also of attempts that nobody had claimed."""
        if flows:
            self._close_trials(client, flows)
            close_open_tasks(client, flows, self.dead.message)

    def _close_trials(self, client: SyncPrefectClient, flows: Sequence[uuid.UUID]) -> None:
        """Close the flow runs of trials that dead flow runs started on a work pool; one that has not begun never does.

        One whose process lives nevertheless has been fenced, and ends by itself.
        """
        wanted = FlowRunFilter(
            parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=list(flows)),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_OPEN)),
        )
        while page := client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.ID_DESC, limit=PAGE):
            for run in page:
                waits = run.state is not None and (run.state.is_scheduled() or run.state.is_pending())
                cancelled = waits or (run.state is not None and run.state.is_cancelling())
                words = self.dead.message
                state: State[Any] = Cancelled(name=STALE, message=words) if cancelled else Crashed(message=words)
                client.set_flow_run_state(run.id, state, force=True)
            close_open_tasks(client, [run.id for run in page], self.dead.message)
            if len(page) < PAGE:
                break
        # Those that ended before may have begun a task that the server heard of only after that.
        wanted.state = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED]))
        count = 0
        while page := client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.ID_DESC, limit=PAGE, offset=count):
            close_open_tasks(client, [run.id for run in page], self.dead.message)
            count += len(page)
            if len(page) < PAGE:
                return

    def _close_tasks(self, client: SyncPrefectClient, tasks: dict[uuid.UUID, Attempt]) -> None:
        """Close the task runs of attempts, each as its attempt ended; forget those that the server knows."""
        ids = list(tasks)
        for start in range(0, len(ids), PAGE):
            wanted = TaskRunFilter(id=TaskRunFilterId(any_=ids[start : start + PAGE]))
            for run in client.read_task_runs(task_run_filter=wanted, **_TASKS):
                state = self._final(run.state, tasks[run.id].outcome)
                if state is not None:
                    client.set_task_run_state(run.id, state, force=True)
                del tasks[run.id]

    def _make_tasks(self, client: SyncPrefectClient, tasks: dict[uuid.UUID, Attempt]) -> None:
        """Make the task runs of attempts that the server does not know, each as its attempt ended; forget them."""
        for identity, attempt in list(tasks.items()):
            client.create_task_run(
                run_trial,
                uuid.UUID(str(attempt.flow_run_id)),
                str(identity),
                id=identity,
                name=f"{self.dead.experiment}/trial-{attempt.trial}#{attempt.number}",
                state=self._final(None, attempt.outcome),
                extra_tags=(TAG, experiment_tag(self.dead.experiment), trial_tag(attempt.trial or 0)),
            )
            del tasks[identity]

    def _final(self, known: State[Any] | None, outcome: Outcome | None) -> State[Any] | None:
        """Return the state that a task run has to have, or None when it may stay as it is."""
        is_final = known is not None and known.is_final()
        is_completed = known is not None and known.is_completed()
        if outcome in (Outcome.COMPLETED, Outcome.PRUNED):
            return None if is_final else Completed(message="its result was persisted; its process died before Prefect knew")
        if is_final and not is_completed:  # completed, and the result was not persisted any more: the trial runs again
            return None
        return Cancelled(message=self.dead.message) if outcome is Outcome.CANCELLED else Crashed(message=self.dead.message)


def close_open_tasks(client: SyncPrefectClient, flows: Sequence[uuid.UUID], message: str) -> None:
    """Put every task run of dead flow runs that has no final state into one."""
    wanted = TaskRunFilter(
        flow_run_id=TaskRunFilterFlowRunId(any_=list(flows)),
        state=TaskRunFilterState(type=TaskRunFilterStateType(any_=_OPEN)),
    )
    while page := client.read_task_runs(task_run_filter=wanted, **_TASKS):
        for run in page:
            client.set_task_run_state(run.id, Crashed(message=message), force=True)
        if len(page) < PAGE:
            return


def close_dead_runs(dead: DeadRuns) -> None:
    """Put dead runs into a final state now; what the server does not know yet is waited for a little."""
    closing = Closing(dead)
    closing.start()
    closing.finish()
