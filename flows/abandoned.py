"""Finding searches that were cut off, and claiming their restores. Nothing here imports Prefect before it is needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast import references, standing
from holdfast.core import faults
from holdfast.core.errors import Contention, ExperimentNotFound, HoldfastError, SpecError
from holdfast.core.failure_section import Cause, RecoverySection
from holdfast.core.recovery import ENDED, Decision, Handed, Situation, Verdict, handed_over, is_under_way, judge, own_notes
from holdfast.core.trial import Attempt
from holdfast.core.values import Json
from holdfast.holding import holder, liveness
from holdfast.locate import Opened, folder_at, open_path
from holdfast.report.observer import restore_command
from holdfast.storage.database import recovering, requests
from holdfast.storage.database.leases import describe
from holdfast.storage.database.reads import Drove, Reader
from holdfast.storage.database.recovering import Known
from holdfast.storage.root import absolute, is_url, join, name_of, parent_of
from holdfast.storages import experiments_of, paths_in

UNREADABLE = "unreadable"
GONE = "gone"

SKEW_SECONDS = 120.0
"""By how much the clock of another host, which wrote a lease's end into a path, may differ from ours."""

Alive = Callable[[Mapping[str, Any]], bool | None]
"""Judges who carries a restore out, a process or a flow run; None when it cannot be seen."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where to look."""

    storages: tuple[str, ...]
    database: str | None = field(default=None, repr=False)
    options: Mapping[str, Any] | None = field(default=None, repr=False)
    _found: dict[str, tuple[str, Mapping[str, Any] | None]] = field(default_factory=dict, repr=False, compare=False)
    """by its location: how each storage was given, and its options"""

    def find(self, given: str) -> str:
        """Return the location of a storage; where a reference stands for it, its options are kept for what lies in it."""
        location, options = references.place(given, self.options)
        storage = absolute(location)
        self._found.setdefault(storage, (given if references.is_reference(given) else storage, options))
        return storage

    def options_of(self, path: str) -> Mapping[str, Any] | None:
        """Return the storage options of an experiment."""
        return self._found.get(parent_of(path), (path, self.options))[1]

    def name_of(self, path: str) -> str:
        """Return the path of an experiment as others may be told of it: by the reference, if that says it all."""
        if self.options:
            return path
        given = self._found.get(parent_of(path), (None, None))[0]
        return path if given is None else f"{given.rstrip('/')}/{name_of(path)}"

    def __post_init__(self) -> None:
        if not self.storages or not all(self.storages):
            raise SpecError(f"storages is {list(self.storages)!r}; name at least one folder or URL that holds experiments")


@dataclass(kw_only=True)
class Row:
    """What a watcher says of one experiment."""

    path: str
    name: str
    id: str | None = None
    verdict: str = UNREADABLE
    why: str = ""
    cause: Cause | None = None
    restores: int = 0
    """restores in a row so far that got nothing done"""
    next: float | None = None
    """when it is restored next, in seconds since 1970"""
    command: str | None = None
    """what restores it by hand"""
    result: str | None = None
    """what became of the restore of this watch"""


@dataclass(frozen=True, kw_only=True)
class Later:
    """When it is worth looking again at an experiment that is left alone now."""

    key: str
    """what names that look, and no other"""
    seconds: float
    """from now on"""
    driver: str | None = None
    """the flow run that seems to drive: it is worth looking only when that one is over in Prefect"""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """An experiment as it was found, and what is to be done with it."""

    row: Row
    decision: Decision
    epoch: int
    gone: dict[str, Any] | None
    """the holder of the lease, known to be dead"""
    recovery: RecoverySection
    runs: tuple[Attempt, ...] = ()
    """attempts that are open though nobody drives"""
    drives: tuple[Drove, ...] = ()
    """the flow runs that drove, the last one first"""
    later: Later | None = None
    called_off: Handed | None = None
    """the restore that a person cancelled, as Prefect says and the database does not yet"""


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A restore that is ours to carry out; what is open is closed once it has been started."""

    examined: Examined
    opened: Opened
    attempt: int

    @property
    def key(self) -> str:
        """What names this restore, and no other."""
        return f"holdfast-{self.opened.record.uuid}-{self.examined.epoch}-{self.attempt}"


def survey(places: Places, alive: Alive) -> Iterator[tuple[Row, Examined | None]]:
    """Yield every experiment of the storages; what cannot be read is a row that says why."""
    for path, why in paths_of(places):
        if why is not None:
            yield Row(path=path, name=name_of(path), why=why), None
        else:
            yield examine(path, places, alive)


def paths_of(places: Places) -> Iterator[tuple[str, str | None]]:
    """Yield the path of every experiment of the storages, and each storage that cannot be read with the reason."""
    seen: set[str] = set()
    for given in places.storages:
        storage = given
        try:
            storage = places.find(given)
            if not is_url(storage) and not Path(storage).is_dir():
                raise SpecError(f"storage {storage} does not exist")
            options = places.options_of(join(storage, "experiment"))
            try:
                found = list(experiments_of(storage, places.database, options))
            except HoldfastError:
                found = paths_in(storage, options)  # each says by itself what is wrong with the database
        except (HoldfastError, OSError) as error:
            yield storage, said(error)
            continue
        for path in found:
            # A database may know experiments of other storages, which may be on other hosts.
            if parent_of(path) == storage and path not in seen:
                seen.add(path)
                yield path, None


def examine(path: str, places: Places, alive: Alive) -> tuple[Row, Examined | None]:
    """Look at one experiment; nothing is written."""
    row = Row(path=path, name=name_of(path))
    options = places.options_of(path)
    try:
        folder = folder_at(path, options)
        original = standing.original_of(folder, folder.identity(), options)
        if original is not None:
            return replace(row, verdict=Verdict.LEFT.value, why=f"a copy of {original.location} that nobody drove"), None
        opened = open_path(path, database=places.database, readonly=True, options=options)
        try:
            found = _examined(row, opened, alive)
        finally:
            opened.close()
        return found.row, found
    except ExperimentNotFound as error:
        return replace(row, verdict=GONE, why=said(error)), None
    except Exception as error:  # noqa: BLE001  # rows that nobody can read, say: the others are looked after all the same
        return replace(row, why=said(error)), None


def said(error: Exception) -> str:
    """Return why an experiment cannot be looked at."""
    words = str(error) or type(error).__name__
    if isinstance(error, (HoldfastError, OSError)):
        return words
    return f"what is stored of it cannot be read ({type(error).__name__}: {error}); restore the database from a backup"


def _examined(row: Row, opened: Opened, alive: Alive) -> Examined:
    recovery = opened.spec.recovery
    known = recovering.look(
        opened.database,
        opened.record.id,
        restarts=recovery.unfinished == "restart",
        reruns_errored=recovery.errored != "skip",
    )
    driver, silent = _driver(opened, known)
    notes = own_notes(known.notes, opened.record.uuid)
    budget = opened.spec.search.num_trials
    decision = judge(
        Situation(
            epoch=known.epoch,
            driver=driver,
            ended=known.ended,
            stop_requested=known.stop_requested,
            unfinished=known.unfinished,
            errored=known.errored,
            can_propose=budget is None or sum(known.counts.values()) < budget,
            notes=notes,
            progress=known.progress,
            under_way=is_under_way(notes, known.epoch, known.now, alive),
            now=known.now,
        ),
        recovery,
    )
    command = restore_command(opened) if decision.cause is not None else None
    handed = handed_over(notes, known.epoch) if decision.verdict in (Verdict.RESTORE, Verdict.WAIT) else None
    called_off = handed is not None and (handed.called_off or _is_cancelled(handed))
    if handed is not None and called_off:
        why = f"{decision.why}; flow run {handed.run}, which was to restore it, was cancelled in Prefect; `{command}` does it"
        decision = replace(decision, verdict=Verdict.LEFT, why=why, attempt=0, at=None)
    if decision.verdict is Verdict.GAVE_UP:
        decision = replace(decision, why=f"{decision.why}; see to the cause, then `{command}`")
    shown = replace(
        row,
        name=opened.record.name,
        id=opened.record.uuid,
        verdict=decision.verdict.value,
        why=decision.why,
        cause=decision.cause,
        restores=decision.restores,
        next=decision.at,
        command=command,
    )
    cut_off = decision.cause is not None
    drives = (
        tuple(Reader(opened.database, opened.record.id).drives(opened.record.uuid)) if cut_off or silent is not None else ()
    )
    return Examined(
        row=shown,
        decision=decision,
        epoch=known.epoch,
        gone=known.holder,
        recovery=recovery,
        runs=tuple(recovering.open_runs(opened.database, opened.record.id)) if cut_off else (),
        drives=drives if cut_off else (),
        later=_later(opened.record.uuid, known, decision, silent, drives),
        called_off=handed if called_off and handed is not None and not handed.called_off else None,
    )


def _is_cancelled(handed: Handed) -> bool:
    from holdfast.flows.watched_runs import was_cancelled

    return was_cancelled(handed.run)


def _later(uuid: str, known: Known, decision: Decision, silent: float | None, drives: Sequence[Drove]) -> Later | None:
    """Say when a look would find something to do that this one did not, and nobody will say so."""
    if decision.verdict is Verdict.WAIT and decision.at is not None:
        return Later(key=f"holdfast-watch-{uuid}-{known.epoch}-{decision.attempt}", seconds=decision.at - known.now)
    if silent is not None and drives:
        return Later(key=f"holdfast-watch-{uuid}-{known.epoch}-lease", seconds=silent, driver=drives[0].flow_run)
    return None


def _driver(opened: Opened, known: Known) -> tuple[str | None, float | None]:
    """Say who drives an experiment, or may do so; None when it is certain that nobody does.

    With it, for one that cannot be seen from here: how many seconds its lease still runs, unless it is renewed.
    """
    if known.holder is not None:
        alive = liveness(known.holder)
        if alive or (alive is None and known.remaining > 0):
            suspended = bool(alive) and known.remaining <= 0
            words = "does not answer, and is there: is it suspended?" if suspended else "drives it"
            return f"{describe(known.holder)} {words}", None if alive else known.remaining
    lease = standing.own_lease(opened.folder, opened.folder.identity())
    if lease is None or lease.holder is None:
        return None, None
    if opened.scratch is None and opened.copied_at is None and lease.epoch <= known.epoch:
        return None, None  # the database that it is driven with has spoken
    alive = liveness(lease.holder)
    left = lease.expires + SKEW_SECONDS - time.time()
    if alive or (alive is None and left > 0):
        words = f"{describe(lease.holder)} drives it with {lease.database}, or did so a moment ago"
        return words, None if alive else left
    return None, None


def claim(examined: Examined, places: Places, alive: Alive) -> Claimed | Row:
    """Claim the restore of an experiment; return a row instead when there is none to be had any more.

    It is looked at once more, in the database that is written to. Whoever gets a claim closes it.
    """
    row = examined.row
    try:
        opened = open_path(row.path, database=places.database, options=places.options_of(row.path))
    except Exception as error:  # noqa: BLE001  # as above
        return replace(row, verdict=UNREADABLE, why=said(error), next=None)
    outcome: Claimed | Row | None = None
    try:
        now = _examined(row, opened, alive)
        outcome = _claimed(now, opened) if now.decision.verdict is Verdict.RESTORE else now.row
    except Exception as error:  # noqa: BLE001  # as above
        outcome = replace(row, verdict=UNREADABLE, why=said(error), next=None)
    finally:
        if not isinstance(outcome, Claimed):
            opened.close()
    return outcome


def _claimed(now: Examined, opened: Opened) -> Claimed | Row:
    decision = now.decision
    detail: dict[str, Json] = {"cause": decision.cause, "restores": decision.restores, "by": holder()}
    try:
        recovering.claim(
            opened.database, opened.record.id, epoch=now.epoch, attempt=decision.attempt, gone=now.gone, detail=detail
        )
    except Contention as error:
        return replace(now.row, verdict=Verdict.UNDER_WAY.value, why=said(error), next=None)
    faults.point("watch.claimed")
    return Claimed(examined=now, opened=opened, attempt=decision.attempt)


def gave_up(examined: Examined, places: Places) -> bool:
    """Note in the audit, once for a crash, that an experiment is not restored any more; tell whether this call did."""
    path = examined.row.path
    opened = open_path(path, database=places.database, options=places.options_of(path))
    try:
        detail: dict[str, Json] = {"why": examined.decision.why, "restores": examined.decision.restores}
        return recovering.give_up(opened.database, opened.record.id, epoch=examined.epoch, detail=detail)
    finally:
        opened.close()


def call_off(examined: Examined, handed: Handed, places: Places) -> None:
    """Note in the audit that a person cancelled a restore before it began: Prefect may forget its runs."""
    path = examined.row.path
    opened = open_path(path, database=places.database, options=places.options_of(path))
    try:
        detail: dict[str, Json] = {"epoch": examined.epoch, "attempt": handed.attempt, "cancelled": True}
        requests.note(opened.database, opened.record.id, ENDED, {**detail, "flow_run_id": handed.run})
    finally:
        opened.close()


def restore_words(claimed: Claimed, places: Places) -> list[str]:
    """Return the arguments of ``holdfast restore`` that restore an experiment by its own policy.

    Storage options are not among them: everybody can read a command line.
    """
    recovery = claimed.examined.recovery
    words = ["restore", places.name_of(claimed.examined.row.path)]
    if recovery.unfinished != "resume":
        words += ["--policy", policy_words(recovery)]
    elif recovery.errored != "skip":
        words.append(f"--{recovery.errored}-errored")
    return words


def policy_words(recovery: RecoverySection) -> str:
    """Return a policy as the command line takes it."""
    return f"unfinished={recovery.unfinished},errored={recovery.errored}"
