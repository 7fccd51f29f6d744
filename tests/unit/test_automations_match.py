"""Which crashes start a watch: those of searches and restores, and not those of trials that run on a work pool."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import pytest
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent, RelatedResource, Resource

from holdfast.deployments.automations import AGAIN, CRASHED, wanted
from holdfast.flows.naming import TAG


def crash(flow: str) -> ReceivedEvent:
    related = [("flow", f"prefect.flow.{uuid.uuid4()}", flow), ("tag", f"prefect.tag.{TAG}", TAG)]
    return ReceivedEvent(
        id=uuid.uuid4(),
        occurred=datetime.now(UTC),
        event="prefect.flow-run.Crashed",
        resource=Resource({"prefect.resource.id": f"prefect.flow-run.{uuid.uuid4()}"}),
        related=[
            RelatedResource({"prefect.resource.role": role, "prefect.resource.id": identity, "prefect.resource.name": name})
            for role, identity, name in related
        ],
    )


@pytest.mark.parametrize(
    ("flow", "starts"),
    [("search", {CRASHED}), ("restore", {CRASHED}), ("watch", {AGAIN}), ("trial", set()), ("collect", set())],
)
def test_a_crashed_trial_starts_no_watch(flow: str, starts: set[str]) -> None:
    found = set()
    for one in wanted(uuid.uuid4(), 90.0):
        if EventTrigger.model_validate(one.trigger.model_dump(mode="json")).covers(crash(flow)):
            found.add(one.name)
    assert found & {CRASHED, AGAIN} == starts
