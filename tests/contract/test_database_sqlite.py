"""The store's contract on SQLite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from holdfast.storage.database.engine import Database, connect, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.testing.database import DatabaseContract
from holdfast.testing.racing import Racers


class TestSqlite(DatabaseContract):
    @pytest.fixture
    def database(self, tmp_path: Path) -> Iterator[Database]:
        with closing(open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True)) as database:
            yield database


def connecting(url: str) -> Callable[[], str]:
    def connected() -> str:
        with closing(connect(url, create=True)) as database, database.read():
            return "connected"

    return connected


def opening(url: str) -> Callable[[], str]:
    def opened() -> str:
        with closing(open_database(url, create_missing=True)) as database, database.read():
            return "opened"

    return opened


@pytest.mark.parametrize("action", [connecting, opening])
def test_processes_at_once_make_one_new_file(tmp_path: Path, action: Callable[[str], Callable[[], str]]) -> None:
    """SQLite refuses at once who gives a file its write-ahead log while another one does, however long it is told to wait."""
    with Racers() as racers:
        for number in range(20):
            url = str(sqlite_url(tmp_path / f"{number}.db"))
            found = racers.race(action, [{"url": url}] * 8)
            assert set(found) in ({"connected"}, {"opened"}), found
