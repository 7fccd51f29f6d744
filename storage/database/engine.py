"""Opening databases, transactions, and statements that are compiled once."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool
from sqlalchemy.sql.base import Executable

from holdfast.core.errors import Corrupt, DatabaseError, HoldfastError, SpecError

BUSY_SECONDS = 60.0
"""How long a writer waits for another process's transaction."""


Location = URL | str
"""Where a database is: a SQLAlchemy URL. It may hold a password, and is stored nowhere."""

DRIVERS = ("sqlite", "sqlite+pysqlite", "postgresql+psycopg")
_SECRETS = frozenset({"password", "sslpassword", "passfile", "oauth_client_secret"})


class Statement:
    """A SQLAlchemy statement, compiled once per dialect and then run on the driver's own cursor.

    Building and looking up an expression costs several times what SQLite needs to run it; the loop's statements never
    change, so their text does not either. Values are bound as they are: no result types, no type processors.
    """

    def __init__(self, expression: Executable) -> None:
        self._expression = expression
        self._texts: dict[str, tuple[str, dict[str, Any]]] = {}

    def text(self, dialect: Dialect) -> tuple[str, dict[str, Any]]:
        """Return the SQL for ``dialect``, with named parameters, and the values of its literals."""
        found = self._texts.get(dialect.name)
        if found is None:
            compiled = self._expression.compile(dialect=dialect)  # type: ignore[attr-defined]  # every statement has it
            literals = {name: value for name, value in compiled.params.items() if value is not None}
            found = self._texts[dialect.name] = (str(compiled), literals)
        return found


class Transaction:
    """One open transaction: to write, or to read one state of the database by several statements."""

    def __init__(self, cursor: Any, dialect: Dialect) -> None:
        self._cursor = cursor
        self._dialect = dialect

    def run(self, statement: Statement, **values: object) -> list[tuple[Any, ...]]:
        """Run ``statement`` and return its rows (of RETURNING or SELECT)."""
        text, literals = statement.text(self._dialect)
        self._cursor.execute(text, {**literals, **values} if literals else values)
        return self._cursor.fetchall() if self._cursor.description else []

    def changed(self, statement: Statement, **values: object) -> int:
        """Run ``statement`` and return how many rows it changed."""
        self.run(statement, **values)
        return int(self._cursor.rowcount)

    def many(self, statement: Statement, rows: list[dict[str, object]]) -> None:
        """Run ``statement`` once for each of ``rows``."""
        if rows:
            text, literals = statement.text(self._dialect)
            self._cursor.executemany(text, [{**literals, **row} for row in rows] if literals else rows)


class Database:
    """One database: short write transactions, one at a time in this process, and reads beside them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        self.file = Path(engine.url.database or "") if self.is_sqlite else None
        """the SQLite file, or None"""
        self._lock = threading.RLock()
        self._writer: Any = None
        self._writing = False
        self._written: tuple[int, int] | None = None
        """device and inode of the SQLite file that the first write went to"""

    @property
    def label(self) -> str:
        """The URL without passwords, to be shown."""
        return _shown(self.engine.url)

    @property
    def clock(self) -> str:
        """SQL for the seconds since 1970 by the database's clock."""
        if self.is_sqlite:
            return "((julianday('now') - 2440587.5) * 86400.0)"
        return "extract(epoch from clock_timestamp())"

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """Run a write transaction: committed when the body ends, rolled back when it raises.

        A body cannot open another one. DatabaseError when the SQLite file was deleted or exchanged since the first write:
        what is written to an open file without a name is lost.
        """
        with self._lock, translated(self):
            if self._writing:
                raise RuntimeError("a write transaction is open in this thread already")
            cursor = self._begin()
            self._writing = True
            try:
                yield Transaction(cursor, self.engine.dialect)
                cursor.execute("COMMIT")
            except BaseException:
                self._abandon(cursor)
                raise
            finally:
                self._writing = False
                cursor.close()

    def _begin(self) -> Any:
        """Return a cursor in a new transaction; a server's connection that broke while it was idle is made anew once."""
        self._check_file()
        idle = self._writer is not None
        try:
            if self._writer is None:
                self._writer = self.engine.raw_connection()
                if not self.is_sqlite:
                    self.engine.dialect.set_isolation_level(self._writer.dbapi_connection, "AUTOCOMMIT")
                self._writer.detach()
            cursor = self._writer.cursor()
            cursor.execute("BEGIN IMMEDIATE" if self.is_sqlite else "BEGIN")
        except BaseException as error:
            self._drop_writer()
            if idle and not self.is_sqlite and isinstance(error, self.engine.dialect.loaded_dbapi.Error):
                return self._begin()
            raise
        return cursor

    def _check_file(self) -> None:
        if self.file is None:
            return
        try:
            found = os.stat(self.file)
        except FileNotFoundError:
            identity = None
        else:
            identity = (found.st_dev, found.st_ino)
        self._written = self._written or identity
        if identity is None or identity != self._written:
            raise DatabaseError(f"database {self.file} was deleted or exchanged while it was open; put it back, then restore")

    def _abandon(self, cursor: Any) -> None:
        try:
            cursor.execute("ROLLBACK")
        except Exception:  # noqa: BLE001  # the connection is broken or no transaction is open: begin afresh next time
            self._drop_writer()

    def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(Exception):  # it is broken: there is nothing to be saved from it
                writer.close()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a connection for SELECTs of SQLAlchemy expressions."""
        with translated(self), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Transaction]:
        """Run several SELECTs that see one state of the database, outside the writer's lock."""
        begin = "BEGIN" if self.is_sqlite else "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"
        with self._cursor() as cursor:
            cursor.execute(begin)
            yield Transaction(cursor, self.engine.dialect)

    def run(self, statement: Statement, **values: object) -> list[tuple[Any, ...]]:
        """Run one SELECT, compiled once, outside the writer's lock."""
        with self._cursor() as cursor:
            return Transaction(cursor, self.engine.dialect).run(statement, **values)

    @contextmanager
    def _cursor(self) -> Iterator[Any]:
        with translated(self):
            connection = self.engine.raw_connection()
            try:
                yield connection.cursor()
            finally:
                connection.close()  # the pool rolls back

    def close(self) -> None:
        """Close every connection; the object can be used again."""
        with self._lock:
            self._drop_writer()
        self.engine.dispose()


@contextmanager
def translated(database: Database) -> Iterator[None]:
    """Raise DatabaseError, or Corrupt, naming the database, for what its driver raises."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise _explained(error, database.label) from error
    except Exception as error:
        if isinstance(error, database.engine.dialect.loaded_dbapi.Error):
            raise _explained(error, database.label) from error
        raise


def _explained(error: Exception, label: str) -> HoldfastError:
    origin = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = str(origin).strip() or type(origin).__name__
    damage = {
        "malformed": "the file is damaged; restore it from a backup",
        "not a database": "the file is damaged or is something else; restore it from a backup",
    }
    hints = {
        "readonly": "make the file and its folder writable",
        "unable to open": "check that the folder exists and may be written",
        "locked": f"another process held it for more than {BUSY_SECONDS:.0f} s; end that process",
        "full": "free some space and restore",
        "disk I/O": "check the disk and its free space, then restore",
    }
    kind: type[HoldfastError] = Corrupt if any(sign in text for sign in damage) else DatabaseError
    hint = next((remedy for sign, remedy in {**damage, **hints}.items() if sign in text), "see the cause above")
    return kind(f"database {label}: {text}; {hint}")


def _shown(url: URL) -> str:
    hidden = {key: "***" for key in url.query if key in _SECRETS}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def parse_url(url: str) -> URL:
    """Return the SQLAlchemy URL in ``url``; SpecError when it is none, or its driver is missing. Shows no password.

    ``postgresql://`` means psycopg. Drivers for asyncio and databases in memory are refused.
    """
    allowed = "allowed: sqlite:////path/file.db, postgresql+psycopg://user@host/name"
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.drivername not in DRIVERS:
            raise SpecError(f"database is {parsed.drivername}; {allowed}")
        parsed.get_dialect().import_dbapi()
    except SpecError:
        raise
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise SpecError(f"database is no SQLAlchemy URL; {allowed}") from None
    except ImportError as error:
        raise SpecError(f"database needs the Python package {error.name!r}; install holdfast[postgres]") from None
    if parsed.get_backend_name() == "sqlite" and (parsed.database in (None, "", ":memory:") or parsed.query):
        raise SpecError("database is in memory, or has options; name a SQLite file: sqlite:////path/file.db")
    return parsed


def sqlite_url(file: Path) -> URL:
    """Return the URL of a SQLite file, whatever characters its path has."""
    return URL.create("sqlite", database=str(file))


def connect(url: Location, *, readonly: bool = False, create: bool = False) -> Database:
    """Return the database at ``url``; connections are opened when they are needed.

    A SQLite file is created with ``create`` only; one that is opened ``readonly`` is never changed.
    """
    parsed = parse_url(url) if isinstance(url, str) else url
    if parsed.get_backend_name() == "sqlite":
        return Database(_sqlite(parsed, readonly=readonly, create=create))
    return Database(create_engine(parsed, pool_pre_ping=True))


def _sqlite(url: URL, *, readonly: bool, create: bool) -> Engine:
    file = Path(os.path.abspath(url.database or ""))
    writable = create or (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK))
    # What only looks keeps no connection to a file that it may not lock: the file may get a writer later.
    pool: dict[str, Any] = {"poolclass": QueuePool, "pool_size": 8, "max_overflow": 64} if writable else {"poolclass": NullPool}

    def creator() -> sqlite3.Connection:
        # A connection that may write takes its -wal and -shm files along when it closes; one that may not leaves them.
        mode = "rwc" if create else "rw" if writable else "ro"
        if not writable and not Path(f"{file}-wal").exists():
            mode += "&immutable=1"  # nobody writes, and the -shm file that readers share cannot be made
        name = f"{file.as_uri()}?mode={mode}"
        connection = sqlite3.connect(name, uri=True, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
        try:
            if readonly or not writable:
                connection.execute("PRAGMA query_only=ON")
            else:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine(url.set(database=str(file)), creator=creator, paramstyle="named", **pool)

    @event.listens_for(engine, "begin")
    def _snapshot(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")  # the driver is in autocommit mode; a migration is one transaction

    return engine
