"""Stopping rules where reports come from several processes: the decisions of one process that sees them in the same order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from support_postgres import Postgres
from test_stopping_stored import RULES, Search

from holdfast.core.errors import CheckpointConflict, DatabaseError, RolledBack
from holdfast.core.history import History
from holdfast.core.stopping import make
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.database import measures
from holdfast.storage.database.engine import Database, Transaction, connect, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.storage.database.reads import Reader
from holdfast.storage.folder import Folder
from holdfast.tasks.place import Place
from holdfast.tasks.remote import RemoteRuntime
from holdfast.tasks.supervisor import Supervisor
from holdfast.tasks.workers.messages import Decision, Report
from holdfast.tasks.working import WorkFolder
from holdfast.testing.lab import Lab
from holdfast.testing.samples import sample_spec

PROCESSES = 3


class Shared(Search):
    """The same search, its trials shared out to workers, each with a database connection and a memory of its own."""

    def begin(self) -> None:
        self.running = {}
        self.workers = [self.worker() for _ in range(PROCESSES)]
        self.runtime = self.workers[0]

    def worker(self) -> RemoteRuntime:
        database = connect(self.lab.database.engine.url)
        place = Place(
            uuid="uuid",
            name="x",
            experiment=self.lab.id,
            epoch=1,
            location="/",
            database="",
            workdir="/",
            trainable="",
            host="",
        )
        made = RemoteRuntime(
            uuid="uuid",
            experiment=self.lab.id,
            epoch=1,
            spec=self.spec,
            workdir="/",
            database=database,
            reader=Reader(database, self.lab.id),
            folder=Folder(self.root),
            checkpoints=LocalCheckpoints(self.root),
            pool=None,
            place=place,
            engine="dask",
            work=WorkFolder(self.root / "work"),
        )
        made._heard = float("inf")  # it does not beat here
        return made

    def supervise(self, number: int) -> Supervisor:
        """Another worker for each attempt, by turns."""
        self.runtime = self.workers[(number + self.lab.trial(number).attempt.number) % PROCESSES]
        made = super().supervise(number)
        claimed, database = made.writer, self.runtime.database
        made._writer = type(claimed)(**{**vars(claimed), "database": database})
        return made

    def check(self) -> None:
        """See that what each knows is what is stored, once it has looked."""
        rules = self.workers[0]._rules
        for worker in self.workers:
            with worker.database.write() as tx:
                worker._stored._look(tx)
            found = worker._stored._history.contents()
            assert repr(found) == repr(_stored(worker.reader, rules.metrics))

    def close(self) -> None:
        for worker in self.workers:
            worker.close_files()


def _stored(reader: Reader, metrics: Any) -> Any:
    history = History(metrics)
    for metric, rows in reader.measured(metrics).items():
        history.load(metric, rows)
    return history.contents()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    file = tmp_path_factory.mktemp("shared") / "holdfast.db"
    open_database(sqlite_url(file), create_missing=True).close()
    with closing(open_database(sqlite_url(file))) as database:
        event.listen(database.engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous = OFF").close())
        yield database


@pytest.mark.parametrize("rule", RULES)
def test_workers_decide_as_one_process_does(rule: str, database: Database, tmp_path: Path) -> None:
    """Also after all attempts were lost at some point, and went on from their checkpoints on other workers."""
    spec = sample_spec(stopping=RULES[rule])
    whole = Search(Lab.new(database, f"{rule}, whole"), tmp_path, spec)
    whole.run()
    assert any(reason for _, _, reason in whole.log)
    for cut in (len(whole.log) + 1, 3, len(whole.log) // 2):
        other = Shared(Lab.new(database, f"{rule}, {cut}"), tmp_path, spec)
        with closing(other):
            if cut <= len(whole.log):
                other.run(cut, told=False)
                other.check()
                before = other.workers
                other.crash()
                for worker in before:
                    worker.close_files()
            other.run()
            other.check()
            assert other.log == whole.log
            assert other.outcome() == whole.outcome()


def race(made: Shared, trials: int = 6, steps: int = 8) -> None:
    """Let each trial report in a thread of its own; see that the stored decisions are those of the stored order."""
    for _ in range(trials):
        made.supervise(made.lab.driver.propose({"x": 0.5}))
    errors: list[BaseException] = []

    def reporting(number: int) -> None:
        try:
            for step in range(steps):
                loss = float(number * 7 % 5) + step % 3
                if made.running[number].report(Report(step=step, metrics={"loss": loss})) is Decision.PRUNE:
                    return
        except BaseException as error:  # noqa: BLE001  # raised below
            errors.append(error)

    first, *others = made.running
    reporting(first)  # the best one: whoever reports after it is pruned if it is not as good, whatever their order
    threads = [threading.Thread(target=reporting, args=(number,)) for number in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    rules = make(made.spec.stopping, made.spec.goals)
    history = History(rules.metrics)
    rows = sorted(made.lab.reader.history(), key=lambda row: row.seq)
    for row in rows:
        history.add(row.trial, row.step, row.metrics)
        assert (row.decision == "prune") == (rules.decide(history, row.trial, row.step) is not None)
    assert any(row.decision == "prune" for row in rows)


def test_reports_at_once(database: Database, tmp_path: Path) -> None:
    spec = sample_spec(stopping={"rule": "asha", "reduction_factor": 2})
    with closing(Shared(Lab.new(database, "at once"), tmp_path, spec)) as made:
        race(made)


def test_reports_at_once_on_a_server(postgres: Postgres, tmp_path: Path) -> None:
    spec = sample_spec(stopping={"rule": "asha", "reduction_factor": 2})
    with (
        closing(open_database(postgres.url(postgres.create()))) as server,
        closing(Shared(Lab.new(server, "at once"), tmp_path, spec)) as made,
    ):
        race(made)


def test_only_what_changed_is_read_again(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = sample_spec(stopping={"rule": "median"})
    read: list[tuple[int, int]] = []
    measured = measures.measured

    def counting(tx: Transaction, experiment: int, metrics: Any, first: int, last: int) -> Any:
        read.append((first, last))
        return measured(tx, experiment, metrics, first, last)

    monkeypatch.setattr(measures, "measured", counting)
    with closing(Shared(Lab.new(database, "read"), tmp_path, spec)) as made:
        for _ in range(60):
            number = made.lab.driver.propose({"x": 0.5})
        for other in (0, 3, 57, number):  # all of them on one worker, but for the last but one
            made.supervise(other)
        read.clear()
        made.report(0, 0, save=False)
        assert read == [(0, measures.ALL), (number, number)]  # before the fence, and the newest change once more within it
        made.report(0, 1, save=False)
        assert read == [(0, measures.ALL), (number, number)]  # its own, which it knows
        on_other = 1
        made.supervise(on_other)
        made.report(on_other, 0, save=False)
        read.clear()
        made.report(0, 2, save=False)
        assert read == [(on_other, on_other)]
        made.check()


def test_the_first_look_does_not_hold_up_others(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is stored, a new worker reads no more of it within its first report's transaction."""
    spec = sample_spec(stopping={"rule": "median"})
    run = Transaction.run

    def first_report(steps: int) -> tuple[int, int]:
        """Return how many rows were read before the fence and within it."""
        with closing(Shared(Lab.new(database, f"first of {steps}"), tmp_path, spec)) as made:
            for _ in range(3):
                made.lab.driver.propose({"x": 0.5})
            for number in range(2):
                made.supervise(number)
                for step in range(steps):
                    made.report(number, step, save=False)
            made.supervise(2)
            new, read = made.runtime, [0, 0]
            assert isinstance(new, RemoteRuntime)
            assert new._stored._seq == -1

            def counting(tx: Transaction, statement: Any, **values: object) -> list[tuple[Any, ...]]:
                rows = run(tx, statement, **values)
                read[new.database._writing] += len(rows)
                return rows

            monkeypatch.setattr(Transaction, "run", counting)
            made.report(2, 0, save=False)
            monkeypatch.setattr(Transaction, "run", run)
            made.check()
        return read[0], read[1]

    few, many = first_report(2), first_report(40)
    assert many[0] >= few[0] + 2 * 38
    assert many[1] == few[1]


@pytest.mark.parametrize("error", [RolledBack("undone"), DatabaseError("away")])
def test_what_was_not_committed_does_not_count(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: DatabaseError
) -> None:
    """A transaction that the database undid is decided anew; one that is given up leaves no trace in what is known."""
    spec = sample_spec(stopping={"rule": "threshold", "upper": 3.0})
    with closing(Shared(Lab.new(database, f"undone {error}"), tmp_path, spec)) as made:
        made.supervise(made.lab.driver.propose({"x": 0.5}))
        made.report(0, 0, save=False)
        runtime = made.workers[1]
        commit, failures = runtime.database._commit, [error]

        def failing(cursor: Any) -> Any:
            if failures:
                raise failures.pop()
            return commit(cursor)

        monkeypatch.setattr(runtime.database, "_commit", failing)
        if isinstance(error, RolledBack):
            made.report(0, 1, save=False)
        else:
            with pytest.raises(DatabaseError):
                made.report(0, 1, save=False)
        made.check()
        with pytest.raises(CheckpointConflict):
            made.report(0, 0, save=False)
        made.check()
