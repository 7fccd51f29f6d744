"""Upkeep of an experiment's checkpoints: what dead attempts left is removed, what is bad is found, what is good is loaded."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from holdfast.core.checkpoint import Checkpoint, CheckpointStatus, eligible
from holdfast.core.errors import CheckpointNotFound, Corrupt, HoldfastError, LeaseHeld, NewerFormat, OutcomeUnknown
from holdfast.core.trial import Attempt, TrialStatus
from holdfast.holding import check_path, end_children, holder, is_driven, liveness
from holdfast.locate import Opened
from holdfast.standing import driven_elsewhere, own_lease
from holdfast.storage import journal
from holdfast.storage.atomic import is_draft
from holdfast.storage.carrying import below
from holdfast.storage.checkpoints import pins
from holdfast.storage.checkpoints.local import Loaded, LocalCheckpoints
from holdfast.storage.checkpoints.names import STAGING, TRASH
from holdfast.storage.checkpoints.ports import Checkpoints, checkpoints_in
from holdfast.storage.code import KEPT, SHIPPED, unnamed
from holdfast.storage.database import queueing, requests
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.experiments import by_uuid
from holdfast.storage.database.leases import Lease, Leases, describe
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.database.reads import Reader
from holdfast.storage.database.rebuild import copied_at
from holdfast.storage.folder import CODE, JOURNAL, Folder
from holdfast.storage.journal import JournalWriter
from holdfast.storage.leasing import Claimant, Keeper, take
from holdfast.storage.root import LocalRoot

log = logging.getLogger(__name__)

_TRIAL_FOLDER = re.compile(r"[0-9]{6,}")
_GONE = "its directory is missing"
_UNPINNED = "pins what is gone"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What reading every file of checkpoints found that their rows do not say."""

    bad: list[tuple[Checkpoint, str]]
    """marked valid, and bad, each with the reason"""
    good: list[Checkpoint]
    """marked corrupt, and good"""


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Something that nobody needs any more: ``path`` is relative to the experiment's, a local copy's is absolute."""

    path: str
    why: str
    bytes: int
    trial: int | None = None


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection of garbage removed, or would remove."""

    dry_run: bool
    removed: list[Leftover]
    left: list[Leftover]
    """what could not be removed; the log says why"""
    missing: list[tuple[Checkpoint, str]]
    """checkpoints that counted, and whose files are gone: they are marked corrupt, unless it is a dry run"""
    good: list[Checkpoint]
    """checkpoints that were marked corrupt, and are good: they stay and count again, unless it is a dry run"""

    @property
    def bytes(self) -> int:
        """The bytes of all that was removed."""
        return sum(item.bytes for item in self.removed)


@dataclass
class _Trial:
    """What is found of one trial."""

    leftovers: list[Leftover] = field(default_factory=list)
    rows: dict[str, Checkpoint] = field(default_factory=dict)
    """by path: rows that are to be marked deleted first"""
    good: list[Checkpoint] = field(default_factory=list)
    """rows that are to be marked valid again"""
    kept: set[str] = field(default_factory=set)


@dataclass
class _Survey:
    trials: dict[int, _Trial]
    files: list[Leftover]
    markers: list[Leftover]
    """files beside the trials"""
    mirror: dict[int, list[Leftover]]
    missing: list[tuple[Checkpoint, str]]
    good: list[Checkpoint]

    @property
    def leftovers(self) -> list[Leftover]:
        """All of it, in the order in which it is removed."""
        copies = [item for items in self.mirror.values() for item in items]
        return [*copies, *(item for trial in self.trials.values() for item in trial.leftovers), *self.markers, *self.files]


def collect(
    opened: Opened, *, corrupt: bool = False, dry_run: bool = False, say: Callable[[str], None] = log.info
) -> Collected:
    """Remove what dead attempts left of an experiment that nobody drives; with ``dry_run`` only tell what would go.

    It takes the lease, so that nobody begins to drive meanwhile and whoever was thought dead is refused, and gives it back.
    Checkpoints that were found bad stay unless ``corrupt``; then each is read once more, and one that is good counts again.
    Pinned ones stay. Nothing is taken when there is nothing to do.
    LeaseHeld, at once, when somebody drives the experiment, or may do so on another host.
    """
    _refuse_driven(opened)
    survey = _survey(opened, corrupt=corrupt)
    if dry_run or not (survey.leftovers or survey.missing or survey.good):
        return Collected(dry_run=dry_run, removed=survey.leftovers, left=[], missing=survey.missing, good=survey.good)
    keeper = take(
        opened.database,
        opened.record.id,
        opened.folder,
        Claimant(holder=holder(), liveness=liveness, say=say, drives=False),
        action="collecting",
        detail={"corrupt": corrupt},
        uuid=opened.record.uuid,
        check=lambda: check_path(replace(opened, copied_at=copied_at(opened.database, opened.record.id))),
    )
    record = by_uuid(opened.database, opened.record.uuid)
    ended = None if record is None else record.ended
    try:
        keeper.start(lambda: None)
        found = _collect(opened, keeper, corrupt=corrupt)
    except BaseException:
        keeper.release_quietly(ended)
        raise
    keeper.release(ended)
    return found


def _refuse_driven(opened: Opened) -> None:
    """Raise LeaseHeld unless it is certain that nobody drives the experiment."""
    name = opened.record.name
    elsewhere = driven_elsewhere(opened.folder, opened.database, opened.record)
    if elsewhere is not None:
        raise LeaseHeld(f"{name} is driven with the database {elsewhere}; nothing was removed: ask there, by --database")
    lease = Leases(opened.database, opened.record.id).look()
    if is_driven(lease):
        assert lease.holder is not None  # a lease is somebody's
        raise LeaseHeld(
            f"{describe(lease.holder)} drives {name}; its lease runs {lease.remaining:.0f} s unless renewed; "
            "nothing was removed: wait for it, or end it with `holdfast stop`"
        )


def driven(opened: Opened) -> bool:
    """Tell whether somebody drives the experiment, or may do so on another host."""
    return is_driven(lease_of(opened))


def lease_of(opened: Opened) -> Lease:
    """Return the lease: its database's or, where the rows are but a copy of what the path told, the path's."""
    lease = Leases(opened.database, opened.record.id).look()
    if lease.holder is not None or (opened.scratch is None and opened.copied_at is None):
        return lease
    path = own_lease(opened.folder, opened.folder.identity())
    if path is None or path.holder is None:
        return lease
    epoch = max(lease.epoch, path.epoch)
    return Lease(epoch=epoch, holder=path.holder, remaining=path.expires - time.time(), renewed=path.renewed)


def _collect(opened: Opened, keeper: Keeper, *, corrupt: bool) -> Collected:
    """Mark rows, write that into the path, then remove files, as pruning does; the lease is held."""
    folder, reader = opened.folder, Reader(opened.database, opened.record.id)
    writer = JournalWriter(folder.root, keeper.epoch, Outbox(opened.database, opened.record.id, keeper.epoch), keeper.check)
    writer.start()
    end_children([trial.attempt for trial in queueing.active(reader) if trial.status is TrialStatus.RUNNING])
    survey = _survey(opened, corrupt=corrupt, files=False)  # anew, now that whoever still writes is refused
    driver = Driver(opened.database, opened.record.id, keeper.epoch, seed=opened.record.seed)
    if survey.missing:
        driver.reject({item.id: reason for item, reason in survey.missing})
    if survey.good:
        requests.acquit(opened.database, opened.record.id, survey.good)
    for trial in survey.trials.values():
        _forget(driver, trial)
    writer.flush()
    removed, left = _remove(folder, checkpoints_in(folder), survey, keeper)
    files = _remove_files(folder, survey.markers)
    detail = {"removed": len(removed) + len(files), "bytes": sum(item.bytes for item in [*removed, *files])}
    driver.audit("collected", {**detail, "missing": len(survey.missing)})
    writer.flush()
    folder.tidy()
    return Collected(dry_run=False, removed=[*removed, *files], left=left, missing=survey.missing, good=survey.good)


def _forget(driver: Driver, trial: _Trial) -> None:
    """Mark the rows of what is to go; what was pinned meanwhile stays."""
    for status in (CheckpointStatus.VALID, CheckpointStatus.CORRUPT):
        rows = {path: row for path, row in trial.rows.items() if row.status is status}
        why = {row.id: f"removed by gc: {row.reason or 'superseded'}" for row in rows.values()}
        marked = driver.forget(why, status=status.value) if rows else set()
        spared = {path for path, row in rows.items() if row.id not in marked}
        trial.kept |= spared
        trial.leftovers = [item for item in trial.leftovers if item.path not in spared]


def _remove(folder: Folder, store: Checkpoints, survey: _Survey, keeper: Keeper) -> tuple[list[Leftover], list[Leftover]]:
    """Remove the leftovers of trials; return what went and what did not."""
    removed: list[Leftover] = []
    left: list[Leftover] = []

    def note(items: Sequence[Leftover], gone: set[str]) -> None:
        for item in items:
            (removed if item.path in gone else left).append(item)

    for number, items in survey.mirror.items():
        keeper.check()
        local = LocalCheckpoints(folder.path)
        note(items, {str(folder.path / path) for path in local.sweep(number, ())})
    for number, trial in survey.trials.items():
        if trial.leftovers:
            keeper.check()
            note(trial.leftovers, set(store.sweep(number, trial.kept)))
    return removed, left


def _remove_files(folder: Folder, markers: Sequence[Leftover]) -> list[Leftover]:
    """Remove temporary files under the lock under which some are written and exchanged; return what went."""
    with folder.root.exclusive():
        files = [*markers, *_files(folder)]
        for item in files:
            if os.path.isabs(item.path):
                Path(item.path).unlink(missing_ok=True)
            else:
                folder.root.delete(item.path)
    return files


def _survey(opened: Opened, *, corrupt: bool, files: bool = True) -> _Survey:
    """Tell what is left of dead attempts; reads only."""
    reader, folder = Reader(opened.database, opened.record.id), opened.folder
    store, attempts = checkpoints_in(folder), reader.attempts()
    rows: dict[int, list[Checkpoint]] = {}
    for row in reader.checkpoints():
        rows.setdefault(row.trial, []).append(row)
    there = set(_trial_numbers(folder.root.names("trials")))
    survey = _Survey(
        trials={},
        markers=_code(folder, reader),
        files=_files(folder) if files else [],
        mirror=_mirror(folder),
        missing=[],
        good=[],
    )
    for number, of_trial in attempts.items():  # a trial that no row knows is not ours to judge
        known = rows.get(number, [])
        if number in there or known:
            held = store.held(number) if number in there else []
            present = store.present(number) if number in there else set()
            found = _judge(folder, number, held, present, known, of_trial, corrupt=store if corrupt else None)
            survey.trials[number] = found
            survey.good += found.good
            counting = {row.path for row in known if row.status is not CheckpointStatus.DELETED} | present
            gone = sorted(pins.pinned(folder.root, number) - counting) if number in there else []
            survey.markers += [Leftover(path=pins.marker(path), why=_UNPINNED, bytes=0, trial=number) for path in gone]
            valid = [row for row in known if row.status is CheckpointStatus.VALID]
            survey.missing += [(row, _GONE) for row in valid if row.path not in present]
    return survey


def _judge(
    folder: Folder,
    number: int,
    held: Sequence[str],
    present: Collection[str],
    rows: Sequence[Checkpoint],
    attempts: Mapping[int, Attempt],
    *,
    corrupt: Checkpoints | None,
) -> _Trial:
    """Tell of each directory of a trial whether it counts, and why not; those marked corrupt are read in ``corrupt``."""
    found, by_path = _Trial(), {row.path: row for row in rows}
    counting = eligible(max(attempts), attempts, [row for row in rows if row.path in present])
    identities = {row.id for row in counting}
    for path in held:
        row, why = by_path.get(path), ""
        kept = row is not None and (row.pinned or row.lent)
        name = path.rpartition("/")[2]
        if row is None:
            why = (
                "never published"
                if name.startswith(STAGING)
                else "half deleted"
                if name.startswith(TRASH)
                else "no row names it"
            )
        elif row.status is CheckpointStatus.DELETED:
            why = "pruned"
        elif row.status is CheckpointStatus.CORRUPT and corrupt is not None and not kept:
            try:
                if _wrong(corrupt, row) is None:
                    found.good.append(row)
                else:
                    why = "corrupt"
                    found.rows[path] = row
            except NewerFormat as error:
                log.warning("%s is left alone: %s", path, error)
        elif row.status is CheckpointStatus.VALID and counting and row.id not in identities and not kept:
            why = "superseded"
            found.rows[path] = row
        if why:
            found.leftovers.append(Leftover(path=path, why=why, bytes=_bytes(folder, path), trial=number))
        else:
            found.kept.add(path)
    return found


def _trial_numbers(names: Sequence[str]) -> list[int]:
    return [int(name) for name in names if _TRIAL_FOLDER.fullmatch(name) and f"{int(name):06d}" == name]


def _mirror(folder: Folder) -> dict[int, list[Leftover]]:
    """Return what this host still has of a remote experiment for workers that do not run."""
    if folder.is_local:
        return {}
    local, found = LocalCheckpoints(folder.path), {}
    for number in _trial_numbers(LocalRoot(folder.path).names("trials")):
        items = [(path, folder.path / path) for path in local.held(number)]
        if items:
            found[number] = [
                Leftover(path=str(place), why="local copy", bytes=_below(place), trial=number) for _, place in items
            ]
    return found


def _files(folder: Folder) -> list[Leftover]:
    """Return the temporary files that a crash left, and segments that a compaction did not come to delete.

    A name alone on an object store may be one that is tried out this moment; there is at most a byte in it.
    """
    found = [
        Leftover(path=name, why="compacted", bytes=len(folder.root.read(name) or b""))
        for name in journal.superseded(folder.root)
    ]
    local = LocalRoot(folder.path)
    trials = [f"trials/{name}" for name in local.names("trials") if _TRIAL_FOLDER.fullmatch(name)]
    for place in ("", JOURNAL, CODE, *trials):
        for name in filter(is_draft, local.names(place)):
            file = folder.path / place / name
            if file.is_file() and not file.is_symlink():
                path = (Path(place) / name).as_posix() if folder.is_local else str(file)
                found.append(Leftover(path=path, why="temporary", bytes=file.stat().st_size))
    return found


def _code(folder: Folder, reader: Reader) -> list[Leftover]:
    """Return the shipped code that none of the last drives had."""
    if not folder.root.names(CODE):
        return []
    drives = [str(row.detail.get("digest")) for row in reader.audit() if row.action == SHIPPED]
    old = unnamed(folder.root, drives[-KEPT:])
    sizes = {f"{CODE}/{name}": size for name, size in below(folder.root, CODE).items()}
    return [Leftover(path=name, why="older code", bytes=sizes.get(name, 0)) for name in old]


def _bytes(folder: Folder, path: str) -> int:
    if folder.is_local:
        return _below(folder.path / path)
    from holdfast.storage.objects import ObjectRoot

    assert isinstance(folder.root, ObjectRoot)
    return sum(folder.root.files(path).values())


def _below(place: Path) -> int:
    """Return the bytes of all files below a folder; one that goes meanwhile counts for nothing."""
    total = 0
    for base, _, names in os.walk(place):
        for name in names:
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except FileNotFoundError:
                continue
    return total


# Pinning, verifying and loading


def pin(opened: Opened, trial: int, step: int, attempt: int | None = None, *, pinned: bool) -> None:
    """Pin a checkpoint, or take the pin away, in the database and in the path; raises as ``requests.pin``.

    The path's marker is there before the row says pinned, and until it does no more: what was acknowledged is in both.
    """
    database, identity, root = opened.database, opened.record.id, opened.folder.root
    with root.exclusive():
        chosen = requests.to_pin(database, identity, trial, step, attempt=attempt, pinned=pinned)
        name = pins.marker(chosen.path)
        if not pinned:
            requests.pin(database, identity, trial, step, attempt=chosen.attempt, pinned=False)
            root.delete(name)
            return
        fresh = root.read(name) is None
        root.write(name, b"")
        try:
            requests.pin(database, identity, trial, step, attempt=chosen.attempt)
        except OutcomeUnknown:
            raise
        except BaseException:
            if fresh:
                root.delete(name)
            raise


def verify(opened: Opened, rows: Sequence[Checkpoint], progress: Callable[[int], None] = lambda done: None) -> Verified:
    """Read every file of the checkpoints that are not deleted; return what was found of them that their rows do not say.

    What is pruned meanwhile is not bad. StorageError when the disk or the store refuses: that is no damage.
    """
    store, reader = checkpoints_in(opened.folder), Reader(opened.database, opened.record.id)
    found = Verified(bad=[], good=[])
    for done, row in enumerate(rows):
        progress(done)
        if row.status is CheckpointStatus.DELETED:
            continue
        wrong = _wrong(store, row)
        if row.status is CheckpointStatus.CORRUPT and wrong is None:
            found.good.append(row)
        elif row.status is CheckpointStatus.VALID and wrong is not None and _still_valid(reader, row):
            found.bad.append((row, wrong))
    progress(len(rows))
    return found


def _wrong(store: Checkpoints, row: Checkpoint) -> str | None:
    """Read every file of a checkpoint; return what is wrong with it, or None."""
    try:
        store.verify(row.path, digest=row.digest, trial=row.trial, attempt=row.attempt, step=row.step)
    except (Corrupt, CheckpointNotFound) as error:
        return str(error)
    return None


def _still_valid(reader: Reader, row: Checkpoint) -> bool:
    now = reader.checkpoints(first=row.trial, last=row.trial)
    return any(item.path == row.path and item.status is CheckpointStatus.VALID for item in now)


def load_checkpoint(opened: Opened, trial: int, step: int | None, *, strict: bool) -> Loaded:
    """Return the newest good checkpoint of a trial, or that of ``step``; see ``Experiment.load_checkpoint``."""
    store, reader = checkpoints_in(opened.folder), Reader(opened.database, opened.record.id)
    refused: dict[str, HoldfastError] = {}
    while True:
        current = max(reader.attempts(first=trial, last=trial)[trial])
        found = [row for row in reader.candidates(trial, current) if step is None or row.step == step]
        row = next((row for row in found if row.path not in refused), None)
        if row is None:
            break
        try:
            return store.load(row.path, digest=row.digest, trial=row.trial, attempt=row.attempt, step=row.step)
        except (Corrupt, CheckpointNotFound) as error:
            if not _still_valid(reader, row):
                continue  # pruned between the look at the rows and the read: there is a newer one
            if strict:
                raise
            refused[row.path] = error
            log.warning("the checkpoint of trial %d at step %d is not used: %s", trial, row.step, error)
    which = "" if step is None else f" of step {step}"
    if step is not None and refused:
        raise next(iter(refused.values()))
    reasons = "".join(f"; {error}" for error in refused.values())
    raise CheckpointNotFound(f"trial {trial} has no good checkpoint{which}{reasons}")
