"""What a restore reads: as many statements for 1,000 finished trials as for 100, and little memory for each."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event
from store_kit import create

from holdfast.core.resume import Action, Rerun, ResumePolicy
from holdfast.core.trial import ErrorInfo, Outcome
from holdfast.flows.changing import RestoreRequest
from holdfast.flows.prepare import Restored, plan_restore, prepare_restore
from holdfast.report.observer import Observer
from holdfast.result import result_of
from holdfast.storage.database.attempts import Saved
from holdfast.storage.database.driver import Driver, Ending
from holdfast.storage.database.leases import Leases

FEW, MANY = 100, 1000
BYTES = 16_000
"""What each finished trial may take at most, in one restore's plan, result and rows; about half of it is what it takes."""
TRAINABLE = "def train(trial):\n    trial.report({'loss': 1.0})\n"


def filled(storage: Path, finished: int) -> Path:
    """Make an experiment of finished trials, two of which failed, and of one that was cut off by a crash; return its path."""
    storage.mkdir()
    storage.joinpath("train.py").write_text(TRAINABLE)
    search = {"engine": "random", "num_trials": finished + 1, "seed": 1}
    trainable = f"{storage / 'train.py'}:train"
    opened = create(storage, search=search, trainable=trainable, execution={"isolation": "inline"})
    leases = Leases(opened.database, opened.record.id)
    leases.take(seen=0, epoch=1, holder={}, action="started", detail={})
    driver = Driver(opened.database, opened.record.id, 1, seed=1)
    for number in range(finished + 1):
        writer = driver.start({"x": number / MANY}, token="token")
        path = f"trials/{number:06d}/checkpoints/step_00000000-a1-3f9c"
        writer.report(0, {"loss": 1.0}, saved=Saved(path=path, digest="d", bytes=1))
        if number in (3, 4):
            writer.fail(Ending(outcome=Outcome.FAILED, error=ErrorInfo(kind="E", message="m")), max_failures=0)
        elif number < finished:
            driver.end(writer.attempt, Ending(outcome=Outcome.COMPLETED, metrics={"loss": 0.5}))
    leases.release(epoch=1, active=1.0, ended="interrupted: a crash")
    opened.close()
    return opened.folder.path


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collect what SQLite runs for this thread: the lease is renewed by another one."""
    statements: list[str] = []
    here = threading.get_ident()

    def note(statement: str) -> None:
        if threading.get_ident() == here:
            statements.append(statement)

    def trace(connection: Any, _: Any) -> None:
        connection.set_trace_callback(note)

    event.listen(Engine, "connect", trace)
    try:
        yield statements
    finally:
        event.remove(Engine, "connect", trace)


def restored(request: RestoreRequest) -> Restored:
    """Prepare a restore, look at the trials as the driver does, and end it with a result."""
    found = prepare_restore(request, Observer())
    if found.session is None:
        result_of(found.opened, "done", trials=found.trials)
        found.opened.close()
        return found
    found.session.followed.look()
    found.session.keeper.release("interrupted: seen enough")
    result_of(found.opened, "done", trials=found.session.followed.own())
    found.session.close()
    return found


RESTORES = {
    "one goes on": (ResumePolicy(), {Action.RESUME}),
    "so do those that failed": (ResumePolicy(errored=Rerun.RESUME), {Action.RESUME}),
    "all of them are left out": (ResumePolicy(unfinished=Rerun.SKIP), {Action.SKIP}),
    "nothing is left to do": (ResumePolicy(unfinished=Rerun.SKIP), {Action.SKIP}),
}
"""One restore after the other: its policy, and what it does with the trials that it does not keep."""


def test_finished_trials_cost_no_statements_and_little_memory(tmp_path: Path) -> None:
    statements: dict[int, dict[str, int]] = {}
    peaks: dict[int, dict[str, int]] = {}
    for count in (FEW, MANY):
        path = filled(tmp_path / str(count), count)
        plan_restore(RestoreRequest(path=path))[0].close()  # statements are compiled, modules imported
        statements[count], peaks[count] = {}, {}
        for name, (policy, actions) in RESTORES.items():
            tracemalloc.start()
            with counted() as run:
                found = restored(RestoreRequest(path=path, policy=policy, new_trials=False))
            peaks[count][name] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            statements[count][name] = len(run)
            assert {planned.action for planned in found.plan} == actions | {Action.KEEP}
            assert len(found.plan) == count + 1
            assert (found.session is None) == (name == "nothing is left to do")
    assert statements[FEW] == statements[MANY]
    assert min(statements[FEW].values()) > 5
    for name in RESTORES:
        assert (peaks[MANY][name] - peaks[FEW][name]) / (MANY - FEW) < BYTES
