"""What a crash, a suspension, a full disk and a fork leave of a store of its own."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_scripts import begin_script

from holdfast import CheckpointStore
from holdfast.core.errors import CheckpointConflict, Corrupt, Fenced, InvalidInput, InvalidStep, SpecError, StorageError
from holdfast.storage.atomic import is_draft
from holdfast.storage.checkpoints import writer
from tests.crash.test_checkpoint_crash import OPERATIONS, fail_at

LOOPS = """
import os, sys
import numpy as np
from holdfast import CheckpointStore

def loop(path, background):
    store = CheckpointStore(path, {"keep_last": 3, "keep_every": 5, "asynchronous": background})
    for step in range((store.steps() or [-1])[-1] + 1, 10**9):
        state = {"step": step, "w": np.full(20_000 if step % 3 == 0 else 200, float(step))}
        store.save(step, state, {"loss": -step})
        if background and step % 4:
            continue
        store.flush()
        os.write(1, f"{step}\\n".encode())

for line in sys.stdin:
    child = os.fork()  # of a process that has imported everything
    if child == 0:
        os.write(1, f"{os.getpid()}\\n".encode())
        loop(sys.argv[1], sys.argv[2] == "background")
    os.waitpid(child, 0)
    os.write(1, b"\\ngone\\n")
"""


def check(path: Path, newest: int) -> list[int]:
    """Check that every listed step loads, the acknowledged one or a later one is the newest, and the rules hold."""
    store = CheckpointStore(path)
    steps = store.steps()
    if newest < 0 and not steps:
        return [-1]
    assert steps[-1] >= newest
    for step in steps:
        state = store.load(step)
        assert state["step"] == step
        assert (state["w"] == step).all()
    assert set(range(0, steps[-1], 5)) <= set(steps)
    assert set(steps[-3:]) == set(range(steps[-1] - 2, steps[-1] + 1))
    return steps


@pytest.mark.parametrize(("kind", "kills"), [("at once", 100), ("background", 30)])
def test_killed_at_any_moment(kind: str, kills: int, tmp_path: Path) -> None:
    moments = random.Random(11)
    newest, steps = -1, [-1]
    saver = subprocess.Popen(
        [sys.executable, "-c", LOOPS, str(tmp_path), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert saver.stdin is not None
    assert saver.stdout is not None
    for _ in range(kills):
        saver.stdin.write("\n")
        saver.stdin.flush()
        child = int(saver.stdout.readline())
        lines = [saver.stdout.readline() for _ in range(moments.randint(0, 6))]
        for _ in range(moments.randint(0, 40_000)):  # somewhere within a save, without a clock
            pass
        os.kill(child, signal.SIGKILL)
        while (line := saver.stdout.readline()) != "gone\n":
            lines.append(line)
        newest = max([newest, *(int(line) for line in lines if line.endswith("\n") and line.strip())])
        steps = check(tmp_path, newest)
    saver.communicate()
    store = CheckpointStore(tmp_path, {"keep_last": 3, "keep_every": 5})
    store.save(steps[-1] + 1, {"step": steps[-1] + 1, "w": np.zeros(1) + steps[-1] + 1})
    steps = check(tmp_path, steps[-1] + 1)
    # a draft of the record, cut off, stays for an hour: nobody can tell sooner that it is nobody's
    left = {name for name in os.listdir(tmp_path) if not name.startswith("step_") and not is_draft(name)}
    assert left == {"writer.json", ".lock", next(name for name in left if name.startswith(".writer-"))}
    assert len([name for name in os.listdir(tmp_path) if name.startswith("step_")]) == len(steps)


STOPPED = """
import os, signal, sys
from holdfast import CheckpointStore
from holdfast.core import faults

store = CheckpointStore(sys.argv[1], {"keep_last": 1})
store.save(0, "zero")
store.save(1, "one")
stops = iter([1])

def stop(name):
    if name == sys.argv[2] and next(stops, 0):
        os.write(1, b"stopping\\n")
        os.kill(os.getpid(), signal.SIGSTOP)

faults.install(stop)
try:
    store.save(2, "of the suspended one")
except Exception as error:
    os.write(1, f"{type(error).__name__}\\n".encode())
try:
    store.save(9, "of the suspended one")
except Exception as error:
    os.write(1, f"{type(error).__name__}\\n".encode())
try:
    store.prune()
except Exception as error:
    os.write(1, f"{type(error).__name__}\\n".encode())
"""


@pytest.mark.parametrize(
    "name", ["checkpoint.staged", "checkpoint.manifest-written", "checkpoint.renamed", "checkpoint.pruned-renamed"]
)
def test_a_suspended_writer_that_goes_on_changes_nothing(name: str, tmp_path: Path) -> None:
    zombie = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path), name], stdout=subprocess.PIPE, text=True)
    assert zombie.stdout is not None
    try:
        assert zombie.stdout.readline() == "stopping\n"
        os.waitid(os.P_PID, zombie.pid, os.WSTOPPED | os.WNOWAIT)
        published = name in ("checkpoint.renamed", "checkpoint.pruned-renamed")
        successor = CheckpointStore(tmp_path)
        assert successor.load("latest") == ("of the suspended one" if published else "one")
        successor.save(5, "of the successor")
        before = {each.step: each.load() for each in successor.checkpoints()}
    finally:
        zombie.send_signal(signal.SIGCONT)
    out, _ = zombie.communicate()
    assert zombie.returncode == 0
    assert out.splitlines()[-2:] == ["Fenced", "Fenced"]
    assert published or out.splitlines()[0] == "Fenced"
    for store in (successor, CheckpointStore(tmp_path)):
        assert {each.step: each.load() for each in store.checkpoints()} == before
    successor.save(6, "goes on")
    assert CheckpointStore(tmp_path).load() == "goes on"


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", ["small", "large", "first"])
def test_a_fault_in_any_operation_of_a_save(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state: Any = {"small": 1, "large": np.arange(20_000.0), "first": 1}[kind]
    for count in range(1, 100):
        path = tmp_path / f"{count}"
        store = CheckpointStore(path, {"keep_last": 2})
        if kind != "first":
            store.save(0, "zero")
            store.save(1, "one")
        before = store.steps()
        with monkeypatch.context() as patch:
            calls = fail_at(patch, name, count)
            reason = ""
            try:
                store.save(2, state)
            except StorageError as error:
                reason = str(error)
        if len(calls) < count:
            break
        reader = CheckpointStore(path)
        if reason:
            assert "No space left" in reason
            assert reader.steps() == before
            assert [reader.load(step) for step in before] == ["zero", "one"][: len(before)]
            store.save(2, state)
        assert 2 in CheckpointStore(path).steps()
        assert not [found for found in os.listdir(path) if found.startswith(".staging")]
        np.testing.assert_equal(CheckpointStore(path).load(), state)
        shutil.rmtree(path)
    else:
        pytest.fail("there is no end of operations")
    assert count > 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk(small_disk: Path, asynchronous: bool) -> None:
    store = CheckpointStore(small_disk / "store", {"asynchronous": asynchronous})
    store.save(0, np.zeros(40_000))
    store.flush()
    with pytest.raises(StorageError) as full, store:
        store.save(1, np.zeros(200_000))
    assert full.value.errno == errno.ENOSPC
    assert store.steps() == [0]
    assert not list((small_disk / "store").glob(".writer-*/*"))
    store.save(1, np.zeros(30_000))
    store.close()
    assert CheckpointStore(small_disk / "store").load(1).shape == (30_000,)
    assert CheckpointStore(small_disk / "store").load(0).shape == (40_000,)


POLL = """
import sys
from holdfast import CheckpointStore

store = CheckpointStore(sys.argv[1])
seen, last = 0, -1
print("ready", flush=True)
while last < 999:
    for which in ("latest", "first", "best"):
        state = store.load(which, strict=True)
    assert state["step"] >= 0
    last = max(last, store.load("latest", strict=True)["step"])
    assert store.latest_path() is not None
    seen += 1
print(seen, flush=True)
"""


def test_a_reader_sees_no_error_while_others_come_and_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, {"keep_last": 2})
    store.save(0, {"step": 0})
    reader = subprocess.Popen(
        [sys.executable, "-c", POLL, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    for step in range(1, 1000):
        store.save(step, {"step": step})
    out, errors = reader.communicate()
    assert reader.returncode == 0, errors
    assert int(out) > 0


def test_the_work_of_a_save_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, {"metric_name": "loss"})
    calls: list[str] = []
    for name in ("listdir", "scandir", "open", "stat", "lstat"):
        real = getattr(os, name)

        def counted(*args: Any, _name: str = name, _real: Any = real, **rest: Any) -> Any:
            calls.append(_name)
            return _real(*args, **rest)

        monkeypatch.setattr(os, name, counted)
    counts = []
    for step in range(300):
        calls.clear()
        store.save(step, step, {"loss": -step})
        store.latest_path()
        store.best_path()
        counts.append(len(calls))
    assert "listdir" not in calls
    assert max(counts[200:]) <= max(counts[10:30])


def test_a_fork_may_not_save_in_the_name_of_its_parent(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(0, 0)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.save(1, "the child's")
        except InvalidInput as error:
            os.write(send, str(error).encode())
        os._exit(0)
    os.close(send)
    os.waitpid(child, 0)
    assert b"open it anew" in os.read(receive, 1000)
    os.close(receive)
    store.save(1, "the parent's")
    assert CheckpointStore(tmp_path).load() == "the parent's"


def test_threads_that_save_one_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    outcomes: list[object] = []

    def save(text: str) -> None:
        try:
            outcomes.append(store.save(5, text))
        except (CheckpointConflict, InvalidStep) as error:
            outcomes.append(error)

    threads = [threading.Thread(target=save, args=(text,)) for text in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([outcome for outcome in outcomes if not isinstance(outcome, Exception)]) == 1
    assert len([outcome for outcome in outcomes if isinstance(outcome, CheckpointConflict)]) == 7
    assert CheckpointStore(tmp_path).steps() == [5]


RACE = """
import os, sys
from holdfast import CheckpointStore
from holdfast.core.errors import HoldfastError

store = CheckpointStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    store.save(1, sys.argv[2])
    print("saved", flush=True)
except HoldfastError as error:
    print(type(error).__name__, flush=True)
"""


def test_processes_that_save_one_step_at_once(tmp_path: Path) -> None:
    for round_number in range(3):
        path = tmp_path / str(round_number)
        CheckpointStore(path).save(0, "first")
        savers = [begin_script(RACE, path, number) for number in range(4)]
        for saver in savers:
            assert saver.stdout is not None
            assert saver.stdout.readline() == "ready\n"
        for saver in savers:
            assert saver.stdin is not None
            saver.stdin.write("\n")
            saver.stdin.flush()
        said = [saver.communicate()[0].strip() for saver in savers]
        assert said.count("saved") == 1, said
        assert set(said) <= {"saved", "Fenced", "CheckpointConflict", "Contention"}
        assert CheckpointStore(path).load() == str(said.index("saved"))


def test_the_checkpoints_of_a_trial_can_be_read_and_not_changed(tmp_path: Path) -> None:
    CheckpointStore(tmp_path / "copied").save(0, "zero")
    (tmp_path / "copied" / writer.FILE).unlink()
    (tmp_path / "experiment.json").write_text("{}")
    folder = tmp_path / "trials" / "000007" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copytree(tmp_path / "copied", folder, dirs_exist_ok=True)
    before = sorted(os.listdir(folder))
    store = CheckpointStore(folder, {"keep_last": 1})
    assert store.load() == "zero"
    for call in (lambda: store.save(1, 1), store.prune, lambda: store.pin(0), lambda: store.unpin(0), lambda: store.stage(1)):
        with pytest.raises(InvalidInput, match="belongs to a trial"):
            call()
    assert sorted(os.listdir(folder)) == before
    with pytest.raises(InvalidInput, match="belongs to a trial"):
        CheckpointStore("memory://x/trials/000007/checkpoints").save(0, 0)


def test_an_older_record_is_noticed(tmp_path: Path) -> None:
    for step in range(3):
        CheckpointStore(tmp_path).save(step, step)
        if step == 0:
            old = (tmp_path / writer.FILE).read_bytes()
    new = (tmp_path / writer.FILE).read_bytes()
    (tmp_path / writer.FILE).write_bytes(old)
    before = sorted(os.listdir(tmp_path))
    for call in (CheckpointStore(tmp_path).load, lambda: CheckpointStore(tmp_path, {"keep_last": 1}).prune()):
        with pytest.raises(Corrupt, match="older than"):
            call()
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / writer.FILE).write_bytes(new)
    assert CheckpointStore(tmp_path).steps() == [0, 1, 2]


def test_a_takeover_that_fails_halfway_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        CheckpointStore(tmp_path).save(step, step)
    real = os.listdir
    for failing in range(1, 12):
        calls: list[int] = []

        def listdir(*args: Any, _calls: list[int] = calls, _failing: int = failing) -> Any:
            _calls.append(1)
            if len(_calls) == _failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args)

        late = CheckpointStore(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", listdir)
            with pytest.raises((StorageError, CheckpointConflict)) as first:
                late.save(1, "late")
        with pytest.raises(CheckpointConflict):
            late.save(1, "late")
        if isinstance(first.value, CheckpointConflict):
            break
    else:
        pytest.fail("there is no end of listings")
    assert failing > 1
    assert [CheckpointStore(tmp_path).load(step) for step in range(3)] == [0, 1, 2]


def test_where_a_store_cannot_be(tmp_path: Path) -> None:
    CheckpointStore(tmp_path / "a").save(0, 0)
    for path, rest in (
        ("", {}), (" ", {}), ("a\0b", {}), (b"a", {}), (7, {}), (Path("s3://bucket/x"), {}),
        ("memory://x/y", {"cache": tmp_path / "a"}),
        ("memory://x/y", {"cache_bytes": "1G"}), ("memory://x/y", {"cache_bytes": -1}),
    ):  # fmt: skip
        with pytest.raises(SpecError):
            CheckpointStore(path, **rest)  # type: ignore[arg-type]


def test_what_cannot_be_pruned_does_not_undo_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, {"keep_last": 1})
    store.save(0, 0)
    real = os.listdir

    def listdir(*args: Any) -> Any:
        if len(list(tmp_path.glob("step_*"))) == 2:  # it is published
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", listdir)
        assert store.save(1, 1) is not None
    assert "pruning" in caplog.text
    assert CheckpointStore(tmp_path).load() == 1
    store.save(2, 2)
    assert CheckpointStore(tmp_path).steps() == [2]


def test_a_damaged_record_is_said_and_nothing_changed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(0, 0)
    (tmp_path / writer.FILE).write_text('{"writer": "me"')
    for call in (CheckpointStore(tmp_path).steps, CheckpointStore(tmp_path).load, lambda: CheckpointStore(tmp_path).save(1, 1)):
        with pytest.raises(Corrupt, match=r"writer\.json is damaged"):
            call()
    (tmp_path / writer.FILE).unlink()
    assert CheckpointStore(tmp_path).load() == 0  # without a record all that is there counts
    CheckpointStore(tmp_path).save(1, 1)
    assert CheckpointStore(tmp_path).steps() == [0, 1]
    with pytest.raises(Fenced):
        store.save(2, 2)


def test_what_a_crash_cut_off_long_ago_is_removed(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(0, 0)
    drafts = [tmp_path / f".holdfast-draft-{letter * 16}" for letter in "ab"]
    for draft in drafts:
        draft.touch()
    os.utime(drafts[0], (0, 0))
    CheckpointStore(tmp_path).save(1, 1)
    assert [draft.exists() for draft in drafts] == [False, True]
