"""The runtime of a worker process: made once, told by beats, ended for every reason there is, and nothing left of it."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from store_kit import sample_spec, until
from support_workers import Drive, children, descriptors, in_threads

from holdfast.core.errors import Conflict, Fenced, HoldfastError, Infrastructure, StorageError, Unfit
from holdfast.core.trial import Outcome
from holdfast.storage.database import requests, workers
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.leases import Terms
from holdfast.tasks import joining, remote
from holdfast.tasks.executing import end
from holdfast.tasks.place import Place
from holdfast.tasks.remote import close_all, reach, using
from holdfast.tasks.workers.messages import Decision

FAST = Terms(duration=600, renewal=0.05)
"""Beats every 20 ms, and all the patience of a busy machine."""


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drive]:
    monkeypatch.setattr(remote, "terms", FAST)
    made = Drive.begin(tmp_path)
    with closing(made.opened):
        yield made
        close_all()


def rows(drive: Drive) -> list[workers.WorkerRow]:
    return workers.every(drive.opened.database, drive.opened.record.id)


def left(drive: Drive) -> list[str | None]:
    return [row.left for row in rows(drive)]


def test_one_for_a_process_whoever_comes_first(drive: Drive) -> None:
    found = in_threads(8, lambda: reach(drive.place(), "dask"))
    assert len({id(one) for one in found}) == 1
    assert isinstance(found[0], remote.RemoteRuntime)
    (row,) = rows(drive)
    assert (row.id, row.engine, row.epoch, row.left) == (found[0].worker, "dask", 1, None)
    assert row.about["slots"] == 1
    assert row.about["python"].split(".")[:2] == [*map(str, sys.version_info[:2])]


def test_the_spec_is_the_one_of_the_row(drive: Drive) -> None:
    """With what a restore has changed, which the file in the path does not know."""
    with drive.opened.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE experiment SET spec = replace(spec, '\"max_steps\":null', '\"max_steps\":77')")
        assert "77" in str(connection.exec_driver_sql("SELECT spec FROM experiment").scalar())
    assert reach(drive.place(), "ray").spec.stopping.max_steps == 77


def test_trials_are_handed_what_this_drive_was_given(drive: Drive) -> None:
    runtime = reach(drive.place(references={"data": "/mnt/new"}), "dask")
    assert runtime.spec.references == {"data": "/mnt/new"}


def test_devices_limit_what_runs_at_once_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    spec = sample_spec(execution={"runner": "dask", "resources": {"gpu": 2}})
    place = Place(
        uuid="u", name="n", experiment=1, epoch=1, location="/x", database="", workdir="/", trainable="", host="", slots=16
    )
    with joining.make_pool(spec, place) as pool:
        assert [environment["CUDA_VISIBLE_DEVICES"] for environment in pool._environments] == ["0,1", "2,3"]


def test_nothing_is_left(drive: Drive) -> None:
    reach(drive.place(), "dask")
    close_all()  # whatever is made once for a process is there now
    gc.collect()  # nor does what earlier tests have left come to its end meanwhile
    before = descriptors(), {*threading.enumerate()}, children()
    runtime = reach(drive.place(), "dask")
    assert runtime.pool is not None
    assert runtime.pool.probe("train.py:quick", runtime.workdir) == "function"
    assert runtime.work.path.is_dir()
    assert children() > before[2]
    close_all()
    assert children() == before[2]
    assert {*threading.enumerate()} <= before[1]
    gc.collect()
    assert Counter(descriptors().values()) <= Counter(before[0].values())
    assert not runtime.work.path.exists()
    assert left(drive) == ["its process ends"] * 2
    close_all()


def test_an_engine_ends_it_from_its_event_loop(drive: Drive) -> None:
    async def engine() -> None:
        end()

    runtime = reach(drive.place(), "dask")
    asyncio.run(engine())
    assert left(drive) == ["its process ends"]
    assert not runtime.work.path.exists()


def test_idle_ones_close_and_used_ones_stay(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    with using(drive.place(), "dask") as runtime:
        monkeypatch.setattr(remote, "IDLE_SECONDS", 0.0)
        beats = runtime._beats
        until(lambda: runtime._beats > beats + 5)
        assert runtime.over is None
    until(lambda: left(drive) == ["no trial came for a while"])
    until(lambda: not any(thread.is_alive() for thread in runtime._threads))
    assert not runtime.work.path.exists()
    with using(drive.place(), "dask") as other:
        assert other is not runtime
        assert other.worker != runtime.worker


def lost(drive: Drive, worker: int) -> None:
    workers.lose(drive.opened.database, drive.opened.record.id, drive.epoch, worker, "silent")


def deleted(drive: Drive, _: int) -> None:
    from holdfast.storage.database import experiments

    experiments.delete(drive.opened.database, drive.opened.record.id)


ENDS: dict[str, tuple[Callable[[Drive, int], None], str]] = {
    "another epoch": (lambda drive, _: drive.take_over(), "epoch 1 is over"),
    "the lease was given back": (lambda drive, _: drive.leases.release(epoch=1, active=0.0, ended="done"), "lease of epoch 1"),
    "the lease ran out": (lambda drive, _: expire(drive), "lease of epoch 1"),
    "given up": (lost, "silent"),
    "deleted": (deleted, "gone from the database"),
}


def expire(drive: Drive) -> None:
    with drive.opened.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE experiment SET lease_expires = 1")


@pytest.mark.parametrize("why", ENDS)
def test_what_ends_it(drive: Drive, why: str) -> None:
    """Children are ended, the row says why, and whoever comes later gets another one, or is told."""
    act, words = ENDS[why]
    runtime = reach(drive.place(), "dask")
    assert runtime.pool is not None
    runtime.pool.probe("train.py:quick", runtime.workdir)
    assert runtime.worker is not None
    assert runtime.decision(0) is Decision.CONTINUE
    runtime.held()
    act(drive, runtime.worker)
    until(lambda: runtime.over is not None)
    assert runtime.decision(0) is Decision.KILL
    with pytest.raises(HoldfastError, match=words):
        runtime.held()
    until(lambda: not any(thread.is_alive() for thread in runtime._threads))
    assert not runtime.enter()
    with pytest.raises(Conflict):
        runtime.pool.probe("train.py:quick", runtime.workdir)
    if why == "deleted":
        with pytest.raises(Infrastructure):
            reach(drive.place(epoch=1), "dask")
        return
    assert words in (left(drive)[0] or "")
    if why == "another epoch":
        with pytest.raises(Fenced):
            reach(drive.place(epoch=1), "dask")
        assert reach(drive.place(), "dask").epoch == 2
    assert remote.known(runtime.uuid, 1) is None


def test_a_new_drive_ends_what_is_left_of_the_last_one(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "terms", Terms(duration=600, renewal=100))  # no beat tells it
    first = reach(drive.place(), "dask")
    drive.take_over()
    second = reach(drive.place(), "dask")
    assert first.over is not None
    assert left(drive) == ["epoch 2 has begun", None]
    assert second.over is None


def test_what_the_driver_and_people_want(drive: Drive) -> None:
    runtime = reach(drive.place(), "dask")
    writer = drive.claim(runtime)
    number = drive.reader.trials()[0].number
    requests.request_cancel(drive.opened.database, drive.opened.record.id, number)
    until(lambda: runtime.decision(number, writer.attempt) is Decision.CANCEL)
    assert runtime.decision(number + 1) is Decision.CONTINUE
    drive.driver.tell("preempt")
    until(lambda: runtime.decision(number, writer.attempt) is Decision.PREEMPT)
    drive.driver.tell("kill")
    until(lambda: runtime.decision(number + 1) is Decision.KILL)
    runtime.held()  # its end may still be told
    drive.leases.renew(epoch=1, active=0.0, journaled=42)
    until(lambda: runtime.journaled() == 42)


def test_an_attempt_that_somebody_else_closed(drive: Drive) -> None:
    runtime = reach(drive.place(), "dask")
    closed, open_ = drive.claim(runtime), drive.claim(runtime)
    beats = runtime._beats
    until(lambda: runtime._beats > beats + 2)
    assert {runtime.decision(0, one.attempt) for one in (closed, open_)} == {Decision.CONTINUE}
    drive.driver.end(closed.attempt, Ending(outcome=Outcome.LOST))
    until(lambda: runtime.decision(0, closed.attempt) is Decision.KILL)
    assert runtime.decision(0, open_.attempt) is Decision.CONTINUE
    assert runtime.over is None


def test_attempts_that_have_ended_are_forgotten_while_others_run(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that ends while a beat is under way, which still tells of it."""
    monkeypatch.setattr(remote, "terms", Terms(duration=600, renewal=100))
    with using(drive.place(), "dask") as runtime:
        staying, ended, ending = (drive.claim(runtime) for _ in range(3))
        for writer in (ended, ending):
            drive.driver.end(writer.attempt, Ending(outcome=Outcome.LOST))
        beat = workers.beat

        def slow(*arguments: Any) -> workers.Beat:
            told = beat(*arguments)
            runtime.let_go(ending)
            return told

        monkeypatch.setattr(workers, "beat", slow)
        runtime._beat()
        assert runtime._closed == {ended.attempt}
        runtime.let_go(ended)
        assert ({*runtime._running}, runtime._closed) == ({staying.attempt}, set())


def test_an_attempt_that_was_claimed_after_the_beat_was_sent_is_open(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "terms", Terms(duration=600, renewal=100))
    runtime = reach(drive.place(), "dask")
    asked, beat = [], workers.beat

    def slow(*arguments: Any) -> workers.Beat:
        told = beat(*arguments)
        asked.append(drive.claim(runtime))
        return told

    monkeypatch.setattr(workers, "beat", slow)
    runtime._beat()
    assert runtime.decision(0, asked[0].attempt) is Decision.CONTINUE
    monkeypatch.setattr(workers, "beat", beat)
    runtime._beat()
    assert runtime.decision(0, asked[0].attempt) is Decision.CONTINUE


def test_a_call_that_hangs_is_noticed(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    """The children are ended while it hangs; once it comes back, nothing is as if it had not."""
    runtime = reach(drive.place(), "dask")
    assert runtime.pool is not None
    runtime.pool.probe("train.py:quick", runtime.workdir)
    before = children()
    file = drive.opened.database.file
    assert file is not None
    with closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(remote, "terms", Terms(duration=0.6, renewal=0.05))
        until(lambda: runtime.over is not None)
        until(lambda: len(children()) < len(before))
        assert runtime.decision(0) is Decision.KILL
        blocker.execute("ROLLBACK")
    until(lambda: "has not heard" in (left(drive)[0] or ""))
    with pytest.raises(Fenced):
        runtime.held()


def test_one_that_was_suspended_notices_before_it_writes(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "terms", Terms(duration=600, renewal=100))
    for notices in (lambda one: one.held(), lambda one: one._beat()):
        runtime = reach(drive.place(), "dask")
        runtime._heard -= 500
        assert runtime.decision(0) is Decision.KILL
        with suppress(Fenced):
            notices(runtime)
        assert runtime.over is not None
        with pytest.raises(Fenced, match="suspended"):
            runtime.held()


class TestUnfit:
    def test_nothing_is_claimed_and_the_row_says_why(self, drive: Drive) -> None:
        number, row = drive.propose()
        place = drive.place(versions={**drive.place().versions, "python": "3.8.1", "prefect": "2.0"})
        found = in_threads(4, lambda: reach(place, "dask"))
        assert {type(one) for one in found} == {Unfit}
        assert {one.reasons[0][:10] for one in found} == {"Python is "}
        assert all("prefect==2.0" in one.reasons[1] for one in found)
        assert [one.startswith("unfit: Python is") for one in left(drive) if one] == [True]  # one look, one row
        trial = drive.reader.trial(number)
        assert trial is not None
        assert not trial.attempt.claimed
        assert trial.attempt.id == row

    def test_it_looks_again_after_a_while(self, drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
        place = drive.place()
        moved = Path(place.location).rename(Path(place.location).with_name("away"))
        with pytest.raises(Unfit, match="no experiment"):
            reach(place, "dask")
        moved.rename(place.location)
        with pytest.raises(Unfit, match="no experiment"):
            reach(place, "dask")
        monkeypatch.setattr(remote, "_unfit", {})
        assert reach(place, "dask").over is None

    @pytest.mark.parametrize("what", ["path", "work"])
    def test_it_looks_again_after_an_attempt_that_could_not_write(
        self, drive: Drive, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        """No further trial begins while that is so; those that run go on."""
        looks, look = [], remote.probe

        def counted(place: Place) -> list[str]:
            looks.append(place)
            return look(place)

        monkeypatch.setattr(remote, "probe", counted)
        with using(drive.place(), "dask") as runtime:
            writer = drive.claim(runtime)
            place = runtime.work.path if what == "work" else Path(drive.place().location)
            looks.clear()
            with using(drive.place(), "dask"):
                assert looks == []
            runtime.fail(StorageError("no space left on device"))
            moved = place.rename(place.with_name("away"))
            words = "no experiment" if what == "path" else "make room"
            for _ in range(3):
                with pytest.raises(Unfit, match=words), using(drive.place(), "dask"):
                    pytest.fail("it is unfit")
            assert len(looks) == 1  # a moment ago
            monkeypatch.setattr(remote, "_unfit", {})
            with pytest.raises(Unfit), using(drive.place(), "dask"):
                pytest.fail("it is still unfit")
            moved.rename(place)
            runtime.held()
            assert runtime.decision(0, writer.attempt) is Decision.CONTINUE
            monkeypatch.setattr(remote, "_unfit", {})
            looks.clear()
            for _ in range(2):
                with using(drive.place(), "dask") as other:
                    assert other is runtime
            assert len(looks) == 1

    def test_too_few_devices(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        made = Drive.begin(tmp_path, execution={"resources": {"gpu": 2}})
        with closing(made.opened):
            runtime = reach(made.place(slots=1), "ray")
            assert runtime.pool is not None
            assert runtime.pool._environments[0]["CUDA_VISIBLE_DEVICES"] == "3,5"
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")  # Ray's next task
            with using(made.place(slots=1), "ray"):
                assert runtime.pool._environments[0]["CUDA_VISIBLE_DEVICES"] == "6,7"
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")
            with pytest.raises(Unfit, match="need 2 devices, 1 are visible"), using(made.place(slots=1), "ray"):
                pass
            close_all()


def test_a_second_execution_at_once_waits_for_the_first_ones_runtime(drive: Drive) -> None:
    """Threads that use it while it ends get another one, or are refused; none gets one that is over."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def use() -> int:
        count = 0
        while not stop.is_set():
            with using(drive.place(), "dask") as runtime:
                count += runtime.over is None
        return count

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(use) for _ in range(4)]
        for _ in range(5):
            until(lambda: remote.known(drive.opened.record.uuid, 1) is not None)
            try:
                close_all()
            except BaseException as error:  # noqa: BLE001  # looked at below
                errors.append(error)
        stop.set()
        assert all(user.result() > 0 for user in users)
    assert errors == []


def test_a_place_shows_no_secret(drive: Drive) -> None:
    place = dataclasses.replace(drive.place(), database="postgresql://u:hush@h/d", options={"secret": "hush"})
    assert "hush" not in repr(place)
