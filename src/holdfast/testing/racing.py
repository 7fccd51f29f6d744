"""Processes that do the same thing at the same moment: for tests of what only one of them may win."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from holdfast.core.errors import AlreadyClaimed, CheckpointConflict, CheckpointNotFound, HoldfastError, LeaseHeld
from holdfast.storage.database import queueing, recovering, requests
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.engine import Database, connect
from holdfast.storage.database.leases import Leases
from holdfast.storage.folder import Folder
from holdfast.storage.leasing import Claimant, take
from holdfast.testing.warm import WANTED, Process, Warm, environment

Run = Callable[[], Any]
IMPORTS = ("holdfast.storage.database.experiments", "holdfast.storage.object_stores", "sqlalchemy.dialects.sqlite", "s3fs")
"""What races import late."""


class Racers:
    """``count`` processes, started once and used again for each race; to be closed, or used as a context manager."""

    def __init__(self, count: int = 8, *, fork: bool = WANTED) -> None:
        self._processes = [_forked() if fork else _fresh() for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for each in self._processes:
            each.commands.close()
        for each in self._processes:
            each.process.wait(60)
            each.answers.close()

    def race(self, action: Callable[..., Run], jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Let one process a job run ``action``, all at once; return what each returned, or its error as text.

        ``action`` is a function of a module: called with a job it prepares, and what it returns is run.
        """
        name = f"{action.__module__}:{action.__name__}"
        running = self._processes[: len(jobs)]
        for process, job in zip(running, jobs, strict=True):
            _send(process, {"action": name, "job": job, "path": sys.path})
        for process in running:
            _receive(process)  # it has opened what it needs
        for process in running:
            _send(process, "go")
        return [_receive(process) for process in running]


@dataclass(frozen=True)
class _Racer:
    """A process, and the two ways to it."""

    process: Process
    commands: IO[str]
    answers: IO[str]


def _fresh() -> _Racer:
    command = [sys.executable, "-m", "holdfast.testing.racing"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    return _Racer(process, process.stdin, process.stdout)


@functools.cache
def _warm() -> Warm:
    """Return the process that racers are forked from; it ends with this one."""
    return Warm("holdfast.testing.racing:main", imports=IMPORTS, environment=environment())


def _forked() -> _Racer:
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    with open(theirs_in, "rb") as source, open(theirs_out, "wb") as output:
        process = _warm().start([], folder=Path.cwd(), environment=environment(), output=output, source=source)
    return _Racer(process, open(ours_out, "w"), open(ours_in))


def _send(racer: _Racer, message: object) -> None:
    racer.commands.write(json.dumps(message) + "\n")
    racer.commands.flush()


def _receive(racer: _Racer) -> Any:
    """Return an answer; AssertionError with what was said when the racer has ended."""
    line = racer.answers.readline()
    try:
        return json.loads(line)
    except ValueError:  # the rest is a traceback, or nothing
        said = line + racer.answers.read()
        raise AssertionError(f"a racer ended with exit code {racer.process.wait(60)}: {said}") from None


def url_of(database: Database) -> str:
    """Return the URL by which another process opens ``database``, its password included."""
    return database.engine.url.render_as_string(hide_password=False)


def propose(url: str, experiment: int, epoch: int, configs: list[dict[str, Any]]) -> Run:
    """Propose every config."""
    driver = Driver(connect(url), experiment, epoch, seed=1)
    return lambda: [driver.propose(config) for config in configs]


def enqueue(url: str, experiment: int, config: dict[str, Any], repeats: int, times: int) -> Run:
    """Queue a group of repeats so many times; return the numbers of each."""
    database = connect(url)
    return lambda: [queueing.enqueue(database, experiment, config, seed=1, repeats=repeats) for _ in range(times)]


def claim(url: str, experiment: int, epoch: int, attempts: list[int], token: str) -> Run:
    """Claim every attempt; return those that were won."""
    database = connect(url)

    def run() -> list[int]:
        won = []
        for attempt in attempts:
            try:
                AttemptWriter.claim(database, experiment, epoch, attempt, token=token)
                won.append(attempt)
            except HoldfastError as error:
                if type(error).__name__ != "AlreadyClaimed":
                    raise
        return won

    return run


def claim_restores(url: str, experiment: int, epoch: int, gone: dict[str, Any], attempts: list[int]) -> Run:
    """Claim restores of a search that was cut off; return those that were won."""
    database = connect(url)

    def run() -> list[int]:
        won = []
        for attempt in attempts:
            with suppress(AlreadyClaimed, LeaseHeld):
                recovering.claim(database, experiment, epoch=epoch, attempt=attempt, gone=gone, detail={})
                won.append(attempt)
        return won

    return run


def claim_or_take(claims: dict[str, Any] | None = None, take: dict[str, Any] | None = None) -> Run:
    """Claim restores, or take the lease as a restore does."""
    if claims is not None:
        return claim_restores(**claims)
    assert take is not None
    leases, seen = Leases(connect(take["url"]), take["experiment"]), int(take["seen"])
    return lambda: leases.take(seen=seen, epoch=seen + 1, holder={"pid": 2}, action="restored", detail={"token": "t"})


def pin(url: str, experiment: int, trial: int, steps: list[int]) -> Run:
    """Pin the checkpoints of some steps; return those that were there to be pinned."""
    database = connect(url)

    def run() -> list[int]:
        done = []
        for step in steps:
            with suppress(CheckpointNotFound):
                requests.pin(database, experiment, trial, step)
                done.append(step)
        return done

    return run


def forget(url: str, checkpoints: list[int], **writer: Any) -> Run:
    """Prune checkpoints (row ids) one by one, as a running attempt; return those that were marked."""
    attempt = AttemptWriter(database=connect(url), **writer)
    return lambda: [each for checkpoint in checkpoints for each in attempt.forget([checkpoint])]


def save(url: str, steps: list[int], path: str, **writer: Any) -> Run:
    """Report steps, each with a checkpoint, as a running attempt; return those that were won."""
    attempt = AttemptWriter(database=connect(url), **writer)

    def run() -> list[int]:
        won = []
        for step in steps:
            with suppress(CheckpointConflict):
                attempt.report(step, {"loss": 1.0}, saved=Saved(path=f"{path}-{step}", digest="d", bytes=1))
                won.append(step)
        return won

    return run


def take_lease(url: str, experiment: int, folder: str) -> Run:
    """Take the lease; return the epoch."""
    database = connect(url)

    def pause(_: float) -> None:
        raise AssertionError("nobody held the lease: there is nothing to wait for")

    claimant = Claimant(holder={"hostname": "here", "pid": 1}, liveness=lambda _: True, say=lambda _: None, pause=pause)
    return lambda: take(database, experiment, Folder(Path(folder)), claimant, action="raced", detail={}).epoch


def main() -> None:
    """Run races, one JSON line each way at a time, until the input ends."""
    for line in sys.stdin:
        message = json.loads(line)
        sys.path[:] = message["path"]
        module, _, name = message["action"].partition(":")
        run = getattr(importlib.import_module(module), name)(**message["job"])
        _answer("ready")
        if not sys.stdin.readline():
            return
        try:
            _answer(run())
        except HoldfastError as error:
            _answer(f"{type(error).__name__}: {error}")


def _answer(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
