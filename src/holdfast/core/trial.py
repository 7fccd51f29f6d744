"""Trials and attempts: their statuses, and the one table that changes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from holdfast.core.errors import Conflict
from holdfast.core.values import Config, Json, Metrics


class TrialStatus(StrEnum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    PRUNED = "PRUNED"
    FAILED = "FAILED"
    TIMED_OUT = "TIMED_OUT"
    CANCELLED = "CANCELLED"
    SKIPPED = "SKIPPED"


UNFINISHED = frozenset({TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.SKIPPED})
ERRORED = frozenset({TrialStatus.FAILED, TrialStatus.TIMED_OUT})
FINISHED = frozenset({TrialStatus.COMPLETED, TrialStatus.PRUNED, TrialStatus.CANCELLED})
ACTIVE = frozenset({TrialStatus.PENDING, TrialStatus.RUNNING})
SCORED = frozenset({TrialStatus.COMPLETED, TrialStatus.PRUNED})


class Outcome(StrEnum):
    """How an attempt ended."""

    COMPLETED = "completed"
    PRUNED = "pruned"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CRASHED = "crashed"
    """its process died"""
    LOST = "lost"
    """its owner died"""
    PREEMPTED = "preempted"
    """it was told to save and stop"""
    CANCELLED = "cancelled"


FAILURES = frozenset({Outcome.FAILED, Outcome.TIMED_OUT, Outcome.CRASHED})
"""Outcomes that use up the retry budget; a lost or preempted attempt does not."""


class Event(StrEnum):
    """What can happen to a trial."""

    CLAIM = "claim"
    COMPLETE = "complete"
    PRUNE = "prune"
    FAIL = "fail"
    TIME_OUT = "time out"
    CANCEL = "cancel"
    REQUEUE = "requeue"
    """lost, preempted, or a retry: the next attempt waits"""
    SKIP = "skip"
    RERUN = "rerun"
    """a restore names an ended trial: the next attempt waits"""


_S, _E = TrialStatus, Event
TRANSITIONS: dict[tuple[TrialStatus, Event], TrialStatus] = {
    (_S.PENDING, _E.CLAIM): _S.RUNNING,
    (_S.PENDING, _E.SKIP): _S.SKIPPED,
    (_S.PENDING, _E.CANCEL): _S.CANCELLED,
    (_S.RUNNING, _E.COMPLETE): _S.COMPLETED,
    (_S.RUNNING, _E.PRUNE): _S.PRUNED,
    (_S.RUNNING, _E.FAIL): _S.FAILED,
    (_S.RUNNING, _E.TIME_OUT): _S.TIMED_OUT,
    (_S.RUNNING, _E.CANCEL): _S.CANCELLED,
    (_S.RUNNING, _E.REQUEUE): _S.PENDING,
    (_S.SKIPPED, _E.RERUN): _S.PENDING,
    (_S.SKIPPED, _E.CANCEL): _S.CANCELLED,
    (_S.FAILED, _E.RERUN): _S.PENDING,
    (_S.TIMED_OUT, _E.RERUN): _S.PENDING,
    (_S.COMPLETED, _E.RERUN): _S.PENDING,
    (_S.PRUNED, _E.RERUN): _S.PENDING,
    (_S.CANCELLED, _E.RERUN): _S.PENDING,
}
"""The only thing that changes a status."""


def transition(status: TrialStatus, event: Event) -> TrialStatus:
    """Return the status after ``event``; Conflict when a trial in ``status`` cannot have it."""
    try:
        return TRANSITIONS[status, event]
    except KeyError:
        allowed = sorted(known.value for state, known in TRANSITIONS if state is status)
        raise Conflict(f"a {status} trial cannot {event.value}; allowed: {', '.join(allowed) or 'nothing'}") from None


ENDING: dict[Outcome, Event] = {
    Outcome.COMPLETED: Event.COMPLETE,
    Outcome.PRUNED: Event.PRUNE,
    Outcome.FAILED: Event.FAIL,
    Outcome.TIMED_OUT: Event.TIME_OUT,
    Outcome.CRASHED: Event.FAIL,
    Outcome.CANCELLED: Event.CANCEL,
    Outcome.LOST: Event.REQUEUE,
    Outcome.PREEMPTED: Event.REQUEUE,
}
"""The event that an attempt's outcome is for its trial, when no retry follows."""


@dataclass(frozen=True, kw_only=True)
class ErrorInfo:
    """The original failure of an attempt."""

    kind: str
    message: str
    traceback: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One execution of a trial."""

    id: int
    number: int
    epoch: int | None = None
    outcome: Outcome | None = None
    claimed: bool = False
    parent: int | None = None
    """number of the attempt whose checkpoint it continues"""
    parent_step: int | None = None
    reason: str = "first"
    note: str = ""
    error: ErrorInfo | None = None
    flow_run_id: str | None = None
    task_run_id: str | None = None
    host: str | None = None
    pid: int | None = None
    donor: tuple[int, int] | None = None
    """(trial, attempt) of the other member of a population whose checkpoint of ``parent_step`` it continues; ``parent`` is then
    the attempt of its own trial that came before"""
    pid_started: str | None = None
    """identity of the child process, so that a recycled pid is told apart"""
    started: datetime | None = None
    ended: datetime | None = None
    created: datetime | None = None
    """when it began to wait"""
    trial: int | None = None
    """number of its trial, where it is looked at without that one"""
    worker: int | None = None
    """row id of the worker that claimed it; None: the driver's own process, or nobody yet"""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One config under evaluation, as it stands."""

    number: int
    status: TrialStatus
    config: Config
    """what the current attempt runs: in a population it changes"""
    config_id: int
    seed: int
    seq: int
    """the experiment's counter at the trial's last change"""
    attempt: Attempt
    """the current one"""
    ended_seq: int | None = None
    """the counter when it last ended: orders the ends; None while it has not"""
    attempts: int = 0
    """how many were started"""
    failures: int = 0
    """of a trial that waits for a retry: attempts of the epoch that made it wait that used up the retry budget"""
    metrics: Metrics = field(default_factory=dict)
    """the last canonical report, overlaid by the final record"""
    step: int | None = None
    """the last canonical step"""
    ts_start: datetime | None = None
    source: str = "proposed"
    """where its config came from: proposed, queued or merged"""
    origin: str | None = None
    """NAME#NUMBER@UUID of the trial that it was merged from"""
    group: int | None = None
    """number of the first of the trials that repeat one config; None: it stands alone"""
    repeat: int = 0
    """place within the group"""
    metadata: dict[str, Json] = field(default_factory=dict)
    first: Config | None = None
    """the config that it began with, where that is another one"""
    state: bytes | None = field(default=None, repr=False)
    """what the engine kept with its proposal; given to engines alone"""

    @property
    def error(self) -> ErrorInfo | None:
        return self.attempt.error
