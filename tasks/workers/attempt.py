"""What an attempt does, in whichever process: continue from a checkpoint, run the user's code, put errors into words."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from holdfast.core.errors import (
    CheckpointCorrupt,
    CheckpointNotFound,
    Infrastructure,
    InvalidInput,
    NotACheckpoint,
    TrainableError,
)
from holdfast.core.values import LONGEST_MESSAGE, LONGEST_TRACE, Metrics, shortened
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.tasks.workers.messages import Decision, Job, Rejected
from holdfast.tasks.workers.randomness import seed_everything
from holdfast.tasks.workers.trainables import ALIAS, Trainable, run
from holdfast.tasks.workers.trial_api import Link, ResumedCheckpoint, Trial, TrialStopped


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Where an attempt continues from: the place among its candidates, and what was wrong with newer ones."""

    place: int | None
    checkpoint: ResumedCheckpoint | None
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error of an attempt, in words."""

    kind: str
    message: str
    traceback: str
    infrastructure: bool
    """the storage failed, not the user's code"""
    names: tuple[str, ...]
    """of its class and the base classes, plain and qualified: what ``failure.retry_on`` may hold"""


def choose(job: Job, checkpoints: LocalCheckpoints) -> Resume:
    """Load the newest candidate that is valid; what is missing, torn or altered is rejected with the reason.

    StorageError, and whatever the user's classes raise when a pickle is read, pass: an older state would hide them.
    """
    rejected: list[Rejected] = []
    for place, candidate in enumerate(job.candidates):
        trial = job.trial if candidate.trial is None else candidate.trial
        try:
            loaded = checkpoints.load(
                candidate.path, digest=candidate.digest, trial=trial, attempt=candidate.attempt, step=candidate.step
            )
        except (CheckpointCorrupt, NotACheckpoint, CheckpointNotFound) as error:
            rejected.append(Rejected(candidate=candidate, reason=str(error)))
            continue
        resumed = ResumedCheckpoint(checkpoints, candidate, loaded, trial)
        return Resume(place=place, checkpoint=resumed, rejected=tuple(rejected))
    return Resume(place=None, checkpoint=None, rejected=tuple(rejected))


def perform(
    job: Job,
    trainable: Trainable,
    link: Link,
    checkpoints: LocalCheckpoints,
    checkpoint: ResumedCheckpoint | None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Decision | None, Metrics | None]:
    """Run the user's code; return what it was told when it was told to stop, or None and the record that it returned.

    Whatever the user's code raises passes, even after it was told to stop. A save that is under way is finished in any case;
    its error is raised unless the user's code raised one.
    """
    seed_everything(job.seed)
    trial = Trial(job, link, checkpoints, checkpoint, clock=clock)
    try:
        metrics = _run(trainable, trial, link, job.max_steps)
        trial.flush()
    finally:
        trial.finish()
    return (trial.stopped, None) if trial.stopped is not None else (None, metrics)


def _run(trainable: Trainable, trial: Trial, link: Link, max_steps: int | None) -> Metrics | None:
    try:
        try:
            return run(trainable, trial, max_steps=max_steps)
        except TrialStopped as error:
            link.check()
            if trial.stopped is None:  # it is no wish of ours, and must not look like one
                raise InvalidInput(
                    "the trial's code raised TrialStopped itself, but nothing told the trial to stop; return to end it, or"
                    " raise an error of your own"
                ) from error
            return None
    except BaseException as error:
        try:
            trial.flush()
        except BaseException as other:  # noqa: BLE001  # the user's own counts
            error.add_note(f"Besides, a checkpoint was not saved: {type(other).__name__}: {other}")
        raise


def describe(error: BaseException) -> Failure:
    """Put ``error`` into words, without holdfast's own frames above the user's."""
    kind = shortened(type(error).__name__, LONGEST_NAME)
    message, trace, names = f"(its {kind} cannot be shown)", "", {kind}
    with contextlib.suppress(BaseException):
        names = names_of(error)
    with contextlib.suppress(BaseException):  # __str__ and __repr__ are the user's code
        message = "".join(str(error))
    with contextlib.suppress(BaseException):
        trace = "".join(traceback.format_exception(type(error), error, _users_frames(error)))
    message, trace = shortened(message, LONGEST_MESSAGE), shortened(trace, LONGEST_TRACE)
    return Failure(
        kind=kind,
        message=message or kind,
        traceback=trace,
        infrastructure=isinstance(error, Infrastructure),
        names=tuple(sorted(names)),
    )


LONGEST_NAME = 200
"""Bytes that are kept of the name of an exception."""


def names_of(error: BaseException) -> set[str]:
    """Return the names of an exception's class and base classes, plain and qualified.

    A group has those that all of its exceptions have in common, too, and a trainable that cannot be imported those of what
    its import raised.
    """
    found: set[str] = set()
    for base in type(error).__mro__[:-1]:  # without object
        module = str(base.__module__).removeprefix(ALIAS)
        found |= {base.__name__, f"{module}.{base.__qualname__}"}
    if isinstance(error, BaseExceptionGroup):
        found |= set.intersection(*(names_of(each) for each in error.exceptions))
    if isinstance(error, TrainableError) and error.__cause__ is not None:
        found |= names_of(error.__cause__)
    return {shortened(name, LONGEST_NAME) for name in found}


_HERE = str(Path(__file__).parent)


def _users_frames(error: BaseException) -> TracebackType | None:
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None and frames.tb_frame.f_code.co_filename.startswith(_HERE):
        frames = frames.tb_next
    return frames
