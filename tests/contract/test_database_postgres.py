"""The store's contract on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from support_postgres import Postgres

from holdfast.storage.database.engine import Database
from holdfast.storage.database.experiments import open_database
from holdfast.testing.database import DatabaseContract


class TestPostgres(DatabaseContract):
    @pytest.fixture
    def database(self, postgres: Postgres) -> Iterator[Database]:
        name = postgres.create()
        with closing(open_database(postgres.url(name))) as database:
            yield database
        postgres.drop(name)
