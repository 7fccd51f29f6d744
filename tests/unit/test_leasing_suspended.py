"""A real driver that is suspended, taken over, and woken up."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from leasing_kit import Waiter, state, take
from store_kit import create, until

from holdfast.core.errors import StorageError
from holdfast.locate import Opened
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.leases import Leases


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with closing(create(tmp_path / "runs")) as opened:
        yield opened


SUSPENDED = """
import sys
from pathlib import Path
from holdfast.core.errors import Fenced
from holdfast.holding import holder, liveness
from holdfast.locate import open_path
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.leases import Terms
from holdfast.storage.leasing import Claimant, take
import threading

opened = open_path(sys.argv[1])
claimant = Claimant(holder=holder(), liveness=liveness, say=print, terms=Terms(duration=3.0, renewal=0.01))
keeper = take(opened.database, opened.record.id, opened.folder, claimant, action="taken", detail={})
lost = threading.Event()
keeper.start(lost.set)
driver = Driver(opened.database, opened.record.id, keeper.epoch, seed=1)
driver.propose({"x": 0.1})
print("driving", flush=True)
sys.stdin.readline()
try:
    driver.propose({"x": 0.2})
except Fenced:
    print("refused", flush=True)
assert lost.wait(20)
for work in (keeper.check, lambda: keeper.release("done")):
    try:
        work()
    except Fenced:
        print("refused", flush=True)
"""


def suspend(process: subprocess.Popen[str], opened: Opened) -> None:
    """Suspend a driver outside of a renewal: within one it holds locks, and whoever comes is told so."""
    file = opened.database.file
    assert file is not None
    while True:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        try:
            with opened.folder.root.exclusive(patience=0.0), closing(sqlite3.connect(file, timeout=0.0)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
            return
        except (StorageError, sqlite3.OperationalError):
            process.send_signal(signal.SIGCONT)
            os.waitid(os.P_PID, process.pid, os.WCONTINUED)


def test_a_suspended_driver_that_goes_on_after_a_takeover_writes_nothing(opened: Opened) -> None:
    command = [sys.executable, "-c", SUSPENDED, str(opened.folder.path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "driving\n"
    suspend(process, opened)
    leases = Leases(opened.database, opened.record.id)
    until(lambda: leases.look().remaining <= 0)
    waiter = Waiter()
    path = opened.folder.lease()
    assert path is not None
    until(lambda: path.expires < time.time())
    keeper = take(opened, pause=waiter.pause)
    Driver(opened.database, opened.record.id, keeper.epoch, seed=1).propose({"x": 0.3})
    before = state(opened)
    process.send_signal(signal.SIGCONT)
    answer, _ = process.communicate("\n", timeout=60)
    assert answer == "refused\n" * 3
    assert process.returncode == 0
    assert state(opened) == before
    keeper.release("done")
