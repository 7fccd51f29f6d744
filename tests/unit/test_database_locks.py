"""A SQLite file is looked at in a process that has it open: what another process commits, or this one, is not lost."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from holdfast.core.errors import Corrupt
from holdfast.storage.database.engine import Statement, sqlite_url
from holdfast.storage.database.experiments import check_file, open_database

OTHER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("INSERT INTO config (digest, body) VALUES ('theirs', '{}')")
connection.close()  # the last one, as far as it can see: what is in the log is written into the file, and the log deleted
"""


def test_a_second_look_does_not_give_up_the_locks_of_the_first(tmp_path: Path) -> None:
    """POSIX gives up a process's locks on a file as soon as it closes any descriptor of it."""
    file = tmp_path / "holdfast.db"
    with (
        closing(open_database(sqlite_url(file), create_missing=True)) as first,
        closing(open_database(sqlite_url(file))) as second,
    ):
        add = Statement(text("INSERT INTO config (digest, body) VALUES (:digest, '{}')"))
        for number in range(3):
            with first.write() as tx:
                tx.run(add, digest=f"ours {number}")
            check_file(file)
            with closing(open_database(sqlite_url(file))) as third, third.read():
                pass
            subprocess.run([sys.executable, "-c", OTHER.replace("theirs", f"theirs {number}"), str(file)], check=True)
        found = {row[0] for row in second.run(Statement(text("SELECT digest FROM config")))}
    with closing(sqlite3.connect(file)) as later:
        stored = {row[0] for row in later.execute("SELECT digest FROM config")}
    assert found == stored == {f"{whose} {number}" for whose in ("ours", "theirs") for number in range(3)}


@pytest.mark.parametrize("left", [0.999999, 0.5, 0.01])
def test_a_truncated_file_is_said_to_be_one(tmp_path: Path, left: float) -> None:
    file = tmp_path / "holdfast.db"
    open_database(sqlite_url(file), create_missing=True).close()
    body = file.read_bytes()
    file.write_bytes(body[: int(len(body) * left)])
    with pytest.raises(Corrupt, match="truncated"):
        check_file(file)
    file.write_bytes(b"")
    with pytest.raises(Corrupt, match="is empty"):
        check_file(file)
