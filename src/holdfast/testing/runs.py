"""Processes that run ``holdfast`` commands, each in a group of its own, and can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.testing.warm import Process, Warm

HOLDFAST = Path(sys.executable).with_name("holdfast")
DIED = 128 + signal.SIGKILL
"""The exit code of a process that was killed, or died at a crash point."""
PATIENCE = 150.0
"""Seconds after which something that should happen counts as not happening."""
IMPORTS = (
    *("holdfast.api", "holdfast.flows.search", "holdfast.flows.restore", "holdfast.report.progress"),
    *("holdfast.engines.optuna_engine", "prefect.flow_engine", "prefect.task_engine", "fastapi", "pandas"),
    *("holdfast.flows.watching", "holdfast.flows.abandoned", "holdfast.flows.launching", "holdfast.storages"),
    *("holdfast.storage.checkpoints.remote", "holdfast.storage.database.migrations", "alembic.command", "alembic.ddl.sqlite"),
    *("prefect.utilities.visualization", "anyio._backends._asyncio", "pygments.formatters.html", "pygments.lexers.html"),
    *("s3fs", "aiobotocore.httpsession", "rich._emoji_codes", "encodings.idna", "stringprep"),
)
"""What ``holdfast run`` and its like import late."""
HUSHED = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
"""What the command line sets before it imports Prefect, which reads it then."""


@dataclass(frozen=True)
class Ended:
    """A process that has ended: 128 + the signal's number when a signal ended it, as in a shell."""

    code: int
    output: str


@dataclass
class Running:
    """A ``holdfast`` process in a group of its own."""

    process: Process
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> Ended:
        """End the whole group by SIGKILL."""
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.wait()

    def within(self, seconds: float) -> Ended | None:
        """Return its end, or None when it still runs after ``seconds``."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return Ended(code if code >= 0 else 128 - code, self.output)

    def wait(self, timeout: float = PATIENCE) -> Ended:
        """Wait for its end; one that does not come is killed, with what it said in the error."""
        ended = self.within(timeout)
        if ended is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"still running after {timeout:g} s:\n{self.output}") from None
        return ended


def warm(environment: Mapping[str, str]) -> list[Warm]:
    """Return processes that have imported ``holdfast``, and Prefect under ``environment``, for :class:`Runs` to take turns.

    There are two: a run and its restore then order sets differently, as two fresh processes would.
    """
    early = {**environment, **HUSHED}
    return [Warm("holdfast.cli:main", imports=IMPORTS, environment=early) for _ in range(2)]


@dataclass
class Runs:
    """Starts ``holdfast`` in a folder, where the output of each process is kept."""

    folder: Path
    environment: Mapping[str, str]
    warmed: Sequence[Warm] = ()
    """processes to fork from (see :func:`warm`); without any each run is a fresh process"""
    all: list[Running] = field(default_factory=list)

    def start(self, *arguments: object, fault: str | None = None, script: str | None = None, **environment: str) -> Running:
        """Start ``holdfast`` with ``arguments``; ``fault`` is the crash point at which it dies.

        ``script`` is Python code to be run in its place, that changes something and calls it.
        """
        log = self.folder / f"output-{len(self.all) + 1}.txt"
        environment = {**self.environment, **environment, **({} if fault is None else {"HOLDFAST_FAULT": fault})}
        words = [*map(str, arguments)]
        process: Process
        with log.open("wb") as stream:
            if self.warmed:
                chosen = self.warmed[len(self.all) % len(self.warmed)]
                process = chosen.start(words, folder=self.folder, environment=environment, output=stream, code=script)
            else:
                process = subprocess.Popen(
                    [str(HOLDFAST), *words] if script is None else [sys.executable, "-c", script, *words],
                    cwd=self.folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        self.all.append(Running(process, log))
        return self.all[-1]

    def close(self) -> None:
        """End every process that is left."""
        for started in self.all:
            if started.process.poll() is None:
                os.killpg(started.process.pid, signal.SIGKILL)
                started.process.wait()
