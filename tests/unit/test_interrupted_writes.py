"""A signal at any moment of a write transaction: it is what ends the body, and the next transaction can begin."""

from __future__ import annotations

import signal
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from holdfast.flows.signals import Terminated
from holdfast.storage.database.engine import Database, Statement, connect, sqlite_url

ADD = Statement(text("INSERT INTO kept (number) VALUES (:number)"))
COUNT = Statement(text("SELECT COUNT(*) FROM kept"))


class Interrupted(Database):
    """A database whose next transaction is interrupted as soon as it has begun."""

    is_next = False

    def _begin(self) -> object:
        cursor = super()._begin()
        if self.is_next:
            self.is_next = False
            raise Terminated(signal.SIGTERM)
        return cursor


def test_a_signal_in_a_write_is_neither_replaced_nor_remembered(tmp_path: Path) -> None:
    with closing(Interrupted(connect(sqlite_url(tmp_path / "rows.db"), create=True).engine)) as database:
        database.run(Statement(text("SELECT 1")))  # the file is made by whoever opens it first
        with database.write() as tx:
            tx.run(Statement(text("CREATE TABLE kept (number INTEGER)")))
        with pytest.raises(Terminated), database.write() as tx:  # noqa: PT012
            tx.run(ADD, number=1)
            raise Terminated(signal.SIGTERM)
        with pytest.raises(Terminated), database.write() as tx:  # noqa: PT012
            tx.run(ADD, number=2)
            tx.run(Statement(text("COMMIT")))  # it comes when the commit has just been done
            raise Terminated(signal.SIGTERM)
        database.is_next = True
        with pytest.raises(Terminated), database.write():
            pass
        with database.write() as tx:
            tx.run(ADD, number=3)
        assert database.run(COUNT) == [(2,)]
