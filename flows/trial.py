"""The flow ``trial``: runs one attempt of a trial where a work pool runs it. Searches start it, not people."""

from __future__ import annotations

import math
import threading
import time
from contextlib import suppress
from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Crashed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from holdfast.core.errors import Contention, HoldfastError, TrialFailure
from holdfast.flows import forms, pooled
from holdfast.flows.naming import STALE
from holdfast.flows.prefect_runs import CANCELLED, wish_behind
from holdfast.flows.signals import Deferred, deferred
from holdfast.flows.telling import plain_tasks
from holdfast.settings import settings
from holdfast.storage.database import requests
from holdfast.tasks import remote
from holdfast.tasks.place import Place
from holdfast.tasks.results import WorkerResults
from holdfast.tasks.trial import run_trial
from holdfast.tasks.workers.messages import Decision

ENGINE = "workpool"
LOOK_SECONDS = 1.0
_TASKS: Any = ThreadPoolTaskRunner(max_workers=1)
"""The task runs in a thread, so that a signal reaches whoever waits for it."""


@flow(name="trial", persist_result=False, validate_parameters=False, task_runner=_TASKS)
def trial(
    path: forms.TrialOf,
    uuid: forms.Identity,
    epoch: forms.Epoch,
    trial: forms.TrialNumber,
    attempt: forms.AttemptNumber,
    row: forms.Row,
    drive: forms.DriveOf = None,
    database: forms.Database = None,
    storage_options: forms.Options = None,
) -> State[Any]:
    """Run an attempt of a trial for the search that started this run; one that no search waits for ends at once."""
    given = {
        "path": path,
        "uuid": uuid,
        "epoch": epoch,
        "trial": trial,
        "attempt": attempt,
        "row": row,
        "drive": drive,
        "database": database,
        "storage_options": storage_options,
    }
    try:
        form = forms.trial_form(given)
        place, config = pooled.place_of(form)
        try:
            with plain_tasks(place.name):
                return _run(form, place, config)
        finally:
            remote.close_all()
    except HoldfastError as error:
        return _ended_by(error)


def _run(form: forms.TrialForm, place: Place, config: str) -> State[Any]:
    runtime = remote.reach(place, ENGINE)
    task = run_trial.with_options()
    task.result_storage = WorkerResults(experiment=place.uuid, epoch=place.epoch)
    woken = threading.Event()
    with deferred() as signals:
        signals.wake = woken.set
        future = task.submit(
            experiment=place.name,
            trial=form.trial,
            attempt=form.attempt,
            config=config,
            identity=place.uuid,
            row=form.row,
            place=place,
            engine=ENGINE,
        )
        future.add_done_callback(lambda _: woken.set())
        try:
            _until_done(future, woken, signals, math.inf)
        except BaseException as error:  # noqa: BLE001  # a signal: the job is to end, whatever becomes of the search
            _tell(runtime, form.trial, error)
            get_run_logger().warning("%s: the trial has %g s to save and stop", type(error).__name__, settings().grace_seconds)
            _until_done(future, woken, signals, settings().grace_seconds, again=runtime.order)
    future.wait()
    return _ended(form, future.state)


def _tell(runtime: remote.RemoteRuntime, trial: int, error: BaseException) -> None:
    """Let the trial save and stop: for good when a person has cancelled this run in Prefect, else to go on in a later attempt.

    A run is cancelled, too, when its search was; that has told its trials by then what becomes of them.
    """
    if runtime.decision(trial) is Decision.CONTINUE and wish_behind(error) == CANCELLED:
        with suppress(HoldfastError):
            requests.request_cancel(runtime.database, runtime.experiment, trial)
            runtime.cancelled = {*runtime.cancelled, trial}
            return
    runtime.order(Decision.PREEMPT)


def _until_done(
    future: PrefectFuture[Any], woken: threading.Event, signals: Deferred, seconds: float, again: Any = None
) -> None:
    """Wait for the end of a trial's task; with ``again``, order its end after ``seconds``, or at one more signal."""
    deadline = time.monotonic() + seconds
    while not future.wrapped_future.done():  # type: ignore[attr-defined]
        try:
            if time.monotonic() > deadline:
                again(Decision.KILL)
                deadline = math.inf
            woken.wait(LOOK_SECONDS)
            woken.clear()
            signals.check()
        except BaseException:  # one more signal
            if again is None:
                raise
            deadline = 0.0


def _ended(form: forms.TrialForm, state: State[Any]) -> State[Any]:
    """Return the flow run's final state: how its task ended, in words alone."""
    if state.is_completed():
        return Completed(message=f"trial {form.trial}: attempt {form.attempt} has its result")
    if state.is_cancelled():
        return Cancelled(name=state.name, message=state.message)
    error = state.result(raise_on_failure=False)
    if state.is_failed() and isinstance(error, HoldfastError):
        return _ended_by(error)
    words = forms.one_line(state.message or str(error))
    return Crashed(message=words) if state.is_crashed() else Failed(message=words)


def _ended_by(error: HoldfastError) -> State[Any]:
    """Return the final state of a run that an error of ours ended; its name says which, where the attempt did not begin."""
    words = forms.one_line(str(error))
    if isinstance(error, Contention):  # nobody waits for this run: it has left nothing
        get_run_logger().info("%s", words)
        return Cancelled(name=STALE, message=words)
    get_run_logger().error("%s", words)
    return Failed(name=None if isinstance(error, TrialFailure) else type(error).__name__, message=words)
