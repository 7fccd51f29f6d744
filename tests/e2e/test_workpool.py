"""Trials as flow runs that a worker of a process work pool runs: retried, cancelled, killed; the search killed and restored."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from support import DIED, PATIENCE, Lab, MakeLab, executed
from support_prefect import ENDLESS, View, Worker

from holdfast.core.trial import Outcome
from holdfast.storage.database import workers

pytestmark = [pytest.mark.xdist_group("workpool"), pytest.mark.timeout(1800)]  # it waits for many things, one after another

NAME = "pooled-story"
"""Of the experiment: no other test has it."""
POOL = "trials"
DEPLOYMENT = "trial/pooled"
STEPS = 5
TERMINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server_environment: dict[str, str]) -> Iterator[Worker]:
    started = Worker.start(POOL, tmp_path_factory.mktemp("workpool"), server_environment)
    yield started
    started.stop()


class Trials:
    """The flow runs of the trials of a search."""

    def __init__(self, view: View) -> None:
        self.view = view

    def every(self) -> dict[str, dict[str, Any]]:
        """Return them by what follows the experiment's name, such as trial-0#1."""
        query = {"flow_runs": {"name": {"like_": f"{self.view.name}/trial-"}}, "limit": 200}
        found = self.view.ask("POST", "/flow_runs/filter", query)
        return {str(run["name"]).rpartition("/")[2]: run for run in found}

    def state(self, name: str) -> str | None:
        run = self.every().get(name)
        return None if run is None else f"{run['state_type']} {run['state_name']}"

    def tasks(self) -> list[dict[str, Any]]:
        """Return every task run of theirs, and those that stand for them in the searches."""
        query: dict[str, Any] = {"task_runs": {"name": {"like_": f"{self.view.name}/trial-"}}, "limit": 200}
        found: list[dict[str, Any]] = self.view.ask("POST", "/task_runs/filter", query)
        return found


def deploy(view: View, lab: Lab) -> None:
    flow = view.ask("POST", "/flows/", {"name": "trial"})["id"]
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(lab.folder)}}
    deployment = {
        "name": "pooled",
        "flow_id": flow,
        "entrypoint": "holdfast.flows.trial.trial",
        "work_pool_name": POOL,
        "pull_steps": [step],
        "tags": ["holdfast"],
        "enforce_parameter_schema": False,
    }
    view.ask("POST", "/deployments/", deployment)


def supervisor_of(lab: Lab, trial: int) -> int | None:
    """Return the process in which the flow run of a trial's current attempt runs."""
    with lab.open(NAME) as experiment:
        database = experiment._opened.database
        attempt = experiment.trials[trial].attempt
        found = workers.of_attempt(database, attempt.id)
        return None if found is None or found.left is not None else found.pid


def test_a_search_whose_trials_are_flow_runs_survives_everything(make_lab: MakeLab, worker: Worker) -> None:
    lab = make_lab(steps=STEPS)
    # Trial 0 fails in its first attempt; those that are ordered to be slow take step after step.
    text = ENDLESS.replace('if ordered("fail",', 'if trial.attempt == 1 and ordered("fail",')
    text = text.replace("Path(__file__).parent", f"Path({str(lab.folder)!r})")  # the code travels, the log stays
    (lab.folder / "train.py").write_text(f"import itertools\n{text}")
    lab.order("fail", 0, 1)
    slow = [lab.order("slow", number, 0) for number in (1, 2)]
    view = View(lab, NAME)
    trials = Trials(view)

    def until(condition: Any, process: Any = None) -> None:
        try:
            lab.until(condition, process)
        except AssertionError as error:
            said = {name: run["state_type"] for name, run in trials.every().items()}
            said |= {run["name"]: (run["state_type"], run["state_name"], run["flow_run_id"]) for run in trials.tasks()}
            raise AssertionError(f"{error}\n{said}\n{worker.log.read_text()[-5000:]}") from None

    until(lambda: POOL in [pool["name"] for pool in view.ask("POST", "/work_pools/filter", {})])
    deploy(view, lab)
    spec = lab.spec(
        name=NAME,
        search={"num_trials": 4, "max_concurrent": 2},
        failure={"max_failures": 1},
        checkpoints={"save_period": 1},
        execution={"runner": "workpool", "deployment": DEPLOYMENT},
    )
    search = lab.start("run", spec)

    def statuses() -> list[str]:
        return lab.statuses(NAME)

    # A trial that fails is retried, in a flow run of its own, beside one that is slow.
    until(lambda: any(entry.trial == 1 and entry.step >= 10 for entry in lab.log()), search)
    until(lambda: trials.state("trial-0#1") == "FAILED Failed", search)
    until(lambda: statuses()[0] == "COMPLETED", search)

    # A flow run that a person cancels is a trial that is cancelled; the search goes on.
    run = trials.every()["trial-1#1"]["id"]
    view.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}, "force": False})
    until(lambda: statuses()[1] == "CANCELLED", search)

    # A process that is killed is a lost attempt, and its trial goes on in another one.
    until(lambda: any(entry.trial == 2 and entry.step >= 5 for entry in lab.log()), search)
    until(lambda: supervisor_of(lab, 2) is not None, search)
    pid = supervisor_of(lab, 2)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: any((entry.event, entry.trial, entry.attempt) == ("start", 2, 2) for entry in lab.log()), search)
    with lab.open(NAME) as experiment:
        first = next(attempt for attempt in experiment.attempts(2) if attempt.number == 1)
    assert first.outcome is Outcome.LOST

    # The search is killed; a restore runs what is left, once.
    until(lambda: statuses()[3] == "COMPLETED", search)
    until(lambda: any(entry.trial == 2 and entry.attempt == 2 and entry.event == "step" for entry in lab.log()), search)
    search.kill()
    assert search.wait().code == DIED
    restored = lab.start("restore", lab.path(NAME))
    # The attempt that ran is fenced by now: had it been let go before, it might have come to its end, and run once more.
    until(lambda: any(entry.event == "start" and entry.trial == 2 and entry.attempt > 2 for entry in lab.log()), restored)
    for file in slow:
        file.unlink()
    ended = restored.wait(2 * PATIENCE)
    assert ended.code == 0, ended.output
    assert statuses() == ["COMPLETED", "CANCELLED", *["COMPLETED"] * 2]
    for number in (0, 3):
        assert executed(lab.log(), number)[-STEPS:] == list(range(STEPS))
    done = [entry.trial for entry in lab.log() if entry.event == "done"]
    assert len(set(done)) == len(done)

    # Prefect says the same of each of them, and nothing runs there any more.
    until(lambda: {run["state_type"] for run in trials.every().values()} <= TERMINAL)
    until(lambda: {run["state_type"] for run in trials.tasks()} <= TERMINAL)
    assert view.flows() == ["CRASHED", "COMPLETED"]
    runs = trials.every()
    assert {name: runs[name]["state_type"] for name in ("trial-0#1", "trial-0#2", "trial-1#1", "trial-2#1")} == {
        "trial-0#1": "FAILED",
        "trial-0#2": "COMPLETED",
        "trial-1#1": "CANCELLED",
        "trial-2#1": "CRASHED",
    }
    assert all({"holdfast", f"experiment:{NAME}"} <= set(run["tags"]) for run in runs.values())
    assert all(run["parent_task_run_id"] for run in runs.values())
