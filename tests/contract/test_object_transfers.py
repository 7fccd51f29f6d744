"""Transfers to and from an S3 server that fails in every way: nothing is lost, mixed or left behind."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import S3
from support_scripts import begin_script

from holdfast.core.errors import CheckpointCorrupt, StorageError
from holdfast.storage.checkpoints.local import Published
from holdfast.storage.checkpoints.manifest import MANIFEST
from holdfast.storage.checkpoints.remote import RemoteCheckpoints
from holdfast.storage.checkpoints.serializers import hash_directory
from holdfast.storage.objects import ObjectRoot
from holdfast.testing.saving import flip, manifest_of, save

SIZE = (33 << 20) + 5  # three parts, the last one short
CONTENT = np.arange(SIZE // 8 + 1, dtype=">u8").tobytes()[:SIZE]


@pytest.fixture
def store(s3: S3, tmp_path: Path) -> RemoteCheckpoints:
    if not s3.own:
        pytest.skip("faults are made inside the tests' own S3 server; HOLDFAST_TEST_S3_ENDPOINT names another")
    store = RemoteCheckpoints(ObjectRoot(f"{s3.bucket('transfers')}/x [1] ü", s3.options), tmp_path / "work")
    assert store.root.names() == []  # it has answered once
    return store


def staged_in(store: RemoteCheckpoints, *, step: int = 0) -> tuple[Path, Any]:
    staged = store.stage(7, 1, step)
    (staged / "big.bin").write_bytes(CONTENT)
    (staged / "small.bin").write_bytes(b"small")
    (staged / "empty").touch()
    return staged, manifest_of(hash_directory(staged), step=step, serializer="directory")


def publish(store: RemoteCheckpoints) -> Published:
    return store.publish(*staged_in(store))


def nothing_is_left(store: RemoteCheckpoints) -> bool:
    local = store._local.root / "trials" / "000007" / "checkpoints"
    return store.root.files("") == {} and store.root.unfinished("trials") == [] and not any(local.iterdir())


UPLOAD = [
    ("POST", "big.bin?uploads"),
    ("PUT", "partNumber=2"),
    ("POST", "uploadId="),
    ("PUT", "small.bin"),
    ("PUT", MANIFEST),
]


@pytest.mark.parametrize("kind", ["500", "503", "429", "slow", "broken"])
def test_an_upload_goes_on_after_faults(s3: S3, store: RemoteCheckpoints, kind: str) -> None:
    for method, part in UPLOAD:
        s3.fault(kind, method=method, part=part)
    published = publish(store)
    assert (store.load(published.path).path / "big.bin").read_bytes() == CONTENT
    assert store.root.unfinished("trials") == []
    assert s3.ordered() == 0, "every fault was met"


@pytest.mark.parametrize("kind", ["500", "503", "429", "slow", "broken", "short"])
def test_a_download_goes_on_after_faults(s3: S3, store: RemoteCheckpoints, tmp_path: Path, kind: str) -> None:
    published = publish(store)
    other = RemoteCheckpoints(store.root, tmp_path / "other")
    for part in ("big.bin", "small.bin", MANIFEST, "list-type=2"):
        s3.fault(kind, method="GET", part=part)
    other.fetch(published.path, digest=published.digest, trial=7, attempt=1, step=0)
    assert (tmp_path / "other" / published.path / "big.bin").read_bytes() == CONTENT
    assert s3.ordered() == 0, "every fault was met"
    assert other.verify(published.path).step == 0


def test_a_store_that_fails_for_longer(s3: S3, store: RemoteCheckpoints, tmp_path: Path) -> None:
    """More faults than the client's library repeats by itself."""
    s3.fault("503", method="PUT", part="partNumber=", count=9)
    published = publish(store)
    s3.fault("short", method="GET", part="big.bin", count=9)
    other = RemoteCheckpoints(store.root, tmp_path / "other")
    other.fetch(published.path, digest=published.digest, trial=7, attempt=1, step=0)
    assert (tmp_path / "other" / published.path / "big.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("method", "part"), [("PUT", "partNumber=3"), ("POST", "uploadId="), ("POST", "?uploads"), ("PUT", "small")]
)
def test_an_upload_that_fails_for_good_leaves_nothing(s3: S3, store: RemoteCheckpoints, method: str, part: str) -> None:
    """C12: no checkpoint, no object, and no parts that nobody sees and somebody pays for."""
    s3.fault("403", method=method, part=part)
    with pytest.raises(StorageError, match="denied"):
        publish(store)
    assert nothing_is_left(store)
    assert store.load(publish(store).path).step == 0


def test_a_completion_whose_answer_is_lost_is_done(s3: S3, store: RemoteCheckpoints) -> None:
    s3.fault("lost", method="POST", part="uploadId=")
    assert (store.load(publish(store).path).path / "big.bin").read_bytes() == CONTENT


def test_an_interrupt_in_the_middle_leaves_nothing(s3: S3, store: RemoteCheckpoints) -> None:
    main = threading.get_ident()
    s3.fault("hang", method="PUT", part="partNumber=2")

    def interrupt() -> None:
        while not any_request(s3, store):
            time.sleep(0.01)  # the server, which is to answer, is asked
        signal.pthread_kill(main, signal.SIGINT)
        s3.fault("clear")

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        publish(store)
    thread.join()
    assert nothing_is_left(store)


def any_request(s3: S3, store: RemoteCheckpoints) -> int:
    """Return how many second parts were sent to the store's bucket."""
    bucket = store.root.location.split("/")[2]
    with_number = [path for method, path in s3.seen() if method == "PUT" and bucket in path and "partNumber=2" in path]
    return len(with_number)


def test_a_kill_in_the_middle_is_swept(s3: S3, store: RemoteCheckpoints, tmp_path: Path) -> None:
    """C12: whole objects and half an upload are there; they are no checkpoint, and the next sweep removes them."""
    before = save(store, 1, step=5)
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from holdfast.storage.checkpoints.remote import RemoteCheckpoints\n"
        "from holdfast.storage.checkpoints.serializers import hash_directory\n"
        "from holdfast.storage.objects import ObjectRoot\n"
        "from holdfast.testing.saving import manifest_of\n"
        "store = RemoteCheckpoints(ObjectRoot(sys.argv[1], json.loads(sys.argv[2])), Path(sys.argv[3]))\n"
        "staged = store.stage(7, 1, 6)\n"
        "(staged / 'big.bin').write_bytes(b'x' * (33 << 20))\n"
        "(staged / 'small.bin').write_bytes(b'x')\n"
        "store.publish(staged, manifest_of(hash_directory(staged), step=6, serializer='directory'))\n"
    )
    s3.fault("hang", method="PUT", part="partNumber=2")
    process = begin_script(code, store.root.location, json.dumps(s3.options), tmp_path / "killed")
    while not any_request(s3, store):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    s3.fault("clear")
    folder = Path(before.path).parent.as_posix()
    store.root.begin(f"{folder}/mine/foreign.bin")  # somebody else's upload
    assert [path for path, _, _ in store.scan(7)] == [before.path]
    assert len(store.root.unfinished("trials")) == 2
    store.sweep(7, [before.path])
    assert [name for name, _ in store.root.unfinished(folder)] == ["mine/foreign.bin"]
    assert store.root.names(folder) == [Path(before.path).name]
    assert store.load(before.path).state == 1


def test_one_bit_of_many_parts(store: RemoteCheckpoints, tmp_path: Path) -> None:
    """C5: nothing of it becomes a copy."""
    published = publish(store)
    name = f"{published.path}/big.bin"
    store.root.write(name, flip(CONTENT, 8 * (17 << 20)))
    other = RemoteCheckpoints(store.root, tmp_path / "other")
    with pytest.raises(CheckpointCorrupt, match=r"big\.bin has the digest"):
        other.fetch(published.path, digest=published.digest, trial=7, attempt=1, step=0)
    with pytest.raises(CheckpointCorrupt, match=r"big\.bin has the digest"):
        other.verify(published.path)
    assert not any((tmp_path / "other").rglob("*.bin"))
