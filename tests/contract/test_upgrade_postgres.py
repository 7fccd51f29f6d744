"""The schema on PostgreSQL: its comments, and its upgrade."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from holdfast.core.errors import Corrupt, DatabaseError, LeaseHeld
from holdfast.storage.database import experiments
from holdfast.storage.database.engine import connect
from holdfast.storage.database.experiments import open_database
from holdfast.storage.database.migrations import upgrade as migrate
from holdfast.storage.database.schema import VERSION, metadata
from holdfast.storage.database.upgrading import inspect, upgrade
from holdfast.testing.samples import sample_spec

pgserver = pytest.importorskip("pgserver", reason="the package pgserver, which brings a PostgreSQL server, is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a server without a database of ours."""
    with tempfile.TemporaryDirectory(prefix="hf-pg-") as folder:
        started = pgserver.get_server(folder, cleanup_mode="delete")
        yield started.get_uri().replace("postgresql://", "postgresql+psycopg://")
        started.cleanup()


@pytest.fixture
def url(server: str) -> str:
    """The URL of a new, empty database."""
    name = f"db_{uuid.uuid4().hex}"
    with closing(connect(server)) as database, database.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text(f"CREATE DATABASE {name}"))
    return server.replace("/postgres?", f"/{name}?")


def old(url: str, version: str = "0001") -> None:
    """Make a database of an older schema with one experiment in it."""
    with closing(connect(url)) as database:
        migrate(database.engine, version)
        experiments.create(database, sample_spec(), uuid="one", location="/one", seed=1, workdir="/")


def comments(url: str) -> dict[tuple[str, str], str | None]:
    query = """
        SELECT c.relname, a.attname, col_description(c.oid, a.attnum) FROM pg_class c
        JOIN pg_attribute a ON a.attrelid = c.oid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND n.nspname = 'public' AND a.attnum > 0 AND NOT a.attisdropped
            AND c.relname <> 'alembic_version'
    """
    with closing(connect(url)) as database, database.read() as connection:
        return {(row[0], row[1]): row[2] for row in connection.execute(text(query))}


DECLARED = {(table.name, column.name): column.comment for table in metadata.tables.values() for column in table.columns}


def test_every_column_has_its_comment_in_the_database(url: str) -> None:
    open_database(url, create_missing=True).close()
    assert comments(url) == DECLARED


@pytest.mark.parametrize("version", ["0001", "0002"])
def test_an_older_schema_is_refused_then_upgraded(url: str, version: str) -> None:
    old(url, version)
    with pytest.raises(Corrupt, match="holdfast db upgrade --database URL"):
        open_database(url)
    assert inspect(url).schema == version
    done = upgrade(url, liveness=lambda _: None)
    assert (done.before, done.after, done.backup) == (version, VERSION, None)
    assert comments(url) == DECLARED
    with closing(open_database(url)) as database:
        with database.read() as connection:
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert [record.name for record in experiments.every(database)] == ["sample"]
    assert upgrade(url, liveness=lambda _: None).before == VERSION


def test_a_failure_in_the_middle_leaves_the_old_schema(url: str) -> None:
    old(url)
    with closing(connect(url)) as database, database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE proposer_state ADD COLUMN seq bigint"))  # in the way of the second statement
    with pytest.raises(DatabaseError, match="seq"):
        upgrade(url, liveness=lambda _: None)
    assert inspect(url).schema == "0001"
    assert ("telemetry", "seq") not in comments(url)


def test_not_while_somebody_drives(url: str) -> None:
    old(url)
    with closing(connect(url)) as database, database.engine.begin() as connection:
        connection.execute(
            text("UPDATE experiment SET holder = '{\"pid\": 1}', lease_expires = extract(epoch from now()) + 300")
        )
    with pytest.raises(LeaseHeld, match="drives 'sample'"):
        upgrade(url, liveness=lambda _: None)
    assert inspect(url).schema == "0001"
    assert upgrade(url, liveness=lambda _: False).after == VERSION
