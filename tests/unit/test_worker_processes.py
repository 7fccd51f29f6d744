"""Real worker processes that are killed, and suspended for too long; and their local folders."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from store_kit import until
from support_scripts import Script, begin_script, run_script
from support_workers import Drive

from holdfast.core.trial import Attempt
from holdfast.storage.database import workers
from holdfast.tasks.workers.processes import is_alive
from holdfast.tasks.working import WorkFolder, sweep

pytestmark = pytest.mark.timeout(900)  # it waits for several processes, each with patience

WORKER = """
import logging, pickle, sys
from functools import partial
from holdfast.storage.database.leases import Terms
from holdfast.tasks import remote, trial
from holdfast.tasks.supervisor import Supervisor

remote.terms = Terms(duration=float(sys.argv[3]), renewal=0.2)
place = pickle.loads(bytes.fromhex(sys.argv[1]))
try:
    with remote.using(place, "dask") as runtime:
        claim = partial(trial._claim, runtime, int(sys.argv[2]), "token", None, None)
        supervisor = Supervisor(runtime, claim, 0, 1, {"x": 0.5}, [], logging.getLogger())
        print(runtime.work.path, flush=True)
        try:
            trial._run(runtime, supervisor)
        finally:
            supervisor.tidy()
except BaseException as error:
    print(type(error).__name__, error, flush=True)
remote.close_all()
"""


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    made = Drive.begin(tmp_path)
    with closing(made.opened):
        yield made


def begin(drive: Drive, folder: Path, *, duration: float) -> tuple[Script, Attempt]:
    """Start a worker whose only trial has reported once; return it and the trial's attempt."""
    _, row = drive.propose()
    place = drive.place(trainable="train.py:reporting")
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}
    script = begin_script(WORKER, pickle.dumps(place).hex(), row, duration, **cache)
    until(lambda: (folder / "running").exists() or script.poll() is not None)
    assert script.poll() is None, script.communicate()[0]
    trial = drive.reader.trial(0)
    assert trial is not None
    assert lives(trial.attempt)
    return script, trial.attempt


def lives(attempt: Attempt) -> bool:
    return is_alive(str(attempt.host), attempt.pid or 0, str(attempt.pid_started)) is True


def test_one_that_is_killed(drive: Drive, tmp_path: Path) -> None:
    """Its child goes with it; the driver closes the attempt, and what is on the disk is swept by the next worker."""
    script, attempt = begin(drive, tmp_path, duration=600)
    with script:
        os.kill(script.pid, signal.SIGKILL)
        script.wait()
        until(lambda: not lives(attempt))
    (row,) = workers.every(drive.opened.database, drive.opened.record.id)
    assert row.left is None
    found = workers.of_attempt(drive.opened.database, attempt.id)
    assert found is not None
    assert found.id == row.id
    assert workers.lose(drive.opened.database, drive.opened.record.id, 1, row.id, "killed") == [(0, attempt.id)]
    work = tmp_path / "cache" / "holdfast" / "work"
    assert len(list(work.iterdir())) == 1
    sweep(work)
    assert list(work.iterdir()) == []


def test_one_that_is_suspended_for_longer_than_its_terms(drive: Drive, tmp_path: Path) -> None:
    """Its child reports meanwhile; on waking it ends itself, and nothing was written."""
    script, attempt = begin(drive, tmp_path, duration=8.4)  # it gives up after 8 s
    with script:
        os.kill(script.pid, signal.SIGSTOP)
        (tmp_path / "go").touch()
        before = state(drive)

        def silent() -> float:
            return workers.every(drive.opened.database, drive.opened.record.id)[0].silent

        until(lambda: silent() > 9.0)
        os.kill(script.pid, signal.SIGCONT)
        said, _ = script.communicate()
    assert "Fenced" in said
    assert "was suspended" in said
    assert state(drive) == before
    assert not lives(attempt)
    (row,) = workers.every(drive.opened.database, drive.opened.record.id)
    assert "was suspended" in (row.left or "")
    assert list((tmp_path / "cache" / "holdfast" / "work").iterdir()) == []


def state(drive: Drive) -> tuple[object, ...]:
    folder = drive.opened.folder
    files = [path for path in folder.path.rglob("*") if ".staging-" not in str(path)]
    return [row.step for row in drive.reader.history()], drive.reader.trial(0), drive.reader.checkpoints(), sorted(files)


class TestWorkFolders:
    def test_of_one_host(self, tmp_path: Path) -> None:
        one, two = WorkFolder(tmp_path), WorkFolder(tmp_path)
        foreign = tmp_path / ("0" * 16)
        foreign.mkdir()
        sweep(tmp_path)
        assert {one.path, two.path, foreign} == {*tmp_path.iterdir()}
        one.close()
        one.close()
        assert {two.path, foreign} == {*tmp_path.iterdir()}
        two.close()

    def test_of_a_process_that_is_gone(self, tmp_path: Path) -> None:
        code = "import os, sys\nfrom pathlib import Path\nfrom holdfast.tasks.working import WorkFolder\n"
        made = run_script(f"{code}made = WorkFolder(Path(sys.argv[1]))\nprint(made.path, flush=True)\nos._exit(0)", tmp_path)
        left = Path(made.stdout.strip())
        (left / "trials").mkdir()
        new = WorkFolder(tmp_path)
        assert {new.path} == {*tmp_path.iterdir()}
        new.close()
