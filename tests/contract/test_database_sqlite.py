"""The store's contract on SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from holdfast.storage.database.engine import Database, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.testing.database import DatabaseContract


class TestSqlite(DatabaseContract):
    @pytest.fixture
    def database(self, tmp_path: Path) -> Iterator[Database]:
        with closing(open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True)) as database:
            yield database
