"""A watch that hands restores over to a deployment, which is served by a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from support import DIED, Lab

SERVE = "from holdfast.flows.restore import restore; restore.serve(name='healing')"

WATCH = """
import json, sys
from holdfast.flows.watch import watch
print("SUMMARY", json.dumps(watch([sys.argv[1]], deployment="restore/healing")))
"""


def ask(lab: Lab, path: str, query: dict[str, Any] | None = None) -> Any:
    data = None if query is None else json.dumps(query).encode()
    request = Request(f"{lab.environment['PREFECT_API_URL']}/{path}", data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        return json.load(answer)


def is_served(lab: Lab) -> bool:
    try:
        return bool(ask(lab, "deployments/name/restore/healing"))
    except HTTPError:
        return False


@pytest.fixture
def served(lab: Lab) -> Iterator[Lab]:
    with (lab.folder / "serve.txt").open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            cwd=lab.folder,
            env=dict(lab.environment),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        lab.until(lambda: is_served(lab) or process.poll() is not None)
        yield lab
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_deployment_restores_once_for_a_crash_however_often_it_is_watched(served: Lab) -> None:
    lab = served
    spec = lab.spec(name="handed", search={"num_trials": 2}, recovery={"delay": 3600})
    lab.run("run", spec, fault="checkpoint.committed:4", code=DIED)
    mistyped = lab.run("watch", lab.folder / "runs", "--deployment", "restore/nobody", code=4)
    assert "'restore/nobody' cannot be run" in mistyped.output
    with lab.open("handed") as experiment:
        assert "recovering" not in {row.action for row in experiment.audit()}  # so it takes none of the restores away
    found = []
    for _ in range(3):
        ended = lab.python(WATCH, lab.folder / "runs")
        assert ended.code == 0, ended.output
        (line,) = [line for line in ended.output.splitlines() if line.startswith("SUMMARY ")]
        ((row,),) = [json.loads(line.removeprefix("SUMMARY "))["experiments"]]
        found.append(row)
    assert found[0]["result"].startswith("handed over to flow run ")
    assert all(row["result"] is None for row in found[1:])
    lab.until(lambda: lab.statuses("handed") == ["COMPLETED"] * 2)
    with lab.open("handed") as experiment:
        uuid = experiment.id
        assert [row.action for row in experiment.audit()].count("recovering") == 1
    deployment = ask(lab, "deployments/name/restore/healing")["id"]
    (run,) = ask(lab, "flow_runs/filter", {"flow_runs": {"deployment_id": {"any_": [deployment]}}})
    assert run["idempotency_key"] == f"holdfast-{uuid}-1-1"
    ended = lab.run("watch", lab.folder / "runs", "--deployment", "restore/nobody")
    assert "left alone" in ended.output
