"""Prefect never closes the task runs of a crashed flow; who restores the experiment does."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import suppress

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.states import Crashed

from holdfast.core.trial import Attempt

RESTORED = "its process died; the experiment was restored"


def close_dead_runs(attempts: Sequence[Attempt], flow: str | None = None, words: str = RESTORED) -> None:
    """Put the flow and task runs of attempts that a crash left open, and the flow run that drove last, into a final state.

    Runs that this API does not know (the crashed search had another one) are left alone, and so is the flow run that this is
    called in: Prefect's Retry runs the same one again. Prefect's states are a view: a failure here stops nothing.
    """
    tasks = {attempt.task_run_id for attempt in attempts if attempt.task_run_id}
    flows = {attempt.flow_run_id for attempt in attempts if attempt.flow_run_id} | ({flow} if flow else set())
    flows.discard(str(flow_run.id))
    if not tasks and not flows:
        return
    with get_client(sync_client=True) as client:
        for run in sorted(tasks):
            _close_task(client, uuid.UUID(run), words)
        for run in sorted(flows):
            _close_flow(client, uuid.UUID(run), words)


_IGNORED = (ObjectNotFound, PrefectHTTPStatusError, httpx.HTTPError)


def _close_task(client: SyncPrefectClient, run: uuid.UUID, words: str) -> None:
    with suppress(*_IGNORED):
        client.set_task_run_state(run, Crashed(message=words), force=True)


def _close_flow(client: SyncPrefectClient, run: uuid.UUID, words: str) -> None:
    with suppress(*_IGNORED):
        state = client.read_flow_run(run).state
        if state is None or not state.is_final():
            client.set_flow_run_state(run, Crashed(message=words), force=True)
