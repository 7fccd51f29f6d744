"""What every engine has to do with a search, however it runs its trials."""

from __future__ import annotations

import os
import signal
import sqlite3
from contextlib import closing
from typing import Any

from support import Lab

SEARCH = {"num_trials": 4, "max_concurrent": 2, "seed": 7}
TASK_RUNS = """
import sys
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterId
with get_client(sync_client=True) as client:
    wanted = TaskRunFilter(id=TaskRunFilterId(any_=sys.argv[1:]))
    states = {str(run.id): run.state.name for run in client.read_task_runs(task_run_filter=wanted)}
    print(*(states.get(run, "unknown") for run in sys.argv[1:]))
"""


def rows(lab: Lab, query: str) -> list[tuple[Any, ...]]:
    """Return what the experiment store answers."""
    with closing(sqlite3.connect(f"file:{lab.database}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


def keep_log_here(lab: Lab) -> None:
    """Let the trainable log into the laboratory's folder wherever its own file was brought."""
    file = lab.folder / "train.py"
    text = file.read_text()
    assert "HERE = Path(__file__).parent" in text
    file.write_text(text.replace("HERE = Path(__file__).parent", f"HERE = Path({str(lab.folder)!r})"))


def goes_through_everything(lab: Lab, runner: str, **execution: Any) -> None:
    """Run a search on an engine, lose a worker, cancel a trial, end the driver, restore: it comes to what threads come to."""
    keep_log_here(lab)
    lab.run("run", lab.spec(name="threads", search=SEARCH))
    lab.clear_log()
    held = [lab.order("hold", 0, 1), lab.order("hold", 1, 1)]
    spec = lab.spec(name="exp", search=SEARCH, execution={"runner": runner, **execution})
    search = lab.start("run", spec, HOLDFAST_GRACE_SECONDS="2")
    lab.until_logged("hold", 0, 1, search)
    lab.until_logged("hold", 1, 1, search)

    (pid,) = rows(
        lab,
        "SELECT w.pid FROM attempt a JOIN worker w ON w.id = a.worker_id JOIN trial t ON t.id = a.trial_id "
        "JOIN experiment e ON e.id = t.experiment_id WHERE e.name = 'exp' AND t.number = 0",
    )[0]
    assert pid != search.process.pid, "a worker is a process of its own"
    os.kill(pid, signal.SIGKILL)
    lab.until(lambda: any((e.event, e.trial, e.attempt) == ("hold", 0, 2) for e in lab.log()), search)
    lost = rows(lab, "SELECT task_run_id FROM attempt WHERE outcome = 'lost'")
    assert lost, search.output

    lab.run("cancel", lab.path(), "--trial", 1)
    lab.until(lambda: lab.statuses()[1] == "CANCELLED", search)
    search.signal(signal.SIGTERM)
    assert search.wait().code == 128 + signal.SIGTERM, search.output
    assert "RUNNING" not in lab.statuses(), search.output
    left = rows(lab, "SELECT count(*) FROM attempt a WHERE a.claimed_by IS NOT NULL AND a.outcome IS NULL")
    assert left == [(0,)]
    states = lab.python(TASK_RUNS, *(run for (run,) in lost)).output.split()
    assert set(states) == {"Crashed"}, states

    for order in held:
        order.unlink()
    lab.run("restore", lab.path())
    expected, found = lab.outcome("threads"), lab.outcome()
    assert found.pop(1)[:2] == ("CANCELLED", expected.pop(1)[1])
    assert found == expected
    assert rows(lab, "SELECT count(*) FROM worker WHERE \"left\" IS NULL AND engine <> 'ray'") == [(0,)]
