"""What becomes of a search that was cut off: restored now, later, or never again. Pure: who lives is passed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from holdfast.core.failure_section import Cause, RecoverySection
from holdfast.core.loop import CONTINUED, is_continued

RECOVERING = "recovering"
"""The audit row by which a watcher claims a restore: ``attempt`` counts within an epoch."""
STARTED = "recovery started"
"""Who carries a claimed restore out: a process, or a flow run."""
ENDED = "recovery ended"
"""A claimed restore ended, or could not be started."""
GAVE_UP = "recovery gave up"
TAKES = ("started", "restored", CONTINUED)
"""The audit rows of who takes the lease to drive; they carry a ``token``. Who continues goes on with the drive before."""
NOTES = (*TAKES, RECOVERING, STARTED, ENDED, GAVE_UP)
"""The audit rows that count here."""

STARTING_SECONDS = 60.0
"""After which a claimed restore that nobody has started counts as dead, though its watcher lives."""
UNSEEN_SECONDS = 600.0
"""After which a restore that another host began, and that did not take the lease, counts as dead."""


class Verdict(StrEnum):
    """What is to be done with an experiment."""

    LEFT = "left alone"
    RESTORE = "restore"
    WAIT = "waits"
    UNDER_WAY = "under way"
    GAVE_UP = "gave up"


@dataclass(frozen=True, kw_only=True)
class Note:
    """An audit row."""

    seq: int
    epoch: int
    action: str
    detail: Mapping[str, Any]

    @property
    def is_take(self) -> bool:
        return self.action in TAKES and "token" in self.detail

    def concerns(self, epoch: int, attempt: int) -> bool:
        return (self.detail.get("epoch"), self.detail.get("attempt")) == (epoch, attempt)


@dataclass(frozen=True, kw_only=True)
class Situation:
    """An experiment as a watcher finds it."""

    epoch: int
    driver: str | None
    """who drives it, or may do so; None: certainly nobody"""
    ended: str | None
    """why the last drive gave the lease back; None when it never did"""
    stop_requested: bool
    unfinished: int
    errored: int
    can_propose: bool
    """whether the budget may have room for more trials"""
    notes: Sequence[Note]
    progress: int = 0
    """the experiment's seq when a trial ended, or a checkpoint was committed, last"""
    under_way: bool = False
    """whether a restore of this epoch was claimed that may still come to take the lease"""
    now: float = 0.0
    """seconds since 1970 by the database's clock, as in the notes"""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done, and why."""

    verdict: Verdict
    why: str
    cause: Cause | None = None
    """how it was cut off; None when it was not"""
    attempt: int = 0
    """the number of the restore that is due, within its epoch"""
    restores: int = 0
    """restores in a row so far that got nothing done"""
    at: float | None = None
    """when to restore, by the database's clock"""


def own_notes(notes: Sequence[Note], uuid: str) -> Sequence[Note]:
    """Return the notes since the last drive of another experiment: a fork and a copy have those of their original, too."""
    foreign = [place for place, note in enumerate(notes) if note.is_take and note.detail.get("uuid", uuid) != uuid]
    return notes[foreign[-1] + 1 :] if foreign else notes


def cut_off(ended: str | None) -> Cause | None:
    """Return how the last drive was cut off; None when it ended by itself, or a person ended it."""
    if ended is None or is_continued(ended):
        return "lost"
    if not ended.startswith("interrupted: "):
        return None
    why = ended.removeprefix("interrupted: ")
    if why.startswith(("SIGINT", "KeyboardInterrupt")):
        return None
    return "terminated" if why.startswith(("SIGTERM", "SIGHUP", "TerminationSignal")) else "failed"


def in_a_row(notes: Sequence[Note], progress: int) -> Sequence[Note]:
    """Return a watcher's restores that got nothing done since something was, or since a person restored it.

    Those that had to end because their watcher was ended are no failures, and are left out.
    """
    ended = {(note.detail.get("epoch"), note.detail.get("attempt")) for note in notes if _is_passed_on(note)}
    found: list[Note] = []
    pending = False
    for note in notes:
        if note.action == RECOVERING:
            pending = True
            if note.seq <= progress:
                found = []
            elif note.detail.get("cause") != CONTINUED and (note.epoch, note.detail.get("attempt")) not in ended:
                found.append(note)
        elif note.is_take:
            found = found if pending else []
            pending = False
    return found


def _is_passed_on(note: Note) -> bool:
    return note.action == ENDED and bool(note.detail.get("passed_on"))


def claims(notes: Sequence[Note], epoch: int) -> list[Note]:
    """Return the restores that were claimed while ``epoch`` was the newest."""
    return [note for note in notes if note.action == RECOVERING and note.epoch == epoch]


def is_under_way(notes: Sequence[Note], epoch: int, now: float, alive: Callable[[Mapping[str, Any]], bool | None]) -> bool:
    """Tell whether the newest claimed restore of an epoch may still come to take the lease.

    ``alive`` judges who carries it out, a process or a flow run: None when that cannot be seen from here.
    """
    claimed = claims(notes, epoch)
    if not claimed:
        return False
    last = claimed[-1]
    age = abs(now - _at(last))  # what lies ahead was noted before the clock was set back: how long ago, nobody knows
    about = [note for note in notes if note.concerns(epoch, len(claimed))]
    if any(note.action == ENDED for note in about):
        return False
    started = [note for note in about if note.action == STARTED]
    if not started:
        watcher = last.detail.get("by")
        return age < STARTING_SECONDS and (not isinstance(watcher, Mapping) or alive(watcher) is not False)
    seen = alive(started[-1].detail)
    return age < UNSEEN_SECONDS if seen is None else seen


@dataclass(frozen=True, kw_only=True)
class Handed:
    """A restore that was handed over to a flow run."""

    run: str
    attempt: int
    called_off: bool
    """whether it is known that a person cancelled the flow run before it began to restore"""


def handed_over(notes: Sequence[Note], epoch: int) -> Handed | None:
    """Return the newest claimed restore of an epoch, if it was handed over."""
    number = len(claims(notes, epoch))
    about = [note for note in notes if note.concerns(epoch, number)]
    runs = [note.detail.get("flow_run_id") for note in about if note.action == STARTED]
    if not runs or runs[-1] is None:
        return None
    called_off = any(note.action == ENDED and note.detail.get("cancelled") is True for note in about)
    return Handed(run=str(runs[-1]), attempt=number, called_off=called_off)


def judge(found: Situation, settings: RecoverySection) -> Decision:
    """Say what is to be done with an experiment."""
    if found.driver is not None:
        return Decision(verdict=Verdict.LEFT, why=found.driver)
    if not any(note.is_take for note in found.notes):
        return Decision(verdict=Verdict.LEFT, why="never driven")
    cause = cut_off(found.ended)
    if cause is None:
        return Decision(verdict=Verdict.LEFT, why=found.ended or "")
    if found.stop_requested:
        return Decision(verdict=Verdict.LEFT, why="a stop was requested")
    if not _is_work_left(found, settings):
        return Decision(verdict=Verdict.LEFT, why="nothing is left to do")
    claimed = claims(found.notes, found.epoch)
    vain = in_a_row(found.notes, found.progress)
    restores = len(vain)
    cause = _before_the_signal(found) or cause
    words = _words(cause, found.ended)
    left = Decision(verdict=Verdict.LEFT, why=words, cause=cause, restores=restores)
    if cause not in settings.after:
        return replace(left, why=f"{words}; recovery.after names {', '.join(settings.after) or 'nothing'}")
    if found.under_way:
        return replace(left, verdict=Verdict.UNDER_WAY, why=f"{words}; restore {len(claimed)} is under way")
    if restores >= settings.max_restores:
        tries = f"{restores} restore{'s' if restores > 1 else ''} in a row got nothing done"
        return replace(left, verdict=Verdict.GAVE_UP, why=f"{words}; {tries if restores else 'recovery.max_restores is 0'}")
    at = found.now
    if restores:
        last = _at(vain[-1])
        wait = pause(restores, settings)
        # What lies further ahead than one wait was noted before the clock was set back: nobody can tell how long ago.
        at = last + wait if last <= found.now + wait else found.now
    verdict = Verdict.WAIT if at > found.now else Verdict.RESTORE
    return replace(left, verdict=verdict, attempt=len(claimed) + 1, at=at)


def pause(restores: int, settings: RecoverySection) -> float:
    """Return how many seconds lie between restore number ``restores`` in a row (from 1) and the next one."""
    try:
        grown = settings.delay * 2.0 ** (restores - 1)
    except OverflowError:
        return settings.max_delay
    return min(grown, settings.max_delay)


def _at(note: Note) -> float:
    at = note.detail.get("at")
    return float(at) if isinstance(at, (int, float)) else 0.0


def _is_work_left(found: Situation, settings: RecoverySection) -> bool:
    if found.unfinished or (found.errored and settings.errored != "skip"):
        return True
    # A restore that found nothing to do took no lease; it has looked at budgets that counting does not tell.
    looked = any(note.action == "restored" and not note.is_take and note.epoch == found.epoch for note in found.notes)
    return found.can_propose and not looked


def _before_the_signal(found: Situation) -> Cause | None:
    """Return how a search was cut off before a watcher restored it that had to end itself, and passed that on."""
    for note in reversed(found.notes):
        if note.is_take:
            return None
        if _is_passed_on(note):
            cause = note.detail.get("cause")
            return cause if cause in ("lost", "terminated", "failed") else None
    return None


def _words(cause: Cause, ended: str | None) -> str:
    if is_continued(ended):
        return "the flow run that was to go on with it did not"
    return "its process died" if cause == "lost" else (ended or "").removeprefix("interrupted: ")
