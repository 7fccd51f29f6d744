"""The store of deliveries on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support_postgres import Postgres

from holdfast.core.errors import HoldfastError
from holdfast.storage.database.deliveries import Deliveries
from holdfast.testing.deliveries import DeliveriesContract
from holdfast.testing.racing import Racers


@pytest.fixture(scope="module")
def racers() -> Iterator[Racers]:
    with Racers(3) as started:
        yield started


class TestSqlite(DeliveriesContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path / 'new' / 'hooks.db'}"


class TestPostgres(DeliveriesContract):
    @pytest.fixture
    def url(self, postgres: Postgres) -> Iterator[str]:
        name = postgres.create(empty=True)
        yield postgres.text(name)
        postgres.drop(name)


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "hooks.db"
    file.write_text("this is a text, and nothing like a database " * 100)
    with pytest.raises(HoldfastError, match="hooks"):
        Deliveries(file)
