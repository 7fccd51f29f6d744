"""Opening databases, transactions, and statements that are compiled once."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import QueuePool
from sqlalchemy.sql.base import Executable

from holdfast.core.errors import DatabaseError, SpecError

BUSY_SECONDS = 60.0
"""How long a writer waits for another process's transaction."""


Location = URL | str
"""Where a database is: a SQLAlchemy URL. It may hold a password, and is stored nowhere."""


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
    """One open write transaction."""

    def __init__(self, cursor: Any, dialect: Dialect) -> None:
        self._cursor = cursor
        self._dialect = dialect

    def run(self, statement: Statement, **values: object) -> list[tuple[Any, ...]]:
        """Run ``statement`` and return its rows (of RETURNING or SELECT)."""
        text, literals = statement.text(self._dialect)
        self._cursor.execute(text, {**literals, **values})
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
        self._lock = threading.RLock()
        self._writer: Any = None

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @property
    def file(self) -> Path | None:
        """The SQLite file, or None."""
        name = self.engine.url.database
        return Path(name) if self.is_sqlite and name and name != ":memory:" else None

    @property
    def label(self) -> str:
        """The URL without its password, to be shown."""
        return self.engine.url.render_as_string(hide_password=True)

    @property
    def clock(self) -> str:
        """SQL for the seconds since 1970 by the database's clock."""
        if self.is_sqlite:
            return "((julianday('now') - 2440587.5) * 86400.0)"
        return "extract(epoch from clock_timestamp())"

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """Run a write transaction: committed when the body ends, rolled back when it raises."""
        with self._lock, translated(self):
            connection = self._connection()
            cursor = connection.cursor()
            try:
                cursor.execute("BEGIN IMMEDIATE" if self.is_sqlite else "BEGIN")
                yield Transaction(cursor, self.engine.dialect)
                cursor.execute("COMMIT")
            except BaseException:
                self._abandon(cursor)
                raise
            finally:
                cursor.close()

    def _connection(self) -> Any:
        if self._writer is None:
            self._writer = self.engine.raw_connection()
        return self._writer

    def _abandon(self, cursor: Any) -> None:
        try:
            cursor.execute("ROLLBACK")
        except Exception:  # noqa: BLE001  # the connection is broken or no transaction is open: begin afresh next time
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.invalidate()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a connection for SELECTs; it sees one consistent state."""
        with translated(self), self.engine.connect() as connection:
            yield connection

    def run(self, statement: Statement, **values: object) -> list[tuple[Any, ...]]:
        """Run one SELECT, compiled once, outside the writer's lock."""
        sql, literals = statement.text(self.engine.dialect)
        with translated(self), self.engine.connect() as connection:
            return [tuple(row) for row in connection.exec_driver_sql(sql, {**literals, **values})]

    def close(self) -> None:
        """Close every connection; the object can be used again."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        self.engine.dispose()


@contextmanager
def translated(database: Database) -> Iterator[None]:
    """Raise DatabaseError, naming the database, for what its driver raises."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise _explained(error, database.label) from error
    except Exception as error:
        if isinstance(error, database.engine.dialect.loaded_dbapi.Error):
            raise _explained(error, database.label) from error
        raise


def _explained(error: Exception, label: str) -> DatabaseError:
    origin = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = str(origin).strip() or type(origin).__name__
    hints = {
        "readonly": "make the file and its folder writable",
        "unable to open": "check that the folder exists and may be written",
        "locked": f"another process held it for more than {BUSY_SECONDS:.0f} s; end that process",
        "full": "free some space and restore",
        "malformed": "the file is damaged; restore it from a backup",
        "not a database": "the file is damaged or is something else; restore it from a backup",
    }
    hint = next((remedy for sign, remedy in hints.items() if sign in text), "see the cause above")
    return DatabaseError(f"database {label}: {text}; {hint}")


def parse_url(url: str) -> URL:
    """Return the SQLAlchemy URL in ``url``; SpecError when it is none, or its driver is missing. Shows no password."""
    try:
        parsed = make_url(url)
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError):
        raise SpecError(
            "database is no SQLAlchemy URL; allowed: sqlite:////path/file.db, postgresql+psycopg://user@host/name"
        ) from None
    except ModuleNotFoundError as error:
        raise SpecError(f"database needs the Python package {error.name!r}; install holdfast[postgres]") from None
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise SpecError(f"database is {parsed.get_backend_name()}; allowed: sqlite, postgresql+psycopg")
    return parsed


def sqlite_url(file: Path) -> URL:
    """Return the URL of a SQLite file, whatever characters its path has."""
    return URL.create("sqlite", database=str(file))


def connect(url: URL | str, *, readonly: bool = False) -> Database:
    """Return the database at ``url``; connections are opened when they are needed.

    A SQLite file that is opened ``readonly`` is never created or changed.
    """
    parsed = parse_url(url) if isinstance(url, str) else url
    if parsed.get_backend_name() == "sqlite":
        return Database(_sqlite(parsed, readonly=readonly))
    return Database(create_engine(parsed, pool_pre_ping=True))


def _sqlite(url: URL, *, readonly: bool) -> Engine:
    def creator() -> sqlite3.Connection:
        database = url.database or ":memory:"
        if readonly:
            # A connection that may write takes its -wal and -shm files along when it closes; one that may not leaves them.
            writable = os.access(database, os.W_OK) and os.access(Path(database).absolute().parent, os.W_OK)
            database = f"{Path(database).absolute().as_uri()}?mode={'rw' if writable else 'ro'}"
        return sqlite3.connect(database, uri=readonly, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)

    engine = create_engine(url, creator=creator, paramstyle="named", poolclass=QueuePool, pool_size=8, max_overflow=64)

    @event.listens_for(engine, "connect")
    def _pragmas(connection: sqlite3.Connection, _record: object) -> None:
        if readonly:
            connection.execute("PRAGMA query_only=ON")
        else:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _snapshot(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")  # the driver is in autocommit mode; a read sees one state

    return engine
