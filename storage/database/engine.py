"""Opening databases, transactions, and statements that are compiled once."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, make_url
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.sql.base import Executable

from holdfast.core.errors import ConnectionLost, DatabaseError, InvalidInput, SpecError
from holdfast.storage.database import losses
from holdfast.storage.database.explain import explained
from holdfast.storage.database.losses import Patience, Sitting, Ticket, repeatable
from holdfast.storage.database.sqlite import sqlite_engine

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
        with _STORABLE:
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
            with _STORABLE:
                self._cursor.executemany(text, [{**literals, **row} for row in rows] if literals else rows)


class _Storable:
    """Raise InvalidInput for a value that no database can hold: an integer of more than 64 bits, text that is no Unicode."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, (OverflowError, UnicodeEncodeError)):
            raise InvalidInput(f"a value that no database can hold was given ({error}); give another") from None


_STORABLE = _Storable()  # without a state; a generator would cost as much as what SQLite does


class Database:
    """One database: short write transactions, one at a time in this process, and reads beside them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        self.file = Path(engine.url.database or "") if self.is_sqlite else None
        """the SQLite file, or None"""
        self._lock = threading.RLock()
        self._writer: Any = None
        self._sitting: Sitting | None = None
        self._ticket: Ticket | None = None
        """the write transaction that is open, or that was lost with its connection"""
        self._reached = False
        """whether the server was ever reached: then it is worth waiting for"""
        self._lost_at: float | None = None
        """since when the server has not been heard of"""
        self._writing = False
        self._written: tuple[int, int] | None = None
        """device and inode of the SQLite file that the first write went to"""

    @property
    def label(self) -> str:
        """The URL without passwords, to be shown."""
        return _shown(self.engine.url)

    @property
    def address(self) -> str:
        """The URL with its password: for processes that are to open it, never to be shown or stored."""
        return self.engine.url.render_as_string(hide_password=False)

    @property
    def clock(self) -> str:
        """SQL for the seconds since 1970 by the database's clock."""
        if self.is_sqlite:
            return "((julianday('now') - 2440587.5) * 86400.0)"
        return "extract(epoch from clock_timestamp())"

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """Run a write transaction: committed when the body ends, rolled back when it raises.

        A body cannot open another one. ConnectionLost when a server's connection was lost: nothing was written then, and a
        function that does nothing else can be made to repeat it (``repeatable``). OutcomeUnknown when it was lost during the
        commit and the server cannot tell what became of it. DatabaseError when the SQLite file was deleted or exchanged
        since the first write: what is written to an open file without a name is lost.
        """
        with translated(self):
            with self._lock:
                if self._writing:
                    raise RuntimeError("a write transaction is open in this thread already")
                cursor = None
                self._writing = True
                try:
                    cursor = self._begin()
                    yield Transaction(cursor, self.engine.dialect)
                    doubtful = self._commit(cursor)
                except BaseException as error:
                    if cursor is None:
                        self._drop_writer()  # a signal may come between the two: nobody would end the transaction
                    else:
                        self._abandon(cursor, error)
                    raise
                finally:
                    self._writing = False
                    if cursor is not None:
                        with suppress(Exception):  # of a connection that is gone: what ended the body counts, not that
                            cursor.close()
            if doubtful is not None:  # without the lock: other threads need not wait for the answer
                self._find_out(doubtful)

    @contextmanager
    def aside(self) -> Iterator[Transaction]:
        """Run a small write transaction on a connection of its own: it waits for no other thread's.

        For what may be written twice, and lost when a server crashes right after it. ConnectionLost when the connection was
        lost, whatever became of the commit.
        """
        self._check_file()
        with self._cursor() as cursor:
            if self.is_sqlite:
                cursor.execute("BEGIN IMMEDIATE")
            else:
                cursor.execute(losses.ASIDE, prepare=False)
            yield Transaction(cursor, self.engine.dialect)
            cursor.connection.commit()

    def _begin(self) -> Any:
        """Return a cursor in a new transaction; a server's connection that broke while it was idle is made anew once."""
        self._check_file()
        idle = self._writer is not None
        try:
            if self._writer is None:
                self._open_writer()
            cursor = self._writer.cursor()
            if self._sitting is None:
                cursor.execute("BEGIN IMMEDIATE")
            else:
                self._ticket = losses.begin(cursor, self._sitting)
        except BaseException as error:
            self._drop_writer()
            if self._is_driver_error(error) and not self.is_sqlite:
                self.engine.dispose()  # those in the pool have most likely gone with it
                if idle:
                    return self._begin()
                self._unreached(error)
            raise
        return cursor

    def _open_writer(self) -> None:
        pooled = self.engine.raw_connection()
        self._writer = pooled.dbapi_connection
        pooled.detach()
        if self.is_sqlite:
            return
        self.engine.dialect.set_isolation_level(self._writer, "AUTOCOMMIT")
        with self._writer.cursor() as cursor:
            self._sitting = losses.sit_down(cursor)
            if self._ticket is not None:
                losses.end(cursor, self._ticket)
        self._heard()
        self._ticket = None

    def _commit(self, cursor: Any) -> Ticket | None:
        """Commit; return the transaction when the connection was lost meanwhile."""
        try:
            cursor.execute("COMMIT")
        except Exception as error:
            ticket = self._ticket
            if ticket is None or not self._is_loss(error, self._writer):
                raise
            self._drop_writer()
            return ticket
        self._ticket = None
        return None

    def _find_out(self, ticket: Ticket) -> None:
        """Return when the transaction was committed; ConnectionLost when it certainly was not."""
        patience = Patience()
        while True:
            try:
                with self._cursor() as cursor:
                    committed = losses.is_committed(cursor, ticket, self.label)
            except ConnectionLost:
                committed = None
            if committed is not None:
                break
            patience.pause(losses.unknown(self.label))
        if not committed:
            raise self._lost()

    def _lost(self) -> ConnectionLost:
        error = ConnectionLost(
            f"database {self.label}: the connection was lost; nothing was written: look after the server, then try again"
        )
        self._lost_at = self._lost_at or time.monotonic()
        error.away = time.monotonic() - self._lost_at
        return error

    def _heard(self) -> None:
        self._reached, self._lost_at = True, None

    def _unreached(self, error: BaseException) -> None:
        """Raise ConnectionLost for a server that was there before: it may come back. Who never was is no loss."""
        if self._reached and not self.is_sqlite and self._is_driver_error(error):
            raise self._lost() from error

    def _is_driver_error(self, error: BaseException) -> bool:
        return isinstance(error, self.engine.dialect.loaded_dbapi.Error)

    def _is_loss(self, error: BaseException, connection: Any) -> bool:
        return not self.is_sqlite and self._is_driver_error(error) and bool(connection.closed)

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

    def _abandon(self, cursor: Any, cause: BaseException) -> None:
        """Roll back; ConnectionLost when the transaction was lost with its connection."""
        if self._writer is not None and self._is_loss(cause, self._writer):
            self._drop_writer()
            raise self._lost() from cause
        try:
            cursor.execute("ROLLBACK")
            self._ticket = None
        except Exception:  # noqa: BLE001  # the connection is broken or no transaction is open: begin afresh next time
            self._drop_writer()

    def _drop_writer(self) -> None:
        writer, self._writer, self._sitting = self._writer, None, None
        if writer is not None:
            with suppress(Exception):  # it is broken: there is nothing to be saved from it
                writer.close()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a connection for SELECTs of SQLAlchemy expressions."""
        with translated(self), self._connected() as connection:
            yield connection

    @repeatable
    def _connected(self) -> Connection:
        """Return a connection that works, whatever became of the pool's."""
        connection = None
        try:
            connection = self.engine.connect()
            if not self.is_sqlite:
                connection.exec_driver_sql("SELECT 1")
                connection.rollback()
                self._heard()
        except DBAPIError as error:
            if connection is not None:
                connection.close()
            if error.orig is not None:
                self._unreached(error.orig)
            raise
        return connection

    @contextmanager
    def snapshot(self) -> Iterator[Transaction]:
        """Run several SELECTs that see one state of the database, outside the writer's lock.

        ConnectionLost when a server's connection is lost within the body; it was there when the body began.
        """
        begin = "BEGIN" if self.is_sqlite else "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"
        with ExitStack() as stack:
            yield Transaction(self._begun(stack, begin), self.engine.dialect)

    @repeatable
    def _begun(self, stack: ExitStack, begin: str) -> Any:
        with ExitStack() as opening:
            cursor = opening.enter_context(self._cursor())
            cursor.execute(begin)
            stack.push(opening.pop_all())
        return cursor

    @repeatable
    def run(self, statement: Statement, **values: object) -> list[tuple[Any, ...]]:
        """Run one SELECT, compiled once, outside the writer's lock; repeated when a server's connection is lost."""
        with self._cursor() as cursor:
            return Transaction(cursor, self.engine.dialect).run(statement, **values)

    @contextmanager
    def _cursor(self) -> Iterator[Any]:
        with translated(self):
            try:
                connection = self.engine.raw_connection()
            except Exception as error:
                self._unreached(error)
                raise
            try:
                yield connection.cursor()
                self._heard()
            except Exception as error:
                if self._is_loss(error, connection.dbapi_connection):
                    connection.invalidate()
                    self.engine.dispose()  # the others in the pool have most likely gone with it
                    raise self._lost() from error
                raise
            finally:
                connection.close()  # the pool rolls back

    def is_locked(self, *, patience: float) -> bool:
        """Tell whether another process keeps the SQLite file locked for ``patience`` seconds; a server ends such itself."""
        if self.file is None:
            return False
        with translated(self), closing(self._probe(patience)) as probe:
            try:
                probe.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                return "locked" in str(error)
            probe.execute("ROLLBACK")
        return False

    def _probe(self, patience: float) -> sqlite3.Connection:
        assert self.file is not None
        return sqlite3.connect(f"{self.file.as_uri()}?mode=rw", uri=True, timeout=patience, isolation_level=None)

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
        raise explained(error, database.label) from error
    except Exception as error:
        if isinstance(error, database.engine.dialect.loaded_dbapi.Error):
            raise explained(error, database.label) from error
        raise


def shown(url: Location) -> str:
    """Return a URL as it may be shown: without passwords, or ``***`` when it is none."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return "***"
    secret = parsed.password is not None or not _SECRETS.isdisjoint(parsed.query)
    return url if isinstance(url, str) and not secret else _shown(parsed)


def with_password(url: str, password: str) -> str:
    """Return a URL with its user's password in it: not to be shown."""
    return parse_url(url).set(password=password).render_as_string(hide_password=False)


def _shown(url: URL) -> str:
    hidden = {key: "***" for key in url.query if key in _SECRETS}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def parse_url(url: str) -> URL:
    """Return the SQLAlchemy URL in ``url``; SpecError when it is none, or its driver is missing. Shows no password.

    ``postgresql://`` means psycopg. Drivers for asyncio and databases in memory are refused.
    """
    allowed = "allowed: sqlite:////path/file.db, postgresql+psycopg://user@host/name"
    if not url.startswith("sqlite") and (url.partition("?")[0].count("@") > 1 or "%00" in url or "\0" in url):
        raise SpecError(
            "database is a URL whose parts cannot be told apart; in user and password write %40 for @, %3A for :, "
            "%2F for / and %25 for %, and no NUL character"
        )
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
        raise SpecError(f"database needs the Python package {error.name or 'psycopg'!r}; install holdfast[postgres]") from None
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
        return Database(sqlite_engine(parsed, readonly=readonly, create=create))
    given = {name: value for name, value in losses.CONNECTING.items() if name not in parsed.query}
    return Database(create_engine(parsed, connect_args=given))
