"""Finding, creating and opening experiments: the path, its database, and whether they belong together."""

from __future__ import annotations

import os
import subprocess
import uuid as uuids
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from holdfast.callables import keep
from holdfast.core import faults
from holdfast.core.errors import (
    Corrupt,
    ExperimentExists,
    ExperimentNotFound,
    SpecError,
    StorageError,
)
from holdfast.core.spec import ExperimentSpec
from holdfast.core.values import digest
from holdfast.settings import settings
from holdfast.storage.atomic import make_folder
from holdfast.storage.database import experiments, merging
from holdfast.storage.database.engine import Database, Location, connect, sqlite_url
from holdfast.storage.database.experiments import Record, open_database
from holdfast.storage.folder import Folder, Identity

DATABASE_FILE = "holdfast.db"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An experiment's folder and rows, found to belong together."""

    folder: Folder
    database: Database
    record: Record
    spec: ExperimentSpec = field(repr=False)
    """not shown: it may name a database with a password"""

    def close(self) -> None:
        self.database.close()


def database_url(storage: Path, given: str | None) -> Location:
    """Return the database of a storage: the one given, else the environment's, else a SQLite file in it."""
    return given or settings().database_url or sqlite_url(storage / DATABASE_FILE)


def stored_spec(record: Record, storage: Path) -> ExperimentSpec:
    """Return the spec of a row, with the storage that it is in now."""
    try:
        return ExperimentSpec.parse({**record.spec, "storage": str(storage)}, source=f"stored spec of {record.name}")
    except SpecError as error:
        raise Corrupt(f"{error}; it is damaged, or a newer holdfast wrote it: update holdfast") from error


def open_path(path: str | Path, *, database: str | None = None, readonly: bool = False) -> Opened:
    """Open the experiment in a folder.

    Raises ExperimentNotFound when the folder is no experiment, Corrupt when its files or rows are damaged or do not belong
    together, DatabaseError when the database is missing. Nothing is changed.
    """
    if "://" in str(path):
        raise SpecError(f"{path} is an object store; this version keeps experiments in local folders only")
    if "\0" in str(path):
        raise ExperimentNotFound("a path has no NUL character; `holdfast list` shows the experiments of a storage")
    folder = Folder(Path(os.path.abspath(path)))
    identity = folder.identity()
    opened = open_database(database_url(folder.path.parent, database), readonly=readonly)
    try:
        record = experiments.by_uuid(opened, identity.uuid)
        if record is None:
            raise Corrupt(
                f"database {opened.label} does not know the experiment in {folder.path} ({identity.uuid}); "
                "name the database that it was made with by --database"
            )
        _refuse_copy(folder, identity, opened)
        spec = stored_spec(record, folder.path.parent)
    except BaseException:
        opened.close()
        raise
    return Opened(folder=folder, database=opened, record=record, spec=spec)


def _refuse_copy(folder: Folder, identity: Identity, database: Database) -> None:
    """Raise Corrupt for a second folder of one experiment on one database: both would drive the same rows."""
    original = Path(identity.location)
    if original == folder.path or not (original / "experiment.json").exists() or os.path.samefile(original, folder.path):
        return
    beside = original.parent / DATABASE_FILE
    if database.file is not None and not (beside.exists() and os.path.samefile(beside, database.file)):
        return  # the storage was copied as a whole: this database is the copy's own
    if Folder(original).identity().uuid == identity.uuid:
        raise Corrupt(
            f"{folder.path} is a copy of {original}, which still exists and has the same rows; use that one, or move it away"
        )


def find(target: str | Path, *, database: str | None = None, readonly: bool = False) -> Opened:
    """Open an experiment by its folder or, where a database is named, by its name or UUID."""
    if database is None or os.path.exists(os.path.join(target, "experiment.json")):
        return open_path(target, database=database, readonly=readonly)
    opened = open_database(database, readonly=True)
    try:
        record = experiments.by_name(opened, str(target)) or experiments.by_uuid(opened, str(target))
    finally:
        opened.close()
    if record is None:
        raise ExperimentNotFound(f"{str(target)!r} is neither an experiment's folder nor an experiment of {opened.label}")
    return open_path(record.location, database=database, readonly=readonly)


def find_gone(target: str, *, database: str | None = None) -> tuple[Database, Record] | None:
    """Return the row of an experiment whose folder is gone, by its path, name or UUID, and its open database, or None."""
    path = os.path.abspath(target)
    url = database_url(Path(path).parent, database)
    if not isinstance(url, str) and not Path(str(url.database)).exists():
        return None
    opened = open_database(url)
    for record in experiments.every(opened):
        if (target in (record.name, record.uuid) or path == record.location) and _is_gone(record):
            return opened, record
    opened.close()
    return None


def _is_gone(record: Record) -> bool:
    return not os.path.exists(os.path.join(record.location, "experiment.json"))


def dated(name: str, now: datetime) -> str:
    """Fill ``{date}`` in a name."""
    return name.replace("{date}", now.strftime("%Y-%m-%d"))


def free_name(spec: ExperimentSpec) -> str:
    """Return the spec's name, or name-2, name-3 ... : the first that has no folder in the storage."""
    name, count = spec.name, 1
    while (Path(spec.storage) / name).exists():
        count += 1
        name = f"{spec.name}-{count}"
    return name


def experiment_path(spec: ExperimentSpec) -> Path:
    """Return the folder that an experiment of ``spec`` has."""
    return Path(os.path.abspath(spec.storage)) / spec.name


def check_free(spec: ExperimentSpec) -> None:
    """Raise ExperimentExists when the spec's folder is taken."""
    path = experiment_path(spec)
    if os.path.exists(path / "experiment.json"):
        raise ExperimentExists(
            f"the name {spec.name!r} is taken: {path} holds an experiment; continue it with `holdfast restore {path}`, "
            "choose another name, or set if_exists: restore or new"
        )
    try:
        taken = path.exists() and (not path.is_dir() or len(Folder(path).leftovers()) < len(list(path.iterdir())))
    except OSError as error:
        raise SpecError(f"storage {path.parent}: {error.strerror}; name another") from error
    if taken:
        raise ExperimentExists(f"{path} exists and is no experiment; choose another name or storage")


def check_merge(spec: ExperimentSpec) -> None:
    """Raise InvalidInput or SpecError unless what the spec merges is there and fits; creates nothing."""
    if not spec.merge:
        return
    url = database_url(experiment_path(spec).parent, spec.database)
    if not isinstance(url, str) and not Path(str(url.database)).exists():
        raise SpecError(f"merge: there is no experiment {spec.merge[0]!r}: the database {url.database} does not exist yet")
    database = open_database(url, readonly=True)
    try:
        merging.sources(database, spec, spec.merge)
    finally:
        database.close()


def check_storage(spec: ExperimentSpec) -> None:
    """Raise SpecError unless the storage can be written; creates nothing."""
    folder = Path(os.path.abspath(spec.storage))
    try:
        existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    except OSError as error:
        raise SpecError(f"storage {folder}: {error.strerror}; name another") from error
    if not existing.is_dir():
        raise SpecError(f"storage {folder}: {existing} is no folder; name another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SpecError(f"storage {folder}: {existing} cannot be written; fix its permissions or name another")


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
    path = experiment_path(spec)
    folder = Folder(path)
    url = database_url(path.parent, spec.database)
    connect(url).close()  # a wrong URL is refused before anything is made
    check_merge(spec)
    made = [part for part in (path, *path.parents) if not part.exists()]
    try:
        make_folder(path)
        faults.point("experiment.path-made")
        with folder.locked():
            check_free(spec)
            database = open_database(url, create_missing=True)
            try:
                record = _add_rows(database, spec, path, seed=seed, workdir=workdir, source=source, commit=commit)
                faults.point("experiment.rows-made")
                if spec.merge:
                    merging.merge(database, record.id, spec, record.uuid, spec.merge)
                if pickled is not None:
                    keep(pickled, path)
                identity = Identity(
                    uuid=record.uuid, name=spec.name, location=str(path), spec=spec.stored(), workdir=workdir, seed=seed
                )
                folder.create(identity)
            except BaseException:
                database.close()
                raise
    except BaseException as error:
        _remove_made(folder, made)
        if isinstance(error, StorageError) and not os.path.exists(path):
            raise SpecError(f"storage {path.parent}: {error}") from error
        raise
    return Opened(folder=folder, database=database, record=record, spec=spec)


def _remove_made(folder: Folder, made: Sequence[Path]) -> None:
    """Remove the folders that a refused creation made, unless somebody else uses them meanwhile."""
    with suppress(OSError):
        if folder.path in made and folder.leftovers() == sorted(folder.path.iterdir()):
            for file in folder.leftovers():
                file.unlink(missing_ok=True)
    for part in made:
        with suppress(OSError):
            part.rmdir()


def _add_rows(
    database: Database, spec: ExperimentSpec, path: Path, *, seed: int, workdir: str, source: str | None, commit: str | None
) -> Record:
    found = experiments.by_name(database, spec.name)
    if found is not None and found.epoch == 0 and found.location == str(path):
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
        location=str(path),
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
