"""Connections to a SQLite file."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.pool import NullPool, QueuePool

from holdfast.storage.database.losses import BUSY_SECONDS

_PAUSE_SECONDS = 0.01


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Let a file have a write-ahead log; SQLite refuses at once, whatever its timeout, while another process does the same."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def sqlite_engine(url: URL, *, readonly: bool, create: bool) -> Engine:
    """Return an engine for a SQLite file; it is made with ``create`` only, and never changed when ``readonly``."""
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
                _write_ahead(connection)
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
