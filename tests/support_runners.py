"""What every engine has to do with a search, however it runs its trials."""

from __future__ import annotations

import os
import signal
import sqlite3
from contextlib import closing
from typing import Any

from support import PATIENCE, Lab
from support_prefect import View

SEARCH = {"num_trials": 4, "max_concurrent": 2, "seed": 7}
CURRENT = (
    "SELECT a.task_run_id, w.pid FROM attempt a JOIN worker w ON w.id = a.worker_id JOIN trial t ON t.id = a.trial_id "
    "JOIN experiment e ON e.id = t.experiment_id WHERE e.name = 'exp' AND t.number = 0"
)


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

    [(run, pid)] = rows(lab, CURRENT)
    assert pid != search.process.pid, "a worker is a process of its own"
    view = View(lab, "exp")

    def state(run: str) -> str | None:
        """Return the state of a task run; None while Prefect's server, which learns of runs from events, has none of it."""
        found = view.ask("POST", "/task_runs/filter", {"task_runs": {"id": {"any_": [run]}}})
        return str(found[0]["state_name"]) if found else None

    lab.until(lambda: state(run) == "Running", search)  # what the process has not sent goes with it
    os.kill(pid, signal.SIGKILL)
    lab.until(lambda: any((e.event, e.trial, e.attempt) == ("hold", 0, 2) for e in lab.log()), search)
    lost = {run for (run,) in rows(lab, "SELECT task_run_id FROM attempt WHERE outcome = 'lost'")}
    assert run in lost, search.output

    lab.run("cancel", lab.path(), "--trial", 1)
    lab.until(lambda: lab.statuses()[1] == "CANCELLED", search)
    search.signal(signal.SIGTERM)
    assert search.wait(2 * PATIENCE).code == 128 + signal.SIGTERM, search.output
    assert "RUNNING" not in lab.statuses(), search.output
    left = rows(lab, "SELECT count(*) FROM attempt a WHERE a.claimed_by IS NOT NULL AND a.outcome IS NULL")
    assert left == [(0,)]
    lab.until(lambda: state(run) == "Crashed")

    for order in held:
        order.unlink()
    ended = lab.start("restore", lab.path()).wait(2 * PATIENCE)
    assert ended.code == 0, ended.output
    expected, found = lab.outcome("threads"), lab.outcome()
    assert found.pop(1)[:2] == ("CANCELLED", expected.pop(1)[1])
    assert found == expected
    lab.until(lambda: rows(lab, "SELECT count(*) FROM worker WHERE \"left\" IS NULL AND engine <> 'ray'") == [(0,)])
