"""The flow ``search``: creates an experiment, or goes on with it, and drives it to the end of its budget."""

from __future__ import annotations

import signal
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.exceptions import Pause
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from holdfast.core import faults
from holdfast.core.errors import Contention, Fenced, HoldfastError, Infrastructure
from holdfast.core.trial import ERRORED
from holdfast.flows import forms
from holdfast.flows.continuing import carried_on, continued_here, go_on, is_continued, moves_on
from holdfast.flows.driver import STOPPED, Drive
from holdfast.flows.leaving import ending_of, exit_code, hurry, leave
from holdfast.flows.prefect_runs import (
    CANCELLED,
    SUSPENDED,
    Closing,
    DeadRuns,
    Wishes,
    hasten,
    tell_left,
    times_run,
    wish_behind,
)
from holdfast.flows.prepare import Restored, checked_spec, prepare_search
from holdfast.flows.session import Session, prepared, prepared_session
from holdfast.flows.shipping import ship
from holdfast.flows.signals import deferred, explained, raised, undisturbed, why
from holdfast.flows.telling import Teller, plain_tasks, tag_run, teller_of
from holdfast.locate import dated
from holdfast.references import PREFIX
from holdfast.report.observer import Observer, RunLog, Together, watching
from holdfast.result import SearchResult, result_of
from holdfast.storage.database.engine import Database
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.reads import DRIVING


def _run_name() -> str:
    spec = flow_run.parameters.get("spec")
    name = spec.get("name") if isinstance(spec, dict) else getattr(spec, "name", None)
    return dated(str(name or Path(str(spec or "").removeprefix(PREFIX)).stem or "search"), moment())


def moment() -> datetime:
    """Return when this flow run was to start first, whatever became of it since: by the clock of whoever schedules."""
    return datetime.fromtimestamp(flow_run.scheduled_start_time.timestamp()).astimezone()


@flow(name="search", flow_run_name=_run_name, persist_result=False, validate_parameters=False)
def search(spec: forms.Spec, overrides: forms.Overrides = None) -> State[Any]:
    """Create an experiment as a spec says, and run its search to the end of its budget."""
    watcher = watcher_here()
    session = prepared_session()
    if session is None:
        try:
            form = forms.search_form({"spec": spec, "overrides": overrides})
            checked, origin = checked_spec(form.spec, form.overrides or ())
            with explained(wish_behind):
                restored = prepare_search(checked, watcher, origin, moment=moment())
        except HoldfastError as error:
            return refused(error)
        if restored.session is None:
            return nothing_left(restored)
        session = restored.session
    return carried_on(session, drive(session, watcher))


def nothing_left(restored: Restored) -> State[Any]:
    """Return the final state of a flow run that found nothing to do."""
    tag_run(restored.opened.record.name)
    restored.opened.close()
    return Completed(message="nothing is left to do")


def refused(error: HoldfastError) -> State[Any]:
    """Return the final state of a flow run that was refused, with the reason and nothing else for its message."""
    reason = forms.one_line(str(error))
    get_run_logger().error("%s", reason)
    return Failed(message=reason, data=error)


def watcher_here() -> Observer:
    """Return the flow run's own log, together with whoever watches from this process."""
    log, caller, session = RunLog(get_run_logger()), watching.get(), prepared.get()
    if session is not None:  # what came before the flow belongs into its log, too
        log.opened(session.opened, restored=session.plan is not None)
        log.planned((session.plan or ()) if session.runs == 0 else ())
    return log if caller is None else Together(caller, log)


def drive(session: Session, watcher: Observer) -> State[Any]:
    """Drive a prepared session inside a flow run; return the flow's final state."""
    wishes = Wishes()
    teller = teller_of(session)
    watcher = Together(watcher, teller)
    with raised(signal.SIGHUP, pass_on=False), plain_tasks(session.opened.record.name):
        try:
            with deferred() as signals:
                closing = _dead_runs(session)
                ship(session, watcher)
                if session.is_seen:
                    teller.begin()
                reason = _still_wanted(session, wishes, Drive(session, watcher, wishes, signals).run())
                session.journal.flush()
                leaves = moves_on(session, reason)
                if leaves or not is_continued(reason):
                    session.keeper.release(_ended(reason))
                _last_words(session)
        except BaseException as error:
            if session.stuck:
                hurry(exit_code(error))
            session.error = cause_of(error, session.opened.database, session.opened.record.id, session.runtime.epoch)
            try:
                with undisturbed():
                    _interrupted(session, session.error, watcher, teller)
                hasten(wishes)
            finally:
                if session.stuck:
                    leave(ending_of(session.error), exit_code(session.error), session.stuck)
            if session.error is error:
                raise
            raise session.error from error
        finally:
            wishes.end()
        closing.finish()
        if reason.startswith("stopped"):
            hasten(wishes)
        if is_continued(reason):
            watcher.say(f"{reason}; the search goes on in a new one")
            teller.continued(reason)
            faults.point("search.continued")
            return go_on(session, reason) if leaves else continued_here(session, reason)
        fast = reason.endswith("fail_fast is set")
        result = result_of(session.opened, reason, fast_failed=fast, plan=session.plan, trials=session.followed.own())
        session.close()
        watcher.ended(result)
    if session.stuck:
        leave(_state(result), int(bool(result.errors)), session.stuck)
    if wishes.stop == SUSPENDED:
        tell_left()
        raise Pause(state=wishes.state)
    return _state(result)


def _dead_runs(session: Session) -> Closing:
    """Note that this flow run drives; begin to end in Prefect what those that drove before left open there."""
    uuid, before = session.opened.record.uuid, session.runtime.epoch
    session.driver.audit(DRIVING, {"flow_run_id": str(flow_run.id), "uuid": uuid, "times": times_run()})
    drives = session.reader.drives(uuid, before=before)
    closing = Closing(DeadRuns(session.spec.name, drives=drives, attempts=session.dead))
    closing.start()
    return closing


def cause_of(error: BaseException, database: Database, experiment: int, epoch: int) -> BaseException:
    """Return Fenced for an error of storage or database that follows from somebody else's having taken the experiment over.

    Whoever takes over sweeps what this process was writing, which can be noticed here before the lost lease is.
    """
    if isinstance(error, Infrastructure):
        with suppress(HoldfastError):
            now = Leases(database, experiment).look().epoch
            if now != epoch:
                return Fenced(f"epoch {epoch} is over: epoch {now} took the experiment over; this process stops")
    return error


def _still_wanted(session: Session, wishes: Wishes, reason: str) -> str:
    """Return why a drive ended; one that goes on in another flow run was not stopped just before."""
    if not is_continued(reason):
        return reason
    wishes.ask()
    if wishes.stop is not None:
        return wishes.stop
    return STOPPED if session.reader.stop_requested() else reason


def _last_words(session: Session) -> None:
    """Let the journal tell that the drive has ended, too, unless somebody else drives already."""
    with suppress(Contention):
        session.journal.try_flush()


def _ended(reason: str) -> str:
    return reason if reason.startswith("stopped") or is_continued(reason) else f"completed: {reason}"


def _interrupted(session: Session, error: BaseException, watcher: Observer, teller: Teller) -> None:
    """Leave everything so that a restore goes on from here, and say so; nothing after the flow call may run any more."""
    reason = why(error)
    try:
        session.keeper.release(reason)
        _last_words(session)
        result = result_of(session.opened, reason, plan=session.plan, trials=session.followed.own())
    except HoldfastError as trouble:
        # Somebody else holds it now, or the database is gone: there is nothing that we may write.
        if isinstance(error, Contention) or isinstance(trouble, Contention):
            teller.close()
        else:
            teller.cut_off(reason)
        return
    finally:
        session.close()
    with suppress(OSError):  # the terminal may be gone
        watcher.ended(result)


def _state(result: SearchResult) -> State[Any]:
    errored = sum(trial.status in ERRORED for trial in result.trials)
    message = f"{result.reason}: {len(result.trials)} trials, {errored} errored; {result.path}"
    if result.reason == CANCELLED:
        return Cancelled(message=message)
    if result.reason.startswith("stopped"):
        return Completed(name="Stopped", message=message)
    return Failed(message=message) if result.failed else Completed(message=message)
