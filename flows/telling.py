"""Words about a search for those who look at it in Prefect: events, artifacts, tags.

Nothing that the search does waits for them, and nothing that goes wrong here reaches it: rows are the truth, this is a view. A
thread of its own sends the newest state every few seconds, and events up to a rate. A process that is killed leaves the last
state; the next one that drives the experiment shows its own under the same keys.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate
from prefect.context import FlowRunContext, TagsContext
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from holdfast.core.trial import Trial, TrialStatus
from holdfast.core.values import Json
from holdfast.flows.artifacts import KINDS, TYPES, Shown, Tally, best_words, error_words, rendered, safe
from holdfast.flows.naming import EXPERIMENT_EVENT, TAG, TRIAL_EVENT, artifact_key, experiment_resource, experiment_tag
from holdfast.flows.prefect_runs import impatient_client, this_run
from holdfast.flows.session import Session
from holdfast.report.observer import Observer, restore_command
from holdfast.report.texts import marked_down, one_line
from holdfast.result import SearchResult

POLL_SECONDS = 1.0
"""How often the thread looks for what is new."""
PAUSE_SECONDS, LONGEST_PAUSE = 3.0, 60.0
"""The time between two updates of the artifacts, of a small search and of one with very many trials."""
TRIALS_A_SECOND = 200
"""So many trials more make the pause a second longer."""
LEAST_PAUSES = 20.0
"""The pause after an update is so many times as long as the update took, at least."""
BURST, EVENTS_A_SECOND = 40, 1.0
"""Events of trials that are sent at once, and after that."""
QUEUED = 1000
"""Events that may wait for the thread."""
AWAY_SECONDS = 2.0
"""How long the end of a search waits for an API that does not answer."""
LAST_SECONDS = 10.0
"""How long it waits for a slow one that does."""

_REASON = 1000
NOT_FOUND = 404
_AWAY = (httpx.HTTPError, ObjectNotFound, OSError)
log = logging.getLogger(__name__)


def send_event(
    name: str, *, experiment: str, title: str, path: str, payload: Mapping[str, Any], at: datetime | None = None
) -> None:
    """Hand an event about an experiment to Prefect's own queue; a failure stops nothing.

    ``experiment`` is its UUID, ``title`` its name. Prefect adds the flow run that this is called in, with its tags, by itself.
    """
    resource = {
        "prefect.resource.id": experiment_resource(experiment),
        "prefect.resource.name": one_line(title),
        "holdfast.path": public(path),
    }
    with suppress(Exception):  # an event is words about what is stored
        emit_event(event=name, resource=resource, payload=dict(payload), occurred=at)


def public(place: str) -> str:
    """Return a path or a URL as one printable line, without the password that somebody may have written into it."""
    with suppress(ValueError):
        parts = urlsplit(place)
        if "@" in parts.netloc and parts.scheme:
            place = urlunsplit(parts._replace(netloc=f"***@{parts.netloc.rpartition('@')[2]}"))
    return one_line(place)


@contextmanager
def plain_tasks(name: str) -> Iterator[None]:
    """In the body let task runs not take over our tags of the flow run; each gives itself its tags once it runs.

    Prefect asks the API for the limits of each new set of tags before a task with them may begin: a search would wait for an
    API that is away. And each of a task's events would name the flow run's tags once more, which a server takes time to store.
    """
    ours, flow_run = set(tags_of(name)), FlowRunContext.get()
    with ExitStack() as stack:
        stack.enter_context(TagsContext(current_tags=TagsContext.get().current_tags - ours))
        if flow_run is not None and flow_run.flow_run is not None:
            plain = flow_run.flow_run.model_copy(update={"tags": [tag for tag in flow_run.flow_run.tags if tag not in ours]})
            stack.enter_context(flow_run.model_copy(update={"flow_run": plain}))
        yield


def tags_of(name: str) -> tuple[str, str]:
    """Return the tags of every flow run of an experiment."""
    return TAG, experiment_tag(name)


def tag_run(name: str) -> None:
    """Give this flow run the tags of an experiment's, unless the API is away."""
    with suppress(*_AWAY), impatient_client() as client:
        _tag(client, name)


def _tag(client: SyncPrefectClient, name: str) -> None:
    """Add our tags to those that this flow run has: a deployment, or who called the flow, knew only some of them."""
    context = FlowRunContext.get()
    known = None if context is None else context.flow_run
    wanted = set(tags_of(name))
    if known is None or wanted <= set(known.tags):
        return
    tags = sorted({*client.read_flow_run(known.id).tags, *wanted})
    client.update_flow_run(known.id, tags=tags)
    known.tags = tags  # what this process says of the run: its heartbeats


class Bucket:
    """Tokens that come back at a rate: who takes one may speak."""

    def __init__(self, size: float, rate: float, now: float) -> None:
        self._size, self._rate, self._tokens, self._at = size, rate, size, now

    def take(self, now: float) -> bool:
        """Take a token, if there is one; ``now`` is in seconds and does not fall."""
        self._tokens = min(self._size, self._tokens + max(now - self._at, 0.0) * self._rate)
        self._at = max(self._at, now)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def pause(trials: int) -> float:
    """Return the seconds between two updates of the artifacts of a search that has so many trials."""
    return min(PAUSE_SECONDS + trials / TRIALS_A_SECOND, LONGEST_PAUSE)


class Board:
    """The artifacts of one flow run: each is made once and changed in place after that."""

    def __init__(self, name: str, experiment: str, run: UUID | None) -> None:
        self._keys = {kind: artifact_key(kind, name, experiment) for kind in KINDS}
        self._run = run
        self._made: dict[str, UUID] = {}
        self._data: dict[str, Any] = {}
        self.answers = 0
        """requests that were answered"""

    def show(self, client: SyncPrefectClient, shown: Shown, tally: Tally) -> None:
        """Bring every artifact that is not as it should be up to date; raises what the client raises."""
        for kind in KINDS:
            data = rendered(kind, shown, tally)
            if self._data.get(kind) == data:
                continue
            if not self._changed(client, kind, data):
                made = client.create_artifact(
                    ArtifactCreate(
                        key=self._keys[kind],
                        type=TYPES[kind],
                        description=f"{kind} of {marked_down(shown.name, 200)}",  # markdown to the UI
                        data=data,
                        flow_run_id=self._run,
                    )
                )
                self._made[kind] = made.id
            self._data[kind] = data
            self.answers += 1

    def _changed(self, client: SyncPrefectClient, kind: str, data: Any) -> bool:
        """Change an artifact; return whether it is there."""
        if kind not in self._made:
            return False
        try:
            # Not by the client's method: that sends an event with the whole artifact in it for each update.
            client.request("PATCH", "/artifacts/{id}", json={"data": data}, path_params={"id": self._made[kind]})
        except (ObjectNotFound, PrefectHTTPStatusError) as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code != NOT_FOUND:
                raise
            del self._made[kind]  # somebody has deleted it
        return kind in self._made


class Teller(Observer):
    """Tells Prefect of one drive. Its methods return at once, but for those that end it."""

    def __init__(self, shown: Shown, experiment: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._shown, self._experiment, self._clock = shown, experiment, clock
        self._began = datetime.now(UTC)
        self._lock = threading.Lock()
        self._changed: dict[int, Trial] = {}
        """the newest state of each trial that the thread has not seen: no more than there are trials"""
        self._events: deque[tuple[str, datetime | None, dict[str, Any]]] = deque(maxlen=QUEUED)
        self._begun: dict[int, int] = {}
        """the attempts of trials that run, as far as anybody was told"""
        self._bucket = Bucket(BURST, EVENTS_A_SECOND, clock())
        self._omitted = 0
        self._tally = Tally(shown.spec)
        self._board = Board(shown.name, experiment, this_run())
        self._next = clock()
        self._away = False
        """whether the last request was not answered"""
        self._is_quiet = False
        """whether it is too late for any word: what Prefect were given now, it would wait for when the process exits"""
        self._ending, self._done = threading.Event(), threading.Event()
        context = contextvars.copy_context()  # which API it is, and which flow run
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="holdfast-telling", daemon=True)

    def begin(self) -> None:
        """Begin to tell of the search, and that it began."""
        self._thread.start()

    # In the thread of the search

    def trial(self, trial: Trial) -> None:
        with suppress(Exception), self._lock:
            before = self._begun.get(trial.number)
            self._changed[trial.number] = trial
            if trial.status is TrialStatus.RUNNING:
                if before != trial.attempt.number:
                    self._begun[trial.number] = trial.attempt.number
                    self._tell(trial, "started", trial.attempt.started)
            elif trial.status is TrialStatus.PENDING:
                self._begun[trial.number] = 0
            elif before is not None:  # else it had ended before this drive
                del self._begun[trial.number]
                if before != trial.attempt.number and trial.attempt.claimed:  # nobody looked while it ran
                    self._tell(trial, "started", trial.attempt.started)
                self._tell(trial, trial.status.value.lower(), trial.attempt.ended)

    def _tell(self, trial: Trial, what: str, at: datetime | None) -> None:
        if self._away or not self._bucket.take(self._clock()):
            self._omitted += 1
            return
        payload: dict[str, Any] = {"trial": trial.number, "attempt": trial.attempt.number}
        if what != "started":
            payload |= {"step": trial.step, "metrics": _objectives(trial, self._shown)}
            if words := error_words(trial):
                payload["error"] = words
            elif trial.attempt.note:
                payload["note"] = one_line(trial.attempt.note, 300)
        self._post(TRIAL_EVENT + what, at, payload)

    def _post(self, name: str, at: datetime | None, payload: dict[str, Any]) -> None:
        if len(self._events) == QUEUED:
            self._omitted += 1
            return
        if self._omitted:
            payload["omitted"], self._omitted = self._omitted, 0
        self._events.append((name, at or datetime.now(UTC), payload))

    def ended(self, result: SearchResult) -> None:
        """Send the last words; what is not sent within a few seconds never is."""
        reason = result.reason
        kind = next((word for word in ("interrupted", "stopped") if reason.startswith(word)), None)
        self._end(kind or ("failed" if result.failed else "completed"), reason)

    def cut_off(self, reason: str) -> None:
        """Say that the search was interrupted, where its result could not be read any more."""
        self._end("interrupted", reason)

    def continued(self, reason: str) -> None:
        """Say that the search goes on in a new flow run."""
        self._end("continued", reason)

    def close(self) -> None:
        """Say nothing more: it has ended, or somebody else tells of this experiment now."""
        self._is_quiet = True
        self._ending.set()

    def _end(self, kind: str, reason: str) -> None:
        if self._ending.is_set() or not self._thread.is_alive():
            return
        self._shown = replace(self._shown, ended=kind, reason=one_line(reason, _REASON))
        self._ending.set()
        until = time.monotonic() + (AWAY_SECONDS if kind == "interrupted" else LAST_SECONDS)
        answers = self._board.answers
        while not self._done.wait(min(AWAY_SECONDS, max(until - time.monotonic(), 0.0))):
            if time.monotonic() >= until or self._board.answers == answers:
                break
            answers = self._board.answers
        self._is_quiet = True

    # In a thread of its own

    def _work(self) -> None:
        try:
            with suppress(Exception), impatient_client() as client:
                with suppress(*_AWAY):
                    _tag(client, self._shown.name)
                if not self._shown.continues:
                    self._say("restored" if self._shown.restored else "started", self._began)
                while not self._ending.wait(POLL_SECONDS):
                    self.step(client)
                self.step(client, last=True)
        finally:
            self._done.set()

    def step(self, client: SyncPrefectClient, *, last: bool = False) -> None:
        """Take in what is new, and send what is due."""
        with self._lock:
            changed, self._changed = self._changed, {}
            events = list(self._events)
            self._events.clear()
        for trial in changed.values():
            self._tally.take(trial)
        for name, at, payload in events:
            self._send(name, at, payload)
        if last:
            if self._omitted:
                self._send(f"{TRIAL_EVENT}omitted", None, {"omitted": self._omitted})
            self._say(str(self._shown.ended), datetime.now(UTC))
        began = self._clock()
        if (last or began >= self._next) and not self._is_quiet:
            try:
                self._board.show(client, self._shown, self._tally)
                self._away = False
            except _AWAY as error:
                self._away = not isinstance(error, PrefectHTTPStatusError | ObjectNotFound)  # a busy one still answers
            except Exception:  # words about a search: a mistake in them takes neither it nor this thread along
                log.warning("the artifacts of %s cannot be shown", one_line(self._shown.name), exc_info=True)
            now = self._clock()
            self._next = now + max(pause(len(self._tally)), LEAST_PAUSES * (now - began))

    def _say(self, what: str, at: datetime) -> None:
        shown = self._shown
        payload: dict[str, Any] = {
            "name": one_line(shown.name),
            "path": public(shown.path),
            "epoch": shown.epoch,
            "restore": one_line(shown.command),
            "trials": {status.value: count for status, count in self._tally.counts.items() if count},
        }
        if shown.restored:
            payload["work_lost"] = shown.lost
        if shown.ended is not None:
            payload |= {"reason": shown.reason, "best": best_words(shown.spec, self._tally)}
        self._send(EXPERIMENT_EVENT + what, at, payload)

    def _send(self, name: str, at: datetime | None, payload: Mapping[str, Any]) -> None:
        if self._is_quiet:
            return
        send_event(name, experiment=self._experiment, title=self._shown.name, path=self._shown.path, payload=payload, at=at)


def _objectives(trial: Trial, shown: Shown) -> dict[str, Json]:
    return {one_line(name, 200): safe(trial.metrics[name]) for name in shown.spec.objectives if name in trial.metrics}


def teller_of(session: Session) -> Teller:
    """Return who tells Prefect of the drive of a session."""
    opened, plan = session.opened, session.plan
    shown = Shown(
        name=opened.record.name,
        path=public(opened.folder.location),
        command=one_line(restore_command(opened)),
        spec=session.spec,
        total=session.spec.search.num_trials,
        epoch=session.runtime.epoch,
        restored=plan is not None,
        continues=session.is_continuation or session.runs > 0,
        lost=sum(planned.lost for planned in plan or ()),
    )
    return Teller(shown, opened.record.uuid)
