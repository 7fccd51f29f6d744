"""File systems that a caller brings along: fsspec's and pyarrow's, as they are, or refused with words that help."""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import S3
from test_checkpoints_remote import Objects

from holdfast.core.errors import SpecError, StorageError
from holdfast.storage.checkpoints.remote import RemoteCheckpoints
from holdfast.storage.filesystems import place_on, resolve
from holdfast.storage.object_stores import S3Store
from holdfast.storage.objects import ObjectRoot
from holdfast.storage.root import LocalRoot, open_root
from holdfast.testing.checkpoints import CheckpointContract
from holdfast.testing.saving import Files, save


def arrow() -> Any:
    return pytest.importorskip("pyarrow.fs", reason="the package pyarrow is missing: pip install pyarrow")


def s3_of_arrow(s3: S3) -> Any:
    return arrow().S3FileSystem(
        access_key=s3.options["key"],
        secret_key=s3.options["secret"],
        endpoint_override=s3.endpoint.partition("://")[2],
        scheme="http",
        region="us-east-1",
    )


@pytest.fixture(scope="module")
def bucket(s3: S3) -> str:
    return s3.bucket("filesystems")


def given(location: str, filesystem: Any) -> ObjectRoot:
    root = open_root(location, filesystem=filesystem)
    assert isinstance(root, ObjectRoot)
    return root


class TestGiven(CheckpointContract):
    """Checkpoints on every kind of given file system keep the contract that the others keep."""

    flips = 3

    @pytest.fixture(params=["memory", "s3fs", "s3fs dir", "pyarrow s3", "pyarrow subtree", "pyarrow memory"])
    def checkpoints(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteCheckpoints:
        kind: str = request.param
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # pyarrow's others are refused by Ceph 16
        name = f"{tmp_path.name} [1] ? ü #%41"
        if kind == "memory":
            root = given(f"given-{secrets.token_hex(4)}/{name}", MemoryFileSystem())
        elif kind == "pyarrow memory":
            root = given(f"given/{name}", arrow()._MockFileSystem())
        else:
            s3: S3 = request.getfixturevalue("s3")
            below = f"{request.getfixturevalue('bucket').partition('://')[2]}/{kind}"
            plain = s3_of_arrow(s3) if kind.startswith("pyarrow") else s3fs.S3FileSystem(**s3.options)
            if kind == "s3fs dir":
                root = given(name, DirFileSystem(below, plain))
                assert root.location == f"s3://{below}/{name}"
            elif kind == "pyarrow subtree":
                root = given(name, arrow().SubTreeFileSystem(below, plain))
                assert root.location == f"s3://{below}/{name}"
            else:
                root = given(f"{below}/{name}", plain)
        return RemoteCheckpoints(root, tmp_path / "work")

    def files(self, store: Any) -> Files:
        return Objects(store)


def test_a_caching_instance_of_s3_does_not_fool_us(s3: S3, tmp_path: Path) -> None:
    bucket = s3.bucket("cached")
    filesystem = s3fs.S3FileSystem(**s3.options, use_listings_cache=True, listings_expiry_time=None)
    url = f"{bucket}/cached"
    ours = RemoteCheckpoints(given(url, filesystem), tmp_path / "ours")
    theirs = RemoteCheckpoints(ObjectRoot(url, s3.options), tmp_path / "theirs")
    assert isinstance(ours.root._store, S3Store)
    assert filesystem.ls(bucket) == []
    assert ours.scan(7) == []
    first = save(theirs, 1)
    assert [path for path, _, _ in ours.scan(7)] == [first.path]
    assert ours.load(first.path).state == 1
    theirs.delete(first.path)
    assert ours.scan(7) == []
    assert ours.root.conditional == theirs.root.conditional


def test_a_local_one_is_a_folder(tmp_path: Path) -> None:
    places = [
        open_root(str(tmp_path), filesystem=LocalFileSystem()),
        open_root(f"file://{tmp_path}", {"filesystem": LocalFileSystem()}),
        open_root(tmp_path.name, filesystem=DirFileSystem(str(tmp_path.parent), LocalFileSystem())),
    ]
    for root in places:
        assert isinstance(root, LocalRoot)
        assert root.path == tmp_path


def test_pyarrows_local_one_is_a_folder(tmp_path: Path) -> None:
    local = arrow().LocalFileSystem()
    assert resolve(tmp_path, local) == (str(tmp_path), None)
    assert resolve("x", arrow().SubTreeFileSystem(str(tmp_path), local)) == (str(tmp_path / "x"), None)
    memory = MemoryFileSystem()
    assert resolve("a/b", arrow().PyFileSystem(arrow().FSSpecHandler(memory))) == ("memory://a/b", memory)


def test_a_place_stays_what_it_is() -> None:
    memory = MemoryFileSystem()
    place, options = place_on("a/b", None, DirFileSystem("/top", memory))
    assert (place, options) == ("memory://top/a/b", {"filesystem": memory})
    assert place_on(place, None, memory) == (place, options)
    assert place_on("a/b", {"key": 1}, None) == ("a/b", {"key": 1})
    assert place_on("a", None, LocalFileSystem()) == (os.path.abspath("a"), None)


def _dead_loop() -> Any:
    loop = asyncio.new_event_loop()
    filesystem = s3fs.S3FileSystem(loop=loop, skip_instance_cache=True)
    filesystem._loop = loop
    return filesystem


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: "s3", "give an instance"),
        (lambda: s3fs.S3FileSystem, "give an instance"),
        (lambda: s3fs.S3FileSystem(asynchronous=True, skip_instance_cache=True), "asynchronous"),
        (_dead_loop, "does not run"),
        (lambda: fsspec.filesystem("simplecache", target_protocol="memory"), "keeps copies"),
        (lambda: fsspec.filesystem("memory"), "is for memory://"),
    ],
)
def test_one_that_cannot_be_used(make: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        open_root("s3://bucket/x", filesystem=make())


def test_one_that_belongs_to_the_loop_that_calls() -> None:
    async def call() -> None:
        filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
        filesystem._loop = asyncio.get_running_loop()
        with pytest.raises(SpecError, match="the loop that calls"):
            open_root("s3://bucket/x", filesystem=filesystem)

    asyncio.run(call())


def test_options_beside_it_are_refused() -> None:
    for call in (lambda: open_root("m/x", {"a": 1}, MemoryFileSystem()), lambda: place_on("m/x", {"a": 1}, MemoryFileSystem())):
        with pytest.raises(SpecError, match="both given"):
            call()


def test_no_message_shows_the_secret_of_a_given_one(bucket: str) -> None:
    secret = "hidden-secret-word"
    filesystem = s3fs.S3FileSystem(
        key="k", secret=secret, endpoint_url=f"http://127.0.0.1:9/{secret}", skip_instance_cache=True
    )
    with pytest.raises(StorageError, match="does not answer") as caught:
        given(f"{bucket}/x", filesystem).write("a", b"")
    assert secret not in str(caught.value)
