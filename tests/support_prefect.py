"""What Prefect's API says of the runs of a laboratory, and what a person does to them there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from support import TRAINABLE, Lab

ENDLESS = TRAINABLE.format(steps=5).replace(
    "for step in range(start, STEPS):",
    "for step in itertools.takewhile(lambda step: step < STEPS or ordered('slow', trial.number, 0), itertools.count(start)):",
)


def make_endless(lab: Lab) -> None:
    """Let a trial that is ordered to be slow take step after step for as long as the order stands."""
    assert "itertools.count" in ENDLESS
    (lab.folder / "train.py").write_text(f"import itertools\n{ENDLESS}")


@dataclass
class View:
    """The runs of one experiment, by its name, which no other test may use."""

    lab: Lab
    name: str

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return what the API answers."""
        data = None if body is None else json.dumps(body).encode()
        address = f"{self.lab.environment['PREFECT_API_URL']}{path}"
        request = Request(address, data, {"Content-Type": "application/json"}, method=method)
        for attempt in range(30):
            try:
                with urlopen(request, timeout=30) as answer:
                    text = answer.read()
            except HTTPError as error:
                if error.code != 503 or attempt == 29:  # its database is busy
                    raise
                time.sleep(1)
            else:
                return json.loads(text) if text else None
        raise AssertionError("the last attempt returns or raises")

    def _runs(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        query = {"flow_runs": {"name": {"any_": [self.name]}}, "limit": 200}
        while page := self.ask("POST", f"/{kind}/filter", {**query, "offset": len(found)}):
            found += page
        return sorted(found, key=lambda run: str(run["created"]))

    def flow_runs(self) -> list[dict[str, Any]]:
        """Return the flow runs, oldest first."""
        return self._runs("flow_runs")

    def flows(self) -> list[str]:
        """Return the state types of the flow runs, oldest first."""
        return [str(run["state_type"]) for run in self.flow_runs()]

    def messages(self) -> list[str]:
        """Return the messages of the states of the flow runs, oldest first."""
        return [str((run["state"] or {}).get("message")) for run in self.flow_runs()]

    def task_runs(self) -> dict[str, dict[str, Any]]:
        """Return the task runs by what follows the experiment's name, such as trial-0#1."""
        return {str(run["name"]).rpartition("/")[2]: run for run in self._runs("task_runs")}

    def tasks(self) -> dict[str, str]:
        """Return the type and the name of the state of each task run."""
        return {name: f"{run['state_type']} {run['state_name']}" for name, run in self.task_runs().items()}

    def set_flow(self, kind: str, *, force: bool = False, **state: Any) -> Any:
        """Put the newest flow run into a state, as the UI does."""
        run = self.flow_runs()[-1]["id"]
        return self.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": kind, **state}, "force": force})

    def set_task(self, name: str, kind: str) -> Any:
        """Put a task run into a state, as the UI does."""
        run = self.task_runs()[name]["id"]
        return self.ask("POST", f"/task_runs/{run}/set_state", {"state": {"type": kind}, "force": False})

    def until_tasks(self, expected: Mapping[str, str]) -> None:
        """Wait until the server has recorded these states: it learns of them from events."""
        try:
            self.lab.until(lambda: self.tasks() == expected)
        except AssertionError:
            assert self.tasks() == expected  # which shows the difference


@dataclass
class Worker:
    """A process worker and its pool."""

    pool: str
    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, pool: str, folder: Path, environment: dict[str, str]) -> Worker:
        log = folder / f"{pool}.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name("prefect")), "worker", "start", "--pool", pool, "--type", "process"],
                cwd=folder,
                env={
                    **environment,
                    "PREFECT_WORKER_QUERY_SECONDS": "1",
                    "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "1",
                    "PREFECT_RUNNER_POLL_FREQUENCY": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(pool, process, log)

    def stop(self) -> None:
        """End it and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
