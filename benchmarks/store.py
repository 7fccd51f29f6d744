"""What the experiment store costs on SQLite, with the raw cost beside it, in one run.

* *write*: create and start a trial, then finish it (two transactions), against two bare commits of a comparable row through
  ``sqlite3`` with the same pragmas: limit 1.5 times;
* *load*: ``Experiment.load()`` of 1,000 and of 10,000 trials (4 parameters, 2 metrics), against fetching the same rows
  undecoded through ``sqlite3``: limits 10 ms and 100 ms;
* *read*: ``holdfast list``, ``show`` and ``trials`` on 10,000 trials as real processes, against the start-up of the program
  (``holdfast --version``): limit 1.5 s;
* *Optuna*: the same through Optuna's ``RDBStorage`` on SQLite with its own pragmas;
* *mlos_bench*: the same through its SQL storage, when ``--mlos-python`` names the Python of an environment that has it
  (``python -m venv DIR; DIR/bin/pip install mlos_bench pytz``).

The order of the arms alternates (trial by trial for *write*); figures are medians over the rounds, and so is the ratio of
*write*. Prints a table; ``--json FILE`` keeps every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast import locate
from holdfast.core.trial import Outcome
from holdfast.experiment import Experiment
from holdfast.storage.database.driver import Driver, Ending
from holdfast.storage.leasing import Claimant, Keeper, take
from holdfast.testing.samples import sample_spec

CONFIG = {"act": "relu", "layers": 3, "lr": 0.0, "p": 0.5}
SPACE = {
    "act": {"type": "categorical", "choices": ["relu", "tanh"]},
    "layers": {"type": "int", "low": 1, "high": 9},
    "lr": {"type": "float", "low": 0.0, "high": 1e9},
    "p": {"type": "float", "low": 0.0, "high": 1.0},
}
METRICS = {"loss": 0.25, "accuracy": 0.75}
PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")

Arms = dict[str, Callable[[], float]]


class Store:
    """One experiment in a database of its own, driven by hand."""

    def __init__(self, folder: Path, name: str) -> None:
        spec = sample_spec(name=name, storage=str(folder), space=SPACE, objectives={"loss": "min", "accuracy": "max"})
        self.opened = locate.create(spec, seed=1, workdir=str(folder))
        claimant = Claimant(holder={"hostname": "here", "pid": os.getpid()}, liveness=lambda _: True, say=print)
        opened = self.opened
        self.keeper: Keeper = take(opened.database, opened.record.id, opened.folder, claimant, action="began", detail={})
        self.driver = Driver(opened.database, opened.record.id, self.keeper.epoch, seed=1)
        self.count = 0

    @property
    def path(self) -> Path:
        return self.opened.folder.path

    def write(self) -> None:
        """Create, start and finish a trial."""
        self.count += 1
        writer = self.driver.start({**CONFIG, "lr": float(self.count)}, token="token")
        self.driver.end(writer.attempt, Ending(outcome=Outcome.COMPLETED, metrics=METRICS))

    def close(self) -> None:
        self.keeper.release("every trial has ended")
        self.opened.close()


class Bare:
    """A table with a row a trial, through sqlite3 alone."""

    def __init__(self, file: Path) -> None:
        self.connection = sqlite3.connect(file, isolation_level=None)
        self.count = 0
        for pragma in PRAGMAS:
            self.connection.execute(f"PRAGMA {pragma}")
        self.connection.execute(
            "CREATE TABLE trial (id INTEGER PRIMARY KEY, status TEXT, config TEXT, loss REAL, accuracy REAL)"
        )

    def write(self) -> None:
        """Insert a row in one transaction and update it in another."""
        run = self.connection.execute
        self.count += 1
        run("BEGIN IMMEDIATE")
        config = json.dumps({**CONFIG, "lr": float(self.count)})
        row = run("INSERT INTO trial (status, config) VALUES ('RUNNING', ?) RETURNING id", (config,)).fetchone()[0]
        run("COMMIT")
        run("BEGIN IMMEDIATE")
        run("UPDATE trial SET status = 'COMPLETED', loss = 0.25, accuracy = 0.75 WHERE id = ?", (row,))
        run("COMMIT")


RAW_TRIALS = (
    "SELECT t.number, t.status, c.body FROM trial t JOIN config c ON c.id = t.config_id WHERE t.number >= 0 ORDER BY t.number"
)
RAW_METRICS = (
    "SELECT t.number, m.name, m.kind, m.number, m.text FROM trial t JOIN attempt a ON a.trial_id = t.id"
    " JOIN report r ON r.attempt_id = a.id JOIN metric m ON m.report_id = r.id WHERE t.number >= 0"
)


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def medians(arms: Arms, rounds: int) -> dict[str, float]:
    """Run every arm once to warm up, then ``rounds`` times in alternating order; return each one's median."""
    for arm in arms.values():
        arm()
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            found[name].append(arms[name]())
    return {name: statistics.median(values) for name, values in found.items()}


def write_row(folder: Path, rounds: int) -> dict[str, Any]:
    """Write 200 trials a round, each beside a bare one: what else the disk has to do meanwhile meets both alike."""
    store, bare = Store(folder / "write", "written"), Bare(folder / "bare.db")
    means: list[dict[str, float]] = []
    try:
        for _ in range(rounds + 1):
            spent = {"holdfast": 0.0, "raw": 0.0}
            for number in range(200):
                pair = [("holdfast", store.write), ("raw", bare.write)]
                for name, write in pair if number % 2 == 0 else pair[::-1]:
                    spent[name] += timed(write)
            means.append({name: seconds / 200 for name, seconds in spent.items()})
    finally:
        bare.connection.close()
        store.close()
    del means[0]  # to warm up
    found = {name: statistics.median(mean[name] for mean in means) for name in ("holdfast", "raw")}
    ratios = sorted(mean["holdfast"] / mean["raw"] for mean in means)
    ratio = statistics.median(ratios)
    limit = f"ratio 1.5 (rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})"
    return {**row("create, start, finish a trial", found, limit=limit, kept=ratio <= 1.5), "ratio": ratio}


def load_row(store: Store, rounds: int, seconds: float) -> dict[str, Any]:
    file = store.opened.database.file
    with Experiment(store.opened) as experiment, closing(sqlite3.connect(file)) as connection:  # type: ignore[arg-type]  # SQLite

        def raw() -> None:
            connection.execute(RAW_TRIALS).fetchall()
            connection.execute(RAW_METRICS).fetchall()

        arms: Arms = {"holdfast": lambda: timed(experiment.load), "raw": lambda: timed(raw)}
        found = medians(arms, rounds)
        assert len(experiment.load().ids) == store.count
    return row(f"load() of {store.count:,} trials", found, limit=f"{seconds * 1e3:.0f} ms", kept=found["holdfast"] <= seconds)


def command_rows(store: Store, rounds: int) -> list[dict[str, Any]]:
    """Time the commands that read, as processes."""

    def process(*words: str) -> Callable[[], float]:
        command = [sys.executable, "-m", "holdfast.cli", *words]
        return lambda: timed(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True))

    targets = {"list": store.path.parent, "show": store.path, "trials": store.path}
    arms: Arms = {"raw": process("--version")}
    for name, target in targets.items():
        arms[name] = process(name, str(target))
        arms[f"{name} --json"] = process(name, str(target), "--json")
    found = medians(arms, rounds)
    return [
        row(
            f"`holdfast {name}`, {store.count:,} trials",
            {"holdfast": seconds, "raw": found["raw"]},
            limit="1.5 s",
            kept=seconds <= 1.5,
        )
        for name, seconds in found.items()
        if name != "raw"
    ]


def optuna_rows(folder: Path, trials: int) -> list[dict[str, Any]]:
    """Time Optuna's RDB storage once."""
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = f"sqlite:///{folder / 'optuna.db'}"
    storage = optuna.storages.RDBStorage(url)
    study = storage.create_new_study([StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE], "bench")
    spread = FloatDistribution(0, 1e9)
    given: list[tuple[str, float, Any]] = [
        ("act", 0, CategoricalDistribution(["relu", "tanh"])),
        ("layers", 3, IntDistribution(1, 9)),
        ("p", 0.5, FloatDistribution(0, 1)),
    ]

    def write() -> None:
        for number in range(trials):
            trial = storage.create_new_trial(study)
            for name, value, distribution in [*given, ("lr", float(number), spread)]:
                storage.set_trial_param(trial, name, value, distribution)
            storage.set_trial_state_values(trial, TrialState.COMPLETE, list(METRICS.values()))

    written = timed(write) / trials
    loaded = statistics.median(timed(lambda: optuna.storages.RDBStorage(url).get_all_trials(study)) for _ in range(3))
    return [
        row(f"Optuna {optuna.__version__} RDBStorage: create, set parameters, finish", {"holdfast": written}),
        row(f"Optuna {optuna.__version__} RDBStorage: load {trials:,} trials", {"holdfast": loaded}),
    ]


MLOS_BENCH = """
import json, os, subprocess, sys, time
from datetime import UTC, datetime
from importlib.metadata import version
from mlos_bench.environments.status import Status
from mlos_bench.storage.sql.storage import SqlStorage
from mlos_bench.tunables.tunable_groups import TunableGroups

folder, trials = sys.argv[1], int(sys.argv[2])
git = ["git", "-C", folder, "-c", "user.name=bench", "-c", "user.email=bench@localhost"]
for words in (["init", "-q"], ["remote", "add", "origin", "none"], ["commit", "-q", "--allow-empty", "-m", "none"]):
    subprocess.run([*git, *words], check=True)  # it asks git where its configuration lies
tunables = TunableGroups({"all": {"cost": 1, "params": {
    "act": {"type": "categorical", "values": ["relu", "tanh"], "default": "relu"},
    "layers": {"type": "int", "range": [1, 9], "default": 3},
    "lr": {"type": "float", "range": [0, 1000000000], "default": 0.5},
    "p": {"type": "float", "range": [0, 1], "default": 0.5},
}}})
storage = SqlStorage({"drivername": "sqlite", "database": os.path.join(folder, "mlos.db"), "lazy_schema_create": False})
with storage.experiment(
    experiment_id="bench", trial_id=1, root_env_config=os.path.join(folder, "env.jsonc"), description="", tunables=tunables,
    opt_targets={"loss": "min", "accuracy": "max"},
) as experiment:
    began = time.perf_counter()
    for number in range(trials):
        trial = experiment.new_trial(tunables.copy().assign({"lr": float(number)}))
        trial.update(Status.RUNNING, datetime.now(UTC))
        trial.update(Status.SUCCEEDED, datetime.now(UTC), {"loss": 0.25, "accuracy": 0.75})
    written = (time.perf_counter() - began) / trials
    began = time.perf_counter()
    assert len(experiment.load()[0]) == trials
    loaded = time.perf_counter() - began
print(json.dumps({"version": version("mlos_bench"), "written": written, "loaded": loaded}))
"""


def mlos_rows(folder: Path, python: str | None, trials: int) -> list[dict[str, Any]]:
    """Time mlos_bench once, in its own environment."""
    if python is None:
        return [row("mlos_bench", {}, note="not measured: give --mlos-python")]
    place = folder / "mlos"
    place.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", MLOS_BENCH, str(place), str(trials)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return [row("mlos_bench", {}, note=f"not measured: {done.stderr.strip().splitlines()[-1]}")]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    name = f"mlos_bench {found['version']} SQL storage"
    return [
        row(f"{name}: create, start, finish", {"holdfast": found["written"]}),
        row(f"{name}: load {trials:,} trials", {"holdfast": found["loaded"]}),
    ]


def row(what: str, found: dict[str, float], *, limit: str = "", kept: bool | None = None, note: str = "") -> dict[str, Any]:
    """Return one line of the table; ``found`` has the seconds of what is measured and of the raw cost beside it."""
    seconds, raw = found.get("holdfast"), found.get("raw")
    return {"what": what, "seconds": seconds, "raw_seconds": raw, "limit": limit, "kept": kept, "note": note}


def line(found: dict[str, Any]) -> str:
    """Return a row as a line of a Markdown table."""
    seconds, raw = found["seconds"], found["raw_seconds"]
    ratio = "" if seconds is None or raw is None else f"{found.get('ratio', seconds / raw):.2f}"
    verdict = "" if found["kept"] is None else ("kept" if found["kept"] else "MISSED")
    note = found["note"] or words(seconds)
    return f"| {found['what']} | {note} | {words(raw)} | {ratio} | {found['limit']} | {verdict} |"


def words(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def measure(folder: Path, rounds: int, python: str | None) -> list[dict[str, Any]]:
    """Measure everything; return the rows of the table."""
    rows = [write_row(folder, rounds)]
    stores = []
    for count, seconds in ((1_000, 0.010), (10_000, 0.100)):
        stores.append(Store(folder / f"store-{count}", f"of-{count}"))
        for _ in range(count):
            stores[-1].write()
        stores[-1].close()
        rows.append(load_row(stores[-1], rounds, seconds))
    rows += command_rows(stores[-1], rounds)
    rows += optuna_rows(folder, 1_000)
    rows += mlos_rows(folder, python, 1_000)
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to put the databases: the disk counts (a temporary folder)")
    parser.add_argument("--mlos-python", metavar="PATH", help="Python of an environment with mlos_bench")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=options.folder) as name:
        rows = measure(Path(name), options.rounds, options.mlos_python)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )
    print(f"{datetime.now(UTC).date().isoformat()}, {machine}; medians of {options.rounds} rounds\n")
    print("| what | time | raw cost | ratio | limit | |\n|---|---|---|---|---|---|")
    for found in rows:
        print(line(found))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rounds": options.rounds, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
