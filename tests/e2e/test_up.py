"""``holdfast up`` as real processes: what it starts, who finds it, how it ends, and what is left when it is killed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
from support import Lab, Running, begin, holdfast_environment
from support_postgres import Postgres, with_extensions
from support_prefect import View, make_endless

import holdfast
from holdfast.storage.database.experiments import by_uuid
from holdfast.testing.runs import PATIENCE

pytestmark = pytest.mark.xdist_group("worker")


@pytest.fixture
def environment(tmp_path: Path, prefect_home: Path, prefect_url: str) -> dict[str, str]:
    """The environment of somebody who has set nothing up; the cache has an empty database of Prefect's already."""
    return holdfast_environment(
        XDG_DATA_HOME=str(tmp_path / "data"),
        PREFECT_HOME=str(tmp_path / "prefect"),
        XDG_CACHE_HOME=str(prefect_home / "cache"),
        PREFECT_PROFILES_PATH=str(tmp_path / "profiles.toml"),
    )


@pytest.fixture
def lab(tmp_path: Path, environment: Mapping[str, str]) -> Iterator[Lab]:
    found = Lab(tmp_path / "lab", environment, steps=5)
    yield found
    found.close()


class Machine:
    """A `holdfast up`, until it is ready or has ended."""

    def __init__(self, lab: Lab, *options: str) -> None:
        self.lab = lab
        words = [sys.executable, "-m", "holdfast.cli", "up", "--port", "0", "--storage", "runs", *options]
        self.run: Running = begin(lab, *words)
        self.process = psutil.Process(self.run.process.pid)
        lab.until(lambda: "Ctrl-C ends everything" in self.output, self.run, seconds=180)
        self.state = json.loads((self.folder.parent / "up.json").read_text())
        self.url = str(self.state["url"])

    @property
    def folder(self) -> Path:
        return Path(self.lab.environment["XDG_DATA_HOME"]) / "holdfast" / "up"

    @property
    def output(self) -> str:
        return self.run.log.read_text()

    def below(self) -> list[psutil.Process]:
        return self.process.children(recursive=True)

    def ends_by(self, number: signal.Signals, code: int) -> None:
        """Send a signal and wait until it, and everything that it had started, has ended."""
        below = self.below()
        assert below
        self.process.send_signal(number)
        assert self.run.process.wait(PATIENCE) == code, self.output
        gone, left = psutil.wait_procs(below, timeout=PATIENCE)
        assert not left, (left, gone)


def record(lab: Lab, name: str) -> tuple[str, Any]:
    with holdfast.open(lab.path(name)) as experiment:
        found = by_uuid(experiment._opened.database, experiment.id)
        return experiment.status, found and found.ended


def test_one_machine(lab: Lab) -> None:
    """A second one is told of the first; runs find it; it is killed, and the next one goes on with what was running."""
    first = Machine(lab)
    assert first.state["ui"] in first.output
    assert max(map(len, first.output.replace(str(first.folder), "~/.local/share/holdfast/up").splitlines())) <= 100
    with urlopen(first.state["ui"], timeout=30) as page:
        assert b"Prefect" in page.read()

    second = lab.run("up", "--port", "0", code=3)
    assert f"process {first.process.pid} of" in second.output
    assert first.state["ui"] in second.output

    # A run in a shell without any setting of Prefect's is on that server.
    lab.run("run", lab.spec(name="shell", search={"num_trials": 1}))
    assert first.state["ui"] in lab.run("deploy", "--storage", "runs").output
    view = View(Lab(lab.folder / "view", {**lab.environment, "PREFECT_API_URL": first.url}), "shell")
    assert view.flows() == ["COMPLETED"]

    # One by the worker, cut off with everything else.
    make_endless(lab)
    slow = lab.order("slow", 0, 0)
    spec = lab.spec(name="cut-off", search={"num_trials": 1})
    deployment = view.ask("GET", "/deployments/name/search/search")["id"]
    view.ask("POST", f"/deployments/{deployment}/create_flow_run", {"parameters": {"spec": str(spec)}})
    lab.until(lambda: lab.checkpoints(0, "cut-off") if (lab.path("cut-off") / "experiment.json").exists() else None)
    first.ends_by(signal.SIGKILL, -signal.SIGKILL)
    assert record(lab, "cut-off") == ("interrupted", None)
    kept = lab.checkpoints(0, "cut-off")[-1].step

    # What it said of itself is still there, and misleads nobody.
    assert (first.folder.parent / "up.json").exists()
    lab.run("show", lab.path("cut-off"))
    next_one = Machine(lab)
    lab.until(lambda: any(entry.event == "start" and entry.attempt == 2 for entry in lab.log()))
    begun = next(entry.step for entry in lab.log() if entry.event == "start" and entry.attempt == 2)
    assert begun == kept + 1

    # Told to end, everything ends in order: the search has saved what it reported.
    lab.until(lambda: any(entry.event == "step" and entry.attempt == 2 for entry in lab.log()))
    next_one.ends_by(signal.SIGINT, 130)
    status, ended = record(lab, "cut-off")
    assert (status, str(ended).partition(":")[0]) == ("interrupted", "interrupted")
    last = [entry.step for entry in lab.log() if entry.event == "step"][-1]
    assert lab.checkpoints(0, "cut-off")[-1].step == last
    assert not (first.folder.parent / "up.json").exists()
    slow.unlink()


@pytest.fixture(scope="module")
def contrib() -> Iterator[Postgres]:
    """A PostgreSQL server with the extension that Prefect's server needs."""
    source = with_extensions()
    if source is None:
        pytest.skip("no PostgreSQL with the extension pg_trgm is there")
    with Postgres(source) as server:
        yield server


def test_on_postgresql(lab: Lab, contrib: Postgres) -> None:
    """Prefect's server gets a database of its own; the password is nowhere but in environments."""
    password = "c0rrect-h0rse"
    with contrib.admin() as connection:
        connection.execute(f"CREATE ROLE machine LOGIN CREATEDB PASSWORD '{password}'")
        connection.execute("CREATE ROLE small LOGIN PASSWORD 'x'")
        connection.execute("CREATE DATABASE lab OWNER machine")
    url = contrib.tcp("lab", user="machine", password=password)
    refused = lab.run("up", "--port", "0", code=4, HOLDFAST_DATABASE_URL=contrib.tcp("lab", user="small", password="x"))
    assert 'CREATE DATABASE "lab_prefect" OWNER small' in refused.output

    lab.environment = {**lab.environment, "HOLDFAST_DATABASE_URL": url}
    machine = Machine(lab, "--no-worker", "--no-automations")
    assert "lab_prefect" in machine.output
    with urlopen(f"{machine.url}/health", timeout=30) as answer:
        assert answer.read() == b"true"
    with contrib.admin("lab_prefect") as connection:
        row = connection.execute("SELECT count(*) FROM deployment").fetchone()
        assert row is not None
        assert row[0] >= 3
    assert not (machine.folder / "prefect.db").exists()
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    said = [machine.output, shown, *(log.read_text(errors="replace") for log in machine.folder.glob("*.log"))]
    said.append((machine.folder.parent / "up.json").read_text())
    assert not any(password in text for text in said)
    machine.ends_by(signal.SIGTERM, 143)
    assert re.search(r"everything has ended\s*$", machine.output)
