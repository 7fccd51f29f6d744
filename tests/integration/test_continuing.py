"""A search that goes on in a new flow run after so many trials is one search: for its caller, in its rows, and in Prefect."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from support import PATIENCE, Lab

import holdfast

pytestmark = pytest.mark.timeout(900)  # it waits for several processes, each with patience

SEARCHES = """
import json, os, signal, sys
from pathlib import Path
import holdfast

HERE = Path.cwd()


def train(trial):
    state = trial.checkpoint.load() if trial.checkpoint else {"step": -1}
    for step in range(state["step"] + 1, 4):
        trial.report({"loss": (trial.config["x"] - 0.3) ** 2 / (step + 1)}, step=step, state={"step": step})


def flaky(trial):
    with (HERE / "flaky").open("a") as log:
        log.write(f"{trial.number}\\n")
    if trial.number == 1:
        raise RuntimeError("no luck")
    trial.report({"loss": trial.config["x"]}, step=0)


class Told(holdfast.Observer):
    def __init__(self, at=None, number=None):
        self.words, self.at, self.number = [], at, number

    def running(self, url):
        self.words.append("running")

    def opened(self, opened, *, restored):
        self.words.append("restored" if restored else "opened")

    def ended(self, result):
        self.words.append(result.reason)

    def say(self, text):
        if text.startswith("continued"):
            self.words.append("continued")
            if self.number is not None and self.words.count("continued") == self.at:
                os.kill(os.getpid(), self.number)


def spec(name, per_run, **more):
    search = {"engine": "random", "num_trials": 9, "seed": 3, "max_concurrent": 1, **more.pop("search", {})}
    return {
        "name": name, "trainable": more.pop("trainable", train), "storage": str(HERE / "runs"), "objectives": {"loss": "min"},
        "space": {"x": {"type": "float", "low": 0, "high": 1}}, "search": search, **more,
        "execution": {"isolation": "inline", "trials_per_run": per_run},
    }


def run(name, per_run, told=None, **more):
    told = told or Told()
    result = holdfast.search(spec(name, per_run, **more), observer=told)
    found = [[trial.status, trial.config, trial.step, trial.metrics, trial.attempts] for trial in result.trials]
    with holdfast.open(HERE / "runs" / name) as experiment:
        epoch = experiment.lease.epoch
    print("FOUND", json.dumps([name, found, told.words, result.reason, epoch]), flush=True)


KINDS = {
    "tpe": {"search": {"engine": "tpe"}},
    "asha": {"search": {"engine": "tpe"}, "stopping": {"rule": "asha", "min_steps": 1}},
    "population": {"search": {"num_trials": 3}, "population": {"interval": 2}},
}
"""

ALIKE = (
    SEARCHES
    + """
for kind, more in KINDS.items():
    run(kind, None, **more)
    run(f"{kind}-parts", {"tpe": 3, "asha": 5, "population": 4}[kind], **more)
run("single", 1, search={"num_trials": 2})
run("flaky", 1, trainable=flaky, search={"num_trials": 3}, failure={"max_failures": 2})
"""
)

SIGNALLED = (
    SEARCHES
    + """
try:
    run("signalled", 3, Told(1, signal.SIGINT))
except KeyboardInterrupt:
    with holdfast.open(HERE / "runs" / "signalled") as experiment:
        print("SIGINT", experiment.status, experiment.ended, len(experiment.trials), flush=True)
told = Told(1, signal.SIGTERM)
holdfast.restore(HERE / "runs" / "signalled", observer=told)
"""
)


def found_in(output: str) -> dict[str, Any]:
    lines = [json.loads(line.partition(" ")[2]) for line in output.splitlines() if line.startswith("FOUND ")]
    return {name: rest for name, *rest in lines}


def test_a_search_in_several_flow_runs_is_the_same_search(lab: Lab) -> None:
    ended = lab.python(ALIKE, timeout=4 * PATIENCE)  # eight searches
    found = found_in(ended.output)
    assert ended.code == 0, ended.output
    for kind, parts in (("tpe", 2), ("asha", 1), ("population", 2)):
        trials, told, reason, epoch = found[f"{kind}-parts"]
        alone, _, words, _ = found[kind]
        assert trials == alone, kind
        assert (reason, epoch) == (words, 1)
        assert told == ["opened", "running", *["continued"] * parts, words]
    assert [trial[0] for trial in found["single"][0]] == ["COMPLETED"] * 2
    # One retry budget for the whole search: the failed trial had its two retries, in flow runs of their own, and no more.
    trials, told, *_ = found["flaky"]
    assert [(trial[0], trial[4]) for trial in trials] == [("COMPLETED", 1), ("FAILED", 3), ("COMPLETED", 1)]
    assert told.count("continued") == 4
    assert sorted((lab.folder / "flaky").read_text().split()) == ["0", "1", "1", "1", "2"]


def test_a_signal_between_two_flow_runs_ends_the_search(lab: Lab) -> None:
    ended = lab.python(SIGNALLED, timeout=2 * PATIENCE)
    assert ended.code in (-signal.SIGTERM, 128 + signal.SIGTERM), ended.output
    assert "SIGINT interrupted interrupted: SIGINT 4" in ended.output, ended.output
    with holdfast.open(lab.path("signalled")) as experiment:
        assert (experiment.status, experiment.ended, experiment.lease.holder) == ("interrupted", "interrupted: SIGTERM", None)
        assert len(experiment.trials) == 7


DEPLOYED = """
import json, sys
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.flow_engine import load_flow_run, run_flow
from holdfast.flows.restore import restore
from holdfast.flows.search import search
from holdfast.testing.faults import install
import holdfast

path, parameters, fault = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
client = get_client(sync_client=True)
restore.to_deployment(name="restore").apply()
if parameters:
    deployment = search.to_deployment(name="continuing").apply()
    run = client.create_flow_run_from_deployment(deployment, parameters=parameters).id
    flow = search
else:
    run, flow = UUID(sys.argv[4]), restore
if fault:
    install(fault)
while run is not None:
    loaded = load_flow_run(run)
    print("RUN", run, json.dumps(loaded.parameters, sort_keys=True), flush=True)
    run_flow(flow, flow_run=loaded, parameters=loaded.parameters, return_type="state")
    ended = client.read_flow_run(run).state
    with holdfast.open(path) as experiment:
        print("STATE", ended.type.value, ended.name, experiment.status, experiment.ended, experiment.lease.holder, flush=True)
        key = f"holdfast-{experiment.id}-{experiment.lease.epoch}-continued"
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key])))
    print("LEFT", run, ended.message, flush=True)
    run, flow = (found[0].id if found else None), restore
"""


def test_a_deployments_search_goes_on_in_runs_of_the_deployment_restore(lab: Lab) -> None:
    execution = {"isolation": "inline", "trials_per_run": 2}
    spec = lab.spec(search={"engine": "tpe", "num_trials": 5}, execution=execution)
    arguments = (lab.path(), json.dumps({"spec": str(spec)}))
    died = lab.python(DEPLOYED, *arguments, "search.continued:1", timeout=2 * PATIENCE)
    assert died.code == -signal.SIGKILL, died.output
    # Nobody drives it, nothing failed, and no flow run goes on: it is told, and looked after, as what was cut off.
    shown = lab.run("show", lab.path()).output
    assert "continued: 2 trials have begun in this flow run; the flow run that goes on with it has not begun" in " ".join(
        shown.split()
    )
    (row,) = json.loads(lab.run("watch", lab.folder / "runs", "--dry-run", "--json").output)["experiments"]
    assert (row["verdict"], row["cause"]) == ("restore", "lost")
    assert "the flow run that was to go on with it did not" in row["why"]
    lab.run("restore", lab.path())
    assert lab.statuses() == ["COMPLETED"] * 5

    other = lab.spec(name="other", search={"engine": "tpe", "num_trials": 5}, execution=execution)
    ended = lab.python(DEPLOYED, lab.path("other"), json.dumps({"spec": str(other)}), "", timeout=2 * PATIENCE)
    assert ended.code == 0, ended.output
    states = [line for line in ended.output.splitlines() if line.startswith("STATE ")]
    continued = "STATE COMPLETED Continued interrupted continued: 2 trials have begun in this flow run None"
    assert states[:2] == [continued] * 2, ended.output
    assert states[2:] == ["STATE COMPLETED Completed completed completed: every trial of the budget was proposed None"]
    runs = [line.split(" ", 2) for line in ended.output.splitlines() if line.startswith("RUN ")]
    assert [json.loads(given) for _, _, given in runs[1:]] == [{"path": str(lab.path("other"))}] * 2
    assert f"flow run {runs[1][1]} of restore/restore goes on with it" in ended.output
    assert lab.outcome("other") == lab.outcome()
    # A run that comes once more, when others have gone on, does nothing: it was to go on from an older state.
    late = lab.python(DEPLOYED, lab.path("other"), "{}", "", runs[1][1])
    assert "STATE COMPLETED" in late.output, late.output
    with holdfast.open(lab.path("other")) as experiment:
        assert experiment.lease.epoch == 3


STOPPED = (
    SEARCHES
    + """
class Stops(Told):
    def trial(self, trial):
        if trial.number == 2 and trial.status == "COMPLETED" and "asked" not in self.words:
            self.words.append("asked")
            with holdfast.open(HERE / "runs" / "stopped") as experiment:
                experiment.stop()


run("stopped", 3, Stops())
"""
)


def test_a_search_that_is_stopped_just_before_it_goes_on_does_not(lab: Lab) -> None:
    ended = lab.python(STOPPED, timeout=2 * PATIENCE)
    assert ended.code == 0, ended.output
    trials, told, reason, _ = found_in(ended.output)["stopped"]
    assert [trial[0] for trial in trials] == [*["COMPLETED"] * 3, "PENDING"]  # the last one was proposed for the next flow run
    assert (told, reason) == (["opened", "running", "asked", "stopped on request"], "stopped on request")
    with holdfast.open(lab.path("stopped")) as experiment:
        assert experiment.ended == "stopped on request"
