"""A real driver that is suspended in the middle of a write transaction, and somebody who takes over."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import Lab, Running, starts

from holdfast.tasks.workers import processes

SUSPENDED = """
import os, signal, sys
from holdfast.storage.database.engine import Transaction
run = Transaction.run
def suspending(self, statement, **values):
    rows = run(self, statement, **values)
    if values.get("step") == 1 and "decision" in values:
        os.kill(os.getpid(), signal.SIGSTOP)
    return rows
Transaction.run = suspending
from holdfast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def suspended(lab: Lab) -> Running:
    """Start a search that stops itself within the transaction of its second report, and wait until it has."""
    log = lab.folder / "suspended.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", SUSPENDED, "run", str(lab.spec(search={"num_trials": 2}))],
            cwd=lab.folder,
            env=dict(lab.environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    run = Running(process, log)
    lab.running.append(run)
    started = processes.identity(process.pid)
    lab.until(lambda: processes.is_suspended(processes.same_host(), process.pid, str(started)), run)
    return run


def test_a_driver_that_is_suspended_within_a_transaction_is_ended_by_force_alone(lab: Lab) -> None:
    run = suspended(lab)
    assert lab.light("restore", lab.path()).code == 3
    assert run.process.poll() is None
    ended = lab.run("restore", lab.path(), "--force")
    assert f"process {run.process.pid} on" in ended.output
    assert "suspended and keeps the database locked" in ended.output
    assert run.process.wait(20) == -signal.SIGKILL
    assert lab.statuses() == ["COMPLETED"] * 2
    assert starts(lab.log(), 0) == [(1, 0), (2, 1)]  # its second report was never acknowledged


def test_only_the_very_process_is_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        try:
            host, pid, started = processes.same_host(), process.pid, str(processes.identity(process.pid))
            assert not processes.is_suspended(host, pid, started)
            process.send_signal(signal.SIGSTOP)
            deadline = time.monotonic() + 20
            while not processes.is_suspended(host, pid, started):
                assert time.monotonic() < deadline
            assert not processes.is_suspended("elsewhere", pid, started)
            assert not processes.is_suspended(host, pid, "another")
            processes.kill(pid, "another")
            assert process.poll() is None
            processes.kill(pid, started)
            assert process.wait(20) == -signal.SIGKILL
            processes.kill(pid, started)
        finally:
            process.kill()


@pytest.mark.parametrize("held", [True, False])
def test_whether_a_database_is_locked(tmp_path: Path, held: bool) -> None:
    import sqlite3
    from contextlib import closing

    from holdfast.storage.database.engine import connect, sqlite_url

    file = tmp_path / "x.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as other, closing(connect(sqlite_url(file))) as database:
        other.execute("PRAGMA journal_mode=WAL")
        if held:
            other.execute("BEGIN IMMEDIATE")
        assert database.is_locked(patience=0.05) is held
