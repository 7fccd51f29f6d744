"""Resuming: the flags, the policy they stand for, and what it means for each trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Self

from holdfast.core.errors import SpecError
from holdfast.core.trial import ACTIVE, ERRORED, UNFINISHED, Outcome, Trial, TrialStatus


class Rerun(StrEnum):
    """What to do with a class of trials."""

    RESUME = "resume"
    RESTART = "restart"
    SKIP = "skip"


@dataclass(frozen=True, kw_only=True)
class ResumePolicy:
    """What a restore does with unfinished, errored and finished trials."""

    unfinished: Rerun = Rerun.RESUME
    errored: Rerun = Rerun.SKIP
    finished: Rerun = Rerun.SKIP

    def __post_init__(self) -> None:
        for name in ("unfinished", "errored", "finished"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, Rerun(value))
            except ValueError:
                allowed = ", ".join(Rerun)
                raise SpecError(f"ResumePolicy: {name} is {value!r}; allowed: {allowed}") from None

    @classmethod
    def from_flags(cls, *, resume_unfinished: bool = True, resume_errored: bool = False, restart_errored: bool = False) -> Self:
        """Return the policy that the three flags stand for; SpecError when both errored flags are set."""
        if resume_errored and restart_errored:
            raise SpecError(
                "resume_errored and restart_errored are both set; choose one: resume continues each errored trial from its "
                "newest checkpoint, restart begins it again at step 0"
            )
        errored = Rerun.RESUME if resume_errored else Rerun.RESTART if restart_errored else Rerun.SKIP
        return cls(unfinished=Rerun.RESUME if resume_unfinished else Rerun.SKIP, errored=errored)

    @classmethod
    def of(cls, given: Self | Mapping[str, str] | str) -> Self:
        """Return the policy that ``given`` is, or says: a mapping, or text such as ``unfinished=resume,errored=restart``.

        A class of trials that is not named is treated as by default. SpecError for anything else.
        """
        if isinstance(given, cls):
            return given
        known = [field.name for field in fields(cls)]
        form = f"policy is {given!r}; name {', '.join(known)} once each, such as errored=restart; values: {', '.join(Rerun)}"
        if isinstance(given, str):
            pairs = [part.partition("=") for part in given.split(",")]
            named = {name.strip(): value.strip() for name, _, value in pairs}
            if len(named) < len(pairs):
                raise SpecError(form)
        elif isinstance(given, Mapping):
            named = dict(given)
        else:
            raise SpecError(form)
        if not named.keys() <= set(known):
            raise SpecError(form)
        return cls(**named)  # type: ignore[arg-type]  # checked there

    def resumes(self, status: TrialStatus) -> bool:
        """Tell whether a trial of a status may go on from a checkpoint."""
        wanted = self.unfinished if status in UNFINISHED else self.errored if status in ERRORED else self.finished
        return wanted is Rerun.RESUME


class Action(StrEnum):
    """What a restore does with one trial."""

    KEEP = "keep"
    ADOPT = "adopt"
    RESUME = "resume"
    RESTART = "restart"
    RUN = "run"
    SKIP = "skip"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A trial as a restore finds it, with what its files say."""

    trial: Trial
    checkpoint: tuple[int, int] | None = None
    """(attempt, step) of the newest valid checkpoint on the current attempt's chain"""
    donor: int | None = None
    """the trial that the checkpoint is of, when that is another one: a member of the same population"""
    rejected: tuple[str, ...] = ()
    """why newer checkpoints than that one do not count"""
    persisted: Outcome | None = None
    """the outcome in the current attempt's persisted result, when its row still says RUNNING"""
    decided: Outcome | None = None
    """how a trial whose row still says RUNNING or PENDING was told to end"""
    reported: Sequence[int] = ()
    """the steps of its canonical reports"""
    unusable: str = ""
    """why its files can be neither read nor written, though others' can"""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One line of a restore's plan."""

    trial: int
    status: TrialStatus
    action: Action
    step: int | None
    """the checkpoint's step that it continues from; None: from the beginning, or nothing runs"""
    reason: str
    parent: tuple[int, int] | None = None
    """(attempt, step) of that checkpoint"""
    lost: int = 0
    """steps whose reports count until then, and that have to be done again"""


def plan_trial(standing: Standing, policy: ResumePolicy) -> Planned:
    """Decide what a restore under ``policy`` does with one trial."""
    trial = standing.trial
    if trial.status is TrialStatus.RUNNING and standing.persisted is not None:
        return _planned(standing, Action.ADOPT, f"its result ({standing.persisted}) was persisted before the crash")
    if trial.status in ACTIVE and standing.decided is not None:
        return _planned(standing, Action.ADOPT, f"it was told to end ({standing.decided}) before")
    if trial.status in UNFINISHED and standing.unusable:
        return _planned(standing, Action.SKIP, f"left out: {standing.unusable}; mend that, and restore again")
    if trial.status in UNFINISHED:
        return _plan_unfinished(standing, policy.unfinished)
    wanted, label = (policy.errored, "errored") if trial.status in ERRORED else (policy.finished, "finished")
    if wanted is Rerun.SKIP:
        return _planned(standing, Action.KEEP, f"{trial.status.value.lower()}: kept")
    if standing.unusable:
        return _planned(standing, Action.KEEP, f"{label}: kept, since {standing.unusable}; mend that, and restore again")
    return _rerun(standing, wanted, f"{label}, and asked to {wanted}")


def _plan_unfinished(standing: Standing, wanted: Rerun) -> Planned:
    trial = standing.trial
    if wanted is Rerun.SKIP:
        return _planned(standing, Action.SKIP, "unfinished, and asked not to resume")
    if trial.attempt.number == 1 and not trial.attempt.claimed:
        return _planned(standing, Action.RUN, "never started")
    return _rerun(standing, wanted, "interrupted" if trial.status is TrialStatus.RUNNING else "waiting")


def _rerun(standing: Standing, wanted: Rerun, why: str) -> Planned:
    if wanted is Rerun.RESTART:
        return _planned(standing, Action.RESTART, f"{why}: from step 0, no checkpoint is loaded")
    why = "; ".join([why, *standing.rejected])
    if standing.checkpoint is None:
        return _planned(standing, Action.RESUME, f"{why}; no valid checkpoint: from step 0")
    attempt, step = standing.checkpoint
    whose = "" if standing.donor is None else f" of trial {standing.donor}"
    return _planned(standing, Action.RESUME, f"{why}; from the checkpoint{whose} at step {step}", parent=(attempt, step))


def _planned(standing: Standing, action: Action, reason: str, parent: tuple[int, int] | None = None) -> Planned:
    start = -1 if parent is None else parent[1]
    return Planned(
        trial=standing.trial.number,
        status=standing.trial.status,
        action=action,
        step=None if parent is None else parent[1],
        reason=reason,
        parent=parent,
        lost=0 if action not in (Action.RESUME, Action.RESTART) else sum(step > start for step in standing.reported),
    )
