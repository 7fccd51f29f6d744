"""Full and refusing disks, flipped bits, long paths, two writers of one step: what a store of checkpoints makes of them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_scripts import begin_script

from holdfast.core.errors import Corrupt, StorageError
from holdfast.storage.checkpoints.local import LocalCheckpoints, Published
from holdfast.storage.database.engine import sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.testing.lab import Lab
from holdfast.testing.racing import url_of
from holdfast.testing.saving import Files, flip, save

FLIPS = 100


def realistic(folder: Path) -> dict[str, tuple[Any, str]]:
    """Return what trainings save: (state, serializer) by kind."""
    generator = np.random.default_rng(3)
    weights = {f"layer {place}": generator.standard_normal((64, 64)).astype(np.float32) for place in range(4)}
    mine = folder / "mine"
    (mine / "sub [1]").mkdir(parents=True)
    (mine / "sub [1]" / "weights ü.bin").write_bytes(generator.bytes(50_000))
    (mine / "config.json").write_text(json.dumps({"lr": 0.1}))
    training = {
        "epoch": 3,
        "weights": weights,
        "moments": generator.standard_normal(3000),
        "key": b"bytes" * 200,
        "log": ["ü"] * 50,
    }
    return {
        "safe": (training, "safe"),
        "cloudpickle": ({**training, "type": int}, "cloudpickle"),
        "folder": (mine, "directory"),
    }


@pytest.mark.parametrize("kind", ["safe", "cloudpickle", "folder"])
def test_a_flipped_bit_is_noticed_wherever_it_is(kind: str, tmp_path: Path) -> None:
    store = LocalCheckpoints(tmp_path / "root")
    state, serializer = realistic(tmp_path)[kind]
    published = save(store, state, serializer=serializer)
    files = Files(store)
    names = files.names(published.path)
    contents = {name: files.read(published.path, name) for name in names}
    assert "manifest.json" in names
    flipped = 0
    for name in names:  # each file gets its share, at places that are spread over it, its first and last bit among them
        bits = len(contents[name]) * 8
        count = -(-FLIPS // len(names))
        for bit in sorted({place * (bits - 1) // (count - 1) for place in range(count)}):
            files.write(published.path, name, flip(contents[name], bit))
            for call in (store.load, store.verify):
                with pytest.raises(Corrupt):
                    call(published.path, digest=published.digest)
            flipped += 1
        files.write(published.path, name, contents[name])
    assert flipped >= FLIPS
    store.load(published.path, digest=published.digest)


# Real file systems


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small file system in memory for the body."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def everything(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_full_disk_takes_nothing_away(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=1m") as root:
        store = LocalCheckpoints(root)
        good = save(store, {"w": np.arange(40_000.0)})  # 320 kB
        before = everything(root)
        states: list[Any] = [{"w": np.zeros(200_000)}, {"a": np.zeros(60_000), "b": np.zeros(60_000)}, "x" * 900_000]
        for step, state in enumerate(states, 1):
            with pytest.raises(StorageError, match="No space left on device"):
                save(store, state, step=step)
            assert everything(root) == before
        smaller = save(store, {"w": np.arange(30_000.0)}, step=4)
        for published, count in ((good, 40_000), (smaller, 30_000)):
            loaded: Any = store.load(published.path, digest=published.digest).state
            assert (loaded["w"] == np.arange(float(count))).all()
        with pytest.raises(StorageError):
            save(store, {"w": np.arange(70_000.0)}, step=5)
        store.delete(good.path)  # a full disk can be pruned
        store.load(save(store, {"w": np.arange(70_000.0)}, step=5).path)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_disk_without_inodes_takes_nothing_away(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "nr_inodes=24") as root:
        store = LocalCheckpoints(root)
        published: list[Published] = []

        def fill() -> None:
            while len(published) < 24:
                published.append(save(store, {"step": len(published)}, step=len(published)))

        with pytest.raises(StorageError, match="No space left on device"):
            fill()
        assert published
        for one in published:
            store.load(one.path, digest=one.digest)
        assert [path for path, _, _ in store.scan(7)] == [one.path for one in published]
        folder = (root / published[0].path).parent
        assert sorted(entry.name for entry in folder.iterdir()) == sorted(Path(one.path).name for one in published)
        store.delete(published[0].path)
        store.load(save(store, {"step": 99}, step=99).path)


@pytest.mark.skipif(sys.platform != "linux", reason="it is remounted as Linux does")
def test_a_disk_that_became_read_only_can_be_read(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=1m") as root:
        store = LocalCheckpoints(root)
        good = save(store, "good")
        staged = store.stage(7, 1, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        before = everything(root)
        with pytest.raises(StorageError, match="Read-only file system"):
            save(store, "more", step=2)
        store.delete(good.path)  # a failing delete is logged, and tried again later
        store.discard(staged)
        assert store.sweep(7, ()) == []
        assert everything(root) == before
        assert store.load(good.path, digest=good.digest).state == "good"
        subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
        assert store.sweep(7, [good.path]) == [str(staged.relative_to(root))]
        store.load(save(store, "more", step=2).path)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run the body without root's right to write everywhere."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def opened_up(place: Path) -> None:
    """Let everybody reach a place below pytest's own folder, and write in it."""
    for parent in place.parents:
        if parent.is_relative_to(tempfile.gettempdir()) and str(parent) != tempfile.gettempdir():
            parent.chmod(0o755)
    for entry in (place, *place.rglob("*")):
        entry.chmod(0o777 if entry.is_dir() else 0o666)


def test_a_folder_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    root = tmp_path / "root"
    store = LocalCheckpoints(root)
    good = save(store, "good")
    opened_up(root)
    folder = (root / good.path).parent
    folder.chmod(0o555)
    before = everything(root)
    with unprivileged():
        with pytest.raises(StorageError, match="Permission denied"):
            save(store, "more", step=1)
        store.delete(good.path)
        assert store.load(good.path, digest=good.digest).state == "good"
    assert everything(root) == before
    (root / good.path / "state.json").chmod(0)
    with unprivileged(), pytest.raises(StorageError, match=r"state\.json: Permission denied"):
        store.load(good.path)  # not damage: another checkpoint would be no better
    folder.chmod(0o777)
    with unprivileged():
        store.load(save(store, "more", step=1).path)


@pytest.mark.parametrize(
    ("name", "call"), [("preadv", "load"), ("preadv", "verify"), ("fstat", "load"), ("open", "load"), ("scandir", "scan")]
)
def test_a_disk_error_is_no_damage(name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalCheckpoints(tmp_path)
    good = save(store, {"w": np.arange(20_000.0)})
    calls: dict[str, Callable[[], object]] = {
        "load": lambda: store.load(good.path),
        "verify": lambda: store.verify(good.path),
        "scan": lambda: store.scan(7),
    }

    def broken(*args: Any, **named: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, broken)
        with pytest.raises(StorageError, match="Input/output error"):
            calls[call]()
    store.load(good.path, digest=good.digest)


def refusal(call: Callable[[], Published]) -> tuple[str, Published | None]:
    try:
        return "", call()
    except StorageError as error:
        return str(error), None


def test_a_path_at_the_limit_is_refused_whole(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_PATH_MAX") - 1  # its end is counted, too
    results = []
    for length in range(longest - 130, longest + 1, 2):
        root = tmp_path
        while len(str(root)) + 202 < length:
            root = root / ("d" * 200)
        root = root / ("e" * max(length - len(str(root)) - 1, 1))
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:
            break
        store = LocalCheckpoints(root)
        said, published = refusal(lambda store=store: save(store, "long"))  # type: ignore[misc]  # called at once
        results.append(said == "")
        if published is None:
            assert "File name too long" in said
            assert not [entry for entry in root.rglob("*") if entry.name.startswith((".staging-", ".trash-", "step_"))]
        else:
            assert store.load(published.path, digest=published.digest).state == "long"
            store.delete(published.path)
            assert list((root / published.path).parent.iterdir()) == []
    assert results == sorted(results, reverse=True)
    assert set(results) == {True, False}


# Two writers of one step


WRITER = """
import json, os, sys
from pathlib import Path
import numpy as np
from holdfast.core.errors import CheckpointConflict
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.engine import connect
from holdfast.testing.saving import save

job = json.loads(sys.argv[1])
attempt = AttemptWriter(database=connect(job["url"]), **job["attempt"])
store, won = LocalCheckpoints(Path(job["root"])), []
print("ready", flush=True)
sys.stdin.readline()
for step in range(job["steps"]):
    published = save(store, {"who": job["who"], "w": np.full(3000, float(job["who"]))}, trial=0, step=step)
    saved = Saved(path=published.path, digest=published.digest, bytes=published.bytes)
    try:
        attempt.report(step, {"loss": float(job["who"])}, saved=saved)
        won.append(step)
    except CheckpointConflict as error:
        assert f"has reported step {step} already" in str(error), error
        store.delete(published.path)
print(json.dumps(won), flush=True)
"""


def test_of_two_processes_that_write_one_step_one_wins(tmp_path: Path) -> None:
    steps = 60
    with closing(open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True)) as database:
        lab = Lab.new(database, "contended")
        attempt = {name: value for name, value in vars(lab.started()).items() if name != "database"}
        job = {"url": url_of(database), "attempt": attempt, "root": str(tmp_path), "steps": steps}
        writers = [begin_script(WRITER, json.dumps({**job, "who": who})) for who in range(2)]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        answers = [writer.communicate()[0] for writer in writers]
        assert [writer.returncode for writer in writers] == [0, 0]
        won = [json.loads(answer) for answer in answers]
        assert sorted([*won[0], *won[1]]) == list(range(steps))
        store, rows = LocalCheckpoints(tmp_path), lab.reader.checkpoints()
        assert [row.step for row in rows] == list(range(steps))
        for row in rows:
            loaded: Any = store.load(row.path, digest=row.digest, trial=0, attempt=1, step=row.step).state
            who = 0 if row.step in won[0] else 1
            assert (loaded["who"], row.metrics["loss"]) == (who, who)
            assert (loaded["w"] == who).all()
        assert sorted(path for path, _, _ in store.scan(0)) == sorted(row.path for row in rows)
