"""A place to run real searches in: specs, a trainable that keeps a log of what it executes, processes that can be killed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
import yaml

import holdfast
from holdfast.core.errors import StorageError
from holdfast.report.tables import trial_json
from holdfast.storage.database.engine import connect, sqlite_url
from holdfast.storage.root import LocalRoot
from holdfast.tasks.workers import processes
from holdfast.testing.executed import Entry, executed, starts  # noqa: F401  # for the tests, as everything here
from holdfast.testing.runs import DIED, HOLDFAST, PATIENCE, Ended, Running, Runs, warm  # noqa: F401
from holdfast.testing.warm import WANTED, Warm

TRAINABLE = '''\
"""Does STEPS steps, one report and checkpoint each. A file orders/ACTION-TRIAL-STEP says what goes wrong there."""
import json, os, time
from pathlib import Path

HERE = Path(__file__).parent
STEPS = {steps}


def log(*entry):
    line = (json.dumps(entry) + "\\n").encode()
    descriptor = os.open(HERE / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, line)
    os.close(descriptor)


def ordered(action, trial, step):
    return (HERE / "orders" / f"{{action}}-{{trial}}-{{step}}").exists()


def train(trial):
    start, w = 0, 0.0
    if trial.checkpoint:
        start, w = trial.checkpoint.step + 1, trial.checkpoint.load()["w"]
    log("start", trial.number, trial.attempt, start, os.getpid())
    for step in range(start, STEPS):
        loss = None
        if ordered("fail", trial.number, step):
            raise RuntimeError(f"no luck in step {{step}}")
        if ordered("segv", trial.number, step):
            os.kill(os.getpid(), 11)
        if ordered("exit", trial.number, step):
            os._exit(3)
        if ordered("noise", trial.number, step):
            for line in range(100_000):
                print("noise", line)
        if ordered("nan", trial.number, step):
            loss = float("nan")
        if ordered("slow", trial.number, 0):
            time.sleep(0.02)
        if ordered("hang", trial.number, step):
            time.sleep(3600)
        if ordered("hold", trial.number, step):
            log("hold", trial.number, trial.attempt, step, os.getpid())
            while ordered("hold", trial.number, step):
                time.sleep(0.02)
        if ordered("mute", trial.number, step):
            return None
        w = 0.5 * w + trial.config["x"] + step
        log("step", trial.number, trial.attempt, step, os.getpid())
        trial.report({{"loss": (w - 2.0) ** 2 if loss is None else loss}}, step=step, state=lambda: {{"w": w}})
    log("done", trial.number, trial.attempt, STEPS, os.getpid())
'''

LIGHT = (
    *("holdfast.api", "holdfast.experiment", "holdfast.locate", "holdfast.specfile", "holdfast.standing", "holdfast.upkeep"),
    *("holdfast.report.tables", "holdfast.report.ranking", "holdfast.report.attempts", "holdfast.storage.database.experiments"),
    *("holdfast.storage.checkpoints.ports", "holdfast.storage.object_stores", "sqlalchemy.dialects.sqlite", "rich.table"),
    *("rich._emoji_codes", "holdfast.engines.factory", "holdfast.storage.leasing", "holdfast.storage.checkpoints.remote"),
    *("holdfast.storage.database.migrations", "alembic.command", "alembic.ddl.sqlite", "s3fs", "aiobotocore.httpsession"),
)
"""What commands import late that do without Prefect."""
HERE = Path(__file__).parent
"""Where ``light_program`` is found."""
WARM: dict[frozenset[tuple[str, str]], list[Warm]] = {}
"""Processes that have imported the program, by what imports read of the environment (see :func:`warmed`)."""


def _read_by_imports(environment: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(pair for pair in environment.items() if not pair[0].startswith(("HOLDFAST_", "AWS_", "XDG_")))


def warm_of(environment: Mapping[str, str]) -> Sequence[Warm]:
    """Return what runs in an environment may be forked from; nothing when they have to be fresh processes."""
    return WARM.get(_read_by_imports(environment), ())


@contextmanager
def warmed(environment: Mapping[str, str]) -> Iterator[None]:
    """Fork what laboratories start in this environment, unless HOLDFAST_TEST_FRESH is set: imports are most of a short run."""
    key = _read_by_imports(environment)
    if WANTED:
        WARM[key] = warm(environment)
    try:
        yield
    finally:
        for one in WARM.pop(key, []):
            one.close()


@functools.cache
def light() -> Warm:
    """Return a process that has imported the program without Prefect, to be forked; it ends with this one."""
    path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return Warm("light_program:main", imports=LIGHT, environment=holdfast_environment(PYTHONPATH=os.pathsep.join(path)))


@dataclass
class Lab:
    """A folder with a trainable and specs, and the environment of the processes that run there."""

    folder: Path
    environment: Mapping[str, str]
    steps: int = 3
    storage: str | None = None
    """an object store's URL, or None for a local folder"""
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._runs = Runs(self.folder, self.environment)
        (self.folder / "orders").mkdir(parents=True)
        (self.folder / "train.py").write_text(TRAINABLE.format(steps=self.steps))

    # Files

    def spec(self, **changes: Any) -> Path:
        """Write a spec: four trials of three parameters, one at a time; keywords replace or (some mappings) update sections."""
        data: dict[str, Any] = {
            "name": "exp",
            "trainable": "train.py:train",
            "objectives": {"loss": "min"},
            "space": {  # in an order of its own: what a sampler draws depends on it
                "x": {"type": "float", "low": 0.0, "high": 4.0},
                "b": {"type": "int", "low": 1, "high": 9},
                "a": {"type": "categorical", "choices": ["r", "t"]},
            },
            "search": {"engine": "random", "num_trials": 4, "seed": 7, "max_concurrent": 1},
        }
        if self.storage is not None:
            data["storage"] = self.storage
        for key, value in changes.items():
            merge = key in ("search", "failure", "checkpoints") and isinstance(value, Mapping)
            data[key] = {**data.get(key, {}), **value} if merge else value
        file = self.folder / f"{data['name']}.yaml"
        file.write_text(yaml.safe_dump(data, sort_keys=False))
        return file

    def path(self, name: str = "exp") -> Any:
        """Return the experiment's folder, or its URL."""
        return self.folder / "runs" / name if self.storage is None else f"{self.storage}/{name}"

    def open(self, name: str = "exp") -> holdfast.Experiment:
        if self.storage is None:
            return holdfast.open(self.path(name))
        return holdfast.open(self.path(name), database=f"sqlite:///{self.database}", storage_options=self.options)

    @property
    def database(self) -> Path:
        if self.storage is None:
            return self.folder / "runs" / "holdfast.db"
        return next((self.folder / "data" / "holdfast").glob("*.db"))

    def order(self, action: str, trial: int, step: int) -> Path:
        """Let the trainable do ``action`` whenever it comes to that step of that trial; return the file that says so."""
        file = self.folder / "orders" / f"{action}-{trial}-{step}"
        file.touch()
        return file

    def log(self) -> list[Entry]:
        """Return what the trainable executed, in order."""
        file = self.folder / "log.txt"
        return [Entry(*json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []

    def clear_log(self) -> None:
        (self.folder / "log.txt").unlink(missing_ok=True)

    # Processes

    def start(self, *arguments: object, fault: str | None = None, script: str | None = None, **environment: str) -> Running:
        """Start ``holdfast`` with ``arguments``; ``fault`` is the crash point at which it dies.

        ``script`` is Python code to be run in its place, that changes something and calls it.
        """
        environment = {**self.environment, **environment}
        self._runs.warmed = warm_of(environment)
        return self._runs.start(*arguments, fault=fault, script=script, **environment)

    def run(self, *arguments: object, code: int | None = 0, fault: str | None = None, **environment: str) -> Ended:
        """Run ``holdfast`` to its end, which must have the exit code ``code`` (None: any)."""
        ended = self.start(*arguments, fault=fault, **environment).wait()
        assert code is None or ended.code == code, f"exit code {ended.code}, not {code}:\n{ended.output}"
        return ended

    def json(self, *arguments: object) -> Any:
        """Run ``holdfast`` with ``--json`` and return what it prints."""
        return json.loads(self.run(*arguments, "--json").output)

    def until(self, condition: Callable[[], object], process: Running | None = None, *, seconds: float = PATIENCE) -> None:
        """Wait for a condition; AssertionError when it does not come about, or ``process`` ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = process is not None and process.process.poll() is not None
            said = process.output if process is not None else ""
            assert not ended or condition(), f"it ended, with {process and process.process.returncode}:\n{said}"
            assert time.monotonic() < deadline, f"waited {seconds:g} s in vain:\n{said}"
            time.sleep(0.02)

    def until_logged(self, event: str, trial: int, step: int, process: Running) -> None:
        """Wait until the trainable has logged an event."""
        self.until(lambda: any((e.event, e.trial, e.step) == (event, trial, step) for e in self.log()), process)

    def suspend(self, run: Running) -> None:
        """Stop a process (SIGSTOP) where it holds neither the database's lock nor the folder's."""
        while True:
            run.signal(signal.SIGSTOP)
            self.until_suspended(run)
            with suppress(StorageError), closing(connect(sqlite_url(self.database))) as database:
                if not database.is_locked(patience=0.2):
                    with LocalRoot(self.path()).exclusive(patience=0.2):
                        return
            run.signal(signal.SIGCONT)
            time.sleep(0.05)  # it has to come out of it

    def until_suspended(self, run: Running) -> None:
        """Wait until a process is stopped."""
        pid = run.process.pid
        started = str(processes.identity(pid))
        self.until(lambda: processes.is_suspended(processes.same_host(), pid, started), run)

    def close(self) -> None:
        """End every process that is left."""
        self._runs.close()

    @property
    def running(self) -> list[Running]:
        """Every process that was started, for those that are started in other ways to be added."""
        return self._runs.all

    def python(self, code: str, *arguments: object, timeout: float = PATIENCE) -> Ended:
        """Run Python code in the environment of the laboratory, for so many seconds at most."""
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=self.folder,
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return Ended(done.returncode, done.stdout)

    def light(self, *arguments: object) -> Ended:
        """Run ``holdfast`` where it must do without Prefect: AssertionError when Prefect was imported."""
        ended = self._light([*map(str, arguments)])
        *lines, imported = ended.output.splitlines()
        assert imported == "Prefect was imported: False", ended.output
        return Ended(ended.code, "\n".join(lines))

    def _light(self, words: list[str]) -> Ended:
        if not WANTED:
            script = f"import sys; sys.path.insert(0, {str(HERE)!r}); import light_program; light_program.main()"
            return self.python(script, *words)
        with TemporaryFile() as output:  # nothing of it comes into the laboratory's folder
            run = light().start(words, folder=self.folder, environment=self.environment, output=output)
            try:
                code = run.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                raise
            output.seek(0)
            return Ended(code, output.read().decode())

    # Stored state

    def trials(self, name: str = "exp") -> list[dict[str, Any]]:
        """Return the trials as ``trials --json`` prints them."""
        with self.open(name) as experiment:
            return [trial_json(trial) for trial in experiment.trials]

    def statuses(self, name: str = "exp") -> list[str]:
        return [trial["status"] for trial in self.trials(name)]

    def outcome(self, name: str = "exp") -> dict[int, Any]:
        """Return what an interruption must not change: status, config, metrics and canonical reports of each trial."""
        with self.open(name) as experiment:
            steps: dict[int, list[Any]] = {}
            for row in experiment.history():
                if row.canonical and row.step >= 0:
                    steps.setdefault(row.trial, []).append((row.step, row.metrics))
            return {
                trial.number: (trial.status.value, dict(trial.config), repr(trial.metrics), steps.get(trial.number, []))
                for trial in experiment.trials
            }

    def checkpoints(self, trial: int, name: str = "exp") -> list[Any]:
        """Return the valid checkpoints of a trial, oldest first."""
        with self.open(name) as experiment:
            return [one for one in experiment.checkpoints() if one.trial == trial and one.status == "valid"]

    def dump(self, *, audit: bool = True) -> list[str]:
        """Return every row of the database as text; without ``audit`` also without what an audit row counts up."""
        with closing(sqlite3.connect(self.database)) as connection:
            tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
            rows = []
            for table in tables:
                if not audit and table in ("audit", "sqlite_sequence"):
                    continue
                columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
                if not audit and table == "experiment":
                    columns.remove("seq")
                rows += [f"{table} {row}" for row in connection.execute(f"SELECT {', '.join(columns)} FROM {table}")]
            return rows

    def tree(self, folder: Path | None = None) -> dict[str, str]:
        """Return the digest of each file below a folder (that of the experiment), by its path."""
        return tree(self.path() if folder is None else folder)


def tree(folder: Path) -> dict[str, str]:
    """Return the digest of each file below ``folder``, and an entry for each folder; not what Python caches there."""
    found = {}
    for entry in sorted(folder.rglob("*")):
        if "__pycache__" in entry.parts:
            continue
        name = str(entry.relative_to(folder))
        found[name] = hashlib.sha256(entry.read_bytes()).hexdigest() if entry.is_file() else "folder"
    return found


MakeLab = Callable[..., Lab]


def steps_of(lab: Lab, number: int) -> list[int]:
    """Return the canonical steps of a trial."""
    return [step for step, _ in lab.outcome()[number][3]]


def begin(lab: Lab, *command: str) -> Running:
    """Start a command of any program in the laboratory."""
    log = lab.folder / f"begun-{len(lab.running)}.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=lab.folder,
            env=dict(lab.environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    run = Running(process, log)
    lab.running.append(run)
    return run


@contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[Path]:
    """Have a small file system at a new folder; where it cannot be mounted, the test is skipped."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "holdfast-test", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("the program mount is missing")
    if done.returncode != 0:
        pytest.skip(f"the right to mount a small file system is missing: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def holdfast_environment(**changes: str) -> dict[str, str]:
    """Return this process's environment without what configures holdfast or Prefect, with ``changes``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOLDFAST_", "PREFECT_"))}
    return {**kept, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", **changes}
