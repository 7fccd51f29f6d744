"""What a watch has to do with Prefect: restores by a deployment, runs of dead processes, events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import httpx
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from holdfast.core.errors import EngineError
from holdfast.flows.abandoned import Examined, Row
from holdfast.flows.prefect_runs import DeadRuns, close_dead_runs, impatient_client
from holdfast.flows.telling import public, send_event
from holdfast.report.texts import one_line

_BY_PREFECT = "Deployment concurrency "
"""How Prefect's messages begin where its own limit cancels a run."""
_UNREACHED = (PrefectHTTPStatusError, httpx.HTTPError)


def has_api() -> bool:
    """Tell whether there is an API to ask: one that Prefect's settings name, or that of the flow run that this is called in."""
    return bool(PREFECT_API_URL.value()) or flow_run.id is not None


def check_deployment(deployment: str) -> None:
    """Raise EngineError when there is no such deployment, or no API to ask for it."""
    with _asking_for(deployment), impatient_client() as client:
        client.read_deployment_by_name(deployment)


@contextmanager
def _asking_for(deployment: str) -> Iterator[None]:
    try:
        if not has_api():
            raise ValueError("Prefect's settings name no API: set PREFECT_API_URL")
        yield
    except (ObjectNotFound, *_UNREACHED, ValueError) as error:
        raise EngineError(
            f"deployment {deployment!r} cannot be run ({error}); `prefect deployment ls` lists them: name one of the flow "
            "restore, as restore/NAME, or name none: restores then run where the watch runs"
        ) from error


def run_restore(deployment: str, parameters: dict[str, Any], key: str, *, job_variables: dict[str, Any] | None = None) -> str:
    """Let a deployment of the flow ``restore`` run, once for each ``key``; return the flow run's id.

    EngineError when there is no such deployment, or its flow does not take the parameters.
    """
    with _asking_for(deployment):
        run = run_deployment(
            deployment,
            parameters=parameters,
            timeout=0,
            idempotency_key=key,
            as_subflow=False,
            job_variables=job_variables or None,
        )
    return str(cast(FlowRun, run).id)


def is_open(run: str) -> bool | None:
    """Tell whether a flow run is not in a final state yet; None when no API answers. One that the API lost is not."""
    if not has_api():
        return None
    try:
        with impatient_client() as client:  # asked at each look, for each experiment: an API that is away must not hold it up
            state = client.read_flow_run(uuid.UUID(run)).state
    except ObjectNotFound:
        return False
    except (*_UNREACHED, OSError):
        return None
    return state is None or not state.is_final()


def was_cancelled(run: str) -> bool:
    """Tell whether a person cancelled a flow run, as far as an API says so; Prefect cancels what is too much for a limit."""
    if not has_api():
        return False
    try:
        with impatient_client() as client:
            state = client.read_flow_run(uuid.UUID(run)).state
    except (ObjectNotFound, *_UNREACHED, OSError):
        return False
    return state is not None and state.is_cancelled() and not (state.message or "").startswith(_BY_PREFECT)


def close_runs(examined: Examined) -> None:
    """Put the runs of a dead process into a final state though its experiment is not restored now."""
    if not examined.drives or not is_open(examined.drives[0].flow_run):
        return  # closed already, or another API's
    message = "its process died; its experiment can be restored"
    close_dead_runs(DeadRuns(examined.row.name, examined.drives, examined.runs, message))


def emit(event: str, row: Row) -> None:
    """Send an event about an experiment; a failure stops nothing."""
    payload = {
        "name": one_line(row.name),
        "path": public(row.path),
        "cause": row.cause,
        "why": one_line(row.why),
        "restores": row.restores,
        "restore": None if row.command is None else one_line(row.command),
    }
    send_event(event, experiment=str(row.id), title=row.name, path=row.path, payload=payload)
