"""A Prefect server of a test's own, for what is global to a server: automations, and deployments under their own names."""

from __future__ import annotations

import contextvars
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from prefect.settings import PREFECT_API_URL, temporary_settings
from support import holdfast_environment

from holdfast.flows.server import EmbeddedServer

PATIENCE = 60.0


@dataclass
class Own:
    """A server, and how to ask it."""

    url: str
    environment: dict[str, str]

    @classmethod
    @contextmanager
    def started(cls, home: Path) -> Iterator[Own]:
        """Have a server."""
        environment = holdfast_environment(PREFECT_HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))
        before = dict(os.environ)
        os.environ.clear()
        # The proactive automations are looked at more often than every five seconds, so that a test waits less.
        os.environ.update({**environment, "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S"})
        server = EmbeddedServer()
        try:
            server.begin()
        finally:
            os.environ.clear()
            os.environ.update(before)
        try:
            url = server.url()
            yield cls(url, {**environment, "PREFECT_API_URL": url})
        finally:
            server.stop()

    @contextmanager
    def used(self) -> Iterator[Own]:
        """Let this process's Prefect use it; nothing that an earlier module has made is there."""
        self.empty()
        with temporary_settings({PREFECT_API_URL: self.url}):
            yield self

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Return what the API answers."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}{path}", data, {"Content-Type": "application/json"}, method=method)
        for attempt in range(10):
            try:
                with urlopen(request, timeout=30) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except HTTPError as error:
                if error.code != 503 or attempt == 9:  # its database is busy
                    raise AssertionError(f"{error.code}: {error.read().decode()}") from error
                time.sleep(0.5)
        raise AssertionError("the last attempt returns or raises")

    def every(self, what: str, **query: Any) -> list[dict[str, Any]]:
        """Return everything of a kind, by its id."""
        found: list[dict[str, Any]] = self.ask("POST", f"/{what}/filter", query)
        return sorted(found, key=lambda one: str(one["id"]))

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/deployments/name/{name}")
        return found

    def state(self) -> dict[str, Any]:
        """Return everything that a deployment makes, whole."""
        kinds = ("deployments", "work_pools", "work_queues", "automations", "block_types", "block_documents", "block_schemas")
        found: dict[str, Any] = {kind: self.every(kind) for kind in kinds}
        ours = {one["id"] for one in found["block_types"] if one["slug"].startswith("holdfast")}
        found["block_types"] = [one for one in found["block_types"] if one["id"] in ours]
        found["block_schemas"] = [one for one in found["block_schemas"] if one["block_type_id"] in ours]
        return found

    def empty(self) -> None:
        """Remove what deployments made."""
        for kind in ("automations", "deployments", "block_documents"):
            for one in self.every(kind):
                self.ask("DELETE", f"/{kind}/{one['id']}")
        for pool in self.every("work_pools"):
            self.ask("DELETE", f"/work_pools/{pool['name']}")

    # Flow runs

    def flow_run(self, flow: str, tags: list[str], state: str = "RUNNING", **more: Any) -> str:
        """Make a flow run that is in a state."""
        identity = self.ask("POST", "/flows/", {"name": flow})["id"]
        body = {"flow_id": identity, "tags": tags, "state": {"type": "PENDING"}, **more}
        made = str(self.ask("POST", "/flow_runs/", body)["id"])
        if state != "PENDING":
            self.set_state(made, state)
        return made

    def set_state(self, run: str, kind: str, **state: Any) -> None:
        body = {"state": {"type": kind, "name": kind.capitalize(), **state}, "force": True}
        self.ask("POST", f"/flow_runs/{run}/set_state", body)

    def type_of(self, run: str) -> str:
        return str(self.ask("GET", f"/flow_runs/{run}")["state_type"])

    def runs_of(self, deployment: str) -> list[dict[str, Any]]:
        """Return the flow runs of a deployment that were not made by a schedule, oldest first."""
        identity = self.deployment(deployment)["id"]
        found = self.every("flow_runs", flow_runs={"deployment_id": {"any_": [identity]}})
        return sorted((run for run in found if not run["auto_scheduled"]), key=lambda run: str(run["created"]))

    def send(self, event: str, run: str, tags: list[str]) -> None:
        """Send an event of a flow run, as its process would."""
        related = [{"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in tags]
        body = {
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": event,
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
            "related": related,
            "payload": {},
        }
        self.ask("POST", "/events", [body])

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds:g} s in vain"
            time.sleep(0.2)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Call all of them side by side, with this thread's settings; return what they return, or raise what one raised."""
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(place: int) -> None:
        barrier.wait()
        try:
            results[place] = calls[place]()
        except BaseException as error:  # noqa: BLE001  # raised below
            results[place] = error

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(run, place)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def without(entry: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}
