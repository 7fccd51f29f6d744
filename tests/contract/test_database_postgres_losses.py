"""Connections to PostgreSQL that are lost at every moment: what is repeated, what is not, and that nothing is done twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import text
from support_postgres import MISSING, Postgres, Proxy, binaries, making

from holdfast.core.errors import ConnectionLost, DatabaseError, OutcomeUnknown
from holdfast.core.trial import TrialStatus
from holdfast.storage.database import experiments, requests, workers
from holdfast.storage.database.driver import add_trial
from holdfast.storage.database.engine import Database, Statement
from holdfast.storage.database.experiments import open_database
from holdfast.storage.database.losses import repeatable
from holdfast.testing import racing
from holdfast.testing.lab import Lab, dump
from holdfast.testing.racing import Racers, url_of
from holdfast.testing.workers import join, started

PROCESSES = 8
ONE = Statement(text("SELECT 1"))


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A server of these tests' own: others' connections do not like it to be restarted."""
    if binaries() is None:
        pytest.skip(MISSING)
    with Postgres() as server:
        yield server


@pytest.fixture
def name(server: Postgres) -> Iterator[str]:
    name = server.create()
    yield name
    server.drop(name)


@pytest.fixture
def proxy(server: Postgres) -> Iterator[Proxy]:
    with closing(Proxy(server)) as proxy:
        yield proxy


@pytest.fixture
def lab(name: str, proxy: Proxy) -> Iterator[Lab]:
    """An experiment whose connections go through the proxy."""
    with closing(open_database(proxy.url(name))) as database:
        yield Lab.new(database, "sample")


@pytest.fixture
def beside(name: str, server: Postgres) -> Iterator[Database]:
    """The same database by connections of its own, to look at."""
    with closing(open_database(server.url(name))) as database:
        yield database


LOSSES: dict[str, Callable[[Postgres, str], object]] = {
    "terminated": lambda server, name: server.terminate(name),
    "restarted": lambda server, _: server.restart("fast"),
    "crashed": lambda server, _: server.restart("immediate"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_after_idle_connections_are_lost_everything_goes_on(server: Postgres, name: str, lab: Lab, loss: str) -> None:
    """Several pooled connections and the writer's."""
    writer = lab.started()
    with lab.database.snapshot() as one, lab.database.snapshot() as two, lab.database.read() as three:
        one.run(ONE), two.run(ONE), three.execute(text("SELECT 1"))
    LOSSES[loss](server, name)
    assert [trial.number for trial in lab.reader.trials()] == [0]
    LOSSES[loss](server, name)
    with lab.database.snapshot() as state:
        assert state.run(ONE) == [(1,)]
    LOSSES[loss](server, name)
    with lab.database.read() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    LOSSES[loss](server, name)
    lab.save(writer, 0)
    LOSSES[loss](server, name)
    requests.request_stop(lab.database, lab.id)
    assert lab.reader.stop_requested()
    LOSSES[loss](server, name)
    with lab.database.write() as tx:
        tx.run(ONE)
    lab.end(writer, loss=1.0)
    assert lab.trial(0).status is TrialStatus.COMPLETED


@pytest.mark.parametrize("loss", LOSSES)
def test_a_beat_is_not_repeated_and_the_next_one_is_heard(server: Postgres, name: str, lab: Lab, loss: str) -> None:
    """A worker that asks again by itself is told at once; its last word is repeated."""
    worker = join(lab)
    writer = started(lab, worker)
    workers.beat(lab.database, lab.id, worker)
    LOSSES[loss](server, name)
    with pytest.raises(ConnectionLost):
        workers.beat(lab.database, lab.id, worker)
    assert workers.beat(lab.database, lab.id, worker).open == {writer.attempt}
    LOSSES[loss](server, name)
    workers.leave(lab.database, lab.id, worker, "done")
    assert [row.left for row in workers.every(lab.database, lab.id, unsettled=True)] == ["done"]


def test_calls_wait_while_the_server_is_away(server: Postgres, lab: Lab) -> None:
    writer = lab.started()
    with ThreadPoolExecutor(3) as pool:
        server.stop()
        try:
            waiting = [
                pool.submit(lab.reader.trials),
                pool.submit(lab.save, writer, 0),
                pool.submit(lab.reader.history),
            ]
        finally:
            server.start()
        for each in waiting:
            each.result()
    assert [row.step for row in lab.reader.history()] == [0]


def test_a_snapshot_that_breaks_is_read_again_as_a_whole(lab: Lab, proxy: Proxy) -> None:
    writer = lab.started()
    lab.save(writer, 0, loss=2.0)
    proxy.cut("LEFT JOIN metric")  # the second statement
    assert [trial.metrics for trial in lab.reader.trials()] == [{"loss": 2.0}]
    assert proxy.cuts == 1


def test_a_body_that_loses_its_connection_wrote_nothing(lab: Lab, beside: Database, server: Postgres, name: str) -> None:
    before = dump(beside)

    def write() -> None:
        with lab.database.write() as tx:
            add_trial(tx, lab.id, 5, {"x": 0.5}, seed=1, source="proposed")
            server.terminate(name)
            add_trial(tx, lab.id, 5, {"x": 0.6}, seed=1, source="proposed")

    with pytest.raises(ConnectionLost, match=r"nothing was written.*try again"):
        write()
    assert dump(beside) == before
    assert lab.driver.propose({"x": 0.5}) == 0


@pytest.mark.parametrize(
    "marker", ["BEGIN; SELECT", "UPDATE experiment", "INSERT INTO config", "INSERT INTO attempt", "COMMIT"]
)
def test_a_write_that_never_arrived_is_repeated(lab: Lab, proxy: Proxy, beside: Database, marker: str) -> None:
    """The server does not notice: the lost connection keeps its locks until it is ended."""
    lab.driver.propose({"x": 0.1})
    proxy.cut(marker)
    assert lab.driver.propose({"x": 0.2}, state=b"s") == 1
    assert proxy.cuts == 1
    assert [trial["number"] for trial in rows(beside, "trial")] == [0, 1]
    assert len(rows(beside, "proposer_state")) == 1


@pytest.mark.parametrize("restart", [None, "fast"])
def test_a_commit_whose_answer_was_lost_is_not_repeated(
    lab: Lab, proxy: Proxy, beside: Database, server: Postgres, restart: str | None
) -> None:
    proxy.cut("COMMIT", pass_on=True, meanwhile=lambda: restart and server.restart(restart))
    assert lab.driver.propose({"x": 0.2}) == 0
    assert proxy.cuts == 1
    assert [trial["number"] for trial in rows(beside, "trial")] == [0]
    assert lab.driver.propose({"x": 0.2}) == 1


def test_a_commit_that_a_restart_overtook_is_repeated(lab: Lab, proxy: Proxy, beside: Database, server: Postgres) -> None:
    proxy.cut("COMMIT", meanwhile=server.restart)
    assert lab.driver.propose({"x": 0.2}) == 0
    assert [trial["number"] for trial in rows(beside, "trial")] == [0]


@pytest.mark.parametrize("written", [True, False], ids=["written", "lost"])
def test_a_commit_that_a_crash_overtook_is_never_taken_for_another(
    lab: Lab, proxy: Proxy, beside: Database, server: Postgres, name: str, written: bool
) -> None:
    """After a crash the number of a lost transaction is given to another one: its being committed says nothing about ours."""

    def crash() -> None:
        server.restart("immediate")
        with server.admin(name) as connection:
            for _ in range(50):
                connection.execute("UPDATE experiment SET active_seconds = active_seconds + 1")

    proxy.cut("COMMIT", pass_on=written, meanwhile=crash)
    try:
        lab.driver.propose({"x": 0.2})
    except OutcomeUnknown:
        made = int(written)
    else:
        assert not written  # the server had noted the lost one's number before it crashed: then it knows
        made = 1
    assert len(rows(beside, "trial")) == made
    assert lab.driver.propose({"x": 0.2}) == made


def test_a_commit_that_a_crash_took_along_is_repeated(lab: Lab, proxy: Proxy, beside: Database, server: Postgres) -> None:
    """Nobody else wrote since: the server knows that it never gave such a number, or that it was given up."""
    proxy.cut("COMMIT", meanwhile=lambda: server.restart("immediate"))
    assert lab.driver.propose({"x": 0.2}) == 0
    assert [trial["number"] for trial in rows(beside, "trial")] == [0]


def rows(database: Database, table: str) -> list[dict[str, Any]]:
    with database.read() as connection:
        return [dict(row) for row in connection.execute(text(f"SELECT * FROM {table}")).mappings()]


def test_many_processes_write_while_connections_break(server: Postgres, name: str, lab: Lab, beside: Database) -> None:
    count, over = 12, threading.Event()

    def disturb() -> int:
        ended = 0
        for _ in range(12):  # not for ever: on a slow machine nobody would get anything done between two of them
            ended += server.terminate(name)
            if over.wait(0.05):
                break
        return ended

    job = {"url": server.text(name), "experiment": lab.id, "epoch": 1}
    jobs = [{**job, "configs": [{"x": place / 32, "n": number} for number in range(count)]} for place in range(PROCESSES)]
    # Fresh ones: forked ones are so fast that their first connections are ended, which is no loss but a server that refuses.
    with Racers(PROCESSES, fork=False) as racers, ThreadPoolExecutor(1) as pool:
        disturbance = pool.submit(disturb)
        try:
            answers = racers.race(racing.propose, jobs)
        finally:
            over.set()
        assert disturbance.result() > 0
    assert all(isinstance(answer, list) for answer in answers), answers
    assert sorted(number for answer in answers for number in answer) == list(range(PROCESSES * count))
    found = {trial.number: trial.config for trial in lab.reader.trials()}
    assert len(found) == PROCESSES * count
    for each, answer in zip(jobs, answers, strict=True):
        assert [found[number] for number in answer] == each["configs"]


def test_of_two_transactions_that_wait_for_each_other_one_is_repeated(beside: Database, name: str, server: Postgres) -> None:
    labs = [Lab.new(beside, "one"), Lab.new(beside, "two")]
    touch = Statement(text("UPDATE experiment SET active_seconds = active_seconds + 1 WHERE id = :experiment"))
    both = threading.Barrier(2)
    runs = []

    @repeatable
    def cross(database: Database, order: list[Lab]) -> None:
        runs.append(order)
        with database.write() as tx:
            tx.run(touch, experiment=order[0].id)
            if len(runs) <= 2:
                both.wait(20)
            tx.run(touch, experiment=order[1].id)

    with closing(open_database(server.url(name))) as other, ThreadPoolExecutor(2) as pool:
        crossing = [pool.submit(cross, beside, labs), pool.submit(cross, other, labs[::-1])]
        for each in crossing:
            each.result()
    # Three as a rule. The repeated one may come so early that it takes the free row before the other does, who was waiting
    # for it: then they wait for each other once more, and one is repeated again.
    assert len(runs) >= 3
    found = [experiments.by_name(beside, each.record.name) for each in labs]
    assert [record and record.active_seconds for record in found] == [2.0, 2.0]


def test_a_writer_that_falls_silent_loses_its_locks(lab: Lab, beside: Database) -> None:
    """As one does that is suspended within a transaction."""
    inside, over = threading.Event(), threading.Event()

    def fall_silent() -> None:
        with lab.database.write() as tx:
            assert tx.run(Statement(text("SHOW idle_in_transaction_session_timeout"))) == [("30s",)]
            assert tx.run(Statement(text("SHOW lock_timeout"))) == [("1min",)]
            add_trial(tx, lab.id, 5, {"x": 0.5}, seed=1, source="proposed")
            tx.run(Statement(text("SELECT 1 FROM experiment FOR UPDATE")))
            tx.run(Statement(text("SET idle_in_transaction_session_timeout = '50ms'")))
            inside.set()
            over.wait(60)
            tx.run(ONE)

    with ThreadPoolExecutor(1) as pool:
        silenced = pool.submit(fall_silent)
        try:
            assert inside.wait(60)
            requests.request_stop(beside, lab.id)  # waits for the lock
        finally:
            over.set()
        with pytest.raises(ConnectionLost):
            silenced.result()
    assert dump(beside)["trial"] == []
    assert lab.driver.propose({"x": 0.5}) == 0


def test_a_server_that_was_never_reached_is_not_waited_for(server: Postgres, name: str) -> None:
    url = server.url(name)
    server.stop()
    try:
        with pytest.raises(DatabaseError) as caught:
            open_database(url)
    finally:
        server.start()
    assert not isinstance(caught.value, ConnectionLost)
    assert "No such file" in str(caught.value) or "refused" in str(caught.value)


def test_processes_at_once_make_the_schema_of_one_empty_database(server: Postgres) -> None:
    with Racers(PROCESSES) as racers:
        for _ in range(2):
            name = server.create(empty=True)
            assert racers.race(making, [{"url": server.text(name)}] * PROCESSES) == ["made"] * PROCESSES
            with closing(open_database(server.url(name))) as database:
                assert url_of(database) == server.text(name)
                assert Lab.new(database, "sample").driver.propose({"x": 0.5}) == 0
            server.drop(name)
