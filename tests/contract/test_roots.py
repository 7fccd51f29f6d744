"""One contract over the places that experiments can be in: a folder, an object store in memory, an S3 server."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3
from support_scripts import begin_script

from holdfast.core.errors import SpecError, StorageError
from holdfast.storage.objects import ObjectRoot
from holdfast.storage.root import LocalRoot, Root, open_root
from holdfast.testing.racing import Racers

NAMES = ["plain", "with space", "a[b]*c?", "%41%2F", "#1", "ü ß 漢", "x?versionId=1", "{date}", "a&b=c", "+plus", "~tilde"]


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Mapping[str, Any]]:
    """A location with nothing at it, and its options."""
    name = f"{tmp_path.name} [x] ü #%41"
    if request.param == "local":
        return str(tmp_path / name), {}
    if request.param == "memory":
        return f"memory://roots-{os.getpid()}/{name}", {}
    s3: S3 = request.getfixturevalue("s3")
    return f"{s3.bucket('roots')}/{name}", s3.options


@pytest.fixture
def root(place: tuple[str, Mapping[str, Any]]) -> Root:
    return open_root(*place)


def test_nothing_is_there_at_first(root: Root) -> None:
    assert root.read("a") is None
    assert root.names() == root.names("deep/er") == []
    assert root.versioned("a") == (None, None)
    root.delete("a")
    root.delete_folder("a")


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 5000])
def test_what_is_written_is_read(root: Root, content: bytes) -> None:
    root.write("a/b/c.bin", b"before")
    root.write("a/b/c.bin", content)
    assert root.read("a/b/c.bin") == content
    assert root.versioned("a/b/c.bin")[0] == content


def test_names_are_no_patterns(root: Root) -> None:
    for name in NAMES:
        root.write(f"{name}/{name}", name.encode())
        root.write(f"all/{name}", name.encode())
    assert root.names() == sorted([*NAMES, "all"])
    assert root.names("all") == sorted(NAMES)
    for name in NAMES:
        assert root.names(name) == [name]
        assert root.read(f"{name}/{name}") == name.encode()
    root.delete("all/a[b]*c?")
    root.delete_folder("with space")
    assert root.names("all") == sorted({*NAMES} - {"a[b]*c?"})
    assert root.names() == sorted({*NAMES, "all"} - {"with space"})


def test_a_folder_is_deleted_with_its_own_only(root: Root) -> None:
    for name in ("one/a", "one/deep/er/b", "one.txt", "one2/c", "on"):
        root.write(name, b"1")
    root.delete_folder("one")
    assert root.names() == ["on", "one.txt", "one2"]
    assert root.read("one/deep/er/b") is None


def test_more_names_than_fit_on_a_page(root: Root) -> None:
    if not isinstance(root, LocalRoot) and root.location.startswith("s3"):
        names = [f"{number:05d}" for number in range(1050)]
        threads = [
            threading.Thread(target=lambda part: [root.write(f"many/{n}", b"") for n in part], args=(names[i::8],))
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert root.names("many") == names
        root.delete_folder("many")
        assert root.names("many") == []


def test_appending_or_not_at_all(root: Root) -> None:
    done = root.append("log", b"1\n")
    assert done == isinstance(root, LocalRoot)
    assert root.read("log") == (b"1\n" if done else None)


def test_replacing_what_was_seen(root: Root) -> None:
    root.write("beside", b"")
    with root.exclusive():
        _, version = root.versioned("a")
        assert root.replace("a", b"1", version)
    if root.conditional and not isinstance(root, LocalRoot):
        assert not root.replace("a", b"2", None)
        _, version = root.versioned("a")
        assert root.replace("a", b"3", version)
        assert not root.replace("a", b"4", version)
        assert root.read("a") == b"3"
        root.delete("a")
        assert not root.replace("a", b"5", version)
        assert root.read("a") is None
    assert all(not name.startswith(".holdfast-draft") for name in root.names())


def test_a_reader_sees_whole_files_only(root: Root) -> None:
    """While another thread writes; a torn one would mix the letters or have another length."""
    contents = [letter * 300_000 for letter in (b"a", b"b")]
    root.write("file", contents[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                root.write("file", content, durable=False)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            assert root.read("file") in contents
    finally:
        stop.set()
        writer.join()


def test_another_process_reads_what_was_written(place: tuple[str, Mapping[str, Any]], root: Root) -> None:
    if place[0].startswith("memory"):
        pytest.skip("memory:// is one process's own")
    code = (
        "import sys, json\n"
        "from holdfast.storage.root import open_root\n"
        "root = open_root(sys.argv[1], json.loads(sys.argv[2]))\n"
        "for line in sys.stdin:\n"
        "    body = root.read('a/x')\n"
        "    print(json.dumps([root.names('a'), body and body.decode()]), flush=True)\n"
    )
    other = begin_script(code, place[0], json.dumps(dict(place[1])))

    def seen() -> Any:
        other.stdin.write("\n")
        other.stdin.flush()
        return json.loads(other.stdout.readline())

    assert seen() == [[], None]
    root.write("a/x", b"1")
    assert seen() == [["x"], "1"]
    root.write("a/x", b"2")
    root.write("a/y", b"")
    assert seen() == [["x", "y"], "2"]
    root.delete("a/x")
    assert seen() == [["y"], None]
    other.communicate()


def replace_seen(location: str, options: Mapping[str, Any], name: str, content: str) -> Callable[[], bool]:
    """Look at a file now, and replace it in the race."""
    root = open_root(location, options)
    _, version = root.versioned(name)
    body = content.encode()

    def run() -> bool:
        with root.exclusive():
            if isinstance(root, LocalRoot) and root.read(name) not in (None, b"old"):
                return False  # it decides by what it reads under its lock
            return root.replace(name, body, version)

    return run


def test_of_eight_processes_one_replaces(place: tuple[str, Mapping[str, Any]], root: Root) -> None:
    if place[0].startswith("memory"):
        pytest.skip("memory:// is one process's own")
    if not root.conditional:
        pytest.skip(f"{place[1].get('endpoint_url')} does not hold the conditions of writes")
    root.write("made", b"")
    with Racers(8) as racers:
        for number in range(10):
            name = f"lease-{number}"
            if number % 2:  # there is one already
                root.write(name, b"old")
            jobs = [
                {"location": place[0], "options": dict(place[1]), "name": name, "content": f"racer {racer}"}
                for racer in range(8)
            ]
            won = racers.race(replace_seen, jobs)
            assert sorted(won) == [False] * 7 + [True], won
            assert root.read(name) == f"racer {won.index(True)}".encode()


# What only object stores have


@pytest.fixture
def objects(s3: S3) -> ObjectRoot:
    return ObjectRoot(f"{s3.bucket('objects')}/runs", s3.options)


def own(s3: S3) -> S3:
    if not s3.own:
        pytest.skip("faults are made inside the tests' own S3 server; HOLDFAST_TEST_S3_ENDPOINT names another")
    return s3


@pytest.mark.parametrize("version", ["missing", "there"])
def test_a_replacement_whose_answer_is_lost_is_ours(s3: S3, objects: ObjectRoot, version: str) -> None:
    if version == "there":
        objects.write("a", b"0")
    _, seen = objects.versioned("a")
    own(s3).fault("lost", part="/runs/a")
    assert objects.replace("a", b"1", seen)
    assert objects.read("a") == b"1"
    own(s3).fault("lost", part="/runs/a")
    assert not objects.replace("a", b"2", seen), "somebody was faster: we were"


def test_what_passes_is_tried_again_and_what_does_not_ends(
    s3: S3, objects: ObjectRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.storage.objects.LEASE_PATIENCE", 1.0)
    objects.write("a", b"0")
    own(s3).fault("503", part="/runs/a", count=7)
    objects.write("a", b"1")
    own(s3).fault("503", method="GET", part="/runs/a", count=7)
    assert objects.read("a") == b"1"
    own(s3).fault("503", part="/runs/a", count=1000)
    with pytest.raises(StorageError, match="does not answer"):
        objects.replace("a", b"2", objects.versioned("a")[1])
    s3.fault("clear")
    assert objects.read("a") == b"1"


@pytest.mark.parametrize(("kind", "conditional"), [("holds", True), ("refuses", False), ("ignores", False)])
def test_whether_conditions_hold_is_tried_out(s3: S3, kind: str, conditional: bool) -> None:
    root = ObjectRoot(f"{own(s3).bucket(kind)}/runs", s3.options)
    assert root.conditional is conditional
    assert root.conditional is conditional
    assert root.names() == []
    assert root.replace("a", b"1", None)
    assert root.replace("a", b"2", None) is not conditional


def test_a_missing_bucket_is_no_empty_one(s3: S3) -> None:
    root = ObjectRoot("s3://holdfast-no-such-bucket/runs", s3.options)
    for call in (root.read, root.names, root.versioned, root.delete_folder):
        with pytest.raises(StorageError, match="there is no such bucket"):
            call("a")
    with pytest.raises(StorageError, match="there is no such bucket"):
        root.write("a", b"")


def test_no_message_shows_a_secret(s3: S3, objects: ObjectRoot) -> None:
    secret = "hidden-secret-word"
    options = {**s3.options, "secret": secret, "endpoint_url": f"http://127.0.0.1:9/{secret}"}
    root = ObjectRoot(f"{objects.location}/x", options)
    with pytest.raises(StorageError, match="does not answer") as caught:
        root.write("a", b"")
    assert secret not in str(caught.value) + repr(root)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("gs://bucket/x", "gcsfs"),
        ("nonsense://bucket/x", "knows no such file system"),
        ("s3://", "names no bucket"),
        ("file:///srv/x", "/srv/x"),
        ("simplecache::s3://bucket/x", "chained"),
        ("s3://key:secret@bucket/x", "holds no credentials"),
    ],
)
def test_a_url_that_cannot_be_used(url: str, says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        open_root(url)
    assert "key:secret" not in str(caught.value)
