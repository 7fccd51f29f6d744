"""What the tests of the store share."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection
from support_scripts import COMMAND, begin_script

from holdfast import locate
from holdfast.locate import Opened
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.schema import metadata
from holdfast.testing.samples import sample_spec


def content(folder: Path) -> dict[str, bytes | None]:
    """Return every file below ``folder`` with its bytes, and every folder."""
    return {
        str(entry.relative_to(folder)): entry.read_bytes() if entry.is_file() else None for entry in sorted(folder.rglob("*"))
    }


def differences(connection: Connection) -> list[Any]:
    """Return in what a SQLite database differs from the schema.

    Of a reference that was added to a table later, SQLAlchemy does not read what becomes of it ON DELETE: SQLite is asked.
    """
    compared = compare_metadata(MigrationContext.configure(connection), metadata)
    found = [each for each in compared if each[0] not in ("add_fk", "remove_fk")]
    for name, table in metadata.tables.items():
        declared = {(name, each.parent.name, each.target_fullname, each.ondelete) for each in table.foreign_keys}
        rows = connection.exec_driver_sql(f"PRAGMA foreign_key_list({name})").mappings().all()
        stored = {(name, row["from"], f"{row['table']}.{row['to']}", row["on_delete"]) for row in rows}
        found += sorted(declared ^ stored)
    return found


def create(storage: Path, name: str = "sample", **changes: object) -> Opened:
    """Create an experiment."""
    return locate.create(sample_spec(name=name, storage=str(storage), **changes), seed=1, workdir=".")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run the body without root's right to write everywhere."""
    if os.getuid() != 0:
        yield
        return
    if not hasattr(os, "setresuid"):
        pytest.skip("cannot give up root's rights for a while")
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def creation(storage: str, name: str) -> Callable[[], str]:
    """Create an experiment, for a race; return its UUID."""

    def run() -> str:
        opened = create(Path(storage), name)
        opened.close()
        return opened.record.uuid

    return run


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def driven_by(opened: Opened, *, release: bool = True) -> None:
    """Let somebody drive an experiment for a moment, or from now on."""
    leases = Leases(opened.database, opened.record.id)
    leases.take(seen=0, epoch=1, holder={"pid": 1, "hostname": "here"}, action="started", detail={})
    if release:
        leases.release(epoch=1, active=0.0, ended="stopped")


def on_terminal(columns: int, *command: str) -> tuple[int, str, str]:
    """Run a command of ``holdfast`` on a terminal; return its exit code, what it printed, and its errors."""
    ours, theirs = os.openpty()
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "xterm"}
    with begin_script(COMMAND, *command, terminal=theirs, **environment) as process:
        os.close(theirs)
        text = b""
        try:
            while part := os.read(ours, 65536):
                text += part
        except OSError:
            pass  # the other end is closed
        err, _ = process.communicate()
        os.close(ours)
    return process.returncode, text.decode().replace("\r\n", "\n"), err
