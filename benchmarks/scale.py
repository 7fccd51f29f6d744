"""What size costs: trials a second by runner, 10,000 trials end to end, 100,000 trials through what the driver itself does.

* *runners*: a search of trials that return at once on each ``execution.runner``, beside the bare engine with the same Prefect
  tasks, both in a process of their own on one running Prefect server, in alternating order;
* *ends*: one search of many trials, every part of it real, with the driver's memory over time: ``threads``, in worker processes
  and ``inline``;
* *driver*: simulated trials through store, journal, loop, ledger, proposer and the words for Prefect, without Prefect, workers
  or user code: each trial is claimed, reports once, and has a result file, by the same calls as in a task. The cost of a trial
  among the last thousand is at most 2 times that among the first ones (the first of all is left out), and the process stays below
  1 GB. ``tpe`` looks at all that was tried for each proposal, so it grows by itself: its figures have no limit.

Prints tables; ``--json FILE`` keeps every figure. ``--postgres`` puts experiments on a PostgreSQL server of the package pgserver.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

WIDTH = 200
"""Simulated trials at once."""
LIMIT_RATIO, LIMIT_MB = 2.0, 1024.0
WINDOW = 1000


def noop(trial: Any) -> dict[str, float]:
    """Return at once."""
    return {"loss": trial.config["x"]}


def memory() -> float:
    """Return the resident memory of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def spec_of(folder: Path, name: str, trials: int, **more: Any) -> dict[str, Any]:
    """Return the spec of a search of three parameters and one objective."""
    search = {"engine": "random", "num_trials": trials, "seed": 1, **more.pop("search", {})}
    return {
        "name": name,
        "trainable": f"{__file__}:noop",
        "storage": str(folder),
        "objectives": {"loss": "min"},
        "space": {
            "x": {"type": "float", "low": 0, "high": 1},
            "y": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
            "z": {"type": "int", "low": 1, "high": 100},
        },
        "search": search,
        **more,
    }


# The driver, with simulated trials


class Simulated:
    """A future of a trial that is claimed, and ends when its turn comes."""

    def __init__(self, parameters: dict[str, Any], writer: Any) -> None:
        from prefect.states import Completed

        self.task_run_id = uuid4()
        self.parameters, self.writer = parameters, writer
        self.state = Completed()
        self.callbacks: list[Callable[[Any], None]] = []

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)

    def wait(self, timeout: float | None = None) -> None:
        """Return: whoever waits was told that it has ended."""


class Trials:
    """A runner, and the queue of what has ended: the oldest running trial ends when the driver waits for one."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._running: deque[Simulated] = deque()
        self._ended: deque[Any] = deque()

    def submit(self, task: Any, parameters: dict[str, Any]) -> Simulated:
        from holdfast.storage.database.attempts import AttemptWriter

        runtime = self._session.runtime
        identity = str(uuid4())
        writer = AttemptWriter.claim(
            runtime.database, runtime.experiment, runtime.epoch, parameters["row"], token=identity, task_run_id=identity
        )
        self._running.append(Simulated(parameters, writer))
        return self._running[-1]

    def withdraw(self, future: Any) -> None:
        """Do nothing: what was submitted runs."""

    def put(self, future: Any) -> None:
        self._ended.append(future)

    def get(self, timeout: float = 0.0) -> Any:
        if not self._ended and self._running:
            self._end(self._running.popleft())
        if not self._ended:
            raise queue.Empty
        return self._ended.popleft()

    def _end(self, future: Simulated) -> None:
        from holdfast.core.space import config_digest

        given = future.parameters
        config = json.loads(given["config"])
        future.writer.report(0, {"loss": config["x"] * config["z"]})
        folder = self._session.opened.folder
        result = {"outcome": "completed", "metrics": {}, "config": config_digest(config)}
        result |= {"trial": given["trial"], "attempt": given["attempt"]}
        name = folder.result_name(given["trial"], given["attempt"])
        record = {"metadata": {"storage_key": name}, "result": json.dumps(result)}
        file = folder.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record))
        for callback in future.callbacks:
            callback(future)


def driver_arm(folder: Path, trials: int, engine: str, database: str | None) -> dict[str, Any]:
    """Drive simulated trials to the end; return seconds and CPU seconds of each thousand, and memory."""
    from holdfast.flows.artifacts import KINDS, rendered
    from holdfast.flows.driver import Drive
    from holdfast.flows.prefect_runs import Wishes
    from holdfast.flows.prepare import Origin, make_experiment
    from holdfast.flows.session import begin
    from holdfast.flows.signals import Deferred
    from holdfast.flows.telling import teller_of
    from holdfast.report.observer import Observer
    from holdfast.result import result_of
    from holdfast.specfile import ExperimentSpec

    data = spec_of(folder, f"driver-{engine}", trials, search={"engine": engine, "max_concurrent": WIDTH})
    data |= {"execution": {"isolation": "inline", "trials_per_run": None}, **({"database": database} if database else {})}
    opened = make_experiment(ExperimentSpec.parse(data), Origin(workdir=str(folder)))
    session = begin(opened, None, Observer(), action="started", detail={})
    teller = teller_of(session)
    drive = Drive(session, teller, Wishes(), Deferred())
    simulated = Trials(session)
    drive._done = simulated  # type: ignore[assignment]  # noqa: SLF001  # in place of tasks that end by themselves
    marks: list[tuple[int, float, float, float]] = [(0, time.perf_counter(), time.process_time(), memory())]
    finish, shown = drive._finish, 0.0  # noqa: SLF001

    def finished(future: Any) -> None:
        nonlocal shown
        finish(future)
        done = future.parameters["trial"] + 1
        if done % WINDOW == 0:
            began = time.process_time()
            with teller._lock:  # noqa: SLF001  # what its thread does every few seconds, without the API
                changed, teller._changed = teller._changed, {}  # noqa: SLF001
            for trial in changed.values():
                teller._tally.take(trial)  # noqa: SLF001
            for kind in KINDS:
                rendered(kind, teller._shown, teller._tally)  # noqa: SLF001
            shown = time.process_time() - began
            marks.append((done, time.perf_counter(), time.process_time(), memory()))

    drive._finish = finished  # type: ignore[method-assign]  # noqa: SLF001
    drive._take_in(session.followed.look(), fresh=False)  # noqa: SLF001
    reason = drive._loop(simulated)  # type: ignore[arg-type]  # noqa: SLF001
    session.journal.flush()
    session.keeper.release(f"completed: {reason}")
    result = result_of(session.opened, reason, trials=session.followed.own())
    assert len(result.trials) == trials
    ended = memory()
    peak = max(ended, *(mark[3] for mark in marks))
    session.close()
    windows = [
        {
            "trials": mark[0],
            "ms": (mark[1] - before[1]) / WINDOW * 1e3,
            "cpu_ms": (mark[2] - before[2]) / WINDOW * 1e3,
            "mb": mark[3],
        }
        for before, mark in zip(marks, marks[1:], strict=False)
    ]
    return {"engine": engine, "windows": windows, "peak_mb": peak, "shown_s": shown, "began_mb": marks[0][3]}
