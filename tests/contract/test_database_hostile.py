"""Databases that refuse us, secrets that must not be shown, disks that are full: a typed error, nothing changed."""

from __future__ import annotations

import io
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import psycopg
import pytest
import yaml
from psycopg import sql
from sqlalchemy import text
from support import Lab, holdfast_environment, small_disk, tree
from support_postgres import Postgres

import holdfast
from holdfast import specfile
from holdfast.core.errors import ConnectionLost, DatabaseError, HoldfastError, SpecError
from holdfast.core.trial import TrialStatus
from holdfast.locate import find
from holdfast.storage.database.engine import parse_url, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.testing.lab import Lab as Store
from holdfast.testing.lab import dump

PASSWORDS = ["s3cr3t@h%st:5/x", "pässwörd-☃-s3cr3t", "s3cr3t%40 +&=?#[]", "s3cr3t'\"\\;--$HOME"]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A laboratory without any Prefect server: nothing here may need one."""
    return Lab(tmp_path / "lab", holdfast_environment(PREFECT_API_URL="http://127.0.0.1:9/api", PREFECT_HOME=str(tmp_path)))


@pytest.fixture
def name(postgres: Postgres) -> Iterator[str]:
    name = postgres.create()
    yield name
    postgres.drop(name)


@pytest.fixture
def role(postgres: Postgres, name: str) -> Iterator[str]:
    """A role that owns its database; its password is asked for by TCP."""
    role = f"role_{name}"
    with postgres.admin(name) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        for kind in ("TABLES", "SEQUENCES"):
            words = sql.SQL("GRANT ALL ON ALL {} IN SCHEMA public TO {}").format(sql.SQL(kind), sql.Identifier(role))  # type: ignore[arg-type]
            connection.execute(words)
    yield role
    with postgres.admin(name) as connection:
        connection.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def set_password(postgres: Postgres, role: str, password: str) -> None:
    with postgres.admin() as connection:
        connection.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(password)))


def hides(password: str, *texts: object) -> bool:
    """Tell whether no text holds the password, nor what a URL makes of it."""
    secrets = {password, quote(password, safe=""), quote(password)}
    return not any(secret in str(each) for secret in secrets for each in texts)


def said(error: BaseException) -> str:
    """Return everything that Python prints of an error, its causes included."""
    output = io.StringIO()
    traceback.print_exception(error, file=output)
    return f"{error} {error!r} {output.getvalue()}"


@pytest.mark.parametrize("password", PASSWORDS)
def test_any_password_will_do_and_is_shown_nowhere(
    lab: Lab, postgres: Postgres, name: str, role: str, password: str, tmp_path: Path
) -> None:
    set_password(postgres, role, password)
    url = f"postgresql://{role}:{quote(password, safe='')}@127.0.0.1:{postgres.port}/{name}"
    with pytest.raises(psycopg.OperationalError):  # it is asked for
        psycopg.connect(host="127.0.0.1", port=postgres.port, user=role, password="other", dbname=name)
    spec = lab.spec(database=url, storage=str(lab.folder / "runs"))
    spec.write_text(spec.read_text() + f"# at home: database: {url}\n")
    with holdfast.create(spec) as experiment:
        assert experiment.spec_source is not None
        assert "***" in experiment.spec_source
        assert yaml.safe_load(experiment.spec_source)["trainable"] == "train.py:train"
        shown = [repr(experiment), repr(experiment.spec), experiment.spec_source, experiment.spec.stored()]
    with closing(find(lab.path(), database=url).database) as database:
        store = Store.new(database, "other")
        store.end(store.started(), loss=1.0)
        assert store.trial(0).status is TrialStatus.COMPLETED
        shown += [database.label, repr(database), dump(database)]
    for file in (lab.folder / "runs").rglob("*"):
        shown += [file.read_text()] if file.is_file() else []
    assert hides(password, *shown)
    listed = lab.light("show", lab.path(), "--database", url)
    assert (listed.code, hides(password, listed.output)) == (0, True), listed.output
    set_password(postgres, role, "changed")
    with pytest.raises(DatabaseError, match=f'authentication failed for user "{role}"') as caught:
        open_database(url)
    assert hides(password, said(caught.value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"password": "wr0ng"}, ["password authentication failed", "check user and password"]),
        ({"username": "nobody"}, ["password authentication failed", "check user and password"]),
        ({"database": "nowhere"}, ['database "nowhere" does not exist', "create it"]),
        ({"host": "nowhere.invalid"}, ["nowhere.invalid", "check the host"]),
        ({"port": 1}, ["refused", "check that the server runs"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_server_that_refuses_is_said_at_once(
    lab: Lab, postgres: Postgres, name: str, role: str, change: dict[str, Any], words: list[str]
) -> None:
    set_password(postgres, role, "s3cr3t")
    url = parse_url(postgres.tcp(name, user=role, password="s3cr3t")).set(**change).render_as_string(hide_password=False)
    before, began = tree(lab.folder), time.monotonic()
    with pytest.raises(DatabaseError) as caught:
        open_database(url, create_missing=True)
    assert time.monotonic() - began < 15  # it is not waited for as for one that restarts
    assert not isinstance(caught.value, ConnectionLost)
    assert hides("s3cr3t", said(caught.value))
    ended = lab.light("run", lab.spec(database=url), "--set", f"storage={lab.folder / 'runs'}")
    assert ended.code == 4, ended.output
    for said_too in (str(caught.value), ended.output):
        assert all(word in said_too for word in words), said_too
    assert hides("s3cr3t", ended.output)
    assert "Traceback" not in ended.output
    (lab.folder / "exp.yaml").unlink()
    left = tree(lab.folder)
    assert left == before


@pytest.mark.parametrize("url", ["p@ss@host/db", "p@s/s@host/db", "p%00@host/db", "p@ss:9@host:5/db"])
def test_a_password_that_is_not_encoded_is_refused_without_showing_it(lab: Lab, url: str) -> None:
    before = tree(lab.folder)
    with pytest.raises(SpecError, match="%40 for @") as caught:
        holdfast.create({**yaml.safe_load(lab.spec().read_text()), "database": f"postgresql://me:{url}"})
    assert "ss" not in str(caught.value).replace("password", "")
    (lab.folder / "exp.yaml").unlink()
    assert tree(lab.folder) == before


def test_the_source_of_a_spec_loses_its_password_however_it_is_written() -> None:
    url = "postgresql://me:s3cr3t%40@host/db"
    texts = [
        f"name: x\ndatabase: {url}\nstorage: y # ü\n",
        f'database: "{url}"   # comment\nname: ☃\n',
        '{database: "postgresql://me:s3cr\\x33t%40@host/db", name: x}',
        f"name: x\ndatabase:\n  {url}\n",
        f"database: >-\n  {url}\nname: x\n",
        "database: postgresql://me@host/db?password=s3cr3t\n",
    ]
    for given in texts:
        kept = specfile.without_password(given)
        assert "s3cr" not in kept
        before, after = yaml.safe_load(given), yaml.safe_load(kept)
        assert "***" in unquote(after.pop("database"))
        del before["database"]
        assert before == after
    for given in ("name: x\ndatabase: postgresql://me@host/db\n", "name: x\n", "database: sqlite:////x%20y.db\n"):
        assert specfile.without_password(given) == given


def test_a_role_that_may_only_look(postgres: Postgres, name: str, role: str) -> None:
    set_password(postgres, role, "s3cr3t")
    with closing(open_database(postgres.url(name))) as owner:
        lab = Store.new(owner, "sample")
        with postgres.admin(name) as connection:
            revoke = sql.SQL("REVOKE INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public FROM {}")
            connection.execute(revoke.format(sql.Identifier(role)))
        before = dump(owner)
        with closing(open_database(postgres.tcp(name, user=role, password="s3cr3t"))) as database:
            store = Store(database, lab.record)
            assert store.reader.trials() == []
            with pytest.raises(DatabaseError, match="permission denied for table experiment"):
                store.driver.propose({"x": 0.5})
        with postgres.admin(name) as connection:
            connection.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(sql.Identifier(name)))
        with closing(open_database(postgres.url(name))) as database:
            assert dump(database) == before
            with pytest.raises(DatabaseError, match="read-only"):
                Store(database, lab.record).driver.propose({"x": 0.5})
        assert dump(owner) == before


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    with small_disk(tmp_path / "small", megabytes=1) as folder:
        yield folder


def test_a_disk_that_is_really_full(small: Path) -> None:
    url = sqlite_url(small / "holdfast.db")
    filler = small / "filler"
    with closing(open_database(url, create_missing=True)) as database:
        lab = Store.new(database, "sample")
        kept = lab.started(0.25)
        fill(filler)
        with pytest.raises(DatabaseError, match=r"free some space|disk"):
            [lab.driver.propose({"x": place / 10_000}) for place in range(10_000)]
        before = dump(database)
        written = len(before["trial"])
        assert [trial.number for trial in lab.reader.trials()] == list(range(written))
        with pytest.raises(DatabaseError):
            kept.report(0, {"loss": 1.0, "note": "x" * 100_000})
        assert dump(database) == before
        filler.unlink()
        assert lab.driver.propose({"x": 0.5}) == written
        lab.end(kept, loss=1.0)
    with closing(open_database(url)) as database, database.read() as connection:
        assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"


def test_no_database_is_made_on_a_full_disk(small: Path) -> None:
    fill(small / "filler")
    with pytest.raises(HoldfastError, match=r"space|disk|full"):
        open_database(sqlite_url(small / "holdfast.db"), create_missing=True)
    assert [entry.name for entry in small.iterdir()] == ["filler"]


def fill(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(descriptor, b"x" * 4096)
    except OSError:
        pass
    finally:
        os.close(descriptor)
