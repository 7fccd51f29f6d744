"""Searches that a worker runs and that are killed, and what has to be true once each has been restored."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import executed, starts
from support_deployed import Process, Site, SiteLab

from holdfast.flows.naming import EXPERIMENT_EVENT, RESTORE, SEARCH, TAG, artifact_key, experiment_resource, experiment_tag
from holdfast.holding import liveness
from holdfast.tasks.workers.processes import identity, is_alive, same_host

TRIALS = 2
STEPS = 3
HELD = 2
"""The step of trial 0 in which the process of the search is killed."""
PATIENCE = 240.0


@dataclass
class Crash:
    """A search that was started as the UI does it; trial 0 waits in its last step."""

    site: Site
    lab: SiteLab
    name: str
    run: str
    hold: Path

    @classmethod
    def begin(cls, site: Site, name: str, **spec: Any) -> Crash:
        """Start one; nothing is waited for."""
        lab = site.lab(name, steps=STEPS)
        file = lab.spec(name=name, search={"num_trials": TRIALS}, **spec)
        hold = lab.order("hold", 0, HELD)
        return cls(site, lab, name, site.start_run(SEARCH, {"spec": str(file)}), hold)

    @property
    def path(self) -> Path:
        return Path(self.lab.path(self.name))

    def until(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Wait; AssertionError with what the site's processes said last."""
        try:
            self.lab.until(condition, seconds=seconds)
        except AssertionError as error:
            said = "\n".join(f"== {each.log.name}\n{each.output[-3000:]}" for each in self.site.started[1:])
            raise AssertionError(f"{self.name}: {what}: {error}\n{said}") from None

    def until_held(self) -> None:
        """Wait until trial 0 is in its last step."""
        self.until(lambda: any(entry.event == "hold" for entry in self.lab.log()), "it comes to the step to be killed in")

    def until_told(self) -> None:
        """Wait until trial 0 is in its last step, and until the server knows that the search began: words take their time."""
        self.until_held()
        self.until(lambda: "started" in self.events(), "the server knows that it began")
        self.until(lambda: experiment_tag(self.name) in self.site.flow_run(self.run)["tags"], "its flow run is tagged")

    def holder(self) -> Mapping[str, Any]:
        """Return who drives."""
        with self.lab.open(self.name) as experiment:
            holder = experiment.lease.holder
        assert holder is not None
        return dict(holder)

    def kill(self, first: Process | None = None) -> None:
        """End the process that drives by SIGKILL, after ``first`` (its worker, say); the next attempt is not held."""
        self.until_told()
        driver = self.holder()
        if first is not None:
            first.kill()
        os.kill(int(driver["pid"]), signal.SIGKILL)
        self.until(lambda: liveness(driver) is False, "the killed process is gone")
        # Its worker goes a moment later, and would take the step that it is held in.
        held = [entry.pid for entry in self.lab.log() if entry.event == "hold"]
        self.until(
            lambda: not any(is_alive(same_host(), pid, identity(pid) or "") for pid in held), "the worker of trial 0 is gone"
        )
        self.hold.unlink()

    def audit(self) -> list[tuple[str, int]]:
        """Return action and epoch of every audit row of somebody who drives, or who claims a restore."""
        with self.lab.open(self.name) as experiment:
            rows = experiment.audit()
        return [(row.action, row.epoch) for row in rows if "token" in row.detail or row.action == "recovering"]

    def statuses(self) -> list[str]:
        return self.lab.statuses(self.name)

    def flow_runs(self) -> list[dict[str, Any]]:
        """Return the flow runs that drove or may drive this experiment, oldest first."""
        mine = self.site.runs_of(SEARCH) + self.site.runs_of(RESTORE)
        words = (str(self.path), str(self.lab.folder))
        return [run for run in mine if any(word in str(run["parameters"]) for word in words)]

    def ends_well(self, *, claims: int) -> None:
        """Wait for the end of the restore: nothing that was done is done again, nothing is lost, and it happened once."""
        self.until(lambda: self.statuses() == ["COMPLETED"] * TRIALS, "the restore completes the search")
        log = self.lab.log()
        for trial in range(TRIALS):
            assert executed(log, trial) == [*range(STEPS)], log
        assert starts(log, 0) == [(1, 0), (2, HELD)]
        assert starts(log, 1) == [(1, 0)]
        self.until(lambda: self.states() == ["CRASHED", "COMPLETED"], f"Prefect says so, too: {self.states()}")
        assert self.audit() == [("started", 1), *[("recovering", 1)] * claims, ("restored", 2)]
        died, restored = self.flow_runs()
        assert died["id"] == self.run
        for run in (died, restored):
            assert {TAG, experiment_tag(self.name)} <= set(run["tags"])

    def states(self) -> list[str]:
        return [str(run["state_type"]) for run in self.flow_runs()]

    def told(self, *, claims: int) -> None:
        """Compare what is shown of it with what happened: events, task runs, artifacts."""
        uuid = self.uuid()
        wanted = ["started", *["recovering"] * claims, "restored", "completed"]
        self.until(lambda: self.events() == wanted, f"the events: {self.events()}")
        expected = {"trial-0#1": "CRASHED", "trial-0#2": "COMPLETED", "trial-1#1": "COMPLETED"}
        self.until(lambda: self.task_runs() == expected, f"the task runs: {self.task_runs()}")
        for kind in ("progress", "leaderboard", "summary"):
            self.until(lambda kind=kind: self.site.artifact(artifact_key(kind, self.name, uuid)), f"the artifact {kind}")
        board = self.site.artifact(artifact_key("leaderboard", self.name, uuid))
        summary = self.site.artifact(artifact_key("summary", self.name, uuid))
        assert board is not None
        assert summary is not None
        assert (board["type"], summary["type"]) == ("table", "markdown")
        assert len(json.loads(board["data"])) == TRIALS
        assert f"holdfast restore {self.path}" in summary["data"]

    def uuid(self) -> str:
        with self.lab.open(self.name) as experiment:
            return experiment.id

    def events(self) -> list[str]:
        """Return what was told of the experiment, oldest first."""
        found = self.site.events(EXPERIMENT_EVENT, experiment_resource(self.uuid()))
        return [str(each["event"]).removeprefix(EXPERIMENT_EVENT) for each in found]

    def task_runs(self) -> dict[str, str]:
        """Return the state types of the task runs, by what follows the experiment's name."""
        runs = [run["id"] for run in self.flow_runs()]
        body = {"flow_runs": {"id": {"any_": runs}}, "limit": 200}
        found = self.site.ask("POST", "/task_runs/filter", body)
        return {str(each["name"]).rpartition("/")[2]: str(each["state_type"]) for each in found}
