"""The automations that heal: what fell silent becomes Crashed, and what crashed is looked after by the deployment ``watch``.

They are known again by their names, and match runs with our tag alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Literal
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from holdfast.flows.naming import LEFT_EVENT, TAG

SILENCE = "holdfast: a run that fell silent is Crashed"
CRASHED = "holdfast: watch looks after a run that crashed"
AGAIN = "holdfast: a watch that crashed looks again"
NAMES = (CRASHED, AGAIN, SILENCE)

AGAIN_SECONDS = 300.0
"""When another watch looks after one crashed: as often as its schedule would, however often that happens."""

HEARTBEAT = "prefect.flow-run.heartbeat"
ENDED_BADLY = frozenset({"prefect.flow-run.Crashed", "prefect.flow-run.Failed", "prefect.flow-run.TimedOut"})
RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
OURS = ResourceSpecification({"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"})


def wanted(watch: UUID, silence: float) -> tuple[AutomationCore, ...]:
    """Return the automations: ``watch`` is the deployment's id, ``silence`` is in seconds.

    Each says only what it needs: whether it is enabled is left to whoever uses them.
    """
    return (
        AutomationCore(
            name=CRASHED,
            description="Runs watch/watch, which restores what was cut off, once for each crash, as its spec's recovery says.",
            trigger=_ended_badly("search", "restore"),
            actions=[RunDeployment(source="selected", deployment_id=watch, parameters=None, job_variables=None)],
        ),
        # A watch that cannot start at all would be run again at once and for ever, without the pause.
        AutomationCore(
            name=AGAIN,
            description=f"Runs watch/watch once more after {AGAIN_SECONDS:g} seconds when a run of it ended badly.",
            trigger=_ended_badly("watch"),
            actions=[
                RunDeployment(
                    source="selected",
                    deployment_id=watch,
                    parameters=None,
                    job_variables=None,
                    schedule_after=timedelta(seconds=AGAIN_SECONDS),
                )
            ],
        ),
        AutomationCore(
            name=SILENCE,
            description=f"A run of holdfast of which nothing was heard for {silence:g} seconds counts as dead.",
            trigger=EventTrigger(
                after={HEARTBEAT},
                expect={"prefect.flow-run.*", LEFT_EVENT},
                match=ResourceSpecification(RUNS),
                match_related=OURS,
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=silence),
            ),
            # Not forced: a run that is in a final state stays as it is, however late its last heartbeat came.
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED,
                    name=None,
                    message=f"no heartbeat for {silence:g} s: its process is gone",
                    force=False,
                )
            ],
        ),
    )


def _ended_badly(*flows: str) -> EventTrigger:
    return EventTrigger(
        expect=set(ENDED_BADLY),
        match=ResourceSpecification(RUNS),
        match_related=[OURS, ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": list(flows)})],
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )


def missing(client: SyncPrefectClient) -> tuple[str, ...]:
    """Return the names of those automations that are not there."""
    return tuple(name for name in NAMES if not client.read_automations_by_name(name))


def ensure(client: SyncPrefectClient, automation: AutomationCore) -> Literal["made", "changed", "as it was"]:
    """Make an automation, or change it to what it is to be; return which: made, changed, or as it was.

    One that somebody switched off stays off, and tags that somebody gave it stay.
    """
    found = client.read_automations_by_name(automation.name)
    if not found:
        client.create_automation(automation)
        _only_one(client, automation.name)
        return "made"
    kept = _only_one(client, automation.name) or found[0]
    if _says(kept) == _says(automation):
        return "as it was"
    body = {**automation.model_dump(mode="json", exclude={"owner_resource"}), "enabled": kept.enabled, "tags": kept.tags}
    client.request("PUT", "/automations/{id}", path_params={"id": kept.id}, json=body)
    return "changed"


def _says(one: AutomationCore) -> tuple[object, ...]:
    return one.description, one.trigger, one.actions, one.actions_on_trigger, one.actions_on_resolve


def _only_one(client: SyncPrefectClient, name: str) -> Automation | None:
    """Remove duplicates, which come about when two make it at once: each looks after it has made its own."""
    found = sorted(client.read_automations_by_name(name), key=lambda one: str(one.id))
    for one in found[1:]:
        client.delete_automation(one.id)
    return found[0] if found else None


def remove(client: SyncPrefectClient) -> Iterator[str]:
    """Remove the automations, and yield the names of those that were there."""
    for name in NAMES:
        found = client.read_automations_by_name(name)
        for one in found:
            client.delete_automation(one.id)
        if found:
            yield name
