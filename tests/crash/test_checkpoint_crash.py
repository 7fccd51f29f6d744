"""What a crash, a full disk and a lost cache leave of checkpoints."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.core import faults
from holdfast.core.errors import StorageError
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.testing.saving import Files, save

NURSERY = """
import itertools, os, sys
from pathlib import Path
import numpy as np
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.testing.saving import save

def loop(start):
    store, last = LocalCheckpoints(Path(sys.argv[1])), None
    for step in itertools.count(start):
        published = save(store, {"step": step, "w": np.full(20_000 if step % 3 == 0 else 200, float(step))}, step=step)
        os.write(1, f"{step} {published.path} {published.digest}\\n".encode())
        if last is not None and step % 2:
            os.write(1, f"- {last.path} -\\n".encode())
            store.delete(last.path)
        last = published

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.write(1, f"pid {os.getpid()} -\\n".encode())
        loop(int(line))
    os.waitpid(child, 0)
    os.write(1, b"ended - -\\n")
"""
KILLS = 100


def test_killed_at_any_moment_every_acknowledged_step_loads(tmp_path: Path) -> None:
    moments = random.Random(7)
    store = LocalCheckpoints(tmp_path)
    acknowledged: dict[str, tuple[int, str]] = {}
    start = 0
    nursery = subprocess.Popen(  # which forks the savers: to start one anew takes far longer than a save
        [sys.executable, "-c", NURSERY, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    with nursery:
        for kill in range(1, KILLS + 1):
            nursery.stdin.write(f"{start}\n")
            nursery.stdin.flush()
            pid = int(nursery.stdout.readline().split()[1])
            lines = [nursery.stdout.readline() for _ in range(moments.randint(1, 12))]
            for _ in range(moments.randint(0, 60_000)):  # somewhere within the next save, without a clock
                pass
            os.kill(pid, signal.SIGKILL)
            while not lines[-1].startswith("ended"):
                lines.append(nursery.stdout.readline())
            new = {}
            for step, path, digest in map(str.split, lines[:-1]):
                if step == "-":
                    acknowledged.pop(path, None)
                    new.pop(path, None)
                else:
                    new[path] = (int(step), digest)
                    start = int(step) + 1
            acknowledged |= new
            for path, (number, digest) in (acknowledged if kill % 20 == 0 else new).items():
                state: Any = store.load(path, digest=digest, step=number).state
                assert state["step"] == number
                assert (state["w"] == number).all()
            for path, manifest, digest in store.scan(7) if kill % 20 == 0 else ():
                assert store.load(path, digest=digest).step == manifest.step
        nursery.stdin.close()
    store.sweep(7, list(acknowledged))
    folder = tmp_path / "trials" / "000007" / "checkpoints"
    assert {entry.name for entry in folder.iterdir()} == {Path(path).name for path in acknowledged}
    assert len(acknowledged) > KILLS / 2


class Killed(BaseException):
    """Stands for a SIGKILL: no handler of the code under test may catch it."""


@pytest.fixture
def kill_at() -> Iterator[Callable[[str], None]]:
    def install(name: str) -> None:
        def hook(passed: str) -> None:
            if passed == name:
                raise Killed

        faults.install(hook)

    yield install
    faults.install(None)


@pytest.mark.parametrize(
    ("name", "visible"),
    [("checkpoint.staged", False), ("checkpoint.manifest-written", False), ("checkpoint.renamed", True)],
)
def test_killed_at_a_point_of_publishing(name: str, visible: bool, tmp_path: Path, kill_at: Callable[[str], None]) -> None:
    store = LocalCheckpoints(tmp_path)
    old = save(store, "old")
    kill_at(name)
    with pytest.raises(Killed):
        save(store, "new", step=1)
    faults.install(None)
    assert [store.load(path).state for path, _, _ in store.scan(7)] == (["old", "new"] if visible else ["old"])
    assert len(store.sweep(7, [old.path])) == 1
    again = save(store, "again", step=1)
    assert [path for path, _, _ in store.scan(7)] == [old.path, again.path]
    assert len(list((tmp_path / old.path).parent.iterdir())) == 2


def test_killed_while_deleting(tmp_path: Path, kill_at: Callable[[str], None]) -> None:
    store = LocalCheckpoints(tmp_path)
    old, new = save(store, "old"), save(store, "new", step=1)
    kill_at("checkpoint.pruned-renamed")
    with pytest.raises(Killed):
        store.delete(old.path)
    faults.install(None)
    assert [path for path, _, _ in store.scan(7)] == [new.path]
    store.delete(old.path)
    assert [entry.name for entry in (tmp_path / old.path).parent.iterdir()] == [Path(new.path).name]


OPERATIONS = ["open", "write", "fsync", "rename", "mkdir", "close"]


def fail_at(patch: pytest.MonkeyPatch, name: str, count: int) -> list[int]:
    """Let the ``count``-th call of an operation fail; the list grows by one entry for each call."""
    real = getattr(os, name)
    calls: list[int] = []

    def operation(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != count:
            return real(*args, **kwargs)
        if name == "close":  # the descriptor is closed in any case, as POSIX leaves it
            real(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, name, operation)
    return calls


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", ["small", "large", "folder"])
def test_a_fault_in_any_operation_leaves_the_old_state(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "mine"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_bytes(b"x" * 10)
    state: Any = {"small": {"a": 1}, "large": np.arange(20_000.0), "folder": source}[kind]
    for count in range(1, 100):
        root = tmp_path / f"{count}"
        store = LocalCheckpoints(root)
        old = save(store, "old", trial=7)
        before = tree(root)
        store = LocalCheckpoints(root)  # one that has yet to make the folders durable
        with monkeypatch.context() as patch:
            calls = fail_at(patch, name, count)
            reason = ""
            try:
                save(store, state, step=1)
            except StorageError as error:
                reason = str(error)
        if len(calls) < count:
            break
        assert "No space left" in reason
        assert tree(root) == before
        assert store.load(old.path, digest=old.digest).state == "old"
        again = save(store, state, step=1)
        store.verify(again.path, digest=again.digest, step=1)
        shutil.rmtree(root)
    else:
        pytest.fail("there is no end of operations")
    assert count > 1


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


def test_a_smaller_one_can_be_saved_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalCheckpoints(tmp_path)
    real, room = os.write, [30_000]

    def write(descriptor: int, data: Any) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(descriptor, data[: room[0]])  # a short write first, as a filling disk gives
        room[0] -= count
        return count

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(StorageError, match="No space left"):
        save(store, np.zeros(20_000))
    assert list((tmp_path / "trials" / "000007" / "checkpoints").iterdir()) == []
    room[0] = 5_000  # what the removed files gave back
    assert store.load(save(store, [1, 2]).path).state == [1, 2]


def check_order(events: list[tuple[str, str]], published: str, root: Path) -> None:
    """Check that everything below the staged directory is synced before the rename, and every parent after it."""
    renames = [at for at, (kind, path) in enumerate(events) if kind == "rename" and path.endswith(published)]
    assert len(renames) == 1
    folder = Path(published).parent
    staged = f"{root / folder}/.staging-{Path(published).name}"
    synced_before = [path for kind, path in events[: renames[0]] if kind == "fsync"]
    synced_after = [path for kind, path in events[renames[0] :] if kind == "fsync"]
    names = [staged, *(f"{staged}/{name}" for name in Files(type("Store", (), {"root": root})).names(published))]
    for name in names:
        assert name in synced_before, name
    assert synced_before.index(f"{staged}/manifest.json") > max(
        (synced_before.index(name) for name in names[1:] if not name.endswith("manifest.json")), default=-1
    )
    assert synced_before[-1] == staged
    for parent in (root / folder, *list((root / folder).parents)[:3]):
        assert str(parent) in synced_after, parent
        if parent == root:
            break


@pytest.mark.parametrize("kind", ["small", "large", "folder"])
def test_everything_is_synced_in_order(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    (tmp_path / "mine" / "sub" / "file").write_bytes(b"x")
    state: Any = {"small": 1, "large": np.arange(20_000.0), "folder": tmp_path / "mine"}[kind]
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def recorded_rename(source: Any, target: Any) -> None:
        rename(source, target)
        events.append(("rename", str(target)))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    root = tmp_path / "root"
    store = LocalCheckpoints(root)
    published = save(store, state)
    check_order(events, published.path, root)
    if kind == "folder":
        manifested = next(at for at, (_, path) in enumerate(events) if path.endswith("/manifest.json"))
        synced = [at for at, (_, path) in enumerate(events) if path.endswith("/sub")]
        assert synced[0] < manifested < synced[-1]  # by whoever wrote it, and again by whoever publishes it
    events.clear()
    second = save(store, state, step=1)
    assert [path for name, path in events[-2:] if name == "fsync"] == [str((root / second.path).parent)]


def test_a_deletion_is_durable_before_the_first_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalCheckpoints(tmp_path)
    published = save(store, 1)
    events: list[str] = []
    for name in ("rename", "fsync", "unlink"):
        real = getattr(os, name)

        def recorded(*args: Any, _name: str = name, _real: Any = real, **kwargs: Any) -> Any:
            events.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(os, name, recorded)
    store.delete(published.path)
    assert events == ["rename", "fsync", "unlink", "unlink"]


ONE = """
import os, sys
from pathlib import Path
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.testing.saving import save
import numpy as np
os.write(1, save(LocalCheckpoints(Path(sys.argv[1])), {"a": 1, "w": np.arange(20_000.0)}).path.encode())
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_kernel_sees_the_same_order(tmp_path: Path) -> None:
    log, root = tmp_path / "log", tmp_path / "root"
    traced = ["strace", "-f", "-y", "-qq", "-s", "1000", "-o", str(log), "-e", "trace=fsync,rename,renameat,renameat2,write"]
    done = subprocess.run([*traced, sys.executable, "-c", ONE, str(root)], capture_output=True, text=True)
    if done.returncode and "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    events: list[tuple[str, str]] = []
    for line in log.read_text().splitlines():
        if found := re.search(r"fsync\(\d+<(.*)>\)\s+= 0", line):
            events.append(("fsync", found[1]))
        elif found := re.search(r'rename\w*\(.*"([^"]+)"(?:, \w+)?\)\s+= 0', line):
            events.append(("rename", found[1]))
        elif re.search(r"write\(1<", line):
            events.append(("return", ""))
    assert events[-1] == ("return", "")
    check_order(events[: events.index(("return", ""))], done.stdout, root)
