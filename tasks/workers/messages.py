"""What the supervising thread and its child say to each other, and the frames that it travels in.

A frame is a length of four bytes and as many bytes of UTF-8 JSON. ``t`` names its kind:

to the child      setup, load, probe, job, go, decision, stored
from the child    ready, kind, refused, started, report, saved, telemetry, ended, failed

The child waits for an answer after ``started`` (go) and ``report`` (decision). ``saved`` hands over a checkpoint that was
written in the background, after its report; ``stored`` says that it counts, or why not. It may come at any time before the
next ``saved``, which waits for it; so do ``ended`` and ``failed``. One is under way at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from holdfast.core.errors import NotStorable
from holdfast.core.trial import Outcome
from holdfast.core.values import Config, Json, Metrics, dumps, loads, plain
from holdfast.storage.checkpoints.local import Published
from holdfast.storage.checkpoints.manifest import FileEntry

Frame = dict[str, Any]
TelemetryRow = tuple[float, str, Json]
"""(seconds since 1970 in UTC, name, value)"""

MAGIC = b"\xffhf\x01"
"""Begins every frame. User code that writes to descriptors it does not know is noticed by its first byte."""
HEADER = len(MAGIC) + 4


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint that the attempt may continue from; ``path`` is relative to the experiment's."""

    attempt: int
    step: int
    path: str
    digest: str
    metrics: Metrics = field(default_factory=dict)
    trial: int | None = None
    """the trial that it is of, when that is another one: a member of the same population"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt, with everything that its process needs to know."""

    experiment: str
    experiment_id: str
    trial: int
    attempt: int
    seed: int
    config: Config
    trainable: str
    """``/abs/train.py:train``, ``package.module:train``, or ``pickle:/abs/file.pkl:train`` for a pickled callable"""
    workdir: str
    """the working directory of the attempt, and where its modules are looked for"""
    root: str
    """the experiment's path"""
    candidates: tuple[Candidate, ...] = ()
    """newest first"""
    save_period: int = 1
    saves: bool = True
    interval: int | None = None
    """of a population: each step that ends such an interval is saved, due or not"""
    serializer: str = "safe"
    asynchronous: bool = False
    """whether checkpoints are written in the background, from a copy of the state"""
    save_by: float | None = None
    """the moment of this process's monotonic clock before which one more step is to be saved, due or not"""
    references: dict[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    timeout: float | None = None
    """seconds"""
    log: str
    """the file that receives what the attempt prints"""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Files that are written and fsynced in a staging folder, to be published; ``path`` is absolute."""

    path: str
    serializer: str
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    step: int
    metrics: Metrics
    staged: Staged | None = None


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A candidate that could not be continued from."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """A process, told apart from a later one with the same number."""

    host: str
    pid: int
    started: str


class Decision(StrEnum):
    """What an attempt is to do next."""

    CONTINUE = "continue"
    PREEMPT = "preempt"
    """save at the next report, then stop"""
    PRUNE = "prune"
    CANCEL = "cancel"
    KILL = "kill"
    """end now; counts as preempted"""


STRENGTH = {decision: strength for strength, decision in enumerate(Decision)}
"""Of two decisions the stronger one holds."""

OUTCOMES = {
    Decision.PREEMPT: Outcome.PREEMPTED,
    Decision.PRUNE: Outcome.PRUNED,
    Decision.CANCEL: Outcome.CANCELLED,
    Decision.KILL: Outcome.PREEMPTED,
}
"""The outcome of an attempt that was told so."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """An attempt that ended without an error: completed, pruned, cancelled or preempted.

    ``metrics`` is the record that a completed one returned, None when it returned nothing.
    """

    outcome: Outcome
    metrics: Metrics | None = None


class Supervision(Protocol):
    """What an attempt tells to whoever records it. Called from the thread that called ``run``, never two at a time.

    An exception that a method raises ends the attempt's process and is raised by ``run``.
    """

    def started(self, process: ProcessIdentity | None, resumed: Candidate | None, rejected: Sequence[Rejected]) -> None:
        """Record the process and where it continues from; called once, before the attempt's trainable is called.

        ``process`` is None when the attempt has none of its own.
        """
        ...

    def report(self, report: Report) -> Decision:
        """Publish the staged checkpoint, if any, and record the report; both are durable when it returns.

        After PREEMPT the report of a step that was not due may come a second time, then with its checkpoint.
        """
        ...

    def publication(self, report: Report) -> Callable[[], Published]:
        """Return what publishes the checkpoint staged with ``report``; without it, that was recorded before.

        What is returned may take minutes. It is called once, maybe in a thread of its own while other methods are called
        here, and raises StorageError when the storage refuses.
        """
        ...

    def saved(self, report: Report, published: Published) -> None:
        """Record what :meth:`publication` published; the checkpoint counts when this returns."""
        ...

    def telemetry(self, rows: Sequence[TelemetryRow]) -> None:
        """Record telemetry; the attempt does not wait for it."""
        ...

    def log(self, lines: Sequence[str]) -> None:
        """Show lines that the attempt printed; not all of them when they are many."""
        ...

    def poll(self) -> Decision:
        """Tell whether the attempt is to stop; called about every 0.2 s.

        PREEMPT, PRUNE and CANCEL are told at the next report; a cancelled attempt that does not report soon is killed.
        """
        ...


def encode(message: Mapping[str, Json]) -> bytes:
    """Return ``message`` as one frame; NotStorable, naming the place, for what JSON cannot hold."""
    try:
        body = dumps(message).encode("utf-8", "surrogatepass")
    except TypeError:
        plain(message, "message")
        raise NotStorable("a message holds what JSON cannot") from None
    return MAGIC + len(body).to_bytes(4, "big") + body


class Inbox:
    """Put frames together from the pieces that a pipe delivers."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        self._data += data

    def next(self) -> Frame | None:
        """Return the next whole frame, or None; ValueError when the bytes are none of ours."""
        data = self._data
        if not MAGIC.startswith(data[: len(MAGIC)]):
            raise ValueError("the bytes are no frame")
        if len(data) < HEADER:
            return None
        end = HEADER + int.from_bytes(data[len(MAGIC) : HEADER], "big")
        if len(data) < end:
            return None
        frame = loads(bytes(data[HEADER:end]))
        del data[:end]
        if not isinstance(frame, dict) or "t" not in frame:
            raise ValueError(f"a frame holds {type(frame).__name__}")
        return frame


def job_frame(job: Job) -> Frame:
    """Return ``job`` as the content of a frame; the clocks of two processes need not agree, so moments go as seconds left."""
    left = None if job.save_by is None else job.save_by - time.monotonic()
    return {**vars(job), "t": "job", "candidates": [vars(candidate) for candidate in job.candidates], "save_by": left}


def job_from(frame: Frame) -> Job:
    """Read what :func:`job_frame` wrote."""
    values = {name: value for name, value in frame.items() if name != "t"}
    values["candidates"] = tuple(Candidate(**candidate) for candidate in values["candidates"])
    if values["save_by"] is not None:
        values["save_by"] += time.monotonic()
    return Job(**values)


def report_frame(report: Report, kind: str = "report") -> Frame:
    """Return a report, or the checkpoint that is ``saved`` after it, as the content of a frame."""
    frame: Frame = {"t": kind, "step": report.step, "metrics": report.metrics}
    if (staged := report.staged) is not None:
        files = [[entry.name, entry.size, entry.digest] for entry in staged.files]
        frame["staged"] = {"path": staged.path, "serializer": staged.serializer, "files": files}
    return frame


def report_from(frame: Frame) -> Report:
    """Read what :func:`report_frame` wrote."""
    staged = frame.get("staged")
    if staged is not None:
        files = tuple(FileEntry(name=name, size=size, digest=digest) for name, size, digest in staged["files"])
        staged = Staged(path=staged["path"], serializer=staged["serializer"], files=files)
    return Report(step=frame["step"], metrics=frame["metrics"], staged=staged)
