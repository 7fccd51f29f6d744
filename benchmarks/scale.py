"""What size costs: trials a second by runner, 10,000 trials end to end, 100,000 trials through what the driver itself does.

* *runners*: a search of trials that return at once on each ``execution.runner``, beside the bare engine with the same Prefect
  tasks, both in a process of their own on one running Prefect server, in alternating order;
* *ends*: one search of many trials, every part of it real, with the driver's memory over time: ``threads``, in worker processes
  and ``inline``;
* *driver*: simulated trials through store, journal, loop, ledger, proposer and the words for Prefect, without Prefect, workers
  or user code: each trial is claimed, reports once, and has a result file, by the same calls as in a task. The cost of a trial
  among the last thousand is at most 2 times that among the first thousand, in CPU seconds, and the process stays below 1 GB.
  ``tpe`` looks at all that was tried for each proposal, so it grows by itself: its figures have no limit.

Prints tables; ``--json FILE`` keeps every figure. ``--postgres`` puts experiments on a PostgreSQL server (package pgserver).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

from trials import drain, prefect_arm

WIDTH = 200
"""Simulated trials at once."""
LIMIT_RATIO, LIMIT_MB = 2.0, 1024.0
WINDOW = 1000
TRIALS = {"runner:workpool": 20, "runner": 500, "bare": 500, "ends": 10_000, "driver": 100_000}
"""Of each kind of arm. A trial on a work pool is a process that starts Python and Prefect."""


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


# Whole searches


def search_arm(folder: Path, name: str, trials: int, database: str | None, **execution: Any) -> dict[str, Any]:
    """Run a search of trials that return at once, 2 at a time; return seconds, CPU seconds a trial and memory over time."""
    import holdfast

    seen: list[tuple[int, float]] = []
    every = max(trials // 10, 1)

    class Watch(holdfast.Observer):
        began = ended_at = cpu = 0.0
        done = 0

        def running(self, api_url: str | None) -> None:
            self.began, self.cpu = time.perf_counter(), time.process_time()

        def trial(self, trial: Any) -> None:
            if trial.status == "COMPLETED" and trial.number >= self.done:
                self.done = trial.number + 1
                if self.done % every == 0:
                    seen.append((self.done, round(memory(), 1)))

        def ended(self, result: Any) -> None:
            self.ended_at, self.cpu = time.perf_counter(), time.process_time() - self.cpu
            assert [trial.status for trial in result.trials] == ["COMPLETED"] * trials

    watch = Watch()
    spec = spec_of(folder, name, trials, search={"max_concurrent": 2}, execution=execution)
    holdfast.search({**spec, **({"database": database} if database else {})}, observer=watch)
    seconds = watch.ended_at - watch.began
    return {"per_s": trials / seconds, "cpu_ms": watch.cpu / trials * 1e3, "memory_mb": seen, "peak_mb": round(memory(), 1)}


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

    def ended(self, future: Any) -> Any:
        from holdfast.flows.runners.port import End, How

        return End(how=How.STATE, state=future.state)

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
    drive._done = simulated  # type: ignore[assignment]  # in place of tasks that end by themselves
    marks: list[tuple[int, float, float, float]] = [(0, time.perf_counter(), time.process_time(), memory())]
    finish, shown = drive._finish, 0.0

    def finished(future: Any) -> None:
        nonlocal shown
        finish(future)
        done = future.parameters["trial"] + 1
        if done % WINDOW == 0:
            began = time.process_time()
            with teller._lock:  # what its thread does every few seconds, without the API
                changed, teller._changed = teller._changed, {}
            for trial in changed.values():
                teller._tally.take(trial)
            for kind in KINDS:
                rendered(kind, teller._shown, teller._tally)
            shown = time.process_time() - began
            marks.append((done, time.perf_counter(), time.process_time(), memory()))
            if done % (10 * WINDOW) == 0 or done <= 2 * WINDOW:
                cpu = (marks[-1][2] - marks[-2][2]) / WINDOW * 1e3
                print(
                    f"{engine}: {done} trials, {cpu:.2f} ms of CPU a trial, {marks[-1][3]:.0f} MB", file=sys.stderr, flush=True
                )

    drive._finish = finished  # type: ignore[method-assign]
    drive._take_in(session.followed.look(), fresh=False)
    drive._runner = simulated  # type: ignore[assignment]
    reason = drive._loop()
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
        for before, mark in pairwise(marks)
    ]
    return {"engine": engine, "windows": windows, "peak_mb": peak, "shown_s": shown, "began_mb": marks[0][3]}


# Arms


MISSING = {"dask": "prefect_dask", "ray": "prefect_ray"}


def absent(runner: str) -> str | None:
    """Return why a runner cannot be measured here, or None."""
    if runner in MISSING and find_spec(MISSING[runner]) is None:
        return f"the extra {runner} is not installed"
    if find_spec(f"holdfast.flows.runners.{runner}") is None and runner != "threads":
        return f"this version has no runner {runner}"
    return None


def run_arm(arm: str, trials: int, folder: Path, url: str | None, database: str | None) -> dict[str, Any]:
    """Run one arm in a process of its own; return what it measured, or why it could not."""
    command = [sys.executable, __file__, "--arm", arm, "--trials", str(trials), "--folder", str(folder)]
    command += ["--database", database] if database else []
    environment = {**os.environ, "PREFECT_LOGGING_LEVEL": "ERROR", **({"PREFECT_API_URL": url} if url else {})}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    if url:
        drain(url)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def one_arm(arm: str, trials: int, folder: Path, database: str | None) -> dict[str, Any]:
    """Measure one arm in this process."""
    kind, _, what = arm.partition(":")
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "driver":
        return driver_arm(folder, trials, what, database)
    if kind == "bare":
        found = prefect_arm(trials, folder / "bare", 6)
        return {"per_s": trials / found["seconds"], "cpu_ms": found["cpu"] / trials * 1e3}
    execution = {"isolation": "inline"} if what == "inline" else {} if kind == "ends" else {"runner": what}
    return search_arm(folder, f"{kind}-{what}", trials, database, **execution)


def measure(options: argparse.Namespace, database: str | None) -> list[dict[str, Any]]:
    """Run the arms, each group with its own number of trials, and return their figures."""
    from holdfast.flows.server import EmbeddedServer

    found: list[dict[str, Any]] = []
    runners = [arm for arm in options.arms if arm.startswith("runner:")]
    server = EmbeddedServer()
    url = None
    if any(not arm.startswith("driver:") for arm in options.arms):
        server.begin()
        url = server.url()
    worker = start_worker(url) if url and "runner:workpool" in runners else None
    try:
        for number in range(options.rounds):
            ordered = [*runners, "bare:threads"] if runners else []
            for arm in [*(ordered if number % 2 == 0 else ordered[::-1]), *(options.arms if number == 0 else [])]:
                if arm in ordered and number == 0 and any(row["arm"] == arm for row in found):
                    continue
                why = absent(arm.partition(":")[2]) if arm.startswith("runner:") else None
                trials = options.trials or TRIALS.get(arm) or TRIALS[arm.partition(":")[0]]
                with tempfile.TemporaryDirectory(prefix="holdfast-scale-", dir=options.folder) as name:
                    row = {"skipped": why} if why else run_arm(arm, trials, Path(name), url, database)
                found.append({"arm": arm, "round": number, "trials": trials, **row})
                print(words(found[-1]), flush=True)
    finally:
        if worker is not None:
            worker.terminate()
            worker.wait()
        server.stop()
    return found


def start_worker(url: str) -> subprocess.Popen[bytes]:
    """Deploy, and start a worker of processes, which runs as many flow runs as it finds."""
    environment = {**os.environ, "PREFECT_API_URL": url}
    command = [sys.executable, "-m"]
    subprocess.run([*command, "holdfast.cli", "deploy", "--no-automations"], env=environment, stdout=sys.stderr, check=True)
    worker = [*command, "prefect", "worker", "start", "--pool", "holdfast", "--type", "process"]
    return subprocess.Popen(worker, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def words(row: dict[str, Any]) -> str:
    """Return a line about one arm."""
    head = f"| {row['arm']} | {row['trials']} |"
    if "skipped" in row or "failed" in row:
        return f"{head} skipped: {row['skipped']} |" if "skipped" in row else f"{head} failed: {row['failed']} |"
    if "windows" not in row:
        return f"{head} {row['per_s']:.1f} trials/s, {row['cpu_ms']:.1f} ms of CPU a trial {row.get('memory_mb', '')} |"
    first, last = row["windows"][0]["cpu_ms"], median(window["cpu_ms"] for window in row["windows"][-3:])
    kept = last <= LIMIT_RATIO * first and row["peak_mb"] <= LIMIT_MB
    verdict = "no limit" if row["engine"] == "tpe" else "kept" if kept else "MISSED"
    return f"{head} {first:.2f} -> {last:.2f} ms of CPU a trial, {last / first:.2f} times; {row['peak_mb']:.0f} MB: {verdict} |"


def main() -> None:
    """Measure, or run one arm."""
    everything = ["runner:threads", "runner:dask", "runner:ray", "runner:workpool"]
    everything += ["ends:process", "ends:inline", "driver:random", "driver:sobol"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=everything, help=f"of {', '.join(everything)}, driver:tpe")
    parser.add_argument("--rounds", type=int, default=3, help="of the runners")
    parser.add_argument("--trials", type=int, help="in place of each arm's own number")
    parser.add_argument("--folder", type=Path, help="where experiments are put for the time, such as /dev/shm")
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--database", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm is not None:
        print(json.dumps(one_arm(options.arm, options.trials, options.folder, options.database)))
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    about = {"date": datetime.now(UTC).date().isoformat(), "machine": machine, "load": os.getloadavg(), "command": sys.argv[1:]}
    with tempfile.TemporaryDirectory(prefix="holdfast-scale-pg-") as folder:
        server, database = None, None
        if options.postgres:
            import pgserver

            server = pgserver.get_server(folder)
            database = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        try:
            about["rows"] = measure(options, database)
        finally:
            if server is not None:
                server.cleanup()
    if options.json is not None:
        options.json.write_text(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
