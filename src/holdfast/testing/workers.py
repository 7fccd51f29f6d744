"""The part of the store's contract that is about workers: who lives, what they are told, in which order reports are judged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import text

from holdfast.core.errors import AlreadyClaimed, Conflict, ExperimentNotFound, Fenced, InvalidInput
from holdfast.core.trial import Outcome, TrialStatus
from holdfast.storage.database import experiments, measures, requests, workers
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.engine import Database, Statement, Transaction, connect
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.outbox import Outbox
from holdfast.testing.lab import FAILED, Lab, dump
from holdfast.testing.racing import Racers, Run, url_of

ABOUT: dict[str, Any] = {"python": "3.11.9", "devices": [0, 1], "süß": None}
_AGE = Statement(text("UPDATE worker SET seen = seen - :seconds WHERE id = :worker"))
_BEAT = Statement(text("UPDATE worker SET seen = seen + :seconds WHERE id = :worker"))
_GIVE_UP = Statement(text('UPDATE worker SET "left" = :why WHERE id = :worker'))


def join(lab: Lab, *, name: str = "w", epoch: int | None = None) -> int:
    """Let a worker join; return its row id."""
    return workers.join(
        lab.database,
        lab.id,
        lab.epoch if epoch is None else epoch,
        name=name,
        engine="dask",
        hostname="node-1",
        host="host boot pid:[1]",
        pid=7,
        started="12345",
        about=ABOUT,
    )


def started(lab: Lab, worker: int, token: str = "token") -> AttemptWriter:
    """Propose a trial and claim it as a worker."""
    number = lab.driver.propose({"x": 0.5})
    return claim(lab, number, worker, token)


def claim(lab: Lab, number: int, worker: int | None, token: str = "token") -> AttemptWriter:
    """Claim a trial's current attempt as a worker."""
    return AttemptWriter.claim(lab.database, lab.id, lab.epoch, lab.trial(number).attempt.id, token=token, worker=worker)


def aged(lab: Lab, worker: int, seconds: float) -> None:
    """Let a worker have been silent for so many seconds more."""
    with lab.database.write() as tx:
        tx.run(_AGE, worker=worker, seconds=seconds)


def beside(action: Callable[[], Any]) -> Callable[[], Any]:
    """Begin ``action`` in a thread; return what waits for its result, which may be its error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(action())
        except Exception as error:  # noqa: BLE001  # it is looked at
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> Any:
        thread.join(60)
        assert found, "it still waits"
        return found[0]

    return result


class Counting:
    """A judge that counts the reports committed before: by all of them, and by what changed since it last looked."""

    def __init__(self, experiment: int) -> None:
        self._experiment = experiment
        self._since = -1
        self._counts: dict[int, int] = {}

    def __call__(self, tx: Transaction) -> tuple[str, str]:
        everything = len(measures.measured(tx, self._experiment, ["loss"])["loss"])
        self._since, changed = measures.changed(tx, self._experiment, self._since)
        for number in changed:
            self._counts[number] = len(measures.measured(tx, self._experiment, ["loss"], number, number)["loss"])
        return ("prune" if everything % 2 else "continue"), f"{everything}={sum(self._counts.values())}"


def report(url: str, experiment: int, steps: int, **writer: Any) -> Run:
    """Report steps as a running attempt, each judged by how many reports were committed before."""
    attempt = AttemptWriter(database=connect(url), experiment=experiment, **writer)
    judge = Counting(experiment)
    return lambda: [attempt.report(step, {"loss": 1.0}, judge=judge)[0] for step in range(steps)]


class WorkersContract:
    """What every database keeps of workers; part of ``DatabaseContract``."""

    @pytest.fixture
    def lab(self, database: Database) -> Lab:
        return Lab.new(database, "sample")

    @pytest.fixture
    def other(self, lab: Lab) -> Iterator[Database]:
        """The same database as another process has it."""
        with closing(connect(url_of(lab.database))) as database:
            yield database

    # Joining, beating, leaving

    def test_a_worker_joins_beats_and_leaves(self, lab: Lab) -> None:
        assert workers.every(lab.database, lab.id) == []
        first, second = join(lab, name="süß 🍯"), join(lab)
        found = workers.every(lab.database, lab.id)
        assert [(row.id, row.name, row.left, row.epoch) for row in found] == [
            (first, "süß 🍯", None, 1),
            (second, "w", None, 1),
        ]
        row = found[0]
        assert (row.engine, row.hostname, row.host, row.pid, row.started) == ("dask", "node-1", "host boot pid:[1]", 7, "12345")
        assert row.about == ABOUT
        aged(lab, first, 100)
        assert 100 <= workers.every(lab.database, lab.id)[0].silent < 130
        beat = workers.beat(lab.database, lab.id, first)
        assert workers.every(lab.database, lab.id)[0].silent < 30
        assert 0 < beat.remaining <= 30
        assert (beat.epoch, beat.told, beat.journaled, beat.left) == (1, "continue", -1, None)
        assert (beat.cancelled, beat.open) == (frozenset(), frozenset())
        for why in ("it is not fit: Python 3.12", "the engine closed it"):
            workers.leave(lab.database, lab.id, first, why)
        assert [row.left for row in workers.every(lab.database, lab.id)] == ["it is not fit: Python 3.12", None]
        assert [row.id for row in workers.every(lab.database, lab.id, unsettled=True)] == [second]
        assert workers.beat(lab.database, lab.id, first).left == "it is not fit: Python 3.12"

    def test_rows_of_workers_leave_the_order_of_writes_alone(self, lab: Lab) -> None:
        before = {name: rows for name, rows in dump(lab.database).items() if name != "worker"}
        worker = join(lab)
        workers.beat(lab.database, lab.id, worker)
        workers.leave(lab.database, lab.id, worker, "done")
        assert {name: rows for name, rows in dump(lab.database).items() if name != "worker"} == before
        assert "worker" not in Outbox(lab.database, lab.id)(-1).rows

    def test_nobody_joins_what_is_over_or_gone(self, lab: Lab) -> None:
        lab.take_over()
        before = dump(lab.database)
        for epoch in (0, 1, 3):
            with pytest.raises(Fenced):
                join(lab, epoch=epoch)
        with pytest.raises(ExperimentNotFound):
            workers.join(lab.database, 10**6, 1, name="", engine="ray", hostname="", host="", pid=1, started="", about={})
        assert dump(lab.database) == before
        lab.epoch = 2
        join(lab)

    def test_a_write_aside_that_fails_leaves_nothing(self, lab: Lab) -> None:
        worker = join(lab)
        before = dump(lab.database)

        def fail() -> None:
            with lab.database.aside() as tx:
                tx.run(_GIVE_UP, worker=worker, why="not this")
                raise InvalidInput("it cannot be said")

        with pytest.raises(InvalidInput, match="cannot be said"):
            fail()
        assert dump(lab.database) == before
        workers.beat(lab.database, lab.id, worker)

    def test_a_worker_hears_that_its_experiment_is_gone(self, lab: Lab) -> None:
        other = Lab.new(lab.database, "other")
        worker, theirs = join(lab), join(other)
        started(lab, worker)
        attempt = started(other, theirs).attempt
        for experiment, stranger in ((lab.id, theirs), (lab.id, 10**6), (10**6, worker)):
            with pytest.raises(ExperimentNotFound):
                workers.beat(lab.database, experiment, stranger)
        experiments.delete(lab.database, lab.id)
        with pytest.raises(ExperimentNotFound):
            workers.beat(lab.database, lab.id, worker)
        workers.leave(lab.database, lab.id, worker, "its experiment is gone")
        assert workers.beat(other.database, other.id, theirs).open == {attempt}
        assert len(dump(lab.database)["worker"]) == 1

    # Attempts

    def test_an_attempt_names_its_worker(self, lab: Lab) -> None:
        worker = join(lab)
        writer = started(lab, worker)
        own = lab.started()
        found = workers.of_attempt(lab.database, writer.attempt)
        assert found is not None
        assert (found.id, found.name) == (worker, "w")
        assert workers.of_attempt(lab.database, own.attempt) is None
        assert workers.of_attempt(lab.database, 10**6) is None
        assert [trial.attempt.worker for trial in lab.reader.trials()] == [worker, None]
        assert lab.attempts(0)[1].worker == worker
        lab.end(writer, loss=1.0)
        assert lab.attempts(0)[1].worker == worker

    def test_who_left_or_is_of_another_epoch_claims_nothing(self, lab: Lab) -> None:
        other = Lab.new(lab.database, "other")
        left, lost, stranger = join(lab), join(lab), join(other)
        workers.leave(lab.database, lab.id, left, "the engine closed it")
        assert workers.lose(lab.database, lab.id, 1, lost, "silent for 31 s") == []
        number = lab.driver.propose({"x": 0.5})
        before = dump(lab.database)
        for worker in (left, lost, stranger, 10**6):
            with pytest.raises(Fenced):
                claim(lab, number, worker)
            assert dump(lab.database) == before
        old = join(lab)
        lab.take_over()
        before = dump(lab.database)
        for lab.epoch in (1, 2):
            with pytest.raises(Fenced):
                claim(lab, number, old)
        assert dump(lab.database) == before
        claim(lab, number, join(lab))
        with pytest.raises(AlreadyClaimed):
            claim(lab, number, join(lab))

    def test_closed_attempts_vanish_from_what_is_open(self, lab: Lab) -> None:
        worker, other = join(lab), join(lab)
        writers = [started(lab, worker) for _ in range(5)]
        foreign = started(lab, other)

        def seen() -> frozenset[int]:
            return workers.beat(lab.database, lab.id, worker).open

        left = {writer.attempt for writer in writers}
        assert seen() == left
        ends: list[Callable[[AttemptWriter], object]] = [
            lambda writer: lab.end(writer, loss=1.0),
            lambda writer: writer.fail(FAILED, max_failures=1),
            lambda writer: lab.end(writer, Outcome.LOST),
            lambda writer: lab.end(writer, Outcome.PREEMPTED),
        ]
        for writer, end in zip(writers, ends, strict=False):
            end(writer)
            left.discard(writer.attempt)
            assert seen() == left
        assert workers.beat(lab.database, lab.id, other).open == {foreign.attempt}
        again = claim(lab, 1, worker)
        assert seen() == {again.attempt, *left}

    # Giving a worker up

    def test_a_lost_worker_s_trials_wait_again_and_keep_their_budget(self, lab: Lab) -> None:
        worker, other = join(lab), join(lab)
        first, second, done = (started(lab, worker) for _ in range(3))
        kept = started(lab, other)
        lab.save(first, 3)
        lab.end(done, loss=1.0)
        second.fail(FAILED, max_failures=1)
        second = claim(lab, 1, worker)
        requests.request_cancel(lab.database, lab.id, 1)
        found = workers.lose(lab.database, lab.id, 1, worker, "silent for 31 s")
        assert found == [(0, first.attempt), (1, second.attempt)]
        assert [trial.status for trial in lab.reader.trials()] == [
            TrialStatus.PENDING,
            TrialStatus.PENDING,
            TrialStatus.COMPLETED,
            TrialStatus.RUNNING,
        ]
        lost, waiting = lab.attempts(0)[1], lab.attempts(0)[2]
        assert (lost.outcome, lost.note) == (Outcome.LOST, "silent for 31 s")
        assert (waiting.reason, waiting.parent, waiting.parent_step, waiting.worker) == ("resume", 1, 3, None)
        assert lab.reader.cancel_requests() == {1}
        for write in (lambda: first.report(4, {"loss": 0.0}), lambda: second.end(FAILED), first.check):
            with pytest.raises(Fenced):
                write()
        kept.check()
        assert workers.beat(lab.database, lab.id, worker).open == frozenset()
        assert workers.beat(lab.database, lab.id, worker).left == "silent for 31 s"
        assert workers.lose(lab.database, lab.id, 1, worker, "again") == []
        assert [row.left for row in workers.every(lab.database, lab.id)] == ["silent for 31 s", None]
        assert claim(lab, 1, other).fail(FAILED, max_failures=2) is TrialStatus.PENDING

    def test_what_a_worker_leaves_open_is_closed_under_its_own_reason(self, lab: Lab) -> None:
        worker = join(lab)
        writer = started(lab, worker)
        settled, working = join(lab), join(lab)
        lab.end(started(lab, settled), loss=1.0)
        for each in (worker, settled):
            workers.leave(lab.database, lab.id, each, "its process was ended")
        assert [row.id for row in workers.every(lab.database, lab.id, unsettled=True)] == [worker, working]
        assert workers.lose(lab.database, lab.id, 1, worker, "it left", silent=30.0) == [(0, writer.attempt)]
        assert workers.every(lab.database, lab.id)[0].left == "its process was ended"
        assert [row.id for row in workers.every(lab.database, lab.id, unsettled=True)] == [working]

    def test_only_who_is_silent_is_lost_if_so_asked(self, lab: Lab) -> None:
        worker = join(lab)
        writer = started(lab, worker)
        aged(lab, worker, 31)
        workers.beat(lab.database, lab.id, worker)
        assert workers.lose(lab.database, lab.id, 1, worker, "silent", silent=30.0) == []
        writer.check()
        assert workers.every(lab.database, lab.id)[0].left is None
        aged(lab, worker, 31)
        assert workers.lose(lab.database, lab.id, 1, worker, "silent", silent=30.0) == [(0, writer.attempt)]

    def test_a_beat_that_comes_first_saves_its_worker(self, lab: Lab, other: Database) -> None:
        worker = join(lab)
        writer = started(lab, worker)
        aged(lab, worker, 31)
        with other.write() as tx:
            tx.run(_BEAT, worker=worker, seconds=31)
            result = beside(lambda: workers.lose(lab.database, lab.id, 1, worker, "silent", silent=30.0))
        assert result() == []
        writer.check()

    def test_a_beat_that_comes_second_hears_of_it(self, lab: Lab, other: Database) -> None:
        worker = join(lab)
        with other.write() as tx:
            tx.run(_GIVE_UP, worker=worker, why="silent for 31 s")
            result = beside(lambda: workers.beat(lab.database, lab.id, worker))
        assert result().left == "silent for 31 s"

    def test_nothing_is_begun_any_more_once_what_runs_is_told_to_end(self, lab: Lab) -> None:
        """The driver takes back what nobody has begun, and waits for it no longer."""
        worker, number = join(lab), lab.driver.propose({"x": 0.5})
        for order in ("preempt", "kill"):
            lab.driver.tell(order)
            before = dump(lab.database)
            with pytest.raises(Fenced):
                claim(lab, number, worker)
            assert dump(lab.database) == before
        lab.driver.tell("continue")
        assert claim(lab, number, worker).number == 1

    def test_a_claim_and_the_loss_of_its_worker_leave_nothing_open(self, lab: Lab, other: Database) -> None:
        """Whichever comes first: a claim that lost is refused, one that won is closed."""
        for place in range(6):
            worker, number = join(lab), lab.driver.propose({"x": 0.5})
            attempt = lab.trial(number).attempt.id
            result = beside(
                lambda a=attempt, w=worker: AttemptWriter.claim(other, lab.id, 1, a, token="t", worker=w)  # type: ignore[misc]
            )
            closed = workers.lose(lab.database, lab.id, 1, worker, "silent")
            claimed = result()
            if isinstance(claimed, Fenced):
                assert closed == []
            else:
                assert closed == [(place, attempt)]
            assert lab.trial(number).status is TrialStatus.PENDING
            assert workers.beat(lab.database, lab.id, worker).open == frozenset()

    # Drivers

    def test_of_two_drivers_the_second_has_the_say(self, lab: Lab) -> None:
        worker = join(lab)
        writer = started(lab, worker)
        lab.driver.tell("preempt")
        Leases(lab.database, lab.id).renew(epoch=1, active=0.0, journaled=5)
        lab.take_over()
        beat = workers.beat(lab.database, lab.id, worker)
        assert (beat.epoch, beat.told, beat.journaled, beat.left) == (2, "continue", -1, None)
        assert beat.open == {writer.attempt}
        before = dump(lab.database)
        with pytest.raises(Fenced):
            workers.lose(lab.database, lab.id, 1, worker, "silent")
        assert dump(lab.database) == before
        lab.epoch = 2
        new = join(lab)
        assert [row.id for row in workers.every(lab.database, lab.id, epoch=1)] == [worker]
        assert [row.id for row in workers.every(lab.database, lab.id, epoch=2, unsettled=True)] == [new]
        assert workers.lose(lab.database, lab.id, 2, worker, "of the driver before") == [(0, writer.attempt)]
        for stranger in (10**6, join(Lab.new(lab.database, "other"))):
            before = dump(lab.database)
            with pytest.raises(Conflict):
                workers.lose(lab.database, lab.id, 2, stranger, "silent")
            assert dump(lab.database) == before

    def test_workers_hear_what_the_driver_tells(self, lab: Lab) -> None:
        worker, leases = join(lab), Leases(lab.database, lab.id)
        for number in range(3):
            lab.driver.propose({"x": number / 4})
        lab.claim(0)
        for number in (0, 1):
            requests.request_cancel(lab.database, lab.id, number)

        def heard() -> tuple[str, int, list[int]]:
            beat = workers.beat(lab.database, lab.id, worker)
            return beat.told, beat.journaled, sorted(beat.cancelled)

        assert heard() == ("continue", -1, [0, 1])
        lab.driver.tell("preempt")
        leases.renew(epoch=1, active=0.0, journaled=17)
        assert heard() == ("preempt", 17, [0, 1])
        lab.driver.tell("kill")
        leases.renew(epoch=1, active=0.0)
        lab.end(lab.writer(0), Outcome.CANCELLED)
        assert heard() == ("kill", 17, [1])
        before = dump(lab.database)
        with pytest.raises(InvalidInput, match="continue, preempt, kill"):
            lab.driver.tell("cancel")
        assert dump(lab.database) == before
        lab.driver.tell("continue")
        assert heard() == ("continue", 17, [1])
        leases.release(epoch=1, active=0.0, ended="done")
        assert workers.beat(lab.database, lab.id, worker).remaining <= 0

    # Judging

    def test_a_report_is_judged_in_its_transaction(self, lab: Lab) -> None:
        first, second = lab.started(), lab.started()
        first.report(0, {"loss": 1.0})
        judge = Counting(lab.id)
        second.report(0, {"loss": 1.0}, decision="continue", note="not this", judge=judge)
        second.report(1, {"loss": 1.0}, judge=judge)
        lab.end(first, Outcome.PREEMPTED)
        claim(lab, 0, None).report(0, {"loss": 2.0})  # the first one counts no more
        second.report(2, {"loss": 1.0}, judge=judge)
        lab.driver.end(lab.trial(0).attempt.id, FAILED)
        lab.driver.rerun(lab.row(0), restart=True)  # nothing of trial 0 counts
        second.report(3, {"loss": 1.0}, judge=judge)
        assert lab.trial(1).attempt.note == "1=1; 2=2; 3=3; 3=3"
        decisions = [(row.step, row.decision) for row in lab.reader.history() if row.trial == 1]
        assert decisions == [(0, "prune"), (1, "continue"), (2, "prune"), (3, "prune")]

    def test_a_judge_s_error_leaves_nothing_and_a_repeated_step_is_not_judged(self, lab: Lab) -> None:
        writer = lab.started()
        writer.report(0, {"loss": 1.0})
        asked: list[int] = []

        def broken(_: Transaction) -> tuple[str, str]:
            asked.append(1)
            raise InvalidInput("it cannot decide")

        before = dump(lab.database)
        with pytest.raises(Conflict):
            writer.report(0, {"loss": 2.0}, judge=broken)
        assert asked == []
        with pytest.raises(InvalidInput, match="cannot decide"):
            writer.report(1, {"loss": 2.0}, judge=broken)
        assert dump(lab.database) == before
        lab.take_over()
        with pytest.raises(Fenced):
            writer.report(1, {"loss": 2.0}, judge=broken)
        assert asked == [1]

    def test_what_was_undone_and_written_by_another_is_looked_at_again(self, lab: Lab) -> None:
        """A transaction that is rolled back gives its seq to the next one: what that writes must not be missed."""
        first, second = lab.started(), lab.started()
        judge = Counting(lab.id)

        def interrupted(tx: Transaction) -> tuple[str, str]:
            judge(tx)
            raise InvalidInput("rolled back")

        with pytest.raises(InvalidInput, match="rolled back"):
            second.report(0, {"loss": 1.0}, judge=interrupted)
        first.report(0, {"loss": 1.0})
        second.report(0, {"loss": 1.0}, judge=judge)
        assert lab.trial(1).attempt.note == "1=1"

    def test_decisions_have_the_order_of_commits(self, lab: Lab, racers: Racers) -> None:
        steps, processes = 6, 8
        writers = [lab.started() for _ in range(processes)]
        job = {"url": url_of(lab.database), "experiment": lab.id, "epoch": 1, "token": "token", "number": 1, "steps": steps}
        answers = racers.race(report, [{**job, "attempt": each.attempt, "trial": each.trial} for each in writers])
        assert all(isinstance(answer, list) for answer in answers), answers
        rows = sorted(lab.reader.history(), key=lambda row: row.seq)
        assert [row.decision for row in rows] == ["prune" if place % 2 else "continue" for place in range(steps * processes)]
        place = {(row.trial, row.step): count for count, row in enumerate(rows)}
        for trial in lab.reader.trials():
            counts = [place[trial.number, step] for step in range(steps)]
            assert trial.attempt.note == "; ".join(f"{count}={count}" for count in counts)
