"""Real searches on a real PostgreSQL that is restarted, or whose driver dies, in the middle of a trial."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Lab, executed, starts
from support_postgres import MISSING, Postgres, binaries

from holdfast.experiment import Experiment
from holdfast.locate import find


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A server of these tests' own: they restart it."""
    if binaries() is None:
        pytest.skip(MISSING)
    with Postgres() as server:
        yield server


@pytest.fixture
def url(server: Postgres) -> Iterator[str]:
    """An empty database: the search makes its schema."""
    name = server.create(empty=True)
    yield server.text(name)
    server.drop(name)


def opened(lab: Lab, url: str) -> Experiment:
    return Experiment(find(lab.path(), database=url))


def statuses(lab: Lab, url: str) -> list[str]:
    with opened(lab, url) as experiment:
        return [trial.status.value for trial in experiment.trials]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_search_goes_on_after_the_server_restarts(lab: Lab, server: Postgres, url: str, mode: str) -> None:
    """Twice: while trials run, and when the last ones are to be written."""
    holds = [lab.order("hold", number, 1) for number in (0, 1)] + [lab.order("hold", 3, 2)]
    run = lab.start("run", lab.spec(database=url, search={"max_concurrent": 2}))
    for number in (0, 1):
        lab.until_logged("hold", number, 1, run)
    server.restart(mode)
    for hold in holds[:2]:
        hold.unlink()
    lab.until_logged("hold", 3, 2, run)
    server.stop(mode)
    holds[2].unlink()
    lab.until_logged("step", 3, 2, run)  # its report finds no server
    server.start()
    ended = run.wait()
    assert ended.code == 0, ended.output
    assert statuses(lab, url) == ["COMPLETED"] * 4
    log = lab.log()
    assert [starts(log, number) for number in range(4)] == [[(1, 0)]] * 4
    assert [executed(log, number) for number in range(4)] == [[0, 1, 2]] * 4
    with opened(lab, url) as experiment:
        assert [(row.trial, row.step) for row in experiment.history() if row.step >= 0] == [
            (number, step) for number in range(4) for step in range(3)
        ]
        assert not experiment.lease.is_held


def test_a_killed_search_is_restored(lab: Lab, url: str) -> None:
    hold = lab.order("hold", 1, 2)
    run = lab.start("run", lab.spec(database=url))
    lab.until_logged("hold", 1, 2, run)
    run.kill()
    hold.unlink()
    lab.clear_log()
    lab.run("restore", lab.path(), "--database", url)
    assert statuses(lab, url) == ["COMPLETED"] * 4
    assert [starts(lab.log(), number) for number in range(4)] == [[], [(2, 2)], [(1, 0)], [(1, 0)]]
    assert not (lab.path().parent / "holdfast.db").exists()
    rows = lab.json("trials", lab.path(), "--database", url)
    assert [row["status"] for row in rows] == ["COMPLETED"] * 4


def test_a_search_whose_server_stays_away_ends_in_time_and_is_restored(lab: Lab, server: Postgres, url: str) -> None:
    """It must not drive on without a lease: it stops before the lease runs out, and says what to do."""
    hold = lab.order("hold", 1, 2)
    run = lab.start("run", lab.spec(database=url, search={"num_trials": 2}))
    lab.until_logged("hold", 1, 2, run)
    server.stop()
    try:
        ended = run.wait()
    finally:
        server.start()
    hold.unlink()
    assert ended.code == 4, ended.output
    assert "Traceback" not in ended.output
    lab.run("restore", lab.path(), "--database", url)
    assert statuses(lab, url) == ["COMPLETED"] * 2


def test_a_stopped_driver_on_postgresql_is_taken_over(lab: Lab, url: str, tmp_path: Path) -> None:
    import signal

    hold = lab.order("hold", 0, 1)
    run = lab.start("run", lab.spec(database=url, search={"num_trials": 1}))
    lab.until_logged("hold", 0, 1, run)
    lab.light("show", lab.path(), "--database", url)  # its imports would take of the lease
    run.signal(signal.SIGSTOP)
    assert lab.light("restore", lab.path(), "--database", url).code == 3
    hold.unlink()
    lab.run("restore", lab.path(), "--database", url, "--force")
    assert statuses(lab, url) == ["COMPLETED"]
    run.signal(signal.SIGCONT)
    assert run.wait().code == 3
