"""The deployment that runs trials as flow runs: whether it is there, and could."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from holdfast.core.errors import (
    EngineError,
    SpecError,
)
from holdfast.flows.pooled import Told
from holdfast.flows.prefect_runs import AWAY, impatient_client
from holdfast.flows.serving import left_running
from holdfast.flows.watched_runs import has_api

LOCAL_POOLS = ("process",)
"""Types of pools whose jobs may run on the search's own machine."""
ENTRYPOINTS = ("holdfast.flows.trial.trial", "flows/trial.py:trial")


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A deployment that runs trials, and its work pool."""

    id: uuid.UUID
    name: str
    pool: str
    kind: str


@contextmanager
def reached() -> Iterator[None]:
    """Let the body ask the API that Prefect's settings name, else the server that `holdfast up` left running."""
    found = None if has_api() else left_running()
    with nullcontext() if found is None else temporary_settings({PREFECT_API_URL: found.url}):
        yield


def check_deployment(name: str, told: Told, variables: Iterable[str] = ()) -> Deployed:
    """Return the deployment that is to run trials of what lies there; nothing is written.

    SpecError when there is none that could, or when its work pool does not know one of the job ``variables``, which it would
    pass over in silence; EngineError when Prefect's API cannot be asked.
    """
    try:
        with impatient_client() as client:
            return checked(client, name, told, variables)
    except AWAY as error:
        raise EngineError(
            f"Prefect's API cannot be asked for the deployment {name!r} ({type(error).__name__}: {error}); look after the "
            "server, then try again"
        ) from error


def checked(client: SyncPrefectClient, name: str, told: Told, variables: Iterable[str] = ()) -> Deployed:
    """Return the deployment as :func:`check_deployment` does, by an open client, whose errors pass."""
    mend = "make it with `holdfast deploy` (--pool NAME for a pool of yours), or name another as execution.deployment"
    try:
        found = client.read_deployment_by_name(name)
    except (ObjectNotFound, ValueError):
        raise SpecError(f"there is no deployment {name!r} to run trials; {mend}") from None
    entrypoint = found.entrypoint or ""
    if not entrypoint.endswith(ENTRYPOINTS):
        raise SpecError(f"the deployment {name!r} runs {entrypoint or 'nothing'}, not {ENTRYPOINTS[0]}; {mend}")
    if found.work_pool_name is None:
        raise SpecError(f"the deployment {name!r} has no work pool, so no worker begins its runs; {mend}")
    try:
        pool = client.read_work_pool(found.work_pool_name)
    except ObjectNotFound:
        raise SpecError(f"the work pool {found.work_pool_name!r} of the deployment {name!r} is gone; {mend}") from None
    if pool.is_paused or found.paused:
        what = f"work pool {pool.name!r}" if pool.is_paused else f"deployment {name!r}"
        resume = f"`prefect work-pool resume {pool.name}`" if pool.is_paused else "resume it in Prefect"
        raise SpecError(f"the {what} is paused, so no trial would begin; {resume}")
    if pool.type not in LOCAL_POOLS and (local := told.local()):
        raise SpecError(
            f"trials run on the work pool {pool.name!r} of type {pool.type}, where no file of this machine is: "
            + ", and ".join(local)
        )
    known = pool.base_job_template.get("variables", {}).get("properties", {})
    if known and (strange := [variable for variable in variables if variable not in known]):  # an empty template says nothing
        raise SpecError(
            f"execution.job_variables holds {', '.join(strange)}, which the base job template of the work pool {pool.name!r} "
            f"does not have; it has {', '.join(known)}"
        )
    return Deployed(id=found.id, name=name, pool=pool.name, kind=pool.type)
