"""One owner: who may take the lease, and how its keeper notices that it is lost. Clocks and pauses are given."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from leasing_kit import Waiter, never, state, take
from store_kit import create, until

from holdfast.core.errors import Corrupt, DatabaseError, Fenced, HoldfastError, LeaseHeld, StorageError
from holdfast.core.values import dumps
from holdfast.holding import holder
from holdfast.locate import Opened
from holdfast.storage import leasing
from holdfast.storage.database import experiments
from holdfast.storage.database.engine import Statement
from holdfast.storage.database.leases import TERMS, Leases, Terms
from holdfast.storage.folder import Folder, LeaseFile, PathLease
from holdfast.storage.leasing import Keeper
from holdfast.storage.root import LocalRoot
from holdfast.testing import racing
from holdfast.testing.lab import dump
from holdfast.testing.racing import Racers, url_of

FAST = Terms(duration=60.0, renewal=0.02)
FOREIGN = {"hostname": "elsewhere", "host": "elsewhere/boot", "pid": 4, "started": "then"}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with closing(create(tmp_path / "runs")) as opened:
        yield opened


def set_lease(opened: Opened, other: Mapping[str, Any] | None, *, seconds: float = 20.0, path: bool = True) -> None:
    """Write the lease that ``other`` would have, ending in ``seconds``."""
    from sqlalchemy import text

    body = "UPDATE experiment SET holder = :holder, epoch = 4, lease_expires = {0} + :seconds, lease_renewed = {0} + :seconds"
    with opened.database.write() as tx:
        statement = Statement(text(body.format(opened.database.clock)))
        tx.run(statement, holder=None if other is None else dumps(dict(other)), seconds=seconds)
    if path:
        set_path(opened, other, seconds=seconds)


def set_path(opened: Opened, other: Mapping[str, Any] | None, *, seconds: float = 20.0, epoch: int = 4) -> None:
    now = time.time()
    lease = PathLease(
        epoch=epoch,
        holder=None if other is None else dict(other),
        expires=now + seconds,
        renewed=now + seconds - TERMS.duration,
        database="sqlite:////another/host.db",
    )
    with opened.folder.changing_lease() as file:
        file.write(lease)


def test_a_free_lease_is_taken_in_both_places(opened: Opened) -> None:
    keeper = take(opened)
    look = Leases(opened.database, opened.record.id).look()
    path = opened.folder.lease()
    assert path is not None
    assert look.epoch == path.epoch == keeper.epoch == 1
    assert look.is_held
    assert look.holder == path.holder == holder()
    keeper.release("done")
    path = opened.folder.lease()
    assert path is not None
    assert (path.holder, path.epoch) == (None, 1)
    assert not Leases(opened.database, opened.record.id).look().is_held
    assert take(opened).epoch == 2


def test_a_live_holder_of_this_host_is_refused_at_once(opened: Opened) -> None:
    keeper = take(opened)
    before = state(opened)
    with pytest.raises(LeaseHeld) as caught:
        take(opened)
    assert f"process {os.getpid()}" in str(caught.value)
    assert holder()["hostname"] in str(caught.value)
    assert re.search(r"runs (30|2\d) s", str(caught.value))
    assert "--force" in str(caught.value)
    assert state(opened) == before
    keeper.release("done")


@pytest.fixture
def dead() -> dict[str, Any]:
    """A process of this host that is gone."""
    program = "import json; from holdfast.holding import holder; print(json.dumps(holder()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_a_dead_process_of_this_host_is_dead_at_once(opened: Opened, dead: dict[str, Any]) -> None:
    set_lease(opened, dead)
    assert take(opened).epoch == 5


def test_a_recycled_pid_is_another_process(opened: Opened) -> None:
    set_lease(opened, {**holder(), "started": f"{str(holder()['started']).rpartition('/')[0]}/1"})
    assert take(opened).epoch == 5


def test_a_process_of_this_host_whose_lease_ran_out_is_not_waited_for(opened: Opened) -> None:
    set_lease(opened, holder(), seconds=-1)  # suspended
    assert take(opened).epoch == 5


@pytest.mark.parametrize("places", ["database", "path", "both"])
def test_a_silent_holder_elsewhere_is_waited_out(opened: Opened, places: str) -> None:
    def elapse(now: float) -> None:
        set_lease_end(20.0 - now)

    def set_lease_end(seconds: float) -> None:
        # As time passes the lease comes nearer to its end, and is not renewed.
        if places != "path":
            move_end(opened, seconds)
        if places != "database":
            path = opened.folder.lease()
            assert path is not None
            with opened.folder.changing_lease() as file:
                file.write(replace(path, expires=time.time() + seconds))

    if places != "path":
        set_lease(opened, FOREIGN, path=False)
    if places != "database":
        set_path(opened, FOREIGN)
    waiter = Waiter(elapse)
    keeper = take(opened, pause=waiter.pause, clock=lambda: waiter.now, say=waiter.said.append)
    assert keeper.epoch == 5
    assert 15 <= waiter.now <= 21
    assert len(waiter.said) == 1
    assert re.search(r"process 4 on elsewhere held the experiment; waiting up to (20|1\d) s", waiter.said[0])


def move_end(opened: Opened, seconds: float) -> None:
    from sqlalchemy import text

    with opened.database.write() as tx:
        tx.run(Statement(text(f"UPDATE experiment SET lease_expires = {opened.database.clock} + :seconds")), seconds=seconds)


def test_a_holder_elsewhere_that_renews_is_refused(opened: Opened) -> None:
    set_lease(opened, FOREIGN)
    waiter = Waiter(lambda now: now > 3 and Leases(opened.database, opened.record.id).renew(epoch=4, active=0.0))
    with pytest.raises(LeaseHeld, match="process 4 on elsewhere drives"):
        take(opened, pause=waiter.pause, clock=lambda: waiter.now)
    assert 3 < waiter.now < 5
    assert Leases(opened.database, opened.record.id).look().epoch == 4


@pytest.mark.parametrize("clock", [-7200.0, -60.0, 0.0, 7200.0], ids=["2 h behind", "1 min behind", "right", "2 h ahead"])
def test_a_holder_elsewhere_with_another_database_that_renews_is_refused(opened: Opened, clock: float) -> None:
    set_path(opened, FOREIGN, seconds=20 + clock, epoch=9)
    waiter = Waiter(lambda now: now > 4 and set_path(opened, FOREIGN, seconds=30 + clock, epoch=9))
    before = dump(opened.database)
    with pytest.raises(LeaseHeld, match="elsewhere"):
        take(opened, pause=waiter.pause, clock=lambda: waiter.now)
    assert dump(opened.database) == before


@pytest.mark.parametrize("clock", [-60.0, 7200.0], ids=["1 min behind", "2 h ahead"])
def test_a_dead_holder_elsewhere_is_waited_out_whatever_its_clock_said(opened: Opened, clock: float) -> None:
    set_path(opened, FOREIGN, seconds=20 + clock, epoch=9)
    waiter = Waiter()
    assert take(opened, pause=waiter.pause, clock=lambda: waiter.now).epoch == 10
    assert 10 <= waiter.now <= 36


def test_a_holder_elsewhere_that_is_long_gone_is_not_waited_for(opened: Opened) -> None:
    set_path(opened, FOREIGN, seconds=-3 * 86400, epoch=9)
    assert take(opened).epoch == 10


def test_a_path_that_another_database_drives_is_refused(opened: Opened) -> None:
    set_path(opened, holder(), epoch=9)
    with pytest.raises(LeaseHeld):
        take(opened)


def test_force_waits_for_nobody(opened: Opened) -> None:
    set_lease(opened, holder())
    set_path(opened, FOREIGN, epoch=11)
    keeper = take(opened, force=True)
    assert keeper.epoch == 12
    path = opened.folder.lease()
    assert path is not None
    assert path.epoch == 12


@pytest.mark.parametrize("torn", ["", "{", "null", '{"epoch": 1}'])
def test_a_torn_path_lease_is_said_and_nothing_is_changed(opened: Opened, torn: str) -> None:
    (opened.folder.path / "lease.json").write_text(torn)
    before = state(opened)
    with pytest.raises(Corrupt, match=r"lease\.json is damaged"):
        take(opened)
    assert state(opened) == before


def test_a_path_that_cannot_be_written_leaves_no_lease_behind(opened: Opened) -> None:
    (opened.folder.path / "lease.json").mkdir()
    ((opened.folder.path / "lease.json") / "x").touch()
    with pytest.raises(StorageError):
        take(opened)
    ((opened.folder.path / "lease.json") / "x").unlink()
    (opened.folder.path / "lease.json").rmdir()

    class Unwritable(Folder):
        @contextmanager
        def changing_lease(self) -> Iterator[LeaseFile]:
            with super().changing_lease() as file:
                (self.path / "file").touch()
                yield replace(file, root=LocalRoot(self.path / "file" / "below"))

    claimant = Waiter().claimant(pause=never)
    with pytest.raises(StorageError):
        leasing.take(opened.database, opened.record.id, Unwritable(opened.folder.path), claimant, action="taken", detail={})
    assert not Leases(opened.database, opened.record.id).look().is_held
    assert take(opened).epoch == 2


# Keeping


@dataclass
class Kept:
    """A keeper at work, with events instead of sleeps."""

    keeper: Keeper
    lost: threading.Event = field(default_factory=threading.Event)
    calls: int = 0

    def start(self) -> None:
        self.keeper.start(self._on_lost)

    def _on_lost(self) -> None:
        self.calls += 1
        self.lost.set()


@pytest.fixture
def kept(opened: Opened) -> Iterator[Kept]:
    kept = Kept(take(opened, terms=FAST))
    kept.start()
    yield kept
    kept.keeper.abandon()


def test_a_keeper_renews_in_both_places_and_counts_active_time(opened: Opened, kept: Kept) -> None:
    leases = Leases(opened.database, opened.record.id)
    first, path = leases.look().renewed, opened.folder.lease()
    assert path is not None
    until(lambda: leases.look().renewed > first + 0.1)
    until(lambda: (opened.folder.lease() or path).renewed > path.renewed + 0.1)
    assert 0.1 < kept.keeper.active_seconds_now() < 60
    kept.keeper.release("done")
    record = experiments.by_uuid(opened.database, opened.record.uuid)
    assert record is not None
    assert record.active_seconds > 0.1
    assert record.ended == "done"
    assert not kept.keeper.is_lost
    assert kept.calls == 0


def test_a_lease_is_given_back_once(opened: Opened, kept: Kept) -> None:
    kept.keeper.release("done")
    before = state(opened)
    kept.keeper.release("interrupted: too late")
    kept.keeper.release_quietly("interrupted: too late")
    kept.keeper.check()
    assert state(opened) == before


def test_a_stop_request_is_seen(opened: Opened, kept: Kept) -> None:
    from holdfast.storage.database import requests

    requests.request_stop(opened.database, opened.record.id)
    until(lambda: kept.keeper.stop_requested)


def test_a_takeover_is_noticed(opened: Opened, kept: Kept) -> None:
    successor = take(opened, force=True)
    assert kept.lost.wait(20)
    before = state(opened)
    assert kept.keeper.is_lost
    for work in (kept.keeper.check, lambda: kept.keeper.release("done")):
        with pytest.raises(Fenced):
            work()
    kept.keeper.release_quietly("done")
    assert kept.calls == 1
    assert state(opened) == before
    successor.release("done")


def test_a_takeover_by_the_path_alone_is_noticed(opened: Opened, kept: Kept) -> None:
    set_path(opened, FOREIGN, epoch=7)
    assert kept.lost.wait(20)
    with pytest.raises(Fenced, match="epoch 7"):
        kept.keeper.check()
    assert (opened.folder.lease() or set_path(opened, None)).epoch == 7  # type: ignore[union-attr]  # it is there


def break_database(opened: Opened) -> None:
    file = opened.database.file
    assert file is not None
    file.rename(file.with_name("away.db"))


def break_folder(opened: Opened) -> None:
    opened.folder.path.rename(opened.folder.path.with_name("away"))


def tear_lease(opened: Opened) -> None:
    (opened.folder.path / "lease.json").write_text("{")


BREAK: dict[str, tuple[Callable[[Opened], object], type[HoldfastError]]] = {
    "database gone": (break_database, DatabaseError),
    "folder gone": (break_folder, StorageError),
    "lease torn": (tear_lease, Corrupt),
    "experiment deleted": (lambda opened: experiments.delete(opened.database, opened.record.id), Fenced),
}


@pytest.mark.parametrize("kind", BREAK)
def test_what_cannot_be_renewed_is_lost_untouchedit_runs_out(opened: Opened, kind: str) -> None:
    kept = Kept(take(opened, terms=Terms(duration=6.0, renewal=1.0)))  # the first beat comes after the spoiling
    kept.start()
    renewed = kept.keeper._renewed
    spoil, expected = BREAK[kind]
    spoil(opened)
    assert kept.lost.wait(20)
    assert leasing.elapsed() - kept.keeper._renewed < 6.0 or renewed == kept.keeper._renewed
    with pytest.raises(expected):
        kept.keeper.check()
    assert kept.calls == 1


def test_a_renewal_that_does_not_come_back_is_given_up_in_time(opened: Opened) -> None:
    kept = Kept(take(opened, terms=Terms(duration=1.0, renewal=0.05)))
    assert opened.database.file is not None
    kept.start()
    with closing(sqlite3.connect(opened.database.file, isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN IMMEDIATE")  # a writer waits for it much longer than the lease lasts
        assert kept.lost.wait(20)
        with pytest.raises(DatabaseError, match="has not answered"):
            kept.keeper.check()
    assert kept.calls == 1
    kept.keeper.abandon()


def test_a_short_absence_of_the_database_is_survived(opened: Opened) -> None:
    kept = Kept(take(opened, terms=Terms(duration=60.0, renewal=0.01)))
    kept.start()
    file = opened.database.file
    assert file is not None
    failed = threading.Event()
    renew = kept.keeper._leases.renew

    def watched(**values: Any) -> Any:
        try:
            return renew(**values)
        except DatabaseError:
            failed.set()
            raise

    kept.keeper._leases.renew = watched  # type: ignore[method-assign]  # looks on
    file.rename(file.with_name("away.db"))
    assert failed.wait(20)
    file.with_name("away.db").rename(file)
    before = kept.keeper._renewed
    until(lambda: kept.keeper._renewed > before)
    kept.keeper.check()
    kept.keeper.release("done")
    assert not kept.keeper.is_lost


@dataclass
class Slept:
    """A clock that goes on while its host sleeps."""

    asleep: float = 0.0

    def __call__(self) -> float:
        return leasing.elapsed() + self.asleep


def drowsy(opened: Opened) -> tuple[Keeper, Slept]:
    """Return a keeper whose thread has not been back since its host slept, and its clock."""
    clock, taken = Slept(), take(opened)
    return Keeper(opened.database, opened.record.id, opened.folder, taken._lease, clock=clock), clock


def test_who_slept_with_the_host_looks_at_the_lease_untouchedanything_else(opened: Opened) -> None:
    keeper, clock = drowsy(opened)
    keeper.check()
    before = Leases(opened.database, opened.record.id).look().renewed
    keeper.check()
    assert Leases(opened.database, opened.record.id).look().renewed == before  # asked for nothing while it lasts
    clock.asleep = 31.0
    keeper.check()
    assert Leases(opened.database, opened.record.id).look().renewed > before
    assert keeper.active_seconds_now() < 30  # sleep is no work
    clock.asleep = 3600.0
    successor = take(opened, force=True)
    untouched = state(opened)
    with pytest.raises(Fenced):
        keeper.check()
    assert state(opened) == untouched
    successor.release("done")


def test_a_clock_that_counts_sleep() -> None:
    """Where there is one; it is never behind the one that does not."""
    name = "CLOCK_BOOTTIME" if hasattr(time, "CLOCK_BOOTTIME") else "CLOCK_MONOTONIC"
    earliest = time.clock_gettime(getattr(time, name))
    assert earliest <= leasing.elapsed() <= time.clock_gettime(getattr(time, name))
    assert leasing.Claimant(holder={}, liveness=lambda _: None, say=print).clock is leasing.elapsed


def test_who_comes_too_late_is_told_by_whom_and_for_how_long(opened: Opened) -> None:
    leases = Leases(opened.database, opened.record.id)
    leases.take(seen=0, epoch=1, holder=FOREIGN, action="started", detail={})
    before = state(opened)
    with pytest.raises(LeaseHeld, match=r"process 4 on elsewhere drives the experiment; its lease runs (30|2\d) s"):
        leases.take(seen=0, epoch=1, holder={"pid": 5}, action="started", detail={})
    assert state(opened) == before
    leases.release(epoch=1, active=0.0, ended="done")
    with pytest.raises(LeaseHeld, match="at the same moment; nothing was changed"):
        leases.take(seen=0, epoch=1, holder={"pid": 5}, action="started", detail={})


# Several processes


def test_of_several_processes_one_takes_the_lease(opened: Opened) -> None:
    job = {"url": url_of(opened.database), "experiment": opened.record.id, "folder": str(opened.folder.path)}
    with Racers(2) as racers:
        for epoch in range(1, 21):
            answers = racers.race(racing.take_lease, [job] * 2)
            assert answers.count(epoch) == 1, answers
            (refused,) = (answer for answer in answers if answer != epoch)
            assert refused.startswith("LeaseHeld")
            assert "drives the experiment; its lease runs" in refused  # also who comes at the same moment is told by whom
            Leases(opened.database, opened.record.id).release(epoch=epoch, active=0.0, ended="done")
            set_path(opened, None, epoch=epoch)
