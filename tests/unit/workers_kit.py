"""What the tests of the workers share: a supervision that records, and jobs."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.storage.checkpoints.local import LocalCheckpoints, Published
from holdfast.storage.checkpoints.manifest import Manifest
from holdfast.tasks.workers.messages import Candidate, Decision, Job, ProcessIdentity, Rejected, Report

PATIENCE = 60.0
"""Seconds after which something that should happen counts as not happening."""
TRAINABLES = Path(__file__).with_name("workers_trainables.py")


def make_job(folder: Path, function: str, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "experiment": "digits",
        "experiment_id": "5c0c9b1e",
        "trial": 7,
        "attempt": 1,
        "seed": 11,
        "config": {"lr": 0.5, "act": "relu"},
        "trainable": f"{TRAINABLES}:{function}",
        "workdir": str(folder),
        "root": str(folder / "experiment"),
        "log": str(folder / "logs" / "deep" / "7.log"),
    }
    return Job(**{**values, **changes})


def publish(job: Job, report: Report) -> Published:
    """Publish a staged checkpoint as a search does."""
    assert report.staged is not None
    manifest = Manifest(
        experiment=job.experiment_id,
        trial=job.trial,
        attempt=job.attempt,
        step=report.step,
        writer="00",
        created="2026-01-01T00:00:00+00:00",
        serializer=report.staged.serializer,  # type: ignore[arg-type]
        metrics=report.metrics,
        files=report.staged.files,
    )
    return LocalCheckpoints(Path(job.root)).publish(Path(report.staged.path), manifest)


@dataclass
class Recorder:
    """A supervision that keeps what it is told, publishes checkpoints, and answers as it is asked to."""

    job: Job
    answer: Callable[[Report], Decision] = lambda report: Decision.CONTINUE
    wish: Callable[[], Decision] = lambda: Decision.CONTINUE
    process: ProcessIdentity | None = None
    resumed: Candidate | None = None
    rejected: Sequence[Rejected] = ()
    reports: list[Report] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    """newest first"""
    rows: list[tuple[float, str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    running: threading.Event = field(default_factory=threading.Event)
    publish: Callable[[Job, Report], Published] = publish
    """what publishes checkpoints that come after their reports"""
    events: list[tuple[str, int]] = field(default_factory=list)
    """(reported, publishing or saved, step) in the order in which this thread was called"""

    def started(self, process: ProcessIdentity | None, resumed: Candidate | None, rejected: Sequence[Rejected]) -> None:
        assert not self.running.is_set()
        self.process, self.resumed, self.rejected = process, resumed, rejected
        self.running.set()

    def report(self, report: Report) -> Decision:
        self.reports.append(report)
        self.events.append(("reported", report.step))
        if report.staged is not None:
            self._count(report, publish(self.job, report))
        return self.answer(report)

    def publication(self, report: Report) -> Callable[[], Published]:
        self.events.append(("publishing", report.step))
        return lambda: self.publish(self.job, report)

    def saved(self, report: Report, published: Published) -> None:
        self.events.append(("saved", report.step))
        self._count(report, published)

    def _count(self, report: Report, published: Published) -> None:
        candidate = Candidate(
            attempt=self.job.attempt,
            step=report.step,
            path=published.path,
            digest=published.digest,
            metrics=report.metrics,
        )
        self.candidates.insert(0, candidate)

    def telemetry(self, rows: Sequence[tuple[float, str, Any]]) -> None:
        self.rows.extend(rows)

    def log(self, lines: Sequence[str]) -> None:
        self.lines.extend(lines)

    def poll(self) -> Decision:
        return self.wish()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def steps(self) -> list[int]:
        return [report.step for report in self.reports]


def runs(pid: int) -> bool:
    """Tell whether a process runs, zombies not counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_end(pid: int) -> None:
    """Wait until a process has ended, reaped or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], PATIENCE)[0], f"process {pid} goes on"
    finally:
        os.close(descriptor)


class Bell:
    """A named pipe by which a test and a trial's process tell each other that something has happened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        os.mkfifo(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def __enter__(self) -> Bell:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def ring(self) -> None:
        os.write(self._descriptor, b"!")

    def wait(self) -> None:
        assert select.select([self._descriptor], [], [], PATIENCE)[0], f"nobody rang {self._path}"
        assert os.read(self._descriptor, 1)


def log_of(job: Job) -> str:
    return Path(job.log).read_text(errors="replace") if os.path.exists(job.log) else ""
