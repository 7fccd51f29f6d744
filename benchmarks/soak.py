"""The long form of the crash tests: searches killed at random moments, restored each time, compared with uninterrupted ones.

Every kill is SIGKILL of the whole process group of the search. The moments are drawn from ``--seed``, uniformly over the time
that the uninterrupted search takes. Prints one row a search and, at the end, JSON. Exit code 1 when a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from holdfast.flows.server import EmbeddedServer

HOLDFAST = [sys.executable, "-m", "holdfast.cli"]
DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "digits.yaml"


@dataclass
class Outcome:
    """What one search went through, and what it ended with."""

    search: str
    kills: int
    seconds: float
    trials: int
    same: bool
    rerun: int
    """finished trials that were executed again"""
    missing_steps: int
    """canonical steps that are missing or twice"""
    lost_steps: int
    """steps that were executed again, over all kills"""


class Soak:
    """Runs searches on one Prefect server."""

    def __init__(self, folder: Path, url: str, seed: int) -> None:
        self._folder = folder
        self._environment = {**os.environ, "PREFECT_API_URL": url}
        self._random = random.Random(seed)

    def compare(self, label: str, kills: int, *, exact: bool, settings: dict[str, str]) -> Outcome:
        """Run one search undisturbed and once with ``kills`` kills; compare."""
        calm, rough = self._folder / f"{label}-calm", self._folder / f"{label}-rough"
        began = time.monotonic()
        self._command("run", DIGITS, calm, settings).wait()
        duration = time.monotonic() - began
        began = time.monotonic()
        finished: dict[int, int] = {}
        rerun = 0
        for number in range(kills):
            self._kill_once(rough, settings, duration / kills, first=number == 0)
            rerun += self._check_finished(rough, finished)
        self._command("restore", rough / "digits", rough, {}).wait()
        rerun += self._check_finished(rough, finished)
        missing, lost = self._steps(rough)
        return Outcome(
            search=label,
            kills=kills,
            seconds=round(time.monotonic() - began, 1),
            trials=len(self._trials(rough)),
            same=self._same(calm, rough, exact=exact),
            rerun=rerun,
            missing_steps=missing,
            lost_steps=lost,
        )

    def _command(self, verb: str, target: Path, storage: Path, settings: dict[str, str]) -> subprocess.Popen[bytes]:
        command = [*HOLDFAST, verb, str(target)]
        if verb == "run":
            command += ["--set", f"storage={storage}"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        return subprocess.Popen(command, env=self._environment, start_new_session=True, stdout=subprocess.DEVNULL)

    def _kill_once(self, storage: Path, settings: dict[str, str], within: float, *, first: bool) -> None:
        """Start or restore, and kill the whole group at a random moment after it has taken the lease."""
        path = storage / "digits"
        before = epoch(path)
        process = self._command("run", DIGITS, storage, settings) if first else self._command("restore", path, storage, {})
        while epoch(path) == before and process.poll() is None:
            time.sleep(0.02)
        delay = self._random.uniform(0.0, within)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _check_finished(self, storage: Path, finished: dict[int, int]) -> int:
        """Return how many trials that had finished before have more attempts now; note those that have finished."""
        again = 0
        for trial in self._trials(storage):
            if trial["number"] in finished:
                again += trial["attempts"] != finished[trial["number"]]
            elif trial["status"] in ("COMPLETED", "PRUNED"):
                finished[trial["number"]] = trial["attempts"]
        return again

    def _trials(self, storage: Path) -> list[dict[str, Any]]:
        done = subprocess.run([*HOLDFAST, "trials", str(storage / "digits"), "--json"], capture_output=True, check=True)
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def _same(self, calm: Path, rough: Path, *, exact: bool) -> bool:
        left, right = self._trials(calm), self._trials(rough)
        keys = ("number", "status", "config", "metrics", "step") if exact else ("number", "status", "step")
        return [[trial[key] for key in keys] for trial in left] == [[trial[key] for key in keys] for trial in right]

    @staticmethod
    def _steps(storage: Path) -> tuple[int, int]:
        """Return (canonical steps that are missing or twice, reports that a resumed attempt made again)."""
        import holdfast

        with holdfast.open(storage / "digits") as experiment:
            history = experiment.history()
            trials = experiment.trials
        wrong = 0
        for trial in trials:
            steps = [row.step for row in history if row.trial == trial.number and row.canonical]
            wrong += len(set(range(20)) ^ set(steps)) + len(steps) - len(set(steps))
        return wrong, sum(not row.canonical for row in history)


def epoch(path: Path) -> int:
    """Return the epoch of an experiment, 0 while there is none."""
    database = path.parent / "holdfast.db"
    if not (path / "experiment.json").exists() or not database.exists():
        return 0
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        row = connection.execute("SELECT epoch FROM experiment WHERE name = 'digits'").fetchone()
    return int(row[0]) if row else 0


def main() -> int:
    """Soak, print the table, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="kills of the exact search; the others get four times as many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["one", "two", "random"], help="one search of the three")
    options = parser.parse_args()
    server = EmbeddedServer()
    server.begin()
    rows = []
    try:
        with tempfile.TemporaryDirectory(prefix="holdfast-soak-") as name:
            soak = Soak(Path(name), server.url(), options.seed)
            plans = {
                "one": (options.kills, True, {"search.max_concurrent": "1"}),
                "two": (options.kills * 4, False, {"search.max_concurrent": "2"}),
                "random": (options.kills * 4, True, {"search.engine": "random", "search.max_concurrent": "2"}),
            }
            for label, (kills, exact, settings) in plans.items():
                if options.only in (None, label):
                    row = soak.compare(label, kills, exact=exact, settings=settings)
                    print(row, flush=True)
                    rows.append(row)
    finally:
        server.stop()
    print(json.dumps([asdict(row) for row in rows], indent=2))
    return 0 if all(row.same and not row.rerun and not row.missing_steps for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
