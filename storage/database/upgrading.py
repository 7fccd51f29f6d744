"""The schema of a database that exists: look at it, and bring it to the one that this program reads."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection, text

from holdfast.core import faults
from holdfast.core.errors import Corrupt, DatabaseError, HoldfastError, LeaseHeld
from holdfast.storage.atomic import sync_folder
from holdfast.storage.database.engine import Database, Location, connect, translated
from holdfast.storage.database.experiments import check_file, refuse_newer, version_of
from holdfast.storage.database.leases import describe
from holdfast.storage.database.schema import VERSION
from holdfast.storage.leasing import Liveness


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What a database is."""

    database: str
    """its URL, without passwords"""
    schema: str
    reads: str = VERSION
    """the schema that this program reads and writes"""
    file: Path | None = None
    bytes: int | None = None
    experiments: int = 0


@dataclass(frozen=True, kw_only=True)
class Upgraded:
    """What :func:`upgrade` did: nothing when ``before`` is ``after``."""

    database: str
    before: str
    after: str
    backup: Path | None = None
    """the file as it was; None where nothing was changed, and for a server"""


def _look(url: Location) -> Database:
    """Return an existing database to be read, whatever its schema."""
    database = connect(url, readonly=True)
    if database.file is not None:
        check_file(database.file)
    return database


def inspect(url: Location) -> Inspected:
    """Return what the database at ``url`` is, whatever its schema; nothing is changed.

    Raises DatabaseError when it is missing, Corrupt when it is empty, damaged or no holdfast database.
    """
    with closing(_look(url)) as database:
        schema = version_of(database)
        with database.read() as connection:
            count = connection.execute(text("SELECT COUNT(*) FROM experiment")).scalar_one()
            size = None
            if database.file is not None:
                pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
                size = int(pages) * int(connection.exec_driver_sql("PRAGMA page_size").scalar_one())
        return Inspected(database=database.label, schema=schema, file=database.file, bytes=size, experiments=int(count))


def upgrade(url: Location, *, liveness: Liveness) -> Upgraded:
    """Bring the database at ``url`` to the schema that this program reads, in one transaction.

    A SQLite file is copied beside itself first: ``NAME.backup-<schema>-<UTC time>``, checked and durable before anything is
    changed. Nothing is done when the schema is current. Raises Corrupt for a newer schema, LeaseHeld while somebody drives
    an experiment in it, DatabaseError when it cannot be written; the database is then as it was.
    """
    with closing(_look(url)) as looked:
        before = version_of(looked)
        refuse_newer(looked, before)
        if before == VERSION:
            return Upgraded(database=looked.label, before=before, after=before)
        with looked.read() as connection:
            _refuse_driven(looked, connection, liveness)
    with closing(connect(url)) as database:
        return _upgrade(database, liveness)


def _upgrade(database: Database, liveness: Liveness) -> Upgraded:
    backup: Path | None = None
    try:
        with translated(database), database.engine.connect() as connection:
            # The first statement is a write: nobody else writes from here on, so that the backup is the state before.
            connection.execute(text("UPDATE alembic_version SET version_num = version_num"))
            before = str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one())
            refuse_newer(database, before)
            if before == VERSION:  # somebody else was faster
                return Upgraded(database=database.label, before=before, after=before)
            _refuse_driven(database, connection, liveness, lock=not database.is_sqlite)
            if database.file is not None:
                backup = back_up(database.file, before, datetime.now(UTC))
                faults.point("upgrade.backed-up")
            _migrate(connection)
            faults.point("upgrade.migrated")
            connection.commit()
    except HoldfastError as error:
        if backup is None:
            raise
        raise type(error)(f"{error}; the database is as it was, and its backup is {backup}") from error
    faults.point("upgrade.committed")
    return Upgraded(database=database.label, before=before, after=VERSION, backup=backup)


def _migrate(connection: Connection) -> None:
    """Run the migrations that are missing in the open transaction of ``connection``."""
    from alembic.util import CommandError

    from holdfast.storage.database.migrations import upgrade_on

    try:
        upgrade_on(connection)
    except CommandError as error:
        raise Corrupt(f"the database's schema is none that holdfast wrote: {error}; restore it from a backup") from error


def _refuse_driven(database: Database, connection: Connection, liveness: Liveness, *, lock: bool = False) -> None:
    """Raise LeaseHeld when somebody who is not known to be gone drives an experiment.

    With ``lock``, nobody can take a lease until the transaction ends (on SQLite its writer keeps everybody out anyhow).
    """
    # Only what every version of the schema has.
    query = f"SELECT name, holder, lease_expires - {database.clock} FROM experiment ORDER BY id"
    for name, holder, remaining in connection.execute(text(query + (" FOR UPDATE" if lock else ""))).all():
        if holder is None or remaining is None or remaining <= 0:
            continue
        found = json.loads(holder)
        if liveness(found) is not False:
            raise LeaseHeld(
                f"{describe(found)} drives {name!r} in database {database.label}; its lease runs {remaining:.0f} s unless "
                "renewed; wait for it or end it, then upgrade; nothing was changed"
            )


def back_up(file: Path, version: str, moment: datetime) -> Path:
    """Copy a SQLite database beside itself, check the copy and make it durable; return the copy's path.

    It holds what is committed, from the log too. DatabaseError when it cannot be written, Corrupt when the database is
    damaged; no copy is left then.
    """
    draft = file.with_name(f"{file.name}.backup-unfinished")
    with _said(file, draft):
        draft.unlink(missing_ok=True)  # what a crash left: nobody else makes one, because the caller is the only writer
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, file.stat().st_mode & 0o777))
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as source, closing(_draft(draft)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log
            found = [str(row[0]) for row in copy.execute("PRAGMA integrity_check(1)")]
            if found != ["ok"]:
                raise Corrupt(f"database {file} is damaged ({found[0]}); restore it from a backup; nothing was changed")
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        backup = _free(file.with_name(f"{file.name}.backup-{version}-{moment:%Y%m%dT%H%M%SZ}"))
        os.rename(draft, backup)
        sync_folder(file.parent)
    return backup


def _free(path: Path) -> Path:
    """Return ``path``, or path-2, path-3 ...: the first that does not exist."""
    found, count = path, 1
    while found.exists():
        count += 1
        found = path.with_name(f"{path.name}-{count}")
    return found


def _draft(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


@contextmanager
def _said(file: Path, draft: Path) -> Iterator[None]:
    """Raise DatabaseError for what hinders a backup, and leave none that is unfinished."""
    hint = "free some space or make its folder writable; nothing was changed"
    try:
        yield
    except BaseException as error:
        for part in (draft, draft.with_name(f"{draft.name}-journal")):
            with suppress(OSError):
                part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DatabaseError(f"no backup of database {file} can be made: {error.strerror or error}; {hint}") from error
        if isinstance(error, sqlite3.DatabaseError) and "malformed" in str(error):
            raise Corrupt(f"database {file} is damaged: {error}; restore it from a backup; nothing was changed") from error
        if isinstance(error, sqlite3.Error):
            raise DatabaseError(f"no backup of database {file} can be made: {error}; {hint}") from error
        raise
