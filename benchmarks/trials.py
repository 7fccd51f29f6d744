"""No-op trials per second, end to end and in isolated processes, against what the engine below could do at best.

Both arms run on one running Prefect server, in processes of their own, alternately, and the server is drained between them:

* ``holdfast``: a search of trials that return at once, each in a warm child process;
* ``prefect``: thread tasks that persist their result, asked and told in a loop of the same width, plus as many fsyncs as the
  search makes (counted, not guessed).

Prints JSON: rates, their ratio by round and its median, the fsyncs a trial, and the raw time of one fsync.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

WIDTH = 2
RECORD = b"x" * 512


def noop(trial: Any) -> dict[str, float]:
    """Return at once."""
    return {"loss": trial.config["x"]}


def holdfast_arm(trials: int, folder: Path) -> dict[str, float]:
    """Run the search; return seconds from the first action of the flow to its end, CPU seconds, and fsyncs a trial."""
    import holdfast
    from holdfast.result import SearchResult

    fsyncs = 0
    real = os.fsync

    def counted(descriptor: int) -> None:
        nonlocal fsyncs
        fsyncs += 1
        real(descriptor)

    os.fsync = counted

    class Clock(holdfast.Observer):
        began = ended_at = cpu = 0.0

        def running(self, api_url: str | None) -> None:
            Clock.began, Clock.cpu = time.perf_counter(), time.process_time()

        def ended(self, result: SearchResult) -> None:
            Clock.ended_at, Clock.cpu = time.perf_counter(), time.process_time() - Clock.cpu
            assert len(result.trials) == trials
            assert all(trial.status == "COMPLETED" for trial in result.trials)

    holdfast.search(
        {
            "name": "noop",
            "trainable": f"{__file__}:noop",
            "storage": str(folder),
            "objectives": {"loss": "min"},
            "space": {"x": {"type": "float", "low": 0, "high": 1}},
            "search": {"engine": "random", "num_trials": trials, "seed": 1, "max_concurrent": WIDTH},
        },
        observer=Clock(),
    )
    with holdfast.open(folder / "noop") as experiment:
        commits = experiment.trials[-1].seq
    return {"seconds": Clock.ended_at - Clock.began, "cpu": Clock.cpu, "fsyncs": (fsyncs + commits) / trials}


def prefect_arm(trials: int, folder: Path, fsyncs: int) -> dict[str, float]:
    """Run bare thread tasks with persisted results and ``fsyncs`` fsyncs each."""
    from prefect import flow, task
    from prefect.filesystems import LocalFileSystem
    from prefect.task_runners import ThreadPoolTaskRunner

    key = "trials/{parameters[number]:06d}/result.json"

    @task(result_storage_key=key, result_serializer="json", cache_result_in_memory=False)
    def trial(number: int, value: float) -> dict[str, float]:
        with (folder / f"log-{number % WIDTH}").open("ab", buffering=0) as stream:
            for _ in range(fsyncs):
                stream.write(RECORD)
                os.fsync(stream.fileno())
        return {"loss": value}

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=WIDTH), persist_result=False)
    def loop() -> None:
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        inflight = submitted = told = 0
        while told < trials:
            while submitted < trials and inflight < WIDTH:
                future = trial.submit(submitted, 0.5)
                future.add_done_callback(done.put)
                submitted += 1
                inflight += 1
            future = done.get()
            future.wait()
            assert future.state.is_completed()
            assert future.state.data.is_persisted
            inflight -= 1
            told += 1

    folder.mkdir(parents=True, exist_ok=True)
    trial.result_storage = LocalFileSystem(basepath=str(folder / "results"))
    began, cpu = time.perf_counter(), time.process_time()
    loop()
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "fsyncs": fsyncs}


def run_arm(name: str, trials: int, folder: Path, url: str, fsyncs: int = 0) -> dict[str, float]:
    """Run one arm in a process of its own and return what it measured."""
    options = {"--arm": name, "--trials": trials, "--folder": folder, "--fsyncs": fsyncs}
    command = [sys.executable, __file__, *(str(word) for pair in options.items() for word in pair)]
    environment = {**os.environ, "PREFECT_API_URL": url, "PREFECT_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    drain(url)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def drain(url: str) -> None:
    """Wait until the server has taken in what it was sent: the number of ended task runs does not rise any more."""
    before = -1
    while (now := count_task_runs(url)) != before:
        before = now
        time.sleep(1.0)


def count_task_runs(url: str) -> int:
    """Return how many ended task runs the server knows."""
    body = json.dumps({"task_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}}).encode()
    request = urllib.request.Request(f"{url}/task_runs/count", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return int(answer.read())


def raw_fsync(folder: Path) -> float:
    """Return the median milliseconds of appending 512 bytes and an fsync."""
    times = []
    with (folder / "raw").open("ab", buffering=0) as stream:
        for _ in range(300):
            began = time.perf_counter()
            stream.write(RECORD)
            os.fsync(stream.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def measure(trials: int, rounds: int) -> dict[str, Any]:
    """Run both arms ``rounds`` times, in alternating order, and return every figure."""
    from holdfast.flows.server import EmbeddedServer

    server = EmbeddedServer()
    server.begin()
    rows = []
    try:
        url = server.url()
        with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as name:
            folder = Path(name)
            fsync = raw_fsync(folder)
            counted = round(run_arm("holdfast", 50, folder / "warm", url)["fsyncs"])
            run_arm("prefect", 50, folder / "warm-prefect", url, counted)
            for number in range(rounds):
                arms = ["holdfast", "prefect"] if number % 2 == 0 else ["prefect", "holdfast"]
                row: dict[str, float] = {}
                for arm in arms:
                    found = run_arm(arm, trials, folder / f"{arm}-{number}", url, counted)
                    row[arm] = trials / found["seconds"]
                    row[f"{arm}_fsyncs"] = found["fsyncs"]
                    row[f"{arm}_cpu_ms"] = found["cpu"] / trials * 1e3
                row["ratio"] = row["holdfast"] / row["prefect"]
                rows.append(row)
    finally:
        server.stop()
    return {
        "benchmark": "no-op trials per second, 2 at a time, isolated, running Prefect server",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "trials": trials,
        "rounds": [{key: round(value, 2) for key, value in row.items()} for row in rows],
        "median_ratio": round(statistics.median(row["ratio"] for row in rows), 3),
        "target_ratio": 0.6,
        "raw_fsync_ms": round(fsync, 3),
    }


def main() -> None:
    """Measure, or run one arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=["holdfast", "prefect"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fsyncs", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm is None:
        print(json.dumps(measure(options.trials, options.rounds), indent=2))
        return
    import prefect.settings as prefect_settings

    with prefect_settings.temporary_settings({prefect_settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        if options.arm == "holdfast":
            found = holdfast_arm(options.trials, options.folder)
        else:
            found = prefect_arm(options.trials, options.folder, options.fsyncs)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
