"""What an error of storage or database comes from, once somebody else has taken an experiment over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from holdfast.core.errors import DatabaseError, Fenced, HoldfastError, StorageError
from holdfast.flows.search import cause_of
from holdfast.storage.database.engine import Database, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.testing.lab import Lab


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True)) as database:
        yield database


@pytest.mark.parametrize("error", [StorageError("step_00000001 is gone"), DatabaseError("locked")])
def test_an_error_after_a_takeover_is_the_takeover(database: Database, error: HoldfastError) -> None:
    lab = Lab.new(database, "taken")
    assert cause_of(error, database, lab.id, 1) is error
    lab.take_over()
    cause = cause_of(error, database, lab.id, 1)
    assert isinstance(cause, Fenced)
    assert "epoch 2 took the experiment over" in str(cause)


def test_other_errors_are_what_they_are(database: Database) -> None:
    lab = Lab.new(database, "taken")
    lab.take_over()
    for error in (KeyboardInterrupt(), ValueError("x"), Fenced("over")):
        assert cause_of(error, database, lab.id, 1) is error


def test_a_database_that_is_gone_changes_no_error(database: Database, tmp_path: Path) -> None:
    lab = Lab.new(database, "gone")
    lab.take_over()
    database.close()
    (tmp_path / "holdfast.db").write_bytes(b"no database")
    error = StorageError("the disk is full")
    assert cause_of(error, database, lab.id, 1) is error
