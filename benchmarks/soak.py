"""The long form of the crash tests: searches killed at random moments, restored each time, compared with uninterrupted ones.

Every kill is SIGKILL of the whole process group of the search, two trials of which run at once. The moments are drawn from
``--seed``, uniformly over the time that the uninterrupted search takes, starts and restores included. A search that is done is
followed by the next one of its kind until the kills are used up. ``races`` restores a killed search twice at once, many times.
Prints a table and, at the end, JSON. Exit code 1 when a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from holdfast.flows.server import EmbeddedServer
from holdfast.settings import environment
from holdfast.testing import runs
from holdfast.testing.crashes import Verdict
from holdfast.testing.ordeals import KINDS
from holdfast.testing.warm import AVAILABLE, Warm

SOAKED = ("random", "tpe", "retries", "stopping", "crashing")
COLUMNS = {
    "kills": "kills",
    "searches": "searches",
    "trials": "trials",
    "lost": "lost",
    "duplicated": "duplicated",
    "renumbered": "renumbered",
    "rerun": "finished re-run",
    "different": "ended otherwise",
    "checkpoints_lost": "checkpoints lost",
    "reports_lost": "reports lost",
    "steps_wrong": "steps wrong",
    "steps_lost": "steps lost",
    "worst": "worst per trial and kill",
    "crowded": "too many at once",
    "left": "left over",
    "races": "races lost",
    "seconds": "seconds",
}


class Soak:
    """Runs searches on one Prefect server."""

    def __init__(self, folder: Path, url: str, options: argparse.Namespace) -> None:
        self._folder = folder
        self._options = options
        self._environment = environment(PREFECT_API_URL=url, PREFECT_SERVER_ANALYTICS_ENABLED="false", DO_NOT_TRACK="1")
        self._local = threading.local()
        self._warm: list[Warm] = []

    def _settings(self) -> dict[str, Any]:
        if not hasattr(self._local, "warm"):
            self._local.warm = runs.warm(self._environment) if AVAILABLE and not self._options.fresh else []
            self._warm += self._local.warm
        return {
            "environment": self._environment,
            "warmed": self._local.warm,
            "database": self._options.database,
            "trials": self._options.trials,
            "pause": self._options.pause,
        }

    def kill(self, name: str, kills: int) -> dict[str, Any]:
        """Kill searches of one kind, one after the other."""
        moments = random.Random(f"{self._options.seed}-{name}")
        calm = KINDS[name].ordeal(self._folder / f"{name}-calm", **self._settings())
        calm.alone()
        calm = KINDS[name].ordeal(self._folder / f"{name}-again", **self._settings())  # the first one waited for imports
        duration = calm.alone()
        whole, searches = Verdict(), 0
        whole.problems += calm.verdict.problems
        while whole.kills < kills:
            rough = KINDS[name].ordeal(self._folder / f"{name}-{searches}", twin=calm.seen, **self._settings())
            searches += 1
            whole.add(rough.endure(kills - whole.kills, moments, duration))
            words = f"{whole.kills} of {kills} kills, {whole.steps_lost} steps lost, {len(whole.problems)} promises broken"
            print(f"{name}: {words}", file=sys.stderr, flush=True)
        return {"search": name, "searches": searches, "uninterrupted": round(duration, 1), **vars(whole)}

    def race(self, rounds: int) -> dict[str, Any]:
        """Restore a killed search twice at once, ``rounds`` times; then let it end."""
        began = time.monotonic()
        folder = self._folder / "races"
        ordeal = KINDS["waiting"].ordeal(folder, **{**self._settings(), "trials": 2})
        (folder / "wait").touch()
        ordeal.live(2.0)
        while not ordeal.place.exists():  # killed before it was there
            ordeal.live(5.0)
        for done in range(rounds):
            ordeal.race()
            if done % 10 == 9:
                print(f"races: {done + 1} of {rounds}", file=sys.stderr, flush=True)
        (folder / "wait").unlink()
        ordeal.live(None)
        ordeal.verdict.seconds = time.monotonic() - began
        return {"search": "races", "searches": 1, **vars(ordeal.verdict)}

    def close(self) -> None:
        for warm in self._warm:
            warm.close()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as text, one search a column."""
    lines = [["", *(row["search"] for row in rows)]]
    for key, words in COLUMNS.items():
        lines.append([words, *(f"{row[key]:.0f}" for row in rows)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(rows) + 1)]
    return "\n".join(
        line[0].ljust(widths[0] + 2) + "  ".join(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def main() -> int:
    """Soak, print the table, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="random kills, spread over the kinds of searches")
    parser.add_argument("--races", type=int, default=50, help="rounds of two restores at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[*SOAKED, "races"], default=[*SOAKED, "races"], help="these kinds alone")
    parser.add_argument("--jobs", type=int, default=2, help="searches side by side")
    parser.add_argument("--trials", type=int, default=10, help="of each search")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds that a step takes")
    parser.add_argument("--fresh", action="store_true", help="a fresh process for each run, not a fork of one with its imports")
    parser.add_argument("--database", metavar="URL", help="of all searches, or postgresql for a server of the package pgserver")
    options = parser.parse_args()
    soaked = [name for name in SOAKED if name in options.only]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-soak-")))
        if options.database == "postgresql":
            import pgserver

            server = pgserver.get_server(folder / "postgresql")
            stack.callback(server.cleanup)
            options.database = server.get_uri()
        prefect = EmbeddedServer()
        prefect.begin()
        stack.callback(prefect.stop)
        soak = Soak(folder, prefect.url(), options)
        stack.callback(soak.close)
        pool = stack.enter_context(ThreadPoolExecutor(options.jobs))
        shares = [options.kills // len(soaked) + (place < options.kills % len(soaked)) for place in range(len(soaked))]
        waiting = [pool.submit(soak.kill, name, share) for name, share in zip(soaked, shares, strict=True)]
        if "races" in options.only and options.races:
            waiting.append(pool.submit(soak.race, options.races))
        rows = [future.result() for future in waiting]
    print(table(rows))
    print(json.dumps(rows, indent=2))
    return 1 if any(row["problems"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
