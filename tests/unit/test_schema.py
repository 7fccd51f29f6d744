"""The schema, its migration, and opening what is not a good database."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import inspect
from store_kit import content, differences, unprivileged

from holdfast.core.errors import Corrupt, DatabaseError, HoldfastError, SpecError
from holdfast.storage.database import experiments
from holdfast.storage.database.engine import Database, connect, parse_url, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.storage.database.schema import VERSION, metadata
from holdfast.testing.samples import sample_spec

TABLES = {
    "experiment",
    "objective",
    "config",
    "worker",
    "trial",
    "attempt",
    "report",
    "metric",
    "telemetry",
    "checkpoint",
    "proposer_state",
    "audit",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database with one experiment, closed."""
    with closing(open_database(sqlite_url(tmp_path / "store" / "holdfast.db"), create_missing=True)) as database:
        add(database, "one")
    return tmp_path / "store" / "holdfast.db"


def add(database: Database, name: str) -> None:
    experiments.create(database, sample_spec(name=name), uuid=name, location=f"/{name}", seed=1, workdir="/")


def names(database: Database) -> list[str]:
    return [record.name for record in experiments.every(database)]


def test_the_migration_makes_what_the_schema_says(file: Path) -> None:
    with closing(connect(sqlite_url(file))) as database, database.read() as connection:
        assert differences(connection) == []
        assert set(inspect(connection).get_table_names()) == {*TABLES, "alembic_version"}
    assert set(metadata.tables) == TABLES


def test_every_table_and_column_has_a_comment() -> None:
    assert [table.name for table in metadata.tables.values() if not table.comment] == []
    assert [str(column) for table in metadata.tables.values() for column in table.columns if not column.comment] == []


def test_what_promises_durability_is_switched_on(file: Path) -> None:
    with closing(open_database(sqlite_url(file))) as database, database.read() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("foreign_keys", "synchronous", "journal_mode")
        }
    assert found == {"foreign_keys": 1, "synchronous": 2, "journal_mode": "wal"}


def truncate(file: Path, share: float) -> None:
    with file.open("r+b") as stream:
        stream.truncate(int(file.stat().st_size * share))


def newer(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()


def older(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000'")
        connection.commit()


def foreign(file: Path) -> None:
    file.unlink()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE mine (a)")
        connection.commit()


def flipped(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\xff" * (size - 100))


BAD: dict[str, tuple[Callable[[Path], object], type[HoldfastError], str]] = {
    "missing": (Path.unlink, DatabaseError, "missing"),
    "empty": (lambda file: truncate(file, 0), Corrupt, "empty"),
    "half": (lambda file: truncate(file, 0.5), Corrupt, "truncated|malformed"),
    "header only": (lambda file: truncate(file, 0.001), Corrupt, "truncated|malformed|not a database"),
    "last page": (lambda file: truncate(file, 0.99), Corrupt, "truncated"),
    "no database": (lambda file: file.write_text("name: x\n" * 100), Corrupt, "not a database"),
    "damaged": (flipped, Corrupt, "malformed"),
    "foreign": (foreign, Corrupt, "no holdfast schema"),
    "newer": (newer, Corrupt, "update holdfast"),
    "older": (older, Corrupt, "db upgrade"),
    "folder": (lambda file: (file.unlink(), file.mkdir()), DatabaseError, "cannot be read"),
}


@pytest.mark.parametrize("readonly", [True, False])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_database_is_a_typed_error_and_stays_as_it_is(file: Path, kind: str, readonly: bool) -> None:
    spoil, expected, words = BAD[kind]
    spoil(file)
    before = content(file.parent)
    with pytest.raises(expected, match=words) as caught:
        open_database(sqlite_url(file), readonly=readonly)
    assert str(file) in str(caught.value)
    assert content(file.parent) == before


def test_an_empty_database_beside_experiments_is_never_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "holdfast.db"
    file.touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "experiment.json").touch()
    with pytest.raises(Corrupt, match="empty"):
        open_database(sqlite_url(file), create_missing=True)
    shutil.rmtree(tmp_path / "old")
    with closing(open_database(sqlite_url(file), create_missing=True)) as database:
        assert names(database) == []


def test_the_drafts_of_dead_processes_are_swept_and_nothing_else(tmp_path: Path) -> None:
    dead, mixed, living, foreign = (tmp_path / f".holdfast-db-{name}" for name in ("dead", "mixed", "living", "file"))
    for folder in (dead, mixed, living):
        folder.mkdir()
        (folder / "new.db").write_text("half")
    (dead / "new.db-wal").touch()
    (mixed / "notes.txt").touch()
    foreign.write_text("mine")
    held = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True).close()
    finally:
        os.close(held)
    kept = {foreign.name, "holdfast.db", living.name, f"{living.name}/new.db", mixed.name, f"{mixed.name}/notes.txt"}
    assert content(tmp_path).keys() == kept


def test_a_damaged_stored_spec_is_a_typed_error(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("UPDATE experiment SET spec = '{\"name\": '")
        connection.commit()
    with closing(open_database(sqlite_url(file))) as database, pytest.raises(Corrupt, match="one"):
        experiments.every(database)


@pytest.mark.parametrize("name", ["a b", "100%", "100%25", "50%41", "a@b:c", "ünï¢ödé ☃", "q?mode=ro#x", "[x]*", "'quote\""])
def test_any_path_will_do(tmp_path: Path, name: str) -> None:
    file = tmp_path / name / f"{name}.db"
    for count in range(2):
        with closing(open_database(sqlite_url(file), create_missing=True)) as database:
            assert database.file == file
            add(database, f"n{count}")
    for url in (sqlite_url(file), sqlite_url(file).render_as_string(hide_password=False)):
        with closing(open_database(url, readonly=True)) as database:
            assert names(database) == ["n0", "n1"]
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_a_relative_path_means_the_same_after_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(open_database("sqlite:///holdfast.db", create_missing=True)) as database:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        add(database, "one")
        database.close()
        assert names(database) == ["one"]
    assert (tmp_path / "holdfast.db").exists()


SECRET = "s3cr3t@%:/"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        f"/path/{SECRET}",
        f"mysql://me:{SECRET}@host/db",
        f"postgresql+asyncpg://me:{SECRET}@host/db",
        "sqlite+aiosqlite:////tmp/x.db",
        f"postgresql+nothing://me:{SECRET}@host/db",
        f"nothing://me:{SECRET}@host/db",
        f"postgresql+psycopg://me:secret@host:{SECRET}/db",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///x.db?mode=memory",
    ],
)
def test_a_bad_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(SpecError, match="database") as caught:
        parse_url(url)
    assert "s3cr3t" not in str(caught.value)
    assert "s3cr3t" not in repr(caught.value)


def test_a_missing_driver_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    for url in ("postgresql://me:s3cr3t@host/db", "postgresql+psycopg://me:s3cr3t@host/db"):
        with pytest.raises(SpecError, match=r"holdfast\[postgres\]") as caught:
            parse_url(url)
        assert "s3cr3t" not in str(caught.value)


def test_a_password_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy import create_engine, make_url

    url = make_url("sqlite://").set(drivername="postgresql+psycopg", username="me", password="s3cr3t", host="h", database="d")
    url = url.update_query_dict({"sslpassword": "s3cr3t", "password": "s3cr3t", "connect_timeout": "3"})
    shown = sqlite_url(Path("/x"))
    engine = create_engine(shown)
    engine.url = url  # type: ignore[misc]  # no driver is needed to look at it
    database = Database(engine)
    assert "s3cr3t" not in database.label + repr(database)
    assert "connect_timeout=3" in database.label


def test_a_full_disk_is_said_and_can_be_mended(file: Path) -> None:
    with closing(open_database(sqlite_url(file))) as database:
        with database.write() as tx:
            tx._cursor.execute("PRAGMA max_page_count = 1")  # as if not one more page would fit
        with pytest.raises(DatabaseError, match="free some space"):
            [add(database, f"filler {count} " + "x" * 150) for count in range(200)]
        with database.write() as tx:
            tx._cursor.execute("PRAGMA max_page_count = 1000000")
        add(database, "two")
        assert names(database)[0] == "one"
        assert names(database)[-1] == "two"


def test_a_broken_connection_is_made_anew(file: Path) -> None:
    with closing(open_database(sqlite_url(file))) as database:
        add(database, "two")
        database._writer.close()
        with pytest.raises(DatabaseError):
            add(database, "three")
        add(database, "three")
        assert names(database) == ["one", "two", "three"]


def test_writing_to_a_file_without_a_name_is_refused(file: Path) -> None:
    with closing(open_database(sqlite_url(file))) as database:
        add(database, "two")
        away = file.rename(file.with_name("away.db"))
        with pytest.raises(DatabaseError, match="deleted or exchanged"):
            add(database, "three")
        shutil.copy(away, file)
        with pytest.raises(DatabaseError, match="deleted or exchanged"):
            add(database, "three")
        file.unlink()
        away.rename(file)
        add(database, "three")
    with closing(open_database(sqlite_url(file))) as database:
        assert names(database) == ["one", "two", "three"]


def test_a_locked_database_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.storage.database.sqlite.BUSY_SECONDS", 0.0)
    with closing(open_database(sqlite_url(file))) as database, closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="locked"):
            add(database, "two")
        assert names(database) == ["one"]
        other.rollback()
        add(database, "two")


@pytest.mark.parametrize("open_elsewhere", [False, True])
def test_what_cannot_be_written_can_be_read(tmp_path: Path, file: Path, open_elsewhere: bool) -> None:
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o005 != 0o005:
            try:
                parent.chmod(0o755)
            except PermissionError:
                pytest.skip("others may not look below the temporary folder")
    with closing(connect(sqlite_url(file))) as writer:
        if open_elsewhere:
            add(writer, "two")
        for entry in file.parent.iterdir():
            entry.chmod(0o444)
        file.parent.chmod(0o555)
        before = content(file.parent)
        try:
            with unprivileged():
                for readonly in (True, False):
                    with closing(open_database(sqlite_url(file), readonly=readonly)) as database:
                        assert names(database) == ["one", "two"] if open_elsewhere else ["one"]
                        with pytest.raises(DatabaseError, match="writable"):
                            add(database, "three")
        finally:
            file.parent.chmod(0o755)
        assert content(file.parent).keys() == before.keys()


def test_a_reader_changes_nothing(file: Path) -> None:
    before = content(file.parent)
    with closing(open_database(sqlite_url(file), readonly=True)) as database:
        assert names(database) == ["one"]
        with pytest.raises(DatabaseError, match="readonly"):
            add(database, "two")
    assert content(file.parent) == before


def test_threads_share_a_database(file: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with closing(open_database(sqlite_url(file))) as database, ThreadPoolExecutor(16) as pool:

        def work(place: int) -> int:
            add(database, f"thread {place}")
            return len(experiments.every(database))

        assert max(pool.map(work, range(60))) == 61


def test_the_version_is_the_last_migration() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    import holdfast.storage.database.migrations as migrations

    config = Config()
    config.set_main_option("script_location", str(Path(str(migrations.__file__)).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_current_head() == VERSION
