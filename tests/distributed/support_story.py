"""One story of a search over several hosts, which engine ever runs its trials: cables, workers and the driver are lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import yaml
from psycopg import sql
from s3_server import S3
from support import HOLDFAST, holdfast_environment
from support_hosts import PATIENCE, Network, Process, network, until
from support_postgres import Postgres

from holdfast.core.spec import ExperimentSpec
from holdfast.engines.factory import make_proposer
from holdfast.storage.database import experiments, workers
from holdfast.storage.database.reads import Reader
from holdfast.testing.crashes import Place, Seen
from holdfast.testing.executed import Entry, executed, read

TRAINABLE = '''\
"""Does STEPS steps, one report and checkpoint each, and holds before two of them until the host has a file of that name."""
import time
from pathlib import Path
from holdfast.testing.executed import recorded

STEPS = 6
HERE = Path("/tmp/work")
GATES = {3: "first", 5: "second"}


def train(trial):
    start, w = 0, 0.0
    if trial.checkpoint:
        start, w = trial.checkpoint.step + 1, trial.checkpoint.load()["w"]
    for step in range(start, STEPS):
        while step in GATES and not (HERE / GATES[step]).exists():
            time.sleep(0.02)
        w = 0.5 * w + trial.config["x"] + step
        trial.report({"loss": w}, step=step, state={"w": w})


train = recorded(train, HERE)
'''
STEPS, TRIALS = 6, 6
DRIVERS = ("driver", "other")
WORKERS = ("left", "right")
SPEC: Mapping[str, Any] = {
    "name": "far",
    "trainable": "train.py:train",
    "objectives": {"loss": "min"},
    "space": {"x": {"type": "float", "low": 0.0, "high": 4.0}},
    "search": {"engine": "random", "num_trials": TRIALS, "seed": 7, "max_concurrent": 4},
}


@dataclass
class Story:
    """A cluster of two worker hosts, a host for the engine's head, two to drive from; services at the network's address."""

    net: Network
    engine: str
    address: str
    storage: str
    options: Mapping[str, Any]
    database: str
    """as the hosts reach it"""
    seen_from_here: str
    """the database as it is reached from here"""
    folder: Path
    before: dict[str, int] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"{self.storage}/far"

    # The search

    def drive(self, host: str, *command: str) -> Process:
        """Run ``holdfast`` on a host, which alone knows how to reach database and store."""
        known = {"HOLDFAST_STORAGE_OPTIONS": json.dumps(dict(self.options)), "HOLDFAST_DATABASE_URL": self.database}
        return self.net[host].run(HOLDFAST, *command, environment=known)

    def begin(self) -> Process:
        execution = {"runner": self.engine, "address": self.address}
        for host in DRIVERS:  # whoever drives has the code
            (self.net[host].work / "train.py").write_text(TRAINABLE)
        (self.net["driver"].work / "far.yaml").write_text(
            yaml.safe_dump({**SPEC, "storage": self.storage, "execution": execution})
        )
        return self.drive("driver", "run", "far.yaml")

    def open(self, gate: str, host: str) -> None:
        (self.net[host].work / gate).touch()

    def shut(self, gate: str, host: str) -> None:
        (self.net[host].work / gate).unlink(missing_ok=True)

    def log(self, host: str) -> list[Entry]:
        return read(self.net[host].work)

    def logs(self) -> list[Entry]:
        """Return what was executed on all hosts, in the order of time: they share the kernel's clock."""
        return sorted((entry for host in WORKERS for entry in self.log(host)), key=lambda entry: entry.time)

    def reported(self, step: int, host: str | None = None) -> set[int]:
        """Return the trials that have reported a step."""
        log = self.logs() if host is None else self.log(host)
        return {entry.trial for entry in log if entry.event == "reported" and entry.step == step}

    # Rows

    @contextmanager
    def reading(self) -> Iterator[tuple[Any, Any]]:
        with closing(experiments.open_database(self.seen_from_here, readonly=True)) as database:
            [record] = experiments.every(database)
            yield database, record

    def outcomes(self) -> dict[tuple[int, int], str | None]:
        """Return how each attempt ended, by trial and number."""
        with self.reading() as (database, record):
            found = Reader(database, record.id).attempts()
        return {
            (trial, number): one.outcome and one.outcome.value for trial, own in found.items() for number, one in own.items()
        }

    def worker_pids(self, host: str) -> list[int]:
        """Return the numbers, outside of their host, of the worker processes that have a row and have not left."""
        with self.reading() as (database, record):
            rows = [row for row in workers.every(database, record.id) if row.hostname == host and row.left is None]
        return [pid for row in rows for pid in [self.net[host].outer(row.pid)] if pid is not None]

    def look(self) -> Seen:
        place = Place(location=self.path, database=self.seen_from_here, options=self.options, work=self.folder / "looked")
        seen = place.look()
        assert seen is not None
        return seen

    def configs(self) -> list[dict[str, Any]]:
        """Return the configs of a search that nothing interrupts."""
        spec = ExperimentSpec.parse({**SPEC, "storage": self.storage})
        proposer = make_proposer(spec, 7)
        offered: list[Any] = [proposer.propose(number) for number in range(TRIALS)]
        return [dict(getattr(one, "config", one)) for one in offered]


def told(story: Story, *, revive: Callable[[], object]) -> None:
    """Tell the story, and check what must be true at its end. ``revive`` lets the engine know the host ``right`` again."""
    net = story.net
    run = story.begin()
    until(lambda: len(story.reported(2)) == 4, run)
    placed = {host: story.reported(2, host) for host in WORKERS}
    assert all(len(trials) == 2 for trials in placed.values()), placed

    # One host is cut off, and its trials go on there: what they write must not count. A worker dies on the other one.
    net["right"].cut()
    story.open("first", "right")
    [*victims] = story.worker_pids("left")
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    until(lambda: {e.trial for e in story.log("right") if e.event == "step" and e.step == 3} == placed["right"], run)
    until(lambda: all(story.outcomes()[number, 1] == "lost" for number in range(4)), run)
    story.open("first", "left")
    until(lambda: story.reported(4, "left"), run)
    net["right"].join()
    revive()

    # The driver dies; of two restores on other hosts one drives.
    run.kill()
    story.shut("first", "right")
    begun = len(story.log("right"))
    restored = story.drive("other", "restore", story.path)
    restored.until("trials:")
    refused = story.drive("driver", "restore", story.path)
    assert refused.wait() == 3, refused.output
    assert "other" in refused.output
    until(lambda: any(entry.event == "start" for entry in story.log("right")[begun:]), restored)
    for host in WORKERS:
        story.open("first", host)
        story.open("second", host)
    assert restored.wait(2 * PATIENCE) == 0, restored.output
    _check(story, placed)


def _check(story: Story, placed: Mapping[str, set[int]]) -> None:
    seen, log = story.look(), story.logs()
    assert [seen.trials[number].status.value for number in range(TRIALS)] == ["COMPLETED"] * TRIALS
    assert [dict(seen.trials[number].config) for number in range(TRIALS)] == story.configs()
    assert sorted(entry.trial for entry in log if entry.event == "done") == [*range(TRIALS)]
    again = {(number, 3) for number in placed["right"]}  # executed where nobody could be told of it
    for number in range(TRIALS):
        steps = [row.step for row in seen.reports if row.trial == number and row.canonical and row.step >= 0]
        assert steps == [*range(STEPS)]
        assert sorted(executed(log, number)) == sorted([*range(STEPS), *(step for trial, step in again if trial == number)])
        outcomes = [one.outcome and one.outcome.value for _, one in sorted(seen.attempts[number].items())]
        assert outcomes[-1] == "completed"
        assert set(outcomes[:-1]) <= {"lost"}
    assert all(seen.attempts[number][1].outcome == "lost" for number in range(4))
    late = {(row.trial, row.attempt, row.step) for row in [*seen.reports, *seen.checkpoints]}
    assert not late & {(number, 1, 3) for number in placed["right"]}
    held = [path for number in placed["right"] for path in seen.held[number]]
    assert not [path for path in held if "step_00000003-a1-" in path]
    epochs = {one.epoch for own in seen.attempts.values() for one in own.values()}
    assert epochs == {1, 2}


@contextmanager
def story_of(
    engine: str, folder: Path, postgres: Postgres, s3: S3, prefect_url: str, start: Callable[[Network], str]
) -> Iterator[Story]:
    """Have a network with its services and a cluster; ``start`` starts that, and returns its address."""
    environment = holdfast_environment(RAY_USAGE_STATS_ENABLED="0", HOLDFAST_GRACE_SECONDS="15")
    environment = {name: value for name, value in environment.items() if not name.startswith("AWS_")}
    names = ("head", *WORKERS, *DRIVERS)
    with network(folder, names, environment) as net:
        prefect, store = net.offer(_port(prefect_url)), net.offer(_port(s3.endpoint))
        for host in net.hosts.values():
            host.environment["PREFECT_API_URL"] = f"http://{net.address}:{prefect}/api"
        name = postgres.create()
        role, word = f"far_{name}", "hop @%/"
        with postgres.admin(name) as connection:
            _owner(connection, role, word)
        there = urlsplit(postgres.tcp(name, user=role, password=word))
        database = there._replace(netloc=f"{there.netloc.rpartition('@')[0]}@{net.address}:{net.offer(postgres.port)}").geturl()
        options = {**s3.options, "endpoint_url": f"http://{net.address}:{store}"}
        bucket = s3.bucket()
        yield Story(net, engine, start(net), f"{bucket}/runs", options, database, postgres.text(name), folder)


def _owner(connection: psycopg.Connection[Any], role: str, word: str) -> None:
    connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(word)))
    for what in ("TABLES", "SEQUENCES"):
        words = f"GRANT ALL ON ALL {what} IN SCHEMA public TO {{}}"
        connection.execute(sql.SQL(words).format(sql.Identifier(role)))  # type: ignore[arg-type]


def _port(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port
