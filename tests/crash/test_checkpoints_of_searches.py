"""Checkpoints of real searches: a driver that is suspended while it publishes or prunes, readers beside it, and gc after it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support import DIED, Lab, MakeLab, Running, steps_of

import holdfast
from holdfast import locate
from holdfast.storage.database.leases import Leases
from holdfast.tasks.workers import processes
from holdfast.testing.lab import Lab as ByHand
from holdfast.testing.racing import url_of
from holdfast.testing.samples import sample_spec

SUSPENDED = """
import os, signal, sys, threading
from holdfast.core import faults
name, count = sys.argv[1].split(":")
passed = []
def suspend(point):
    if point == name:
        passed.append(point)
        if len(passed) == int(count):
            from holdfast.tasks.runtime import _runtimes
            (runtime,) = _runtimes.values()
            with runtime.database._lock:  # no other thread is within a transaction: that would keep the database locked
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread stops first: here
faults.install(suspend)
from holdfast.cli import main
sys.exit(main(sys.argv[2:]))
"""
KEEP_ONE = {"keep_last": 1, "keep_top_k": None}


def suspended(lab: Lab, point: str, spec: Path) -> Running:
    """Start a search that suspends itself at a pass of a point, and wait until it has."""
    run = lab.start(point, "run", spec, script=SUSPENDED)
    started = processes.identity(run.process.pid)
    lab.until(lambda: processes.is_suspended(processes.same_host(), run.process.pid, str(started)), run)
    return run


def valid(lab: Lab) -> dict[str, bytes]:
    """Return the manifest of each checkpoint whose row says valid, by its path."""
    with lab.open() as experiment:
        rows = [row for row in experiment.checkpoints() if row.status == "valid"]
    return {row.path: (lab.path() / row.path / "manifest.json").read_bytes() for row in rows}


@pytest.mark.parametrize(
    "point",
    [
        "checkpoint.manifest-written:2",
        "checkpoint.renamed:2",
        "checkpoint.pruned-row:1",
        "checkpoint.pruned-renamed:1",
    ],
)
def test_a_driver_suspended_in_the_middle_of_a_publication_or_a_pruning_harms_nobody(lab: Lab, point: str) -> None:
    zombie = suspended(lab, point, lab.spec(search={"num_trials": 2}, checkpoints=KEEP_ONE))
    refused = lab.light("gc", lab.path())
    assert refused.code == 3
    assert f"process {zombie.process.pid} on" in refused.output
    lab.run("restore", lab.path(), "--force")
    assert lab.statuses() == ["COMPLETED"] * 2
    before, rows = valid(lab), lab.dump()
    assert {path.split("/")[1] for path in before} == {"000000", "000001"}
    zombie.signal(signal.SIGCONT)
    ended = zombie.wait()
    assert ended.code == 3, ended.output
    assert valid(lab) == before
    assert lab.dump() == rows  # nothing of it came in
    assert lab.run("checkpoints", lab.path(), "--verify").output.endswith(f"{len(before)} of {len(before)} are good\n")
    assert [steps_of(lab, number) for number in range(2)] == [[0, 1, 2]] * 2
    with lab.open() as experiment:
        experiment.gc()
        assert experiment.gc().removed == []
    assert valid(lab) == before
    folders = [entry for trial in (lab.path() / "trials").iterdir() for entry in (trial / "checkpoints").iterdir()]
    assert sorted(str(folder.relative_to(lab.path())) for folder in folders) == sorted(before)


@pytest.mark.parametrize(
    ("fault", "left"),
    [
        ("checkpoint.manifest-written:2", {"never published"}),
        ("checkpoint.renamed:2", {"no row names it"}),
        ("checkpoint.pruned-renamed:1", {"half deleted"}),
    ],
)
def test_what_a_killed_search_left_is_removed_and_the_rest_goes_on(lab: Lab, fault: str, left: set[str]) -> None:
    lab.run("run", lab.spec(search={"num_trials": 2}, checkpoints=KEEP_ONE), fault=fault, code=DIED)
    tree, rows = lab.tree(), lab.dump()
    would = json.loads(lab.light("gc", lab.path(), "--dry-run", "--json").output)
    assert (lab.tree(), lab.dump()) == (tree, rows)
    assert {item["why"] for item in would["removed"]} == left
    went = json.loads(lab.light("gc", lab.path(), "--json").output)
    assert went["removed"] == would["removed"]
    assert lab.light("gc", lab.path()).output == "nothing is left to remove"
    assert lab.json("show", lab.path())["status"] == "interrupted"
    newest = max((row.step for row in lab.checkpoints(0)), default=-1)
    assert f"resumed (trial 0 after step {newest})" in lab.run("restore", lab.path()).output
    assert lab.statuses() == ["COMPLETED"] * 2


def test_a_pin_while_the_search_runs_outlives_it(make_lab: MakeLab) -> None:
    lab = make_lab(steps=8)
    order = lab.order("hold", 0, 2)
    run = lab.start("run", lab.spec(search={"num_trials": 1}, checkpoints=KEEP_ONE))
    lab.until_logged("hold", 0, 2, run)
    assert lab.light("pin", lab.path(), "--trial", "0", "--step", "1").code == 0
    order.unlink()
    assert run.wait().code == 0
    assert [(row.step, row.pinned) for row in lab.checkpoints(0)] == [(1, True), (7, False)]
    assert lab.light("gc", lab.path()).output == "nothing is left to remove"
    lab.database.unlink()  # the journal tells of the pin, too
    assert [(row.step, row.pinned) for row in lab.checkpoints(0)] == [(1, True), (7, False)]
    lab.run("checkpoints", lab.path(), "--verify")
    lab.light("pin", lab.path(), "--trial", "0", "--step", "1", "--remove")
    assert [row.pinned for row in lab.checkpoints(0)] == [False, False]


def read_while(experiment: holdfast.Experiment, ended: Callable[[], bool]) -> list[int]:
    """Load the newest checkpoint of trial 0 again and again; return the steps. An older one than was listed is an error."""
    seen: list[int] = []
    while not ended():
        listed = [row.step for row in experiment.checkpoints() if row.status == "valid"]
        if listed:
            loaded: Any = experiment.load_checkpoint(0, strict=True)
            assert loaded.step >= max(listed)
            assert set(loaded.state) == {"w"}
            seen.append(loaded.step)
    assert seen == sorted(seen)
    return seen


def test_a_reader_of_a_running_search_sees_no_error(make_lab: MakeLab) -> None:
    steps = 200
    lab = make_lab(steps=steps)
    run = lab.start("run", lab.spec(search={"num_trials": 1}, checkpoints={"keep_last": 2, "keep_top_k": None}))
    lab.until_logged("step", 0, 3, run)
    with lab.open() as experiment:
        seen = read_while(experiment, lambda: run.process.poll() is not None)
    assert run.wait().code == 0, run.output
    assert len(set(seen)) > 2, seen
    assert [row.step for row in lab.checkpoints(0)] == [steps - 2, steps - 1]


SAVES = 1000
SAVER = """
import json, sys
from pathlib import Path
import numpy as np
from holdfast.core.retention import KeepLast, surplus
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.engine import connect
from holdfast.testing.saving import save

job = json.loads(sys.argv[1])
attempt, store = AttemptWriter(database=connect(job["url"]), **job["attempt"]), LocalCheckpoints(Path(job["root"]))
for step in range(job["saves"]):
    published = save(store, {"w": np.full(2000, float(step))}, trial=0, step=step)
    saved = Saved(path=published.path, digest=published.digest, bytes=published.bytes)
    attempt.report(step, {"loss": float(step)}, saved=saved)
    going = surplus(attempt.kept()[0], [KeepLast(2)])
    marked = attempt.forget([item.id for item in going])
    for item in going:
        assert item.id in marked
        store.delete(item.path)
"""


def test_a_reader_beside_many_saves_of_which_two_are_kept_sees_no_error(tmp_path: Path) -> None:
    """As the search does it, without what makes a search slow."""
    spec = sample_spec(storage=str(tmp_path / "runs"))
    with closing(locate.create(spec, seed=1, workdir=".")) as opened:
        Leases(opened.database, opened.record.id).take(seen=0, epoch=1, holder={"pid": 1}, action="started", detail={})
        writer = ByHand(opened.database, opened.record).started()
        attempt = {name: value for name, value in vars(writer).items() if name != "database"}
        job = {"url": url_of(opened.database), "attempt": attempt, "root": str(opened.folder.path), "saves": SAVES}
        with subprocess.Popen([sys.executable, "-c", SAVER, json.dumps(job)]) as saver:
            try:
                seen = read_while(holdfast.Experiment(opened), lambda: saver.poll() is not None)
            finally:
                saver.kill()
        assert saver.returncode == 0
        assert len(set(seen)) > 10
        rows = [row for row in holdfast.Experiment(opened).checkpoints() if row.status == "valid"]
        assert [row.step for row in rows] == [SAVES - 2, SAVES - 1]


BAD_FOLDERS = """
import os, shutil
from pathlib import Path


def train(trial):
    own = trial.stage(0)
    (own / "w.bin").write_bytes(b"w" * 1000)
    if trial.number == 0:
        shutil.rmtree(own)
    if trial.number == 1:
        shutil.rmtree(own)
        own.write_text("mine")
    trial.report({"loss": 1.0}, step=0)
    if trial.number == 2:
        Path("loop").mkdir(exist_ok=True)
        if not os.path.lexists("loop/a"):
            os.symlink("a", "loop/a")
        trial.report({"loss": 1.0}, step=1, directory="loop")
    trial.report({"loss": 1.0}, step=1, state=1)
"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_trial_whose_folder_is_bad_fails_alone(lab: Lab, asynchronous: bool) -> None:
    (lab.folder / "train.py").write_text(BAD_FOLDERS)
    ended = lab.run("run", lab.spec(checkpoints={"asynchronous": asynchronous}), code=1)
    assert lab.statuses() == ["FAILED", "FAILED", "FAILED", "COMPLETED"], ended.output
    assert {number: steps_of(lab, number) for number in (2, 3)} == {2: [0], 3: [0, 1]}
    assert [one.step for one in lab.checkpoints(3)] == [0, 1]
    ended = lab.run("restore", lab.path(), "--restart-errored", code=1)
    assert lab.statuses() == ["FAILED", "FAILED", "FAILED", "COMPLETED"], ended.output
    with lab.open() as experiment:
        errors = [trial.error for trial in experiment.trials[:3]]
    for error in errors:
        assert error is not None
        assert "NotStorable" in str(error), error
    assert not list(lab.path().glob("trials/*/checkpoints/.staging*"))
