"""The contract of checkpoints over an object store, and what only an object store has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3
from support_scripts import begin_script

from holdfast.core.errors import CheckpointNotFound, NotACheckpoint, StorageError
from holdfast.storage.checkpoints.cache import Cache
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.checkpoints.manifest import MANIFEST
from holdfast.storage.checkpoints.remote import RemoteCheckpoints
from holdfast.storage.checkpoints.serializers import hash_directory
from holdfast.storage.objects import ObjectRoot
from holdfast.testing.checkpoints import CheckpointContract
from holdfast.testing.racing import Racers
from holdfast.testing.saving import Files, manifest_of, save


class Objects(Files):
    """The raw objects of a checkpoint."""

    def __init__(self, store: RemoteCheckpoints) -> None:
        self.store = store.root

    def names(self, path: str) -> list[str]:
        return list(self.store.files(path))

    def read(self, path: str, name: str) -> bytes:
        found = self.store.read(f"{path}/{name}")
        assert found is not None
        return found

    def write(self, path: str, name: str, data: bytes) -> None:
        self.store.write(f"{path}/{name}", data)

    def remove(self, path: str, name: str) -> None:
        self.store.delete(f"{path}/{name}")

    def swap(self, one: str, other: str) -> None:
        kept = {path: {name: self.read(path, name) for name in self.names(path)} for path in (one, other)}
        for path, source in ((one, other), (other, one)):
            self.store.delete_folder(path)
            for name, data in kept[source].items():
                self.write(path, name, data)


@pytest.fixture(scope="module")
def bucket(s3: S3) -> str:
    return s3.bucket("checkpoints")


@pytest.fixture
def store(s3: S3, bucket: str, tmp_path: Path) -> RemoteCheckpoints:
    return RemoteCheckpoints(ObjectRoot(f"{bucket}/{tmp_path.name}", s3.options), tmp_path / "work")


class TestRemote(CheckpointContract):
    flips = 10

    @pytest.fixture(params=["plain", "ex [a-z] * ? ü {date} %s # &+"])
    def checkpoints(self, s3: S3, bucket: str, tmp_path: Path, request: pytest.FixtureRequest) -> RemoteCheckpoints:
        return RemoteCheckpoints(ObjectRoot(f"{bucket}/{tmp_path.name}/{request.param}", s3.options), tmp_path / "work")

    def files(self, store: Any) -> Files:
        return Objects(store)


def big(store: RemoteCheckpoints, source: Path, *, step: int = 0) -> Any:
    """Stage two files, one of which takes several parts."""
    staged = store.stage(7, 1, step)
    (staged / "a.bin").write_bytes(b"a" * 1000)
    (staged / "sub").mkdir()
    (staged / "sub" / "z.bin").write_bytes(bytes(range(256)) * (36 << 12))
    return staged, manifest_of(hash_directory(staged), step=step, serializer="directory")


def test_a_big_file_comes_back_from_another_host(store: RemoteCheckpoints, tmp_path: Path) -> None:
    staged, manifest = big(store, tmp_path)
    published = store.publish(staged, manifest)
    elsewhere = RemoteCheckpoints(store.root, tmp_path / "elsewhere")
    elsewhere.fetch(published.path, digest=published.digest, trial=7, attempt=1, step=0)
    copy = tmp_path / "elsewhere" / published.path
    assert (copy / "sub" / "z.bin").read_bytes() == (tmp_path / "work" / published.path / "sub" / "z.bin").read_bytes()
    assert (copy / MANIFEST).read_bytes() == store.root.read(f"{published.path}/{MANIFEST}")
    elsewhere.release(7)
    assert not copy.exists()
    assert store.root.files(published.path).keys() == {"a.bin", "sub/z.bin", MANIFEST}


@pytest.mark.parametrize("part", ["a.bin", "sub/z.bin", MANIFEST])
def test_an_upload_that_fails_publishes_nothing(s3: S3, store: RemoteCheckpoints, tmp_path: Path, part: str) -> None:
    """C12: nothing is there afterwards, neither on the store nor staged; saving the step again works."""
    if not s3.own:
        pytest.skip("faults are made inside the tests' own S3 server; HOLDFAST_TEST_S3_ENDPOINT names another")
    store.root.read("x")  # it has answered once
    before = save(store, 1, step=1)
    staged, manifest = big(store, tmp_path)
    s3.fault(
        "403", method="PUT", part=f"{tmp_path.name}/{staged.parent.relative_to(tmp_path / 'work')}/{staged.name[9:]}/{part}"
    )
    with pytest.raises(StorageError, match="denied"):
        store.publish(staged, manifest)
    assert [path for path, _, _ in store.scan(7)] == [before.path]
    assert store.root.names("trials/000007/checkpoints") == [Path(before.path).name]
    assert not staged.exists()
    staged, manifest = big(store, tmp_path)
    assert store.load(store.publish(staged, manifest).path).step == 0


def test_a_file_that_vanishes_publishes_nothing(store: RemoteCheckpoints, tmp_path: Path) -> None:
    staged, manifest = big(store, tmp_path)
    (staged / "sub" / "z.bin").unlink()
    with pytest.raises(StorageError, match=r"z\.bin is missing"):
        store.publish(staged, manifest)
    assert store.root.names() == []


def test_a_write_whose_answer_is_lost_is_done(s3: S3, store: RemoteCheckpoints) -> None:
    if not s3.own:
        pytest.skip("faults are made inside the tests' own S3 server; HOLDFAST_TEST_S3_ENDPOINT names another")
    s3.fault("lost", part=MANIFEST)
    s3.fault("503", part="state.json", count=3)
    published = save(store, {"a": 1})
    assert store.load(published.path).state == {"a": 1}


def test_another_process_sees_a_commit_at_once(s3: S3, store: RemoteCheckpoints, tmp_path: Path) -> None:
    """C12: it has listed the folder before, and must not remember that."""
    code = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "from holdfast.storage.objects import ObjectRoot\n"
        "from holdfast.storage.checkpoints.remote import RemoteCheckpoints\n"
        "store = RemoteCheckpoints(ObjectRoot(sys.argv[1], json.loads(sys.argv[2])), Path(sys.argv[3]))\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps([path for path, _, _ in store.scan(7)]), flush=True)\n"
    )
    import json

    arguments = [store.root.location, json.dumps(s3.options), str(tmp_path / "other")]
    other = begin_script(code, *arguments)

    def seen() -> list[str]:
        other.stdin.write("\n")
        other.stdin.flush()
        found: list[str] = json.loads(other.stdout.readline())
        return found

    paths: list[str] = []
    assert seen() == []
    for step in range(5):
        paths.append(save(store, step, step=step).path)
        assert seen() == paths
    store.delete(paths.pop(0))
    assert seen() == paths
    other.communicate()


def test_a_delete_that_fails_halfway_leaves_no_checkpoint(
    s3: S3, store: RemoteCheckpoints, caplog: pytest.LogCaptureFixture
) -> None:
    if not s3.own:
        pytest.skip("faults are made inside the tests' own S3 server; HOLDFAST_TEST_S3_ENDPOINT names another")
    published = save(store, 1)
    s3.fault("403", method="DELETE", part=f"{published.path}/state.json")
    with caplog.at_level(logging.WARNING):
        store.delete(published.path)
    assert "could not delete" in caplog.text
    with pytest.raises(NotACheckpoint):
        store.load(published.path)
    assert store.sweep(7, []) == [published.path]
    with pytest.raises(CheckpointNotFound):
        store.load(published.path)


def test_foreign_objects_survive(store: RemoteCheckpoints) -> None:
    published = save(store, 1)
    folder = published.path.rpartition("/")[0]
    foreign = ["notes.txt", "step_00000001/x", "step_00000001-a1-XYZW/x", "step_00000001-a1-3f9c.bak/x", "[*]/x"]
    for name in foreign:
        store.root.write(f"{folder}/{name}", b"mine")
    assert [path for path, _, _ in store.scan(7)] == [published.path]
    assert store.sweep(7, []) == [published.path]
    assert sorted(store.root.files(folder)) == sorted(foreign)


def test_a_copy_here_is_used_and_a_damaged_one_replaced(s3: S3, store: RemoteCheckpoints, tmp_path: Path) -> None:
    published = save(store, {"w": 1})
    named: dict[str, Any] = {"digest": published.digest, "trial": 7, "attempt": 1, "step": 0}
    read = f"{published.path}/state.json"
    before = s3.requests("GET", read) if s3.own else 0
    store.fetch(published.path, **named)
    assert not s3.own or s3.requests("GET", read) == before
    copy = tmp_path / "work" / published.path / "state.json"
    good = copy.read_bytes()
    copy.write_bytes(b"torn")
    store.fetch(published.path, **named)
    assert copy.read_bytes() == good


def fetch_often(location: str, options: dict[str, Any], work: str, saved: list[list[Any]]) -> Callable[[], int]:
    """Fetch checkpoints into a shared folder that has room for two, and load each as a worker does."""
    store = RemoteCheckpoints(ObjectRoot(location, options), Path(work), 2 * 70_000)
    folder = LocalCheckpoints(Path(work))

    def run() -> int:
        good = 0
        for _ in range(3):
            for step, path, digest in saved:
                store.fetch(path, digest=digest, trial=7, attempt=1, step=step)
                good += folder.load(path, digest=digest).state == bytes([step]) * 40_000
        return good

    return run


def test_processes_share_copies_while_they_are_evicted(s3: S3, store: RemoteCheckpoints, tmp_path: Path) -> None:
    published = [save(store, bytes([step]) * 40_000, step=step) for step in range(5)]
    saved = [[step, one.path, one.digest] for step, one in enumerate(published)]
    work = tmp_path / "shared"
    job = {"location": store.root.location, "options": s3.options, "work": str(work), "saved": saved}
    with Racers(4) as racers:
        assert racers.race(fetch_often, [job] * 4) == [15] * 4
    Cache(work, 0).make_room(1 << 40)
    assert not list(work.rglob("*step_*"))
