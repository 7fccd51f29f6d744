"""The store's contract on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from sqlalchemy import text
from support_postgres import Postgres

from holdfast.storage.database import workers
from holdfast.storage.database.driver import fence
from holdfast.storage.database.engine import Database, Statement, connect
from holdfast.storage.database.experiments import open_database
from holdfast.testing.database import DatabaseContract
from holdfast.testing.lab import Lab
from holdfast.testing.racing import url_of
from holdfast.testing.workers import join


class TestPostgres(DatabaseContract):
    @pytest.fixture
    def database(self, postgres: Postgres) -> Iterator[Database]:
        name = postgres.create()
        with closing(open_database(postgres.url(name))) as database:
            yield database
        postgres.drop(name)

    def test_a_beat_waits_for_nobody_who_writes(self, lab: Lab, postgres: Postgres) -> None:
        """Neither for another process that holds the experiment's row, nor for another write of its own process."""
        worker = join(lab)
        with closing(connect(url_of(lab.database))) as other, other.write() as theirs, lab.database.write() as ours:
            fence(theirs, lab.id, 1)
            ours.run(Statement(text("SELECT 1")))
            assert workers.beat(lab.database, lab.id, worker).epoch == 1
            workers.leave(lab.database, lab.id, worker, "done")
        assert workers.every(lab.database, lab.id)[0].left == "done"
