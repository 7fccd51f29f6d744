"""A long search goes on in a new flow run, so that none grows without end.

In a deployment's flow run the lease is given back, and a flow run of the deployment ``restore`` is created, which goes on.
Anywhere else the next one follows in the same process, which keeps the lease meanwhile: nobody can come in between, and a
signal that comes between two of them ends the search as any other one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from prefect.client.schemas import State
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from holdfast import references
from holdfast.core.errors import AlreadyClaimed, EngineError, HoldfastError, SpecError
from holdfast.core.loop import CONTINUED, is_continued
from holdfast.core.recovery import ENDED, STARTED
from holdfast.core.values import Json
from holdfast.flows.forms import secret_in
from holdfast.flows.naming import RESTORE
from holdfast.flows.session import Session, prepared
from holdfast.flows.signals import undisturbed, why
from holdfast.flows.watched_runs import check_deployment, run_restore
from holdfast.holding import holder
from holdfast.locate import default_database
from holdfast.report.observer import restore_command
from holdfast.settings import settings
from holdfast.storage.database import recovering, requests
from holdfast.storage.database.engine import parse_url
from holdfast.storage.root import parent_of

__all__ = ["CONTINUED", "carried_on", "continued_here", "go_on", "is_continued", "moves_on", "told_to_go_on"]

_KEY = re.compile(r"holdfast-(.+)-(\d+)-continued")


def moves_on(session: Session, reason: str) -> bool:
    """Tell whether a drive that ended for ``reason`` goes on in a flow run of the deployment ``restore``, and not here."""
    if not is_continued(reason) or session.is_prepared or _deployment() is None:
        return False
    try:
        _parameters(session)
        check_deployment(RESTORE)
    except EngineError as error:
        get_run_logger().warning("the search goes on in this process: %s", error)
        return False
    return True


def go_on(session: Session, reason: str) -> State[Any]:
    """Let a flow run of the deployment ``restore`` go on with an experiment; return this one's state.

    The lease was given back. Whoever watches the storage leaves the experiment to that flow run for as long as it is there.
    """
    opened, epoch = session.opened, session.runtime.epoch
    database, experiment = opened.database, opened.record.id
    about: dict[str, Json] = {"epoch": epoch, "attempt": 1}
    try:
        try:
            recovering.claim(
                database, experiment, epoch=epoch, attempt=1, detail={"cause": CONTINUED, "restores": 0, "by": holder()}
            )
        except AlreadyClaimed:  # a watch, or a person, was faster
            return Completed(name="Continued", message=f"{reason}; somebody else goes on with it; {opened.folder.place}")
        try:
            run = run_restore(RESTORE, _parameters(session), _key(opened.record.uuid, epoch), job_variables=_job_variables())
        except EngineError as error:
            with suppress(HoldfastError):
                requests.note(database, experiment, ENDED, {**about, "error": str(error)})
            return Failed(message=f"{reason}; the next flow run was not created ({error}); {restore_command(opened)}")
        with suppress(HoldfastError):  # without it a watch takes the new flow run for one that never came, a minute later
            requests.note(database, experiment, STARTED, {**about, "flow_run_id": run})
        return Completed(
            name="Continued", message=f"{reason}; flow run {run} of {RESTORE} goes on with it; {opened.folder.place}"
        )
    finally:
        session.close()


def continued_here(session: Session, reason: str) -> State[Any]:
    """Leave a session to the next flow run of this process; return this one's state."""
    session.continued = reason
    return Completed(name="Continued", message=f"{reason}; the next one follows in this process; {session.opened.folder.place}")


def carried_on(session: Session, state: State[Any]) -> State[Any]:
    """Go on with a session to the end of its search, in flow runs below the one that this is called in; return the last state.

    Who has prepared the session goes on with it.
    """
    if session.is_prepared or session.continued is None:
        return state
    from holdfast.flows.restore import restore

    location = references.name_of_location(session.opened.folder.location)
    token = prepared.set(session)
    try:
        while session.next_run():
            state = restore(location, return_state=True)
    except BaseException as error:
        with undisturbed():
            session.keeper.release_quietly(why(error))
            session.close()
        raise
    finally:
        prepared.reset(token)
    return state


def told_to_go_on() -> tuple[str, int] | None:
    """Return the experiment (UUID) and the epoch that this flow run was created to go on from; None when it was not."""
    context = FlowRunContext.get()
    known = None if context is None else context.flow_run
    found = None if known is None else _KEY.fullmatch(known.idempotency_key or "")
    return None if found is None else (found[1], int(found[2]))


def _key(uuid: str, epoch: int) -> str:
    return f"holdfast-{uuid}-{epoch}-continued"


def _deployment() -> str | None:
    context = FlowRunContext.get()
    known = None if context is None else context.flow_run
    return None if known is None or known.deployment_id is None else str(known.deployment_id)


def _job_variables() -> dict[str, Any] | None:
    context = FlowRunContext.get()
    known = None if context is None else context.flow_run
    return None if known is None else known.job_variables


def _parameters(session: Session) -> dict[str, Any]:
    """Return the next flow run's parameters: as a person fills in the form, without what must not be shown."""
    opened = session.opened
    path = references.name_of_location(opened.folder.location)
    parameters: dict[str, Any] = {"path": path}
    options = _given("storage_options")
    if options is None and not references.is_reference(path):
        options = session.spec.storage_options
    if options:
        if (found := secret_in(options)) is not None:
            raise EngineError(f"the storage options hold the credential {found!r}, which no flow run's parameters may show")
        parameters["storage_options"] = dict(options)
    if (database := _database(session)) is not None:
        parameters["database"] = database
    if not session.new_trials:
        parameters["new_trials"] = False
    return parameters


def _database(session: Session) -> str | None:
    """Return how the next flow run is told the database that this one uses; None when it finds that by itself."""
    database, environment = session.opened.database, settings().database_url
    if references.is_reference(known := references.name_of_database(database.label)):
        return known
    if database.label == database.address:  # no password in it
        is_default = database.address == str(default_database(parent_of(session.opened.folder.location)))
        is_named = session.spec.database or _given("database") or environment
        return database.address if is_named or not is_default else None
    with suppress(SpecError):
        if environment and not references.is_reference(environment) and parse_url(environment) == parse_url(database.address):
            return None
    raise EngineError(
        f"the database {database.label} is given with its password, which no flow run's parameters may show; save it in a "
        "block HoldfastDatabase and name it as block:NAME, or leave it to HOLDFAST_DATABASE_URL where searches run"
    )


def _given(name: str) -> Any:
    """Return what this flow run was given under a name: by itself, as ``restore`` takes it, or in the spec of a ``search``."""
    context = FlowRunContext.get()
    parameters = {} if context is None else context.parameters or {}
    spec = parameters.get("spec")
    if name in parameters:
        return parameters[name]
    return spec.get(name) if isinstance(spec, Mapping) else getattr(spec, name, None)
