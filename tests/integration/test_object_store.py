"""Searches whose experiment lies on an object store: run, killed, restored from the prefix alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from s3_server import S3
from support import DIED, Lab, executed, starts, steps_of

import holdfast
from holdfast.storage.objects import ObjectRoot

FAST = {"HOLDFAST_GRACE_SECONDS": "5"}


@pytest.fixture
def remote(s3: S3, tmp_path: Path, server_environment: dict[str, str]) -> Any:
    """A function that makes laboratories whose storage is a bucket, with work and data folders of their own."""
    labs: list[Lab] = []

    def make(name: str = "lab", *, storage: str | None = None, kind: str = "test", **options: Any) -> Lab:
        folder = tmp_path / name
        changes = {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_DATA_HOME": str(folder / "data"), **s3.environment}
        lab = Lab(
            folder,
            {**server_environment, **changes},
            storage=storage or s3.bucket(kind) + "/runs [x] ü",
            options=s3.options,
            **options,
        )
        labs.append(lab)
        return lab

    yield make
    for lab in labs:
        lab.close()


Make = Callable[..., Lab]


def objects(lab: Lab, s3: S3) -> list[str]:
    """Return the names of all objects of the storage."""
    assert lab.storage is not None
    return list(ObjectRoot(lab.storage, s3.options).files(""))


def below(lab: Lab, s3: S3, prefix: str) -> list[str]:
    return [name for name in objects(lab, s3) if name.startswith(prefix)]


def work(lab: Lab) -> list[str]:
    """Return the files that are left where the host worked."""
    return sorted(str(file.relative_to(lab.folder)) for file in (lab.folder / "cache" / "holdfast" / "work").rglob("*"))


def test_a_search_on_an_object_store(remote: Make, s3: S3) -> None:
    lab = remote()
    said = lab.run("run", lab.spec()).output
    assert f"path: {lab.path()}" in said
    assert lab.statuses() == ["COMPLETED"] * 4
    assert all(steps_of(lab, number) == [0, 1, 2] for number in range(4))
    names = objects(lab, s3)
    for number in range(4):
        assert f"exp/trials/{number:06d}/result-a1.json" in names
        assert any(name.startswith(f"exp/trials/{number:06d}/checkpoints/step_00000002-a1-") for name in names)
    assert work(lab) == []
    assert not any((lab.folder / "runs").glob("*")) if (lab.folder / "runs").exists() else True

    assert lab.json("list", lab.storage)[0]["path"] == lab.path()
    assert lab.json("show", lab.path())["status"] == "completed"
    assert len(lab.json("trials", lab.path())) == 4
    lab.run("checkpoints", lab.path(), "--verify")
    assert "nothing is left to do" in lab.run("restore", lab.path()).output
    assert holdfast.can_restore(lab.path(), database=f"sqlite:///{lab.database}", storage_options=s3.options)
    secret = s3.options["secret"]
    assert not any(secret in row for row in lab.dump())

    elsewhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    lab.run("show", lab.path(), "--storage-option", f"endpoint_url={s3.endpoint}", **elsewhere)
    assert "does not answer" in lab.run("show", lab.path(), code=4, **elsewhere).output

    taken = lab.run("run", lab.spec(), code=2).output
    assert f"holdfast restore {lab.path()}" in taken
    lab.run("delete", lab.path(), "--yes")
    assert objects(lab, s3) == []


def test_credentials_in_a_spec_are_stored_nowhere(remote: Make, s3: S3, prefect_url: str) -> None:
    """Not in the database, not on the store, not in Prefect, not in what is printed."""
    lab = remote()
    secret = "a-secret-of-the-tests" if s3.own else s3.options["secret"]
    options = {**s3.options, "secret": secret}
    lab.environment = {name: value for name, value in lab.environment.items() if not name.startswith("AWS_")}
    said = lab.run("run", lab.spec(storage_options=options, search={"num_trials": 2})).output
    given = [word for name, value in options.items() for word in ("--storage-option", f"{name}={value}")]
    said += lab.run("restore", lab.path(), *given, "--set", "search.num_trials=3").output
    said += lab.run("show", lab.path(), *given, "--json").output
    assert secret not in said
    assert not any(secret in row for row in lab.dump())
    root = ObjectRoot(lab.path(), s3.options)
    assert not any(secret.encode() in (root.read(name) or b"") for name in root.files(""))
    files = [file for folder in ("cache", "data") for file in (lab.folder / folder).rglob("*") if file.is_file()]
    assert not [file for file in files if secret.encode() in file.read_bytes()]
    for kind, order in (
        ("flow_runs", "START_TIME_DESC"),
        ("task_runs", "EXPECTED_START_TIME_DESC"),
        ("logs", "TIMESTAMP_DESC"),
    ):
        body = json.dumps({"sort": order, "limit": 200}).encode()
        request = Request(f"{prefect_url}/{kind}/filter", body, {"Content-Type": "application/json"})
        with urlopen(request) as answer:
            found = answer.read().decode()
        assert lab.path() in found or kind != "flow_runs", "the restore is among them"
        assert secret not in found


@pytest.mark.parametrize("cache", ["kept", "deleted"])
def test_killed_in_the_middle_and_restored(remote: Make, s3: S3, cache: str) -> None:
    """Every trial runs once; the interrupted ones go on from their newest checkpoints, which are fetched."""
    lab = remote(steps=6)
    holds = [lab.order("hold", 1, 3), lab.order("hold", 2, 2)]
    process = lab.start("run", lab.spec(search={"max_concurrent": 2, "num_trials": 5}))
    lab.until_logged("hold", 1, 3, process)
    lab.until_logged("hold", 2, 2, process)
    pids = {entry.pid for entry in lab.log() if entry.event == "hold"}
    process.kill()
    lab.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    for hold in holds:
        hold.unlink()
    if cache == "deleted":
        shutil.rmtree(lab.folder / "cache" / "holdfast" / "work")
    plan = {row["trial"]: row for row in lab.json("restore", lab.path(), "--plan")}
    assert (plan[1]["action"], plan[2]["action"]) == ("resume", "resume")
    lab.run("restore", lab.path())
    assert lab.statuses() == ["COMPLETED"] * 5
    assert all(steps_of(lab, number) == list(range(6)) for number in range(5))
    assert starts(lab.log(), 1) == [(1, 0), (2, 3)]
    assert starts(lab.log(), 2) == [(1, 0), (2, 2)]
    assert all(executed(lab.log(), number) == list(range(6)) for number in range(5))
    assert work(lab) == []


def test_the_prefix_is_enough(remote: Make, s3: S3) -> None:
    """R17: killed, then restored by a host that has neither the database nor the work folder. Each byte comes once."""
    lab = remote(steps=6)
    hold = lab.order("hold", 1, 3)
    process = lab.start("run", lab.spec(search={"num_trials": 3}))
    lab.until_logged("hold", 1, 3, process)
    process.kill()
    hold.unlink()
    for name in ("data", "cache"):
        shutil.rmtree(lab.folder / name)
    assert [row["path"] for row in lab.json("list", lab.storage)] == [lab.path()]
    newest = ObjectRoot(lab.path(), s3.options).names("trials/000001/checkpoints")[-1]
    before = s3.requests("GET", f"{newest}/state.json") if s3.own else 0
    lab.run("restore", lab.path())
    if s3.own:
        assert s3.requests("GET", f"{newest}/state.json") == before + 1
    assert lab.statuses() == ["COMPLETED"] * 3
    assert starts(lab.log(), 1) == [(1, 0), (2, 3)]
    assert all(executed(lab.log(), number) == steps_of(lab, number) == list(range(6)) for number in range(3))


def test_a_damaged_checkpoint_is_not_used(remote: Make, s3: S3) -> None:
    """R15: the one before counts, and the reason is shown."""
    lab = remote(steps=5)
    hold = lab.order("hold", 0, 3)
    process = lab.start("run", lab.spec(search={"num_trials": 1}, checkpoints={"keep_last": 3}))
    lab.until_logged("hold", 0, 3, process)
    process.kill()
    hold.unlink()
    newest = lab.checkpoints(0)[-1]
    root = ObjectRoot(lab.path(), s3.options)
    content = root.read(f"{newest.path}/state.json")
    assert content is not None
    root.write(f"{newest.path}/state.json", content[:-1])
    said = lab.run("restore", lab.path()).output
    assert "state.json has a size of" in said
    assert starts(lab.log(), 0) == [(1, 0), (2, 2)]
    assert steps_of(lab, 0) == list(range(5))


def test_a_callable_travels_with_the_experiment(remote: Make) -> None:
    lab = remote()
    code = """
import os, sys
import holdfast

def train(trial):
    print("hello from trial", trial.number)
    trial.report({"loss": trial.config["x"]}, step=0)

spec = {"name": "exp", "storage": sys.argv[1], "trainable": train, "objectives": {"loss": "min"},
        "space": {"x": {"type": "float", "low": 0, "high": 1}}, "search": {"engine": "random", "num_trials": 2, "seed": 1}}
with holdfast.create(spec) as experiment:
    assert experiment.path == sys.argv[1] + "/exp", experiment.path
"""
    done = lab.python(code, lab.storage)
    assert done.code == 0, done.output
    shutil.rmtree(lab.folder / "cache" / "holdfast" / "work", ignore_errors=True)
    lab.run("restore", lab.path())
    assert lab.statuses() == ["COMPLETED"] * 2
    log = ObjectRoot(lab.path(), lab.options or {}).read("trials/000001/log-a1.txt")
    assert log is not None
    assert b"hello from trial 1" in log


@pytest.mark.parametrize("kind", ["s3fs", "memory"])
def test_a_search_on_a_callers_own_file_system(remote: Make, s3: S3, kind: str) -> None:
    """Only the file system knows how to reach the storage; it is given again to whatever opens the experiment."""
    lab = remote()
    lab.environment = {name: value for name, value in lab.environment.items() if not name.startswith("AWS_")}
    code = """
import json, sys
import holdfast, s3fs
from fsspec.implementations.memory import MemoryFileSystem
from holdfast.core.errors import SpecError

def train(trial):
    trial.report({"loss": trial.config["x"]}, step=0, state={"x": trial.config["x"]})

kind, storage, database = sys.argv[1:4]
fs = MemoryFileSystem() if kind == "memory" else s3fs.S3FileSystem(**json.loads(sys.argv[4]))
spec = {"name": "exp", "storage": storage.partition("://")[2], "trainable": train, "objectives": {"loss": "min"},
        "space": {"x": {"type": "float", "low": 0, "high": 1}}, "database": database,
        "search": {"engine": "random", "num_trials": 2, "seed": 1}}
result = holdfast.search(spec, filesystem=fs)
assert [str(trial.status) for trial in result.trials] == ["COMPLETED"] * 2
path = storage.partition("://")[2] + "/exp"
assert holdfast.can_restore(path, database=database, filesystem=fs)
result = holdfast.restore(path, database=database, filesystem=fs, changes={"search.num_trials": 3})
assert len(result.trials) == 3
with holdfast.open(path, database=database, filesystem=fs) as experiment:
    assert len(experiment.trials) == 3
    print("path", experiment.path)
try:
    holdfast.open(path, filesystem=fs, storage_options={"a": 1})
except SpecError as error:
    print(error)
"""
    storage = str(lab.storage) if kind == "s3fs" else "memory://given/runs"
    done = lab.python(code, kind, storage, f"sqlite:///{lab.folder}/given.db", json.dumps(s3.options))
    assert done.code == 0, done.output
    assert f"path {storage}/exp" in done.output
    assert "both given" in done.output
    assert s3.options["secret"] not in done.output
    assert bool(below(lab, s3, "exp/trials/000002/")) == (kind == "s3fs")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"storage": "s3://holdfast-no-such-bucket/runs"}, "there is no such bucket"),
        ({"storage_options": {"endpoint_url": "http://127.0.0.1:9"}}, "does not answer"),
        ({"storage": "gs://bucket/runs"}, "gcsfs"),
        ({"storage": "nonsense://bucket/runs"}, "knows no such file system"),
        ({"storage": "s3://"}, "names no bucket"),
        ({"storage_options": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_a_storage_that_cannot_be_used(remote: Make, s3: S3, changes: dict[str, Any], says: str) -> None:
    lab = remote()
    ended = lab.light("run", lab.spec(**changes))
    assert ended.code in (2, 4), ended.output
    assert says in ended.output
    assert "Traceback" not in ended.output
    assert objects(lab, s3) == []
    assert not (lab.folder / "data").exists()
    assert work(lab) == []


def test_refused_credentials(remote: Make, s3: S3) -> None:
    if not s3.own:
        pytest.skip("the refusal is made inside the tests' own S3 server; HOLDFAST_TEST_S3_ENDPOINT names another")
    lab = remote()
    assert lab.storage is not None
    s3.fault("403", part=lab.storage.split("/")[2])
    ended = lab.light("run", lab.spec())
    assert ended.code == 2
    assert "access is denied" in ended.output
    assert s3.options["secret"] not in ended.output
    assert objects(lab, s3) == []
    assert not (lab.folder / "data").exists()


@pytest.mark.parametrize("kind", ["refuses", "ignores"])
def test_without_conditional_writes_a_database_is_named(remote: Make, s3: S3, kind: str) -> None:
    if not s3.own:
        pytest.skip("such servers are played by the tests' own S3 server; HOLDFAST_TEST_S3_ENDPOINT names another")
    lab = remote(kind=kind)
    ended = lab.light("run", lab.spec())
    assert ended.code == 2
    assert "no conditional writes" in ended.output
    assert objects(lab, s3) == []
    if kind == "ignores":
        return  # from here on as where they are refused
    database = f"sqlite:///{lab.folder}/named.db"
    lab.run("run", lab.spec(database=database, search={"num_trials": 2}))
    lab.run("restore", lab.path(), "--database", database, "--set", "search.num_trials=3")
    assert len(lab.json("trials", lab.path(), "--database", database)) == 3


def test_a_store_that_fails_for_a_moment_does_not_end_the_search(remote: Make, s3: S3) -> None:
    if not s3.own:
        pytest.skip("faults are made inside the tests' own S3 server; HOLDFAST_TEST_S3_ENDPOINT names another")
    lab = remote(steps=3)
    hold = lab.order("hold", 0, 1)
    process = lab.start("run", lab.spec(search={"num_trials": 2}))
    lab.until_logged("hold", 0, 1, process)
    bucket = str(lab.storage).split("/")[2]
    s3.fault("503", method="PUT", part=bucket, count=8)
    s3.fault("503", method="GET", part=bucket, count=8)
    hold.unlink()
    assert process.wait().code == 0, process.output
    assert lab.statuses() == ["COMPLETED"] * 2
    assert all(starts(lab.log(), number) == [(1, 0)] for number in range(2))


def test_two_hosts_with_a_database_each_do_not_both_drive(remote: Make, s3: S3) -> None:
    """R19: both restore the prefix at once; one drives, the other is refused. Each learns from the path what the other did."""
    first = remote("first", steps=3)
    first.order("hold", 0, 1)
    process = first.start("run", first.spec(search={"num_trials": 6}))
    first.until_logged("hold", 0, 1, process)
    process.kill()
    second = remote("second", storage=first.storage)
    for number in range(2):
        for file in (first.folder / "orders").glob("hold-*"):
            file.unlink()
        first.order("hold", number, 2)
        first.clear_log()
        racers = [lab.start("restore", lab.path()) for lab in (first, second)]
        first.until(lambda: any(racer.process.poll() is not None for racer in racers))  # noqa: B023  # called at once
        loser = next(racer for racer in racers if racer.process.poll() is not None)
        winner = next(racer for racer in racers if racer is not loser)
        assert loser.wait().code == 3, loser.output
        first.until_logged("hold", number, 2, winner)
        entries = first.log()
        assert len([entry for entry in entries if entry.event == "start" and entry.trial == number]) == 1
        winner.kill()
    (first.folder / "orders" / "hold-1-2").unlink()
    second.run("restore", second.path())
    assert all(steps_of(lab, number) == [0, 1, 2] for lab in (first, second) for number in range(6))
    lease = json.loads(ObjectRoot(first.path(), s3.options).read("lease.json") or b"{}")
    assert lease["epoch"] >= 4


def copied(source: str, target: str, s3: S3, *, keep: bool) -> None:
    """Copy every object of a prefix below another one, or move it there."""
    old, new = ObjectRoot(source, s3.options), ObjectRoot(target, s3.options)
    for name in old.files(""):
        new.write(name, old.read(name) or b"")
    if not keep:
        for name in old.files(""):
            old.delete(name)


def test_a_moved_prefix_and_a_copied_one(remote: Make, s3: S3) -> None:
    """R17: old and new trials run and write only in the new place; a copy beside the original is another experiment."""
    lab = remote(steps=4)
    lab.run("run", lab.spec(search={"num_trials": 3}), fault="checkpoint.committed:6", code=DIED)
    storage = str(lab.storage)
    copied(lab.path(), f"{storage}/copy", s3, keep=True)
    before = objects(lab, s3)
    said = lab.run("restore", f"{storage}/copy").output
    assert "an experiment of its own" in said
    assert [name for name in objects(lab, s3) if name.startswith("exp/")] == [
        name for name in before if name.startswith("exp/")
    ]

    copied(lab.path(), f"{storage}/elsewhere/exp", s3, keep=False)
    shutil.rmtree(lab.folder / "data")
    lab.clear_log()
    lab.run("restore", f"{storage}/elsewhere/exp")
    assert not starts(lab.log(), 0)
    assert below(lab, s3, "exp/") == []
    assert below(lab, s3, "elsewhere/exp/trials/000002/result-a") == ["elsewhere/exp/trials/000002/result-a1.json"]
    copy, moved = (lab.json("show", f"{storage}/{name}") for name in ("copy", "elsewhere/exp"))
    assert copy["id"] != moved["id"]
    assert copy["trials"] == moved["trials"] == {"COMPLETED": 3}
