"""Experiments as rows: create, find, list, delete; and the schema of the database that holds them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import inspect, text

from holdfast.core import faults
from holdfast.core.errors import Corrupt, DatabaseError, ExperimentExists
from holdfast.core.spec import ExperimentSpec
from holdfast.core.values import dumps_ordered
from holdfast.storage.database.driver import add_audit
from holdfast.storage.database.engine import Database, Location, Statement, connect, sqlite_url, translated
from holdfast.storage.database.losses import repeatable
from holdfast.storage.database.rows import moment, now
from holdfast.storage.database.schema import VERSION


def _sql(body: str) -> Statement:
    return Statement(text(body))


_COLUMNS = (
    "id, uuid, name, location, spec, workdir, code_digest, seed, created, seq, epoch, active_seconds, stop_requested, ended,"
    " spec_source, git_commit"
)
_BY_UUID = _sql(f"SELECT {_COLUMNS} FROM experiment WHERE uuid = :uuid")
_BY_NAME = _sql(f"SELECT {_COLUMNS} FROM experiment WHERE name = :name")
_ALL = _sql(f"SELECT {_COLUMNS} FROM experiment ORDER BY id")
_ADD = _sql(
    "INSERT INTO experiment (uuid, name, location, spec, spec_source, git_commit, workdir, code_digest, seed, created, seq,"
    " epoch, active_seconds, stop_requested) VALUES (:uuid, :name, :location, :spec, :spec_source, :git_commit, :workdir,"
    " :code_digest, :seed, :created, 1, 0, 0, 0) RETURNING id"
)
_ADD_OBJECTIVE = _sql(
    "INSERT INTO objective (experiment_id, position, name, direction) VALUES (:experiment, :position, :name, :direction)"
)
_DELETE = _sql("DELETE FROM experiment WHERE id = :experiment")


@dataclass(frozen=True, kw_only=True)
class Record:
    """An experiment's row."""

    id: int
    uuid: str
    name: str
    location: str
    spec: dict[str, Any]
    workdir: str
    code_digest: str | None
    seed: int
    created: datetime
    seq: int
    epoch: int
    active_seconds: float
    stop_requested: bool
    ended: str | None
    spec_source: str | None = None
    git_commit: str | None = None


def _record(row: tuple[Any, ...]) -> Record:
    return Record(
        id=row[0],
        uuid=row[1],
        name=row[2],
        location=row[3],
        spec=_spec(row[4], row[2]),
        workdir=row[5],
        code_digest=row[6],
        seed=row[7],
        created=moment(row[8]),  # type: ignore[arg-type]  # the column is never null
        seq=row[9],
        epoch=row[10],
        active_seconds=float(row[11]),
        stop_requested=bool(row[12]),
        ended=row[13],
        spec_source=row[14],
        git_commit=row[15],
    )


def _spec(text: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Corrupt(f"the stored spec of {name!r} is damaged; restore the database from a backup")
    return found


@repeatable
def create(
    database: Database,
    spec: ExperimentSpec,
    *,
    uuid: str,
    location: str,
    seed: int,
    workdir: str,
    spec_source: str | None = None,
    git_commit: str | None = None,
    code_digest: str | None = None,
) -> Record:
    """Insert an experiment and its objectives; ExperimentExists when the name is taken in this database."""
    with database.write() as tx:
        taken = tx.run(_BY_NAME, name=spec.name)
        if taken:
            raise ExperimentExists(
                f"the name {spec.name!r} is taken by {taken[0][3]}; restore it with `holdfast restore {taken[0][3]}`, "
                "choose another name, or set if_exists: restore or new"
            )
        identity = tx.run(
            _ADD,
            uuid=uuid,
            name=spec.name,
            location=location,
            spec=dumps_ordered(spec.stored()),
            spec_source=spec_source,
            git_commit=git_commit,
            workdir=workdir,
            code_digest=code_digest,
            seed=seed,
            created=now(),
        )[0][0]
        objectives: list[dict[str, object]] = [
            {"experiment": identity, "position": place, "name": goal.name, "direction": goal.direction.value}
            for place, goal in enumerate(spec.goals)
        ]
        tx.many(_ADD_OBJECTIVE, objectives)
        add_audit(tx, identity, 1, 0, "created", {"location": location})
        return _record(tx.run(_BY_UUID, uuid=uuid)[0])


def by_uuid(database: Database, uuid: str) -> Record | None:
    """Return the experiment of that identity, or None."""
    rows = database.run(_BY_UUID, uuid=uuid)
    return _record(rows[0]) if rows else None


def by_name(database: Database, name: str) -> Record | None:
    """Return the experiment of that name, or None."""
    rows = database.run(_BY_NAME, name=name)
    return _record(rows[0]) if rows else None


def every(database: Database) -> list[Record]:
    """Return all experiments in order of creation."""
    return [_record(row) for row in database.run(_ALL)]


@repeatable
def delete(database: Database, experiment: int) -> None:
    """Delete an experiment's rows; configs stay, since others may share them."""
    with database.write() as tx:
        tx.run(_DELETE, experiment=experiment)


def open_database(url: Location, *, create_missing: bool = False, readonly: bool = False) -> Database:
    """Open the database at ``url`` and check its schema.

    Raises DatabaseError when it is missing (unless ``create_missing``), and Corrupt when it is empty, damaged, no holdfast
    database, or of a newer or older schema than this program's; nothing is changed then.
    """
    database = connect(url, readonly=True)  # a file that is refused is never changed
    file = database.file
    if file is None:
        return _open_server(database, create_missing=create_missing)
    if create_missing and (not file.exists() or (_is_empty(file) and _unborn(file))):
        _make(file)
    check_file(file)
    try:
        _check_version(database)
    finally:
        database.close()
    return connect(url, readonly=readonly)


def _open_server(database: Database, *, create_missing: bool) -> Database:
    try:
        if create_missing and _version(database) is None:
            _migrate_once(database)
        _check_version(database)
    except BaseException:
        database.close()
        raise
    return database


def has_schema(database: Database) -> bool:
    """Tell whether a database holds experiments, of whatever version."""
    return _version(database) is not None


_SCHEMA_LOCK = 0x686F6C6466617374
"""The advisory lock of a server's database under which its schema is made: "holdfast"."""


@repeatable
def _migrate_once(database: Database) -> None:
    """Make the schema, unless another process has made it while we waited for it to end."""
    with database.read() as guard:
        guard.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})
        if _version(database) is None:
            _migrate(database)


def _check_version(database: Database) -> None:
    found = version_of(database)
    refuse_newer(database, found)
    if found != VERSION:
        target = shlex.quote(database.label) if database.is_sqlite else "URL"  # a server's label lacks the password
        backup = ", which makes a backup first" if database.is_sqlite else " after a backup"
        remedy = f"run `holdfast db upgrade --database {target}`{backup}"
        raise Corrupt(f"database {database.label} has schema {found}, this program reads {VERSION}; {remedy}")


def version_of(database: Database) -> str:
    """Return the version of a database's schema; Corrupt when it has none."""
    found = _version(database)
    if found is None:
        raise Corrupt(f"database {database.label} has no holdfast schema; name another one, or delete it to begin anew")
    return found


def refuse_newer(database: Database, found: str) -> None:
    """Raise Corrupt when the schema ``found`` is newer than this program's."""
    if found > VERSION:
        raise Corrupt(f"database {database.label} has schema {found}, this program reads {VERSION}; update holdfast")


def check_file(file: Path) -> None:
    """Raise DatabaseError when a SQLite file is missing, Corrupt when it is empty or truncated."""
    if not file.exists():
        raise DatabaseError(f"database {file} is missing; put it back, or name another with --database")
    if _is_empty(file):
        raise Corrupt(f"database {file} is empty; put the lost file back, or delete it to begin anew")


def _is_empty(file: Path) -> bool:
    """Tell whether a SQLite file is empty; Corrupt when it is shorter than its header says, which SQLite finds out late."""
    try:
        pages = _pages(file)
        in_log = _size(Path(f"{file}-wal")) > 0  # then pages may be there still
        size = file.stat().st_size
        if pages is None and not in_log:
            pages = _pages(file)  # a log may have been written into the file meanwhile
    except OSError as error:
        raise DatabaseError(f"database {file} cannot be read: {error.strerror}; name a file that you may read") from error
    if not in_log and (pages is None or size < pages):
        raise Corrupt(f"database {file} is {'malformed or ' if pages is None else ''}truncated; restore it from a backup")
    return size == 0


def _size(file: Path) -> int:
    """Return how many bytes a file has, 0 when it is not there: who closes a database last removes its log."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _pages(file: Path) -> int | None:
    """Return how many bytes of pages a SQLite file has by its header; None when it is malformed, 0 when it is no SQLite file.

    SQLite itself reads it: closing any descriptor of a file gives up all locks of this process on it, those of its open
    connections too, unless SQLite knows of both.
    """
    if file.is_dir() or not os.access(file, os.R_OK):
        code = errno.EISDIR if file.is_dir() else errno.EACCES
        raise OSError(code, os.strerror(code), str(file))
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            (count,), (page,) = (connection.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
            return int(count) * int(page)
    except sqlite3.DatabaseError as error:
        return None if error.sqlite_errorcode in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_IOERR_SHORT_READ) else 0


def _unborn(file: Path) -> bool:
    """Tell whether nothing beside an empty database file shows that it once held experiments."""
    return not any((entry / "experiment.json").exists() for entry in file.parent.iterdir() if entry.is_dir())


def _version(database: Database) -> str | None:
    with database.read() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        return None if version is None else str(version)


_DRAFT_FOLDER = ".holdfast-db-"
_DRAFT_FILES = ("new.db", "new.db-wal", "new.db-shm", "new.db-journal")


def _make(file: Path) -> None:
    """Create a SQLite database beside its final place, so that a crash leaves all of it or nothing."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _sweep(file.parent)
        with _draft_folder(file.parent) as folder:
            draft = folder / _DRAFT_FILES[0]
            with closing(connect(sqlite_url(draft), create=True)) as fresh:
                _migrate(fresh)
                with fresh.engine.connect() as connection:
                    connection.exec_driver_sql("COMMIT")
                    connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            faults.point("experiment.database-drafted")
            try:
                os.link(draft, file)  # fails when another process was faster: its database is as good as ours
            except FileExistsError:
                if file.stat().st_size == 0:
                    os.replace(draft, file)
        descriptor = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DatabaseError(
            f"database {file} cannot be created: {error.strerror or error}; make its folder writable"
        ) from error


@contextmanager
def _draft_folder(parent: Path) -> Iterator[Path]:
    """Make a folder for a draft, locked while this process lives: what is not locked is a dead process's."""
    lock = None
    while lock is None:  # another process may sweep it before it is locked
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=_DRAFT_FOLDER))
        lock = _lock(folder)
    try:
        yield folder
    finally:
        _remove_draft(folder)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder; None when another process has locked it, or has removed it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(parent: Path) -> None:
    """Remove the drafts of processes that died while they made a database; whatever else lies in them stays."""
    for folder in parent.glob(f"{_DRAFT_FOLDER}*"):
        with suppress(OSError):  # not ours, then
            lock = _lock(folder)
            if lock is not None:
                _remove_draft(folder)
                os.close(lock)


def _remove_draft(folder: Path) -> None:
    with suppress(OSError):
        for name in _DRAFT_FILES:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _migrate(database: Database) -> None:
    from holdfast.storage.database.migrations import upgrade

    with translated(database):
        upgrade(database.engine)
