"""What a restore finds and mends before anything runs: dead children, orphaned results, half-written things."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property

from holdfast.core.checkpoint import Checkpoint, CheckpointStatus, eligible
from holdfast.core.errors import CheckpointNotFound, Corrupt, StorageError
from holdfast.core.history import History
from holdfast.core.resume import Action, Planned, ResumePolicy, Standing, plan_trial
from holdfast.core.space import config_digest
from holdfast.core.spec import ExperimentSpec
from holdfast.core.stopping import make
from holdfast.core.trial import ACTIVE, Attempt, Outcome, Trial, TrialStatus
from holdfast.flows.session import Session
from holdfast.storage.checkpoints.ports import checkpoints_in
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.reads import Reader
from holdfast.storage.database.steps import canonical_steps
from holdfast.storage.folder import Folder
from holdfast.storage.recovery import RECOVERED
from holdfast.tasks.runtime import stored_history
from holdfast.tasks.workers.messages import Decision

_ITS_OWN = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
"""What is wrong with one trial's folder, not with the disk below it."""


class Survey:
    """Stored trials with what their files say; reads only."""

    def __init__(
        self,
        reader: Reader,
        folder: Folder,
        policy: ResumePolicy,
        spec: ExperimentSpec,
        trials: Sequence[Trial] | None = None,
    ) -> None:
        self._folder = folder
        self._policy = policy
        self.trials = reader.trials() if trials is None else trials
        self._cancelled = reader.cancel_requests()
        self._decisions = reader.last_decisions()
        self._steps = canonical_steps(reader, policy)
        self._reader, self._rules = reader, make(spec.stopping, spec.goals)
        self.stopped: dict[int, str] = {}
        """why a trial ends as PRUNED, by number, where its rows do not say it"""
        self.rejected: dict[int, str] = {}
        """row id and reason of each checkpoint that turned out bad"""
        self.unusable: dict[int, str] = {}
        """why files of a trial cannot be used, by number: it is left out, and the others are not"""

    def plan(self) -> list[Planned]:
        """Return what a restore does with each trial."""
        return [self._planned(trial) for trial in self.trials]

    @cached_property
    def _range(self) -> dict[str, int]:
        """The first and the last trial of which more than its row can matter: only of those is the rest read."""
        resumed = {status for status in TrialStatus if self._policy.resumes(status)} | {TrialStatus.RUNNING}
        numbers = [trial.number for trial in self.trials if trial.status in resumed]
        return {"first": min(numbers, default=0), "last": max(numbers, default=-1)}

    @cached_property
    def _attempts(self) -> dict[int, dict[int, Attempt]]:
        return self._reader.attempts(**self._range)

    @cached_property
    def _checkpoints(self) -> dict[int, list[Checkpoint]]:
        found: dict[int, list[Checkpoint]] = {}
        for checkpoint in self._reader.checkpoints(**self._range):
            found.setdefault(checkpoint.trial, []).append(checkpoint)
        return found

    @cached_property
    def _borrowed(self) -> dict[int, dict[int, Checkpoint]]:
        return self._reader.borrowed(**self._range)

    def valid_paths(self, trial: int) -> set[str]:
        """Return the paths of a trial's checkpoints that count, or are kept as they are."""
        return {
            checkpoint.path
            for checkpoint in self._checkpoints.get(trial, [])
            if checkpoint.status is not CheckpointStatus.DELETED
        }

    def _planned(self, trial: Trial) -> Planned:
        persisted, decided = None, None
        if trial.status in ACTIVE and trial.number in self._cancelled:
            decided = Outcome.CANCELLED
        try:
            if trial.status is TrialStatus.RUNNING:
                persisted = persisted_outcome(self._folder, trial)
                if self.is_pruned(trial):
                    decided = Outcome.PRUNED
            reported = self._steps.get(trial.number, ())
            probe = plan_trial(Standing(trial=trial, persisted=persisted, decided=decided, reported=reported), self._policy)
            if trial.status is TrialStatus.RUNNING or probe.action not in (Action.KEEP, Action.SKIP):
                self._check_folders(trial.number)
            if probe.action is not Action.RESUME:
                return probe
            found, reasons = self._newest(trial)
        except StorageError as error:  # no damage: what cannot be read now may be intact, so nothing is begun anew
            code = error.errno if error.errno is not None else getattr(error.__cause__, "errno", None)
            if code not in _ITS_OWN:
                raise
            self.unusable[trial.number] = (error.strerror or str(error)).partition(";")[0]
            unusable = Standing(trial=trial, persisted=persisted, decided=decided, unusable=self.unusable[trial.number])
            return plan_trial(unusable, self._policy)
        standing = Standing(
            trial=trial,
            checkpoint=None if found is None else (found.attempt, found.step),
            donor=None if found is None or found.trial == trial.number else found.trial,
            rejected=tuple(reasons),
            decided=decided,
            reported=reported,
        )
        return plan_trial(standing, self._policy)

    def _check_folders(self, trial: int) -> None:
        """Raise StorageError when a trial's folders are there and cannot be used."""
        if not self._folder.is_local:
            return
        checkpoints_in(self._folder).held(trial)
        place = self._folder.path / self._folder.trial_name(trial)
        for folder in (place, place / "checkpoints"):
            if folder.exists() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise StorageError(errno.EACCES, f"cannot write {folder}: {os.strerror(errno.EACCES)}")

    def is_pruned(self, trial: Trial) -> bool:
        """Tell whether a stopping rule ended a trial with the last report of its open attempt.

        Where only a manifest tells of that report, the rules say it once more.
        """
        decision = self._decisions.get(trial.attempt.id)
        if decision == RECOVERED and self._rules and trial.step is not None:
            reason = self._rules.decide(self._history, trial.number, trial.step)
            if reason is not None:
                self.stopped[trial.number] = reason
            return reason is not None
        return decision == Decision.PRUNE

    @cached_property
    def _history(self) -> History:
        return stored_history(self._reader, self._rules)

    def _newest(self, trial: Trial) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint whose files are what its manifest says, and why newer ones are not."""
        store = checkpoints_in(self._folder)
        check = store.verify if self._folder.is_local else store.fetch  # what is read there is here for the worker, too
        reasons = []
        known, borrowed = self._checkpoints.get(trial.number, []), self._borrowed.get(trial.number)
        candidates = eligible(trial.attempt.number, self._attempts[trial.number], known, borrowed)
        for candidate in candidates:
            try:
                check(
                    candidate.path,
                    digest=candidate.digest,
                    trial=candidate.trial,
                    attempt=candidate.attempt,
                    step=candidate.step,
                )
            except (Corrupt, CheckpointNotFound) as error:
                self.rejected[candidate.id] = str(error)
                whose = "" if candidate.trial == trial.number else f" of trial {candidate.trial}"
                reasons.append(f"the checkpoint{whose} at step {candidate.step} is not used: {error}")
            else:
                return candidate, reasons
        return None, reasons


def persisted_outcome(folder: Folder, trial: Trial) -> Outcome | None:
    """Return the outcome in the current attempt's persisted result, or None when there is none that counts."""
    result = folder.result(trial.number, trial.attempt.number)
    if result is None or result.get("outcome") not in (Outcome.COMPLETED, Outcome.PRUNED):
        return None
    if result.get("config", "") not in ("", config_digest(trial.config)):
        return None  # of another trial that once had this number, in a path whose newest journal was lost
    return Outcome(result["outcome"])


def open_attempts(trials: Sequence[Trial]) -> list[Attempt]:
    """Return the attempts that a dead driver left open."""
    return [trial.attempt for trial in trials if trial.status is TrialStatus.RUNNING]


def close_attempts(session: Session, survey: Survey, plan: Mapping[int, Planned]) -> list[Attempt]:
    """Give every open attempt its outcome: adopted, as decided, or lost; sweep what it left half-written. Return them."""
    if survey.rejected:
        session.driver.reject(survey.rejected)
    closed = []
    for trial in survey.trials:
        if trial.status is not TrialStatus.RUNNING:
            continue
        with suppress(StorageError):  # only words, and only where its driver ran on this host
            session.opened.folder.keep_log(trial.number, trial.attempt.number)
        if trial.number not in survey.unusable:
            session.runtime.checkpoints.sweep(trial.number, survey.valid_paths(trial.number))
        if plan[trial.number].action is Action.ADOPT:
            ending = _adopted(session, trial, survey)
        else:
            ending = Ending(outcome=Outcome.LOST, note="its driver died")
        session.driver.end(trial.attempt.id, ending)
        closed.append(replace(trial.attempt, outcome=ending.outcome, trial=trial.number))
    return closed


def _adopted(session: Session, trial: Trial, survey: Survey) -> Ending:
    folder = session.opened.folder
    outcome = persisted_outcome(folder, trial)
    if outcome is None:
        decided = Outcome.PRUNED if survey.is_pruned(trial) else Outcome.CANCELLED
        why = trial.attempt.note or survey.stopped.get(trial.number, "")
        note = _joined(why, "decided before a crash")
        return Ending(outcome=decided, note=note)
    result = folder.result(trial.number, trial.attempt.number) or {}
    return Ending(
        outcome=outcome,
        metrics=result.get("metrics"),
        result=folder.result_name(trial.number, trial.attempt.number),
        note=_joined(trial.attempt.note or str(result.get("note") or ""), "adopted: its result was persisted before a crash"),
    )


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def apply(session: Session, plan: Sequence[Planned]) -> None:
    """Carry the plan out: trials to be run wait afterwards, trials to be left out are SKIPPED."""
    rows = session.reader.trial_ids()
    current = {trial.number: trial for trial in session.followed.own()}
    skipped = []
    for planned in plan:
        trial = current[planned.trial]
        match planned.action:
            case Action.RESUME | Action.RUN:
                session.driver.rerun(rows[trial.number], restart=False, note=_note(planned))
            case Action.RESTART:
                session.driver.rerun(rows[trial.number], restart=True)
            case Action.ADOPT if trial.status is TrialStatus.PENDING:
                session.driver.cancel(rows[trial.number])
            case Action.SKIP if trial.status is TrialStatus.PENDING:
                skipped.append(rows[trial.number])
            case _:
                pass
    if skipped:
        session.driver.skip(skipped)


def _note(planned: Planned) -> str:
    return planned.reason if "not used" in planned.reason else ""
