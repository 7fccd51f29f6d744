"""The tour: run the digits search, kill it with SIGKILL in the middle, restore it, and say what became of every trial."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HOLDFAST = [sys.executable, "-m", "holdfast.cli"]
KILL_AFTER = 7
"""trials that have ended when the search is killed"""


def main() -> int:
    """Run the tour and return 0 when every promise was seen to hold."""
    storage = Path(tempfile.mkdtemp(prefix="holdfast-demo-"))
    path = storage / "digits"
    started = time.monotonic()
    try:
        say(f"1. run: 20 trials of a small network on scikit-learn's digits, two at a time, in {storage}")
        before = run_and_kill(storage, path)
        say("3. what is on disk")
        show("restore", str(path), "--plan")
        say("4. restore")
        show("restore", str(path))
        after = trials(path)
        complete = report(before, after)
        say(f"the whole tour took {time.monotonic() - started:.0f} s")
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return 0 if complete else 1


def run_and_kill(storage: Path, path: Path) -> list[dict[str, Any]]:
    """Start the search in a process group of its own, kill all of it in the middle, and return its trials."""
    command = [*HOLDFAST, "run", str(HERE / "digits.yaml"), "--set", f"storage={storage}"]
    search = subprocess.Popen(command, start_new_session=True)
    try:
        while ended(path) < KILL_AFTER:
            if search.poll() is not None:
                raise SystemExit(f"the search ended by itself with exit code {search.returncode}")
            time.sleep(0.3)
    finally:
        if search.poll() is None:
            os.killpg(search.pid, signal.SIGKILL)
        search.wait()
    say("2. kill -9 of the whole process group, in the middle of training")
    return trials(path)


def ended(path: Path) -> int:
    """Return how many trials have ended; 0 while there is no experiment yet."""
    return sum(trial["status"] == "COMPLETED" for trial in trials(path)) if (path / "lease.json").exists() else 0


def trials(path: Path) -> list[dict[str, Any]]:
    """Return what ``holdfast trials --json`` prints."""
    done = subprocess.run([*HOLDFAST, "trials", str(path), "--json"], capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def show(*arguments: str) -> None:
    """Run a command of holdfast before the reader's eyes."""
    print(f"$ holdfast {' '.join(arguments)}", flush=True)
    subprocess.run([*HOLDFAST, *arguments], check=True)


def report(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> bool:
    """Say what was kept, resumed and lost; return whether it is what holdfast promises."""
    finished = [trial for trial in before if trial["status"] == "COMPLETED"]
    running = [trial for trial in before if trial["status"] == "RUNNING"]
    now = {trial["number"]: trial for trial in after}
    kept = [trial for trial in finished if now[trial["number"]] == trial]
    say("5. what became of the trials")
    print(f"kept      {len(kept)} of {len(finished)} finished trials, none of them ran again")
    for trial in running:
        reported = "nothing yet" if trial["step"] is None else f"step {trial['step']}"
        then = "began at step 0" if trial["step"] is None else "went on from its checkpoint"
        attempts = now[trial["number"]]["attempts"]
        print(f"resumed   trial {trial['number']}: it had reported {reported}; attempt {attempts} {then}")
    lost = [trial["number"] for trial in before if trial["number"] not in now]
    print(f"lost      {len(lost)} trials")
    print(f"finished  {sum(trial['status'] == 'COMPLETED' for trial in after)} of 20")
    return len(kept) == len(finished) and not lost and all(trial["status"] == "COMPLETED" for trial in after)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
