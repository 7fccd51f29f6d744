"""What the flows that look after storages have to do with Prefect: their names, a table each, and a look that is due later."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import deployment
from prefect.states import Scheduled

from holdfast.flows.abandoned import Later
from holdfast.flows.naming import artifact_key
from holdfast.flows.prefect_runs import this_run
from holdfast.flows.watched_runs import is_open
from holdfast.storage.root import name_of

SLACK_SECONDS = 1.0
"""So that what is due then is due by another clock, too."""
TROUBLE_SECONDS = 300.0
"""When storages, databases or deployments that could not be used are tried again."""
ROWS = 100
"""What a table holds at most."""
_TRIES = 100


def run_name(flow: str, storages: Any) -> str:
    """Return the name of a flow run: the flow, and the last part of each storage."""
    given = storages if isinstance(storages, (list, tuple)) else []
    return f"{flow} {', '.join(name_of(str(place).rstrip('/')) for place in given)}"[:200].rstrip()


def table(kind: str, storages: Sequence[str], rows: Sequence[Mapping[str, Any]], text: str) -> None:
    """Make a table artifact, under one key for each set of storages; a failure stops nothing."""
    left_out = len(rows) - ROWS
    more = f"; {left_out} more are not shown" if left_out > 0 else ""
    names = " ".join(name_of(place.rstrip("/")) for place in storages)
    key = artifact_key(kind, names, "\n".join(storages))
    with suppress(Exception):  # words about what is stored
        create_table_artifact(table=[dict(row) for row in rows[:ROWS]], key=key, description=f"{text}{more}")


def look_again(later: Sequence[Later], *, trouble: bool) -> datetime | None:
    """Schedule one run of this flow run's deployment for the next time at which it is worth looking; return when that is.

    None outside a deployment, or when there is nothing to look for. However many runs find out the same, they share one.
    """
    own, home = this_run(), deployment.id
    if own is None or not home:
        return None
    wanted = [*later, *([_after_trouble()] if trouble and not _has_schedule(uuid.UUID(home)) else [])]
    for one in sorted(wanted, key=lambda one: one.seconds):
        when = datetime.now(UTC) + timedelta(seconds=max(one.seconds, 0.0) + SLACK_SECONDS)
        if one.driver is not None:
            # Prefect says that its run is over, and the lease that it is not: one of them is late. Once the lease has run out
            # there is no doubt; who still renews it lives, whatever Prefect says, and is not looked at for ever.
            if is_open(one.driver) is False and _scheduled(uuid.UUID(home), own, one.key, when):
                return when
            continue
        for number in range(1, _TRIES):
            if _scheduled(uuid.UUID(home), own, one.key if number == 1 else f"{one.key}-{number}", when):
                return when
    return None


def _has_schedule(home: uuid.UUID) -> bool:
    with get_client(sync_client=True) as client:
        return any(schedule.active for schedule in client.read_deployment(home).schedules)


def _after_trouble() -> Later:
    place = int(datetime.now(UTC).timestamp() // TROUBLE_SECONDS)
    return Later(key=f"holdfast-watch-{deployment.id}-trouble-{place}", seconds=TROUBLE_SECONDS)


def _scheduled(home: uuid.UUID, own: uuid.UUID, key: str, when: datetime) -> bool:
    """Schedule a run under a key; tell whether it is still to come: a run of that key that is over, or ours, is none."""
    with get_client(sync_client=True) as client:
        parameters = client.read_flow_run(own).parameters
        run: FlowRun = client.create_flow_run_from_deployment(
            home, parameters=parameters, state=Scheduled(scheduled_time=when), idempotency_key=key
        )
    return run.id != own and run.state is not None and not run.state.is_final()
