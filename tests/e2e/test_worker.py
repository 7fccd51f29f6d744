"""Searches that a worker of a process work pool runs, as deployments: cancelled, suspended, killed and run again in Prefect."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import Lab, MakeLab, executed, starts
from support_prefect import View, Worker, make_endless

import holdfast
from holdfast.storage.database.experiments import by_uuid

pytestmark = pytest.mark.xdist_group("worker")

PREEMPTED = "CANCELLED Preempted"
DONE = "COMPLETED Completed"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server_environment: dict[str, str]) -> Iterator[Worker]:
    started = Worker.start("shared", tmp_path_factory.mktemp("worker"), server_environment)
    yield started
    started.stop()


@dataclass
class Deployed:
    """A search that a worker runs."""

    lab: Lab
    view: View
    worker: Worker
    run: str
    slow: Path

    @classmethod
    def begin(cls, make_lab: MakeLab, worker: Worker, name: str) -> Deployed:
        """Start one that goes on with its experiment when it is run again, and wait until trial 0 is under way, slowly."""
        lab = make_lab()
        make_endless(lab)
        slow, view = lab.order("slow", 0, 0), View(lab, name)
        lab.until(lambda: worker.pool in [pool["name"] for pool in view.ask("POST", "/work_pools/filter", {})])
        flow = view.ask("POST", "/flows/", {"name": "search"})["id"]
        deployment = {
            "name": name,
            "flow_id": flow,
            "entrypoint": "holdfast.flows.search.search",
            "work_pool_name": worker.pool,
            "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(lab.folder)}}],
            "enforce_parameter_schema": False,
        }
        made = view.ask("POST", "/deployments/", deployment)["id"]
        spec = lab.spec(name=name, search={"num_trials": 2}, checkpoints={"save_period": 100}, if_exists="restore")
        run = view.ask("POST", f"/deployments/{made}/create_flow_run", {"parameters": {"spec": str(spec)}})["id"]
        found = cls(lab, view, worker, run, slow)
        found.until(lambda: any((e.event, e.step) == ("step", 10) for e in lab.log()))
        found.until(lambda: view.tasks() == {"trial-0#1": "RUNNING Running"})
        return found

    @property
    def name(self) -> str:
        return self.view.name

    def until(self, condition: Any) -> None:
        try:
            self.lab.until(condition)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.worker.log.read_text()}") from None

    def record(self) -> tuple[str, Any]:
        """Return the status of the experiment, why its last drive ended."""
        with holdfast.open(self.lab.path(self.name)) as experiment:
            found = by_uuid(experiment._opened.database, experiment.id)
            return experiment.status, found and found.ended

    def pid(self) -> int:
        """Return the process that drives."""
        with holdfast.open(self.lab.path(self.name)) as experiment:
            holder = experiment.lease.holder
        assert holder is not None
        return int(holder["pid"])

    def until_ended(self, flow: str, status: str, ended: str | None) -> None:
        """Wait until Prefect says how the flow run ended, and compare what the experiment says."""
        self.until(lambda: self.view.flows() == [flow])
        self.until(lambda: self.record() == (status, ended))

    def ends_well(self, *, attempt: int = 2) -> None:
        """Wait for the end of a run that goes on; nothing that was reported is done again."""
        last = self._last
        self.until(lambda: self.view.flows()[-1] == "COMPLETED")
        assert self.lab.statuses(self.name) == ["COMPLETED"] * 2
        assert starts(self.lab.log(), 0) == [(attempt, last + 1)]

    def goes_on(self, *, saved: bool = True) -> None:
        """Get ready for the run that goes on."""
        kept = [one.step for one in self.lab.checkpoints(0, self.name)]
        self._last = kept[-1]
        assert not saved or self._last == executed(self.lab.log(), 0)[-1]
        self.slow.unlink()
        self.lab.clear_log()

    _last: int = -1


def test_a_cancelled_flow_run_is_a_stopped_search(make_lab: MakeLab, worker: Worker) -> None:
    """The worker sends SIGTERM: what a person stopped is told apart from what was merely interrupted."""
    search = Deployed.begin(make_lab, worker, "worker-cancel")
    search.view.set_flow("CANCELLING")
    search.until_ended("CANCELLED", "stopped", "stopped: cancelled in Prefect")
    search.view.until_tasks({"trial-0#1": PREEMPTED})
    search.goes_on()
    search.lab.run("restore", search.lab.path(search.name))
    search.ends_well()
    assert search.view.flows() == ["CANCELLED", "COMPLETED"]


def test_a_terminated_process_is_an_interrupted_search(make_lab: MakeLab, worker: Worker) -> None:
    """Whoever sends it: the work pool, the machine that shuts down. Prefect's Retry runs the same flow run again."""
    search = Deployed.begin(make_lab, worker, "worker-term")
    os.kill(search.pid(), signal.SIGTERM)
    search.until_ended("CRASHED", "interrupted", "interrupted: SIGTERM")
    search.view.until_tasks({"trial-0#1": PREEMPTED})
    search.goes_on()
    search.view.set_flow("SCHEDULED", name="AwaitingRetry")
    search.ends_well()
    assert search.view.flows() == ["COMPLETED"]
    search.view.until_tasks({"trial-0#1": PREEMPTED, "trial-0#2": DONE, "trial-1#1": DONE})


def test_a_killed_process_is_retried_in_prefect(make_lab: MakeLab, worker: Worker) -> None:
    """Its worker says Crashed at once; its task run is closed by the run that goes on, which is the same flow run."""
    search = Deployed.begin(make_lab, worker, "worker-kill")
    search.until(lambda: search.lab.checkpoints(0, search.name))
    os.kill(search.pid(), signal.SIGKILL)
    search.until_ended("CRASHED", "interrupted", None)
    assert search.view.tasks() == {"trial-0#1": "RUNNING Running"}
    search.goes_on(saved=False)
    search.view.set_flow("SCHEDULED", name="AwaitingRetry")
    search.ends_well()
    assert search.view.flows() == ["COMPLETED"]
    search.view.until_tasks({"trial-0#1": "CRASHED Crashed", "trial-0#2": DONE, "trial-1#1": DONE})


def test_a_suspended_flow_run_is_resumed(make_lab: MakeLab, worker: Worker) -> None:
    search = Deployed.begin(make_lab, worker, "worker-suspend")
    search.view.set_flow("PAUSED", name="Suspended", state_details={"pause_reschedule": True})
    search.until_ended("PAUSED", "stopped", "stopped: suspended in Prefect")
    search.view.until_tasks({"trial-0#1": PREEMPTED})
    search.goes_on()
    search.view.ask("POST", f"/flow_runs/{search.run}/resume", {})
    search.ends_well()
    assert search.view.flows() == ["COMPLETED"]
