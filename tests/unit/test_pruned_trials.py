"""What user code makes of being stopped by a rule, in processes and inline: the trial ends as it was decided."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from holdfast.core.checkpoint import CheckpointStatus
from holdfast.core.trial import Outcome, TrialStatus
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.engine import Database, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.storage.folder import Folder
from holdfast.tasks.runtime import Runtime
from holdfast.tasks.supervisor import Supervisor
from holdfast.tasks.trial import _run
from holdfast.tasks.workers.messages import Decision
from holdfast.tasks.workers.pool import WorkerPool
from holdfast.testing.lab import Lab
from holdfast.testing.samples import sample_spec

CODE = """
STEPS = 6


def plain(trial):
    for step in range(STEPS):
        trial.report({"loss": float(step)}, state={"step": step})
    raise RuntimeError("never comes here")


class Stepwise:
    def __init__(self):
        self.steps = 0

    def step(self):
        self.steps += 1
        return {"loss": float(self.steps - 1)}

    def save(self):
        return {"step": self.steps - 1}

    def load(self, state):
        self.steps = state["step"] + 1


def deaf(trial):
    for step in range(STEPS):
        try:
            trial.report({"loss": float(step)}, state={"step": step})
        except BaseException:
            pass
    return {"loss": -1.0}


def angry(trial):
    try:
        plain(trial)
    finally:
        raise ValueError("as it is told to stop")


def tidy(trial):
    try:
        plain(trial)
    finally:
        try:
            trial.report({"loss": -5.0}, state={"step": -1})
        finally:
            open("tidied", "w").close()


def gone(trial):
    try:
        plain(trial)
    finally:
        import os

        if trial.references["process"]:
            os._exit(7)
"""
FUNCTIONS = ["plain", "Stepwise", "deaf", "angry", "tidy", "gone"]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True)) as database:
        yield database


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, WorkerPool | None]]:
    pool = WorkerPool(1)
    yield {"process": pool, "inline": None}
    pool.close()


@pytest.mark.parametrize("isolation", ["process", "inline"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_trial_ends_as_it_was_decided(
    database: Database,
    tmp_path: Path,
    pools: dict[str, WorkerPool | None],
    isolation: str,
    asynchronous: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after step 2, whatever the code does then; what was due to be saved with that step is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    lab = Lab.new(database, "pruned")
    for function in FUNCTIONS:
        runtime = make_runtime(lab, tmp_path, function, pools[isolation], asynchronous=asynchronous, isolation=isolation)
        number = lab.driver.propose({"x": 0.5})
        supervisor = supervise(lab, runtime, number)
        result = _run(runtime, supervisor)
        assert (result["outcome"], result["metrics"]) == ("pruned", {}), function
        assert result["note"] == "stopped by threshold after step 2: loss 2 is above 1"
        lab.driver.end(supervisor.writer.attempt, Ending(outcome=Outcome(result["outcome"]), metrics=result["metrics"]))
        trial = lab.trial(number)
        assert (trial.status, trial.metrics, trial.step) == (TrialStatus.PRUNED, {"loss": 2.0}, 2), function
        assert trial.attempt.note == result["note"]
        decided = {row.step: row.decision for row in lab.reader.history() if row.trial == number}
        assert decided == {0: "continue", 1: "continue", 2: "prune"}
        saved = {one.step for one in lab.reader.checkpoints() if one.trial == number and one.status is CheckpointStatus.VALID}
        cut_off = asynchronous and function == "gone"  # maybe before its last save was written
        assert saved in ([{0, 1}, {0, 1, 2}] if cut_off else [{0, 1, 2}]), function
        if isolation == "process":
            assert result["note"] in runtime.folder.log_file(number, 1).read_text()
    assert (tmp_path / "tidied").exists()


def test_a_process_that_is_told_to_end_meanwhile(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver kills the trial that a rule has just stopped: that is no interruption of the trial."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    lab = Lab.new(database, "killed")
    runtime = make_runtime(lab, tmp_path, "plain", None, isolation="inline")
    supervisor = supervise(lab, runtime, lab.driver.propose({"x": 0.5}))
    report = supervisor.report

    def killing(given: Any) -> Decision:
        if given.step == 2:
            runtime.order(Decision.KILL)
        return report(given)

    monkeypatch.setattr(supervisor, "report", killing)
    assert _run(runtime, supervisor)["outcome"] == "pruned"


def make_runtime(lab: Lab, folder: Path, function: str, pool: WorkerPool | None, **options: Any) -> Runtime:
    spec = sample_spec(
        trainable=f"code.py:{function}",
        stopping={"rule": "threshold", "upper": 1.0, "max_steps": 6},
        checkpoints={"save_period": 1, "keep_last": 9, "asynchronous": options.get("asynchronous", False)},
        execution={"isolation": options["isolation"]},
        references={"process": options["isolation"] == "process"},
    )
    return Runtime(
        uuid="uuid",
        experiment=lab.id,
        epoch=1,
        spec=spec,
        workdir=str(folder),
        database=lab.database,
        reader=lab.reader,
        folder=Folder(folder / "exp"),
        checkpoints=LocalCheckpoints(folder / "exp"),
        pool=pool,
    )


def supervise(lab: Lab, runtime: Runtime, number: int) -> Supervisor:
    def claim(**_: Any) -> AttemptWriter:
        return lab.claim(number)

    return Supervisor(runtime, claim, number, 1, {"x": 0.5}, [], logging.getLogger(__name__))
