"""Prefect's API, as the receiver uses it: answers or raises within seconds."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx

from holdfast.core.errors import HoldfastError
from holdfast.deployments.webhook.problems import Problem, later
from holdfast.flows.naming import TAG, experiment_tag

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

_LOG = logging.getLogger("holdfast.webhook")
_UNANSWERED = (httpx.HTTPError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)
"""What a client raises when nobody answers, or somebody who is not Prefect, such as the login page of a proxy."""
_SOON = timedelta(minutes=1)
_MOST_WAITING = 200


@dataclass(frozen=True, kw_only=True)
class Started:
    """A flow run."""

    id: str
    url: str | None
    """where the UI shows it"""


def _away(words: str) -> Problem:
    return later(503, "prefect", words, 10.0)


def load() -> None:
    """Import what the first delivery would wait for, and every other call with it."""
    import prefect.client.orchestration
    import prefect.utilities.urls  # noqa: F401


class NoApi(HoldfastError):
    """Prefect's settings name no API."""


class Api:
    """The API that Prefect's settings name; never one that a client would start itself."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[PrefectClient]:
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

        if not PREFECT_API_URL.value():
            raise NoApi("Prefect's settings name no API: set PREFECT_API_URL")
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            async with get_client(httpx_settings={"timeout": self._seconds}) as client:
                yield client

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[PrefectClient]:
        from prefect.exceptions import PrefectHTTPStatusError

        try:
            async with self._client() as client:
                yield client
        except (*_UNANSWERED, NoApi) as error:
            code = f" {error.response.status_code}" if isinstance(error, PrefectHTTPStatusError) else ""
            _LOG.warning("Prefect's API: %s%s", type(error).__name__, code)
            # The error may quote the URL with its password, or an answer with a secret in it: it goes no further.
            raise _away("Prefect's API does not answer; try again") from None

    async def answers(self) -> bool:
        """Tell whether the API answers."""
        try:
            async with self._client() as client:
                return await client.api_healthcheck() is None
        except (*_UNANSWERED, NoApi):
            return False

    async def secret(self, name: str) -> str:
        """Return the value of a Secret block."""
        from prefect.exceptions import ObjectNotFound

        async with self._asking() as client:
            try:
                found = await client.read_block_document_by_name(name, "secret", include_secrets=True)
            except ObjectNotFound as error:
                _LOG.warning("Secret block %s is not there", name)
                raise later(503, "secret", "the secret of this hook is not there; save its block", 60.0) from error
        return str(found.data.get("value", ""))

    async def deployment(self, name: str) -> Any:
        """Return the id of a deployment."""
        from prefect.exceptions import ObjectNotFound

        async with self._asking() as client:
            try:
                return (await client.read_deployment_by_name(name)).id
            except ObjectNotFound as error:
                _LOG.warning("deployment %s is not there", name)
                raise _away(f"deployment {name} is not there; `holdfast deploy` makes it") from error

    async def run_of(self, key: str) -> Started | None:
        """Return the flow run that was started with an idempotency key."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
        from prefect.client.schemas.sorting import FlowRunSort

        async with self._asking() as client:
            only = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key]))
            found = await client.read_flow_runs(flow_run_filter=only, limit=1, sort=FlowRunSort.ID_DESC)
        return started(found[0]) if found else None

    async def waiting(self, deployment: Any, parameters: dict[str, Any], names: str) -> Started | None:
        """Return a flow run of the deployment for the same ``names`` (path or spec) that is due and has not begun."""
        from prefect.client.schemas.filters import (
            FlowRunFilter,
            FlowRunFilterDeploymentId,
            FlowRunFilterState,
            FlowRunFilterStateType,
        )
        from prefect.client.schemas.objects import StateType
        from prefect.client.schemas.sorting import FlowRunSort

        states = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING]))
        only = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]), state=states)
        async with self._asking() as client:
            order = FlowRunSort.EXPECTED_START_TIME_ASC
            found = await client.read_flow_runs(flow_run_filter=only, limit=_MOST_WAITING, sort=order)
        soon = datetime.now(UTC) + _SOON
        for run in found:
            if run.parameters.get(names) == parameters[names] and (run.expected_start_time or soon) <= soon:
                return started(run)
        return None

    async def start(self, deployment: Any, parameters: dict[str, Any], *, key: str, name: str) -> Started:
        """Start a flow run, once for each ``key``."""
        from prefect.exceptions import PrefectHTTPStatusError

        async with self._asking() as client:
            try:
                run = await client.create_flow_run_from_deployment(
                    deployment, parameters=parameters, idempotency_key=key, tags=[TAG, experiment_tag(name)]
                )
            except PrefectHTTPStatusError as error:
                if error.response.status_code not in (400, 409, 422):
                    raise
                _LOG.warning("the deployment refuses the parameters %s", ", ".join(sorted(parameters)))
                words = "the deployment refuses these parameters; deploy it anew with `holdfast deploy`"
                raise Problem(422, "refused-by-deployment", words) from error
        return started(run)


def started(run: FlowRun) -> Started:
    """Return what is told of a flow run."""
    from prefect.utilities.urls import url_for

    return Started(id=str(run.id), url=url_for("flow-run", obj_id=run.id))
