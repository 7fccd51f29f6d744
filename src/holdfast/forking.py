"""Forks: a new experiment that starts from the state of another one, whose path stays as it is."""

from __future__ import annotations

import json
import logging
import secrets
import uuid as uuids
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast import references, standing
from holdfast.core import faults
from holdfast.core.errors import Contention, ExperimentExists, HoldfastError, InvalidInput, LeaseHeld, SpecError, StorageError
from holdfast.core.loop import CONTINUED
from holdfast.core.spec import CHANGEABLE, ExperimentSpec
from holdfast.core.trial import ACTIVE
from holdfast.core.values import Json, dumps, dumps_ordered
from holdfast.holding import holder, liveness
from holdfast.locate import Opened, check_storage, database_url, dated, default_database, find, folder_at, open_path
from holdfast.storage.atomic import make_folder
from holdfast.storage.database import rebuild
from holdfast.storage.database.engine import connect
from holdfast.storage.database.experiments import has_schema, open_database
from holdfast.storage.database.leases import describe
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.folder import FORKING, Folder, Identity
from holdfast.storage.inheriting import Staged, cut, let_go
from holdfast.storage.journal import COLUMNS, Batch, Contents, JournalWriter
from holdfast.storage.objects import ObjectRoot
from holdfast.storage.root import LOCK, absolute, is_url, join, parent_of

log = logging.getLogger(__name__)

FORKABLE = (*CHANGEABLE, "search.seed", "description")
"""What a fork may change at once; each change is recorded in its audit."""

FORKED = "forked"
"""The audit row of a fork: from where, at which seq and trial, and what was changed."""

_TRIES = 5
"""Looks at an original whose checkpoints are pruned between a look at its rows and one at its files."""

Reopen = Callable[[], Opened]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be made, checked before anything is."""

    spec: ExperimentSpec
    seed: int
    changes: Mapping[str, Json]
    at_trial: int | None
    location: str
    database: str | None
    options: Mapping[str, Any] | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One state of the original."""

    folder: Folder
    identity: Identity
    spec: ExperimentSpec
    contents: Contents


def fork(
    path: str | Path,
    name: str,
    *,
    at_trial: int | None = None,
    storage: str | None = None,
    database: str | None = None,
    changes: Mapping[str, Json] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Opened:
    """Make a new experiment from the state of the one at ``path`` and open it; see ``holdfast.fork``.

    ``database`` is both experiments'; else each has that of its storage. ``options`` are an object store's, of either.
    """

    path, options = references.place(path, options)
    if storage is not None and references.is_reference(storage):
        place, own = references.place(storage)
        if own and options and dict(own) != dict(options):
            raise SpecError(f"{storage} has other storage options than the original's storage; fork within one storage")
        storage, options = str(place), own or options

    def reopen() -> Opened:
        return find(path, database=database, readonly=True, options=options)

    return _fork(reopen, name, at_trial=at_trial, storage=storage, database=database, changes=changes or {}, options=options)


def fork_of(
    opened: Opened,
    name: str,
    *,
    at_trial: int | None = None,
    storage: str | None = None,
    changes: Mapping[str, Json] | None = None,
) -> Opened:
    """Make a new experiment from the state of an open one, with the same database unless that is its storage's own."""
    location, options = opened.folder.location, opened.spec.storage_options
    url = opened.database.engine.url.render_as_string(hide_password=False)
    default = default_database(parent_of(location))
    mine = opened.scratch is not None or (not isinstance(default, str) and url == default.render_as_string())
    return fork(
        location,
        name,
        at_trial=at_trial,
        storage=storage,
        database=None if mine else url,
        changes=changes,
        options=options or None,
    )


def _fork(
    reopen: Reopen,
    name: str,
    *,
    at_trial: int | None,
    storage: str | None,
    database: str | None,
    changes: Mapping[str, Json],
    options: Mapping[str, Any] | None,
) -> Opened:
    with _looked_at(reopen, options) as source:
        plan = _checked(source, name, at_trial, storage, database, changes, options)
    there = options if is_url(plan.location) else None
    target = folder_at(plan.location, there)
    check_storage(plan.spec.model_copy(update={"database": database}))
    _check_free(target, plan)
    made = [part for part in (target.path, *target.path.parents) if not part.exists()] if target.is_local else []
    try:
        if target.is_local:
            make_folder(target.path)
        with target.root.exclusive():
            _check_free(target, plan)
            identity = _staged(reopen, target, plan)
    except BaseException:
        _remove_made(made)
        raise
    try:
        opened = open_path(plan.location, database=database, options=there)
    except BaseException:  # another experiment took the name a moment ago, or the database could not be written
        with suppress(HoldfastError, OSError):
            if target.lease() is None:  # else somebody drives it already
                target.delete()
        _remove_made(made)
        raise
    log.debug("forked %s from %s", identity.uuid, identity.forked_from)
    return replace(opened, notes=tuple(plan.notes))


# Checks


def _checked(
    source: _Source,
    name: str,
    at_trial: int | None,
    storage: str | None,
    database: str | None,
    changes: Mapping[str, Json],
    options: Mapping[str, Any] | None,
) -> _Plan:
    """Check what is asked for and return what it means; raises InvalidInput, SpecError and ExperimentExists."""
    original = source.folder.location
    count = sum(number >= 0 for (number,) in source.contents.tables["trial"])
    if at_trial is not None:
        if source.spec.population is not None:
            raise InvalidInput(
                f"{source.identity.name} is a population, whose members go on from each other: it cannot be forked at a trial; "
                "leave at_trial out, and all of them come along"
            )
        if not isinstance(at_trial, int) or isinstance(at_trial, bool) or not 0 <= at_trial <= count:
            raise InvalidInput(
                f"at_trial is {at_trial!r}; it is the number of the first trial that does not come along, from 0 to {count}: "
                f"{source.identity.name} has {count} trials"
            )
    if storage is not None and (not storage.strip() or "\0" in storage):
        raise SpecError(f"storage {storage!r} names no folder; name one, or leave it out for that of {source.identity.name}")
    place = absolute(storage) if storage is not None else parent_of(original)
    spec, changed = _changed_spec(source.spec, dated(name, datetime.now().astimezone()), place, changes, options)
    location = join(place, spec.name)
    if location == original:
        raise InvalidInput(f"{location} is the original itself; give the fork another name, or another storage")
    if place == original or place.startswith(original.rstrip("/") + "/"):
        raise InvalidInput(f"storage {place} lies within the experiment that is forked; name another")
    seed = spec.search.seed if "search.seed" in changed else source.identity.seed
    if seed is None:
        raise SpecError("search.seed is null; a fork needs a number")
    return _Plan(
        spec=spec, seed=seed, changes=changed, at_trial=at_trial, location=location, database=database, options=options
    )


def _changed_spec(
    stored: ExperimentSpec, name: str, storage: str, changes: Mapping[str, Json], options: Mapping[str, Any] | None
) -> tuple[ExperimentSpec, dict[str, Json]]:
    """Return the fork's spec, and what changes with the values before and after."""
    options = dict(options or {}) if is_url(storage) else {}
    data = {**stored.stored(), "name": name, "storage": storage, "storage_options": options}
    changed: dict[str, Json] = {}
    for key, value in changes.items():
        if key not in FORKABLE:
            raise SpecError(f"a fork cannot change {key!r}; allowed: {', '.join(FORKABLE)}")
        section, _, last = key.rpartition(".")
        inside = data[section] if section else data
        if inside[last] != value:
            changed[key] = [inside[last], value]
            data = {**data, section: {**inside, last: value}} if section else {**data, last: value}
    return type(stored).parse(data, source="fork"), changed


def _check_free(folder: Folder, plan: _Plan) -> None:
    """Raise ExperimentExists when the folder, or the name in the database, is taken; LeaseHeld while another fork makes it."""
    name = plan.spec.name
    if folder.exists():
        raise ExperimentExists(
            f"the name {name!r} is taken: {folder.location} holds an experiment; continue it with "
            f"`holdfast restore {folder.location}`, or choose another name"
        )
    names = folder.root.names()
    is_file = folder.is_local and not names and folder.path.exists() and not folder.path.is_dir()
    if is_file or (FORKING not in names and len(folder.leftovers()) < len(names)):
        raise ExperimentExists(f"{folder.location} exists and is no experiment; choose another name or storage")
    if not folder.is_local and FORKING in names:  # a local folder has a lock, which dies with its process
        maker = _maker(folder)
        if maker is not None and liveness(maker):
            raise LeaseHeld(f"{describe(maker)} is making {folder.location}; wait for it, or choose another name")
    _check_name(plan, name)


def _check_name(plan: _Plan, name: str) -> None:
    url = database_url(parent_of(plan.location), plan.database)
    connection = connect(url, readonly=True)
    missing = not connection.file.exists() if connection.file is not None else not has_schema(connection)
    connection.close()
    if missing:
        return
    database = open_database(url, readonly=True)
    try:
        taken = rebuild.name_taken(database, name, "")
    finally:
        database.close()
    if taken is not None:
        raise ExperimentExists(
            f"the name {name!r} is taken by the experiment in {taken} (database {database.label}); choose another name, or, if "
            f"that was removed, free it with `holdfast delete {name} --database URL`"
        )


def _maker(folder: Folder) -> Mapping[str, Any] | None:
    """Return who makes a fork in the folder, or None when nobody says so."""
    with suppress(ValueError):
        found = json.loads(folder.root.read(FORKING) or b"null")
        return found if isinstance(found, dict) else None
    return None


# The original


@contextmanager
def _looked_at(reopen: Reopen, options: Mapping[str, Any] | None) -> Iterator[_Source]:
    """Have one state of the original, as its database or, where that does not know it, its path tells; writes nothing."""
    opened = reopen()
    try:
        folder, identity = opened.folder, opened.folder.identity()
        contents = None
        if standing.original_of(folder, identity, options) is not None:
            contents = standing.contents_of(folder, identity)  # a copy that nobody opened yet: the rows are another's
        if contents is None:
            contents = Contents()
            contents.apply(Outbox(opened.database, opened.record.id)(-1))
            contents.epoch = opened.record.epoch
        contents.epoch = max([contents.epoch, *(row["epoch"] for row in contents.tables["audit"].values())])
        spec = contents.experiment.get("spec")
        stored = opened.spec if spec is None else _parsed(opened.spec, json.loads(spec))
        yield _Source(folder=folder, identity=identity, spec=stored, contents=contents)
    finally:
        opened.close()


def _parsed(opened: ExperimentSpec, stored: Mapping[str, Any]) -> ExperimentSpec:
    place = {"storage": opened.storage, "storage_options": opened.storage_options}
    return type(opened).parse({**stored, **place}, source="stored spec")


# The fork


def _staged(reopen: Reopen, target: Folder, plan: _Plan) -> Identity:
    """Make the fork's folder, ``experiment.json`` last; whatever goes wrong before leaves nothing of it."""
    marker = json.dumps({**holder(), "token": secrets.token_hex(8)}).encode() + b"\n"
    if FORKING in target.root.names():
        target.clear(but=(LOCK, FORKING))
        if isinstance(target.root, ObjectRoot):
            for name, upload in target.root.unfinished("trials"):
                target.root.abort(f"trials/{name}", upload)
        names = target.root.names()
        if len(target.leftovers()) < len(names):
            raise ExperimentExists(f"{target.location} holds files that are not holdfast's; choose another name or storage")
    _, version = target.root.versioned(FORKING)
    if not target.root.replace(FORKING, marker, version):
        raise LeaseHeld(f"another process is making {target.location}; wait for it, or choose another name")
    try:
        source = _carried(reopen, target, plan)
        identity = _identity(source, plan)
        batch = _rows(source, identity, plan)
        if target.exists() or target.root.read(FORKING) != marker:
            raise Contention(f"another process makes, or has made, {target.location}; this one stops")
        JournalWriter(target.root, source.contents.epoch, lambda since: batch).start()
        faults.point("fork.linked")
    except Contention:
        raise
    except BaseException:
        with suppress(HoldfastError, OSError):
            target.clear(but=(LOCK,))
        raise
    target.create(identity)
    faults.point("fork.identified")
    with suppress(StorageError):
        target.root.delete(FORKING)
    return identity


def _carried(reopen: Reopen, target: Folder, plan: _Plan) -> _Source:
    """Bring the files of one state of the original; return that state, with what was not there any more marked.

    What was pruned between the look at the rows and the files makes a new look necessary.
    """
    lost: set[str] = set()
    staged: Staged | None = None
    for last in [*[False] * (_TRIES - 1), True]:
        with _looked_at(reopen, plan.options) as source:
            notes = [] if plan.at_trial is None else cut(source.contents, plan.at_trial)
            seq, now = source.contents.end + 1, int(datetime.now(UTC).timestamp() * 1_000_000)
            staged = staged or Staged(source.folder, target)
            staged.take(source.contents)
            missing = staged.missing
            if missing and not last and not missing <= lost:
                lost = missing
                continue
            staged.finish(source.contents, seq, said=notes, pruned=missing - lost)
            let_go(source.contents, source.folder, seq, now, population=source.spec.population is not None)
            plan.notes[:] = notes
            return source
    raise AssertionError


def _identity(source: _Source, plan: _Plan) -> Identity:
    return replace(
        source.identity,
        uuid=str(uuids.uuid4()),
        name=plan.spec.name,
        location=plan.location,
        spec=plan.spec.stored(),
        seed=plan.seed,
        ancestors=[source.identity.uuid, *source.identity.ancestors],
        forked_from=source.identity.uuid,
    )


def _rows(source: _Source, identity: Identity, plan: _Plan) -> Batch:
    """Return everything that the fork's journal is to tell."""
    contents = source.contents
    seq, now = contents.end + 1, int(datetime.now(UTC).timestamp() * 1_000_000)
    trials = contents.tables["trial"]
    count = sum(number >= 0 for (number,) in trials)
    ended = contents.experiment.get("ended")
    waits = any(row["status"] in ACTIVE for row in trials.values())
    whole = plan.at_trial is None and not plan.changes and not waits
    detail: dict[str, Json] = {
        "from": source.identity.uuid,
        "name": source.identity.name,
        "location": source.folder.location,
        "seq": contents.end,
        "trial": count,
        "changes": dict(plan.changes),
    }
    audit = {"seq": seq, "epoch": contents.epoch, "happened": now, "action": FORKED, "detail": dumps(detail)}
    rows = {
        name: [[row[column] for column in COLUMNS[name]] for row in table.values()] for name, table in contents.tables.items()
    }
    rows["audit"].append([audit[column] for column in COLUMNS["audit"]])
    experiment = {
        **contents.experiment,
        "uuid": identity.uuid,
        "name": identity.name,
        "seed": identity.seed,
        "created": now,
        "copied_from": source.identity.uuid,
        "spec": dumps_ordered(plan.spec.stored()),
        "stop_requested": 0,
        "active_seconds": contents.experiment.get("active_seconds", 0.0) if plan.at_trial is None else 0.0,
        "ended": ended if whole and ended and not ended.startswith(("interrupted", "stopped", CONTINUED)) else None,
    }
    return Batch(start=-1, end=seq, rows=rows, experiment=experiment)


def _remove_made(made: Sequence[Path]) -> None:
    """Remove the folders that a refused fork made, unless they hold something."""
    for part in made:
        with suppress(OSError):
            if part is made[0] and [entry.name for entry in part.iterdir()] == [LOCK]:
                (part / LOCK).unlink()
        with suppress(OSError):
            part.rmdir()
