"""Forks from and to object stores and databases on a server."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import s3fs
from s3_server import S3
from support_forks import searched, story
from support_postgres import Postgres

import holdfast
from holdfast.core import faults
from holdfast.core.errors import ExperimentNotFound, LeaseHeld, StorageError
from holdfast.experiment import Experiment
from holdfast.holding import holder
from holdfast.locate import Opened
from holdfast.settings import settings
from holdfast.storage import carrying, object_stores
from holdfast.storage.carrying import Carrier
from holdfast.storage.folder import Folder
from holdfast.storage.objects import ObjectRoot
from holdfast.storage.root import LocalRoot
from holdfast.upkeep import collect, verify


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "cache_folder", tmp_path / "cache")
    monkeypatch.setattr(settings(), "data_folder", tmp_path / "data")


@pytest.fixture
def remote(s3: S3, tmp_path: Path) -> Iterator[Opened]:
    storage = s3.bucket("fork") + "/runs [x] ü"
    with closing(story(storage, storage_options=s3.options, database=f"sqlite:///{tmp_path}/holdfast.db")) as opened:
        yield opened


def root_of(opened: Opened) -> ObjectRoot:
    assert isinstance(opened.folder.root, ObjectRoot)
    return opened.folder.root


def objects(opened: Opened) -> dict[str, bytes | None]:
    root = root_of(opened)
    return {name: root.read(name) for name in root.files("")}


def fork(s3: S3, opened: Opened, name: str = "fork", **how: Any) -> Experiment:
    return holdfast.fork(opened.folder.location, name, **{"storage_options": s3.options, **how})


def database(opened: Opened) -> str:
    return f"sqlite:///{opened.database.file}"


def test_on_one_store_the_server_copies(s3: S3, remote: Opened) -> None:
    before, seen = objects(remote), len(s3.seen()) if s3.process else 0
    with fork(s3, remote, database=database(remote)) as forked:
        if s3.process:
            read = [path for method, path in s3.seen()[seen:] if method == "GET" and "state.json" in path]
            assert read == []
        assert objects(remote) == before
        theirs = objects(forked._opened)
        assert {n: c for n, c in theirs.items() if n.startswith("trials/")} == {
            n: c for n, c in before.items() if n.startswith("trials/")
        }
        assert {name for name in theirs if "/" not in name} == {"experiment.json"}
        assert [t.status.value for t in forked.trials] == ["COMPLETED", "FAILED", *["PENDING"] * 4]
        assert not verify(forked._opened, forked.checkpoints()).bad
        assert forked.load_checkpoint(2).step == 1
        collect(forked._opened)
        searched(forked._opened, 7)
        forked._opened.folder.delete()
        assert objects(remote) == before
        assert not verify(remote, Experiment(remote).checkpoints()).bad


def test_between_places(s3: S3, remote: Opened, tmp_path: Path) -> None:
    """To a local folder, from there to a store, and from one store to another one: bytes come through this process."""
    filesystem = s3fs.S3FileSystem(**s3.options, skip_instance_cache=True)
    place, url = remote.folder.location, database(remote)
    with holdfast.fork(place, "one", storage=str(tmp_path / "one"), filesystem=filesystem, database=url) as forked:
        assert Path(forked.path) == tmp_path / "one" / "one"
        assert not verify(forked._opened, forked.checkpoints()).bad
    local = str(tmp_path / "local [ü]")
    with fork(s3, remote, storage=local, at_trial=3, database=database(remote)) as first:
        assert Path(first.path) == tmp_path / "local [ü]" / "fork"
        assert not verify(first._opened, first.checkpoints()).bad
        bucket = s3.bucket("other")
        with holdfast.fork(first.path, "back", storage=bucket, storage_options=s3.options) as second:
            assert second.path == f"{bucket}/back"
            assert not verify(second._opened, second.checkpoints()).bad
            assert [c.path for c in second.checkpoints()] == [c.path for c in first.checkpoints()]
            assert second._opened.folder.identity().ancestors == [first.id, remote.record.uuid]
            mine, theirs = objects(second._opened), objects(remote)
            assert {n: c for n, c in mine.items() if n.startswith("trials/000002")} == {
                n: c for n, c in theirs.items() if n.startswith("trials/000002")
            }


def test_a_store_that_does_not_copy_between_its_places(s3: S3, remote: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrying, "_BATCH", 30_000)  # a few files at a time
    if s3.process:
        s3.fault("501", part="fork/trials", count=1)
    with fork(s3, remote, database=database(remote)) as forked:
        assert not verify(forked._opened, forked.checkpoints()).bad
    assert not s3.process or s3.ordered() == 0


def test_files_come_whole_to_every_place(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones in parts, names of every kind, empty ones; what is not there any more is named."""
    monkeypatch.setattr(object_stores, "LARGEST_COPY", 5 << 20)
    contents = {"a/manifest [1]*ü %.bin": secrets.token_bytes(12_000_000), "a/empty": b"", "b": b"1"}
    files = [(name, len(content)) for name, content in contents.items()]
    local = LocalRoot(tmp_path / "first")
    for name, content in contents.items():
        local.write(name, content)
    bucket = s3.bucket("carry")
    memory = f"memory://carry-{secrets.token_hex(4)}"
    other = {**s3.options, "config_kwargs": {"user_agent_extra": "x"}}  # a connection of its own
    places: list[Any] = [
        local,
        ObjectRoot(f"{bucket}/one", s3.options),
        ObjectRoot(f"{bucket}/two", s3.options),
        ObjectRoot(f"{bucket}/three", other),
        ObjectRoot(f"{memory}/one", {}),
        ObjectRoot(f"{memory}/two", {}),
        LocalRoot(tmp_path / "last"),
        LocalRoot(tmp_path / "linked"),
    ]
    for source, target in pairwise(places):
        carrier = Carrier(source, target)
        assert carrier.carry([*files, ("gone", 3)]) == {"gone"}
        carrier.finish()
        carrier.check([("a/empty", 0)], "a")
        assert {name: target.read(name) for name in contents} == contents
        assert carrying.below(target, "a") == {name[2:]: size for name, size in files if name.startswith("a/")}
        assert target.read("gone") is None
        with pytest.raises(StorageError, match="instead of 1"):
            carrier.check([("a/empty", 1)], "a")


def test_a_fork_that_was_cut_off_on_a_store(s3: S3, remote: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(BaseException):
        pass

    def hook(name: str) -> None:
        if name == "fork.linked":
            target.write(".fork.json", b"{}")  # somebody of another host, and nothing is cleaned up after him
            raise Cut

    target = ObjectRoot(f"{remote.folder.location.rpartition('/')[0]}/fork", s3.options)
    faults.install(hook)
    try:
        monkeypatch.setattr(Folder, "clear", lambda *_, **__: [])
        with pytest.raises(Cut):
            fork(s3, remote, database=database(remote))
    finally:
        faults.install(None)
        monkeypatch.undo()
    assert target.files("trials")
    with pytest.raises(ExperimentNotFound):
        holdfast.open(target.location, storage_options=s3.options)
    target.write(".fork.json", json.dumps(holder()).encode())
    with pytest.raises(LeaseHeld, match="is making"):
        fork(s3, remote, database=database(remote))
    target.write(".fork.json", b"torn")
    with fork(s3, remote, at_trial=1, database=database(remote)) as forked:
        assert [t.number for t in forked.trials] == [0]
        assert root_of(forked._opened).names("trials") == ["000000"]


def test_on_a_database_server(postgres: Postgres, tmp_path: Path) -> None:
    name = postgres.create(empty=True)
    url = postgres.text(name)
    try:
        with closing(story(tmp_path / "runs", database=url)) as opened:
            with holdfast.fork(opened.folder.path, "fork", at_trial=3, database=url) as forked:
                assert [t.status.value for t in forked.trials] == ["COMPLETED", "FAILED", "PENDING"]
                with holdfast.open("fork", database=url) as again:
                    assert again.id == forked.id
                with forked.fork("again") as second:
                    assert second._opened.database.label == forked._opened.database.label
                    searched(second._opened, 5)
                    assert len(second.trials) == 5
            with holdfast.fork(opened.folder.path, "elsewhere", storage=str(tmp_path / "else"), database=url) as other:
                assert len(other.trials) == 6
            assert not (tmp_path / "runs" / "holdfast.db").exists()
    finally:
        postgres.drop(name)
