"""A log of what a trainable really executes, whatever becomes of the processes and of the rows that tell of it."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOG = "executed.jsonl"
ENDS = frozenset({"done", "stopped", "raised"})


@dataclass(frozen=True)
class Entry:
    """One line: what happened (start, step, reported, done, stopped, raised), in which attempt, process and second."""

    event: str
    trial: int
    attempt: int
    step: int
    """of a start: the first one that it is going to execute"""
    pid: int
    time: float = 0.0
    """seconds since 1970"""


def note(folder: Path, event: str, trial: int, attempt: int, step: int) -> None:
    """Append one entry to the log in ``folder``, in one write."""
    line = json.dumps([event, trial, attempt, step, os.getpid(), time.time()]) + "\n"
    descriptor = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def read(folder: Path) -> list[Entry]:
    """Return the log in ``folder``, oldest entry first; empty when there is none."""
    file = folder / LOG
    return [Entry(*json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def starts(log: Iterable[Entry], trial: int) -> list[tuple[int, int]]:
    """Return (attempt, first step) of each start of a trial."""
    return [(entry.attempt, entry.step) for entry in log if entry.event == "start" and entry.trial == trial]


def executed(log: Iterable[Entry], trial: int) -> list[int]:
    """Return the steps that were executed of a trial, in order, repetitions included."""
    return [entry.step for entry in log if entry.event == "step" and entry.trial == trial]


def recorded(train: Callable[[Any], Any], folder: str | Path) -> Callable[[Any], Any]:
    """Return a trainable that does what the function ``train`` does, and logs in ``folder`` what it executes.

    A step counts as executed when it is about to be reported, and as reported when ``report`` has returned.
    """
    place = Path(folder)

    @functools.wraps(train)
    def run(trial: Any) -> Any:
        recorder = _Recorder(trial, place)
        recorder.note("start", recorder.next)
        event = "raised"
        try:
            result = train(recorder)
            event = "done"
            return result
        except Exception:
            raise
        except BaseException:
            event = "stopped"
            raise
        finally:
            recorder.note(event, recorder.next)

    return run


class _Recorder:
    """A trial whose reports are logged."""

    def __init__(self, trial: Any, folder: Path) -> None:
        self._trial = trial
        self._folder = folder
        self.next: int = 0 if trial.checkpoint is None else trial.checkpoint.step + 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def note(self, event: str, step: int) -> None:
        note(self._folder, event, self._trial.number, self._trial.attempt, step)

    def report(self, metrics: Any, *, step: int | None = None, **content: Any) -> None:
        step = self.next if step is None else step
        self.next = step + 1
        self.note("step", step)
        self._trial.report(metrics, step=step, **content)
        self.note("reported", step)
