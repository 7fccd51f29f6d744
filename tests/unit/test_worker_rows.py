"""Rows of workers are of the present: nothing that an experiment leaves or is copied by has them; looking at them is cheap."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from forking_kit import fork
from leasing_kit import take
from store_kit import create, until

from holdfast.locate import Opened, open_path
from holdfast.storage.database import measures, workers
from holdfast.storage.database import statements as sql
from holdfast.storage.database.engine import Statement, sqlite_url
from holdfast.storage.database.leases import Leases, Terms
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.database.reads import Reader
from holdfast.storage.journal import JournalWriter
from holdfast.storage.leasing import Keeper
from holdfast.testing.lab import Lab, dump
from holdfast.testing.workers import join, started
from holdfast.transfer import export, take_in


def work(opened: Opened) -> None:
    """Drive an experiment with a worker that has an attempt, stop, and write the journal."""
    keeper = take(opened)
    lab = Lab(opened.database, opened.record, keeper.epoch)
    writer = JournalWriter(opened.folder.root, keeper.epoch, Outbox(opened.database, opened.record.id))
    writer.start()
    worker = join(lab)
    started(lab, worker).report(0, {"loss": 1.0})
    lab.end(started(lab, worker), loss=2.0)
    lab.driver.tell("kill")
    Leases(opened.database, opened.record.id).renew(epoch=keeper.epoch, active=0.0, journaled=7)
    writer.flush()
    keeper.release("interrupted: told so")
    writer.flush()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An experiment that a worker worked for."""
    with closing(create(tmp_path / "runs")) as opened:
        work(opened)
        assert len(dump(opened.database)["worker"]) == 1
    return tmp_path / "runs" / "sample"


def lost(path: Path, tmp_path: Path) -> Opened:
    (path.parent / "holdfast.db").unlink()
    return open_path(path)


def stayed_behind(path: Path, tmp_path: Path) -> Opened:
    shutil.copy(path.parent / "holdfast.db", tmp_path / "old.db")
    with closing(open_path(path)) as opened:
        work(opened)
    return open_path(path, database=str(sqlite_url(tmp_path / "old.db")))


def copied(path: Path, tmp_path: Path) -> Opened:
    shutil.copytree(path.parent, tmp_path / "copied")
    return open_path(tmp_path / "copied" / "sample")


def exported(path: Path, tmp_path: Path) -> Opened:
    url = str(sqlite_url(tmp_path / "other.db"))
    with closing(open_path(path)) as opened:
        export(opened, tmp_path / "file.holdfast")
    take_in(tmp_path / "file.holdfast", url)
    return open_path(path, database=url)


def forked(path: Path, tmp_path: Path) -> Opened:
    with closing(open_path(path)) as opened, fork(opened) as made:
        return open_path(Path(made.path))


@pytest.mark.parametrize("way", [lost, stayed_behind, copied, exported, forked])
def test_no_copy_of_an_experiment_has_its_workers(path: Path, tmp_path: Path, way: Callable[[Path, Path], Opened]) -> None:
    with closing(way(path, tmp_path)) as opened:
        assert workers.every(opened.database, opened.record.id) == []
        trials = Reader(opened.database, opened.record.id).trials()
        assert len(trials) >= 2
        assert {trial.attempt.worker for trial in trials} == {None}
        keeper = take(opened)
        lab = Lab(opened.database, opened.record, keeper.epoch)
        beat = workers.beat(opened.database, opened.record.id, join(lab))
        assert (beat.epoch, beat.told, beat.journaled) == (keeper.epoch, "continue", -1)
        assert beat.open == beat.cancelled == frozenset()


def test_neither_the_journal_nor_an_export_speaks_of_workers(path: Path, tmp_path: Path) -> None:
    with closing(open_path(path)) as opened:
        export(opened, tmp_path / "file.holdfast")
    for file in [tmp_path / "file.holdfast", *(path / "journal").iterdir()]:
        assert b"node-1" not in file.read_bytes()


def test_a_keeper_tells_workers_how_far_the_journal_is(tmp_path: Path) -> None:
    reached = [3]
    with closing(create(tmp_path / "runs")) as opened:
        before = take(opened)
        before.release("done")
        keeper = Keeper(
            opened.database,
            opened.record.id,
            opened.folder,
            take(opened)._lease,
            Terms(duration=30.0, renewal=0.02),
            journaled=lambda: reached[0],
        )
        worker = join(Lab(opened.database, opened.record, keeper.epoch))
        keeper.start(lambda: None)
        try:
            assert workers.beat(opened.database, opened.record.id, worker).journaled == 3
            reached[0] = 9
            until(lambda: workers.beat(opened.database, opened.record.id, worker).journaled == 9)
        finally:
            keeper.release("done")


LOOKED_UP: dict[str, Statement] = {
    "open": workers._OPEN,
    "open, of a loss": sql.OPEN_OF_WORKER,
    "cancelled": sql.CANCEL_REQUESTS,
    "working": workers._statements("1.0").working,
    "stranded": workers._statements("1.0").stranded,
    "changed": measures._CHANGED,
    "reported": measures._REPORTED,
}
"""What is asked often, and must not look at every row of a table."""


@pytest.mark.parametrize("name", LOOKED_UP)
def test_what_is_asked_often_looks_at_few_rows(path: Path, name: str) -> None:
    """SQLite plans each of them by an index of the few rows that it is about."""
    few = {"trial": ("ix_trial_running", "ix_trial_cancel", "ix_trial_changes"), "worker": ("ix_worker_working",)}
    with closing(open_path(path)) as opened:
        body, _ = LOOKED_UP[name].text(opened.database.engine.dialect)
    values = {key: 1 for key in ("experiment", "worker", "since", "first", "last") if f":{key}" in body}
    with closing(sqlite3.connect(path.parent / "holdfast.db")) as connection:
        plan = [str(row[3]) for row in connection.execute(f"EXPLAIN QUERY PLAN {body}", values)]
    assert not any(step.startswith("SCAN") for step in plan if "SCALAR" not in step), plan
    first = next(step for step in plan if step.startswith("SEARCH"))
    table = {"a": "attempt", "t": "trial", "w": "worker"}.get(first.split()[1], first.split()[1])
    assert any(index in first for index in {**few, "attempt": ("ix_attempt_worker",)}[table]), plan
