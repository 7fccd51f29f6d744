"""A real driver that is suspended in the middle of a write transaction, and somebody who takes over."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import HOLDFAST, Lab, MakeLab, Running, begin, starts, tree

from holdfast.tasks.workers import processes

SUSPENDED = """
import os, signal, sys, threading
from holdfast.storage.database.engine import Transaction
run = Transaction.run
def suspending(self, statement, **values):
    rows = run(self, statement, **values)
    if values.get("step") == 1 and "decision" in values:
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread stops first: here
    return rows
Transaction.run = suspending
from holdfast.cli import main
sys.exit(main(sys.argv[1:]))
"""


ELSEWHERE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
"""Runs what follows among other processes, none of ours; its host may have a name of its own."""


def suspended(lab: Lab) -> Running:
    """Start a search that stops itself within the transaction of its second report, and wait until it has."""
    run = lab.start("run", lab.spec(search={"num_trials": 2}), script=SUSPENDED)
    lab.until_suspended(run)
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


def elsewhere(lab: Lab, *arguments: object) -> Running:
    """Start ``holdfast`` as on another host that shares the disk: it sees none of our processes."""
    return begin(lab, *ELSEWHERE, "sh", "-c", 'hostname elsewhere && exec "$0" "$@"', str(HOLDFAST), *map(str, arguments))


def test_suspended_for_longer_than_the_lease_and_restored_elsewhere(make_lab: MakeLab) -> None:
    """The zombies end themselves and have written nothing: one suspended between transactions, and one within.

    The first is restored with its own database, the second one, which keeps that locked, with another one from the path alone.
    """
    namespaces = [*ELSEWHERE, "hostname", "elsewhere"]
    if shutil.which("unshare") is None or subprocess.run(namespaces, capture_output=True).returncode:
        pytest.skip("another host is played by new pid and UTS namespaces, which need unshare and root")
    between, within = make_lab("between"), make_lab("within")
    holds = [between.order("hold", number, 1) for number in (0, 1)]
    outside = between.start("run", between.spec(search={"num_trials": 3, "max_concurrent": 2}))
    for number in (0, 1):
        between.until_logged("hold", number, 1, outside)
    between.suspend(outside)
    inside = suspended(within)
    for hold in holds:
        hold.unlink()
    other = within.folder / "other"
    other.mkdir()
    restores = [
        elsewhere(between, "restore", between.path()),
        elsewhere(within, "restore", within.path(), "--database", f"sqlite:///{other / 'holdfast.db'}"),
    ]
    for restore in restores:
        ended = restore.wait(180)
        assert ended.code == 0, ended.output
        assert "wait" in ended.output
    assert between.statuses() == ["COMPLETED"] * 3
    assert starts(within.log(), 0)[-1] == (2, 2)  # what was published counts, although its row never did
    before = between.dump(), between.tree(), between.log()
    path, rows = within.tree(), tree(other)
    for zombie in (outside, inside):
        zombie.signal(signal.SIGCONT)
    for zombie in (outside, inside):
        ended = zombie.wait()
        assert ended.code == 3, ended.output
    assert (between.dump(), between.tree(), between.log()) == before
    assert set(within.tree().items()) ^ set(path.items()) == set()
    assert tree(other) == rows


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
