"""The Prefect task that runs one attempt of one trial."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

from prefect import task
from prefect.client.schemas import State
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run
from prefect.states import Cancelled
from prefect.transactions import get_transaction

from holdfast.core import faults
from holdfast.core.errors import (
    AlreadyClaimed,
    Infrastructure,
    TrialCrashed,
    TrialFailed,
    TrialFailure,
    TrialTimedOut,
)
from holdfast.core.objective import missing, no_numbers
from holdfast.core.seeding import trial_seed
from holdfast.core.space import config_digest
from holdfast.core.trial import ErrorInfo, Outcome, Trial
from holdfast.core.values import Metrics, tagged
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.driver import Ending
from holdfast.tasks.place import Place
from holdfast.tasks.remote import using
from holdfast.tasks.runtime import Runtime, find
from holdfast.tasks.supervisor import Supervisor, full_metrics
from holdfast.tasks.workers.inline import run_inline
from holdfast.tasks.workers.messages import Ended, Job

PREEMPTED = "Preempted"
"""The name of the state (of the type CANCELLED) of a task run whose attempt saved and stopped, to go on later."""


@task(
    name="trial",
    task_run_name="{experiment}/trial-{trial}#{attempt}",
    result_storage_key="trials/{parameters[trial]:06d}/result-a{parameters[attempt]}.json",
    result_serializer="json",
    retries=0,
    cache_result_in_memory=False,
)
def run_trial(
    experiment: str,
    trial: int,
    attempt: int,
    config: str,
    identity: str,
    row: int,
    place: Place | None = None,
    engine: str = "threads",
) -> dict[str, Any] | State[Any]:
    """Run attempt ``attempt`` of trial ``trial`` and return its result, which Prefect persists.

    An attempt that was told to end before it had one ends in the state that says so, and nothing is persisted.

    Args:
        experiment: Name of the experiment.
        trial: Number of the trial, from 0.
        attempt: Number of the attempt, from 1.
        config: The trial's config as JSON text.
        identity: UUID of the experiment.
        row: The attempt's row in the experiment store.
        place: The experiment as a worker of an engine finds it; None in the driver's own process.
        engine: What brought the task here: threads, dask, ray or workpool.
    """
    with nullcontext(find(identity)) if place is None else using(place, engine) as runtime:
        return _supervised(runtime, trial, attempt, config, row)


def _supervised(runtime: Runtime, trial: int, attempt: int, config: str, row: int) -> dict[str, Any] | State[Any]:
    _tag(runtime.tags(trial))
    if runtime.worker is not None:
        _check_unclaimed(runtime, trial, row)
    claim = partial(_claim, runtime, row, uuid.uuid4().hex, _text(flow_run.id), _text(task_run.id))
    candidates = runtime.reader.candidates(trial, attempt) if attempt > 1 else []
    values = json.loads(config)
    supervisor = Supervisor(runtime, claim, trial, attempt, values, candidates, get_run_logger())
    try:
        return _run(runtime, supervisor)
    except TrialFailure as failure:
        _commit_failure(runtime, supervisor, failure)
    finally:
        try:
            supervisor.tidy()
        finally:
            supervisor.let_go()


def _claim(runtime: Runtime, row: int, token: str, flow: str | None, run: str | None, **found: Any) -> AttemptWriter:
    writer = AttemptWriter.claim(
        runtime.database,
        runtime.experiment,
        runtime.epoch,
        row,
        token=token,
        flow_run_id=flow,
        task_run_id=run,
        worker=runtime.worker,
        **found,
    )
    runtime.claimed(writer)
    return writer


def _check_unclaimed(runtime: Runtime, trial: int, row: int) -> None:
    """Raise AlreadyClaimed for an attempt that an engine runs a second time, before anything is made or fetched for it."""
    stored = runtime.reader.trial(trial)
    if stored is None or stored.attempt.id != row or stored.attempt.claimed or stored.attempt.outcome is not None:
        raise AlreadyClaimed(f"attempt {row} was claimed by another process, or has ended; nothing was run")


def _tag(tags: Iterable[str]) -> None:
    """Add tags to this task run: Prefect gets them with the run's next state.

    Those that a task has before it runs are looked up in the API first, each new set of them anew, as names of limits: no trial
    would begin while the API is away.
    """
    context = TaskRunContext.get()
    if context is not None:
        context.task_run.tags = sorted({*context.task_run.tags, *tags})


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _run(runtime: Runtime, supervisor: Supervisor) -> dict[str, Any] | State[Any]:
    try:
        job = make_job(runtime, supervisor)
        ended = run_inline(job, supervisor) if runtime.pool is None else runtime.pool.run(job, supervisor)
    except Infrastructure as error:
        runtime.fail(error)
        raise
    except TrialFailure as failure:
        if supervisor.pruned is None:
            raise
        supervisor.logger.warning("after it was told to stop: %s", failure)
        ended = Ended(outcome=Outcome.PRUNED)
    faults.point("result.returned")
    supervisor.check_end()  # Prefect is about to write the result into the path
    if supervisor.pruned is not None:
        ended = Ended(outcome=Outcome.PRUNED)  # as it was decided, also if this process is told to end meanwhile
    if ended.outcome in (Outcome.PREEMPTED, Outcome.CANCELLED):
        with runtime.changing(supervisor.trial):
            supervisor.writer.end(Ending(outcome=ended.outcome, metrics=ended.metrics))
        return _stopped(supervisor, ended.outcome)
    return _result(runtime, supervisor, ended)


def _stopped(supervisor: Supervisor, outcome: Outcome) -> State[Any]:
    """Return the state of the task run of an attempt that has no result."""
    transaction = get_transaction()
    assert transaction is not None, "a task that persists its result runs in a transaction"
    transaction.write_on_commit = False  # else the state would be kept as the result, and be found by the next run
    if outcome is Outcome.CANCELLED:
        return Cancelled(message=f"trial {supervisor.trial} was cancelled")
    return Cancelled(name=PREEMPTED, message=f"told to save and stop; trial {supervisor.trial} goes on in a later attempt")


def make_job(runtime: Runtime, supervisor: Supervisor) -> Job:
    """Return what the worker needs to run the attempt."""
    spec, trial, attempt = runtime.spec, supervisor.trial, supervisor.attempt
    save_before = spec.checkpoints.save_before
    return Job(
        experiment=spec.name,
        experiment_id=runtime.uuid,
        trial=trial,
        attempt=attempt,
        seed=trial_seed(spec.search.seed or 0, trial),
        config=supervisor.config,
        trainable=spec.trainable,
        workdir=runtime.workdir,
        root=str(runtime.folder.path),
        candidates=supervisor.fetched(),
        save_period=spec.checkpoints.due_period,
        saves=spec.checkpoints.saves,
        interval=None if spec.population is None else spec.population.interval,
        serializer=spec.checkpoints.serializer,
        asynchronous=spec.checkpoints.asynchronous,
        save_by=None if save_before is None else runtime.began + save_before,
        references=spec.references,
        max_steps=spec.stopping.max_steps,
        timeout=spec.failure.trial_timeout,
        log=str(runtime.folder.log_file(trial, attempt)),
    )


def _result(runtime: Runtime, supervisor: Supervisor, ended: Ended) -> dict[str, Any]:
    last: Metrics = supervisor.metrics
    if supervisor.reported is None and supervisor.resumed is not None:
        stored: Trial | None = runtime.reader.trial(supervisor.trial)
        last = stored.metrics if stored is not None else {}
    metrics = full_metrics(last, ended.metrics)
    wrong = no_numbers(metrics, runtime.spec.goals)
    if wrong and ended.outcome is Outcome.COMPLETED:
        words = ", ".join(f"{name!r} is {value!r:.60}, a {type(value).__name__}" for name, value in wrong.items())
        raise TrialFailed(f"the trial ended and {words}: an objective must be a number", kind="NoNumber")
    absent = missing(metrics, runtime.spec.goals)
    if absent and ended.outcome is Outcome.COMPLETED:
        raise TrialFailed(
            f"the trial ended without {', '.join(map(repr, absent))}: neither its last report nor what it returned has it; "
            f'call trial.report({{"{absent[0]}": value}}) or return it',
            kind="MissingObjective",
        )
    return {
        "trial": supervisor.trial,
        "attempt": supervisor.attempt,
        "outcome": ended.outcome.value,
        "metrics": tagged(ended.metrics or {}),
        "config": config_digest(supervisor.config),
        "note": supervisor.pruned or "",
        "reports": tagged([list(told) for told in supervisor.unjournaled()]),
    }


def _commit_failure(runtime: Runtime, supervisor: Supervisor, failure: TrialFailure) -> NoReturn:
    """Commit the original failure with its traceback, and then raise it for Prefect."""
    if runtime.worker is not None:
        runtime.held()  # else a worker that was suspended tells of its own silence
    outcome, kind = Outcome.FAILED, type(failure).__name__
    trace, names = "", list[str]()
    match failure:
        case TrialFailed():
            kind, trace, names = failure.kind, failure.traceback, list(failure.names)
        case TrialTimedOut():
            outcome = Outcome.TIMED_OUT
        case TrialCrashed():
            outcome = Outcome.CRASHED
        case _:
            pass
    error = ErrorInfo(kind=kind, message=str(failure), traceback=trace)
    rule = runtime.spec.failure
    budget = rule.max_failures if rule.retries(outcome, names) else 0
    with runtime.changing(supervisor.trial):
        supervisor.writer.fail(Ending(outcome=outcome, error=error), max_failures=budget)
    faults.point("attempt.failed")
    # Prefect sends the message on as UTF-8, which an undecodable file name in it would break.
    failure.args = (str(failure).encode("utf-8", "backslashreplace").decode(),)
    raise failure
