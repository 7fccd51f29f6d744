"""Finding, creating and opening experiments: the path, its database, and whether they belong together."""

from __future__ import annotations

import os
import subprocess
import uuid as uuids
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from holdfast import references, standing
from holdfast.core import faults
from holdfast.core.errors import (
    AlreadyClaimed,
    Corrupt,
    ExperimentExists,
    ExperimentNotFound,
    SpecError,
    StorageError,
)
from holdfast.core.spec import ExperimentSpec
from holdfast.core.values import digest
from holdfast.settings import settings
from holdfast.storage import journal
from holdfast.storage.atomic import make_folder
from holdfast.storage.database import experiments, merging
from holdfast.storage.database.engine import Database, Location, connect, shown, sqlite_url
from holdfast.storage.database.experiments import Record, has_schema, open_database
from holdfast.storage.database.rebuild import copied_at
from holdfast.storage.folder import FORKING, TRAINABLE, Folder, Identity
from holdfast.storage.root import absolute, is_url, join, parent_of

DATABASE_FILE = "holdfast.db"

Spec = TypeVar("Spec", bound=ExperimentSpec)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An experiment's folder and rows, found to belong together."""

    folder: Folder
    database: Database
    record: Record
    spec: ExperimentSpec = field(repr=False)
    """not shown: it may name a database with a password"""
    notes: tuple[str, ...] = ()
    """what was done to bring them together"""
    copied_at: int | None = None
    """the journal's end when the rows were rebuilt from it and nobody has driven with them since"""
    scratch: TemporaryDirectory[str] | None = None
    """where the database is, when it exists to be read only"""

    def close(self) -> None:
        self.database.close()
        if self.scratch is not None:
            self.scratch.cleanup()


def folder_at(location: str | Path, options: Mapping[str, Any] | None = None) -> Folder:
    """Return the folder at a location; SpecError for one that cannot be used."""
    place = absolute(location)
    options = options or (settings().storage_options if is_url(place) else None)
    spelled = place.encode("utf-8", "backslashreplace").decode()  # a file's name need not be Unicode text
    work = settings().cache_folder / "work" / digest(spelled)[:16]
    return Folder.at(place, options=options, work=work, cache_bytes=settings().cache_bytes)


def database_url(storage: str, given: str | None) -> Location:
    """Return the database of a storage: the one given, else the environment's, else a SQLite file.

    That of a local storage lies in it, that of an object store in the user's data folder on this host.
    """
    if given or settings().database_url:
        return references.database(given or settings().database_url) or ""
    return default_database(storage)


def default_database(storage: str) -> Location:
    """Return the SQLite file of a storage that has no other database."""
    if not is_url(storage):
        return sqlite_url(Path(storage) / DATABASE_FILE)
    return sqlite_url(settings().data_folder / f"{digest(storage)[:16]}.db")


def stored_spec(record: Record, storage: str, options: Mapping[str, Any] | None = None) -> ExperimentSpec:
    """Return the spec of a row, with the storage that it is in now."""
    place = {"storage": storage, **({"storage_options": dict(options)} if options else {})}
    try:
        return ExperimentSpec.parse({**record.spec, **place}, source=f"stored spec of {record.name}")
    except SpecError as error:
        raise Corrupt(f"{error}; it is damaged, or a newer holdfast wrote it: update holdfast") from error


def open_path(
    path: str | Path,
    *,
    database: str | None = None,
    readonly: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Opened:
    """Open the experiment at a location.

    A database that does not have the experiment, or an older state of it, is brought up to date from the path; with
    ``readonly`` nothing is written, and a passing database is made to read in. A copy whose original still exists becomes an
    experiment of its own. ``Opened.notes`` say what was done.

    Raises ExperimentNotFound when there is none, Corrupt when its files or rows are damaged or went separate ways,
    DatabaseError when the database cannot be used. Nothing is changed then.
    """
    for _ in range(_TRIES):
        with suppress(AlreadyClaimed):  # another process brought the same database up to date, and may drive with it by now
            return _open_path(path, database, readonly, options)
    return _open_path(path, database, readonly, options)


def _open_path(path: str | Path, database: str | None, readonly: bool, options: Mapping[str, Any] | None) -> Opened:
    if "\0" in str(path):
        raise ExperimentNotFound("a path has no NUL character; `holdfast list` shows the experiments of a storage")
    path, options = references.place(path, options)
    folder = folder_at(path, options)
    identity = folder.identity()
    if identity.forked_from is not None and not readonly:
        with suppress(StorageError):
            folder.root.delete(FORKING)  # its maker died with the last step
    url = database_url(parent_of(folder.location), database)
    found = _database(url, folder, readonly=readonly)
    notes: list[str] = []
    try:
        original = standing.original_of(folder, identity, options)
        if original is not None and not readonly:
            identity = standing.adopt_copy(folder, identity, found)
            notes.append(f"{folder.location} is a copy of {original.location}: from now on an experiment of its own")
        if found is not None and not readonly:
            standing.follow_copy(folder, identity, found)
        return _together(folder, identity, found, url, readonly=readonly, notes=notes, options=options)
    except BaseException:
        if found is not None:
            found.close()
        raise


def _database(url: Location, folder: Folder, *, readonly: bool) -> Database | None:
    """Return the database, or None when it is missing and the path can replace it."""
    connection = connect(url, readonly=True)
    file = connection.file
    missing = not file.exists() if file is not None else not has_schema(connection)
    connection.close()
    if missing and journal.end(folder.root) == -1 and folder.root.names("trials"):
        return open_database(url, readonly=readonly)  # says that it is missing
    return None if missing else open_database(url, readonly=readonly)


_TRIES = 3
"""How often an experiment is looked at anew while others write it."""
_LACKS = {
    standing.Verdict.UNKNOWN: "does not have the experiment",
    standing.Verdict.BEHIND: "has an older state of the experiment",
}


def _together(
    folder: Folder,
    identity: Identity,
    database: Database | None,
    url: Location,
    *,
    readonly: bool,
    notes: list[str],
    options: Mapping[str, Any] | None,
) -> Opened:
    record = None if database is None else experiments.by_uuid(database, identity.uuid)
    verdict = standing.Verdict.UNKNOWN
    if database is not None and record is not None:
        verdict = standing.verdict(folder, identity, database, record)
    if verdict is standing.Verdict.DIVERGED and database is not None:
        raise standing.diverged(folder, identity, database)
    scratch = None
    if database is None or record is None or verdict is not standing.Verdict.CURRENT:
        # Read first: what cannot be read leaves no database behind.
        found = standing.told(folder, identity, shown(url) if database is None else database.label)
        target = database
        if readonly:
            target, scratch = standing.scratch()
        elif target is None:
            target = open_database(url, create_missing=True)
        try:
            record, words = standing.bring(folder, identity, target, verdict, found, None if readonly else record)
            notes.append(words if scratch is None else f"shown as the journal tells it: the database {_LACKS[verdict]}")
        except BaseException:
            if target is not database:
                target.close()
            if scratch is not None:
                scratch.cleanup()
            raise
        if database is not None and target is not database:
            database.close()
        database = target
    return Opened(
        folder=folder,
        database=database,
        record=record,
        spec=stored_spec(record, parent_of(folder.location), options),
        notes=tuple(notes),
        copied_at=copied_at(database, record.id),
        scratch=scratch,
    )


def find(
    target: str | Path, *, database: str | None = None, readonly: bool = False, options: Mapping[str, Any] | None = None
) -> Opened:
    """Open an experiment by its location or, where a database is named, by its name or UUID."""
    target, options = references.place(target, options)
    database = references.database(database)
    if database is None or is_url(target) or os.path.exists(os.path.join(target, "experiment.json")):
        return open_path(target, database=database, readonly=readonly, options=options)
    opened = open_database(database, readonly=True)
    try:
        record = experiments.by_name(opened, str(target)) or experiments.by_uuid(opened, str(target))
    finally:
        opened.close()
    if record is None:
        raise ExperimentNotFound(f"{str(target)!r} is neither an experiment's folder nor an experiment of {opened.label}")
    return open_path(record.location, database=database, readonly=readonly, options=options)


def find_gone(target: str, *, database: str | None = None) -> tuple[Database, Record] | None:
    """Return the row of an experiment whose folder is gone, by its path, name or UUID, and its open database, or None."""
    path = absolute(references.place(target)[0])
    url = database_url(parent_of(path), database)
    if not isinstance(url, str) and not Path(str(url.database)).exists():
        return None
    opened = open_database(url)
    for record in experiments.every(opened):
        if (target in (record.name, record.uuid) or path == record.location) and _is_gone(record):
            return opened, record
    opened.close()
    return None


def _is_gone(record: Record) -> bool:
    return not is_url(record.location) and not os.path.exists(os.path.join(record.location, "experiment.json"))


def dated(name: str, now: datetime) -> str:
    """Fill ``{date}`` in a name."""
    return name.replace("{date}", now.strftime("%Y-%m-%d"))


def placed(spec: Spec) -> Spec:
    """Return the spec with its storage where that really is, if a reference stands for it. The database is found when used."""
    if not references.is_reference(spec.storage):
        return spec
    storage, options = references.place(spec.storage, spec.storage_options)
    return spec.model_copy(update={"storage": str(storage), "storage_options": dict(options or {})})


def free_name(spec: ExperimentSpec) -> str:
    """Return the spec's name, or name-2, name-3 ... : the first that has nothing of its name in the storage."""
    name, count = spec.name, 1
    taken = set(folder_at(spec.storage, spec.storage_options).root.names())
    while name in taken:
        count += 1
        name = f"{spec.name}-{count}"
    return name


def experiment_path(spec: ExperimentSpec) -> str:
    """Return the location that an experiment of ``spec`` has."""
    return join(absolute(spec.storage), spec.name)


def check_free(spec: ExperimentSpec) -> None:
    """Raise ExperimentExists when the spec's folder is taken."""
    folder = folder_at(experiment_path(spec), spec.storage_options)
    try:
        exists, names = folder.exists(), folder.root.names()
        is_file = folder.is_local and not names and Path(folder.location).exists() and not Path(folder.location).is_dir()
    except OSError as error:
        raise SpecError(f"storage {parent_of(folder.location)}: {error.strerror or error}; name another") from error
    if exists:
        raise ExperimentExists(
            f"the name {spec.name!r} is taken: {folder.location} holds an experiment; continue it with "
            f"`holdfast restore {folder.location}`, choose another name, or set if_exists: restore or new"
        )
    if FORKING in names and (not folder.is_local or len(folder.leftovers()) < len(names)):
        raise ExperimentExists(
            f"{folder.location} is no experiment yet: a fork is being made there, or its making was cut off; wait for it, make "
            f"that fork again, which begins anew, or delete the folder; or choose another name than {spec.name!r}"
        )
    if is_file or len(folder.leftovers()) < len(names):
        raise ExperimentExists(f"{folder.location} exists and is no experiment; choose another name or storage")


def check_merge(spec: ExperimentSpec) -> None:
    """Raise InvalidInput or SpecError unless what the spec merges is there and fits; creates nothing."""
    if not spec.merge:
        return
    url = database_url(parent_of(experiment_path(spec)), spec.database)
    if not isinstance(url, str) and not Path(str(url.database)).exists():
        raise SpecError(f"merge: there is no experiment {spec.merge[0]!r}: the database {url.database} does not exist yet")
    database = open_database(url, readonly=True)
    try:
        merging.sources(database, spec, spec.merge)
    finally:
        database.close()


def check_storage(spec: ExperimentSpec) -> None:
    """Raise SpecError unless the storage can be written and the database's URL is one; a local storage is not touched."""
    connect(database_url(absolute(spec.storage), spec.database)).close()
    if is_url(spec.storage):
        _check_object_store(spec)
        return
    folder = Path(absolute(spec.storage))
    try:
        existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    except OSError as error:
        raise SpecError(f"storage {folder}: {error.strerror}; name another") from error
    if not existing.is_dir():
        raise SpecError(f"storage {folder}: {existing} is no folder; name another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SpecError(f"storage {folder}: {existing} cannot be written; fix its permissions or name another")


def _check_object_store(spec: ExperimentSpec) -> None:
    """Raise SpecError unless a probe can be written, and the lease can be held between hosts or by one database."""
    storage = folder_at(spec.storage, spec.storage_options)
    try:
        storage.write_probe()
    except StorageError as error:
        raise SpecError(f"storage {error}") from error
    if not storage.root.conditional and not (spec.database or settings().database_url):
        raise SpecError(
            f"storage {storage.location} has no conditional writes: two hosts with a database each could both drive an "
            "experiment; name one database that all of them share (database: postgresql+psycopg://...)"
        )


def create(
    spec: ExperimentSpec,
    *,
    seed: int,
    workdir: str,
    source: str | None = None,
    commit: str | None = None,
    pickled: bytes | None = None,
) -> Opened:
    """Create an experiment: its database (if that is new), its rows, and last its ``experiment.json``.

    Raises ExperimentExists when the name is taken, SpecError when the storage cannot be written or the database's URL is
    wrong; nothing is left then. What a crash leaves half-made is taken over by the next call; of two calls at once one wins.
    """
    check_free(spec)
    check_storage(spec)
    location = experiment_path(spec)
    folder = folder_at(location, spec.storage_options)
    url = database_url(parent_of(location), spec.database)
    connect(url).close()  # a wrong URL is refused before anything is made
    check_merge(spec)
    made = [part for part in (folder.path, *folder.path.parents) if not part.exists()]
    try:
        make_folder(folder.path)
        faults.point("experiment.path-made")
        with folder.root.exclusive():
            check_free(spec)
            folder.root.delete(FORKING)  # of a fork that was cut off before it had anything
            database = open_database(url, create_missing=True)
            try:
                record = _add_rows(database, spec, location, seed=seed, workdir=workdir, source=source, commit=commit)
                faults.point("experiment.rows-made")
                if spec.merge:
                    merging.merge(database, record.id, spec, record.uuid, spec.merge)
                if pickled is not None:
                    folder.root.write(TRAINABLE, pickled)
                identity = Identity(
                    uuid=record.uuid,
                    name=spec.name,
                    location=location,
                    spec=spec.stored(),
                    workdir=workdir,
                    seed=seed,
                    spec_source=source,
                    git_commit=commit,
                )
                _publish(folder, identity, database, record)
            except BaseException:
                database.close()
                raise
    except BaseException as error:
        _remove_made(folder, made)
        if isinstance(error, StorageError) and folder.is_local and not os.path.exists(location):
            raise SpecError(f"storage {parent_of(location)}: {error}") from error
        raise
    return Opened(folder=folder, database=database, record=record, spec=spec)


def _publish(folder: Folder, identity: Identity, database: Database, record: Record) -> None:
    """Write ``experiment.json``; rows whose folder another host was faster to take are deleted."""
    try:
        folder.create(identity)
    except ExperimentExists:
        experiments.delete(database, record.id)
        raise


def _remove_made(folder: Folder, made: Sequence[Path]) -> None:
    """Remove the folders that a refused creation made, unless somebody else uses them meanwhile."""
    with suppress(OSError):
        if folder.is_local and folder.path in made and folder.leftovers() == folder.root.names():
            for name in folder.leftovers():
                folder.root.delete(name)
    for part in made:
        with suppress(OSError):
            part.rmdir()


def _add_rows(
    database: Database, spec: ExperimentSpec, location: str, *, seed: int, workdir: str, source: str | None, commit: str | None
) -> Record:
    found = experiments.by_name(database, spec.name)
    if found is not None and found.epoch == 0 and found.location == location:
        experiments.delete(database, found.id)  # a crash cut its creation off: nobody ever drove it, and we hold its lock
    elif found is not None and _is_gone(found):
        beside = database.file is not None and database.file == Path(found.location).parent / DATABASE_FILE
        target = found.location if beside else f"{found.name} --database URL"
        raise ExperimentExists(
            f"the name {spec.name!r} is taken by the experiment in {found.location}, which is not there: if it was moved, "
            f"restore it from where it is; if it was removed, free the name with `holdfast delete {target}`; or choose another"
        )
    return experiments.create(
        database,
        spec,
        uuid=str(uuids.uuid4()),
        location=location,
        seed=seed,
        workdir=workdir,
        spec_source=source,
        git_commit=commit,
        code_digest=code_digest(spec),
    )


def code_digest(spec: ExperimentSpec) -> str | None:
    """Return the digest of the trainable's file, or None when it is no file that can be read."""
    target = spec.trainable.rpartition(":")[0]
    try:
        return digest(Path(target).read_text()) if target.endswith(".py") else None
    except (OSError, UnicodeDecodeError):
        return None


def git_commit(folder: Path) -> str | None:
    """Return the commit that is checked out where ``folder`` lies, or None."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
