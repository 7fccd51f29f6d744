"""Whether a process can run trials: every reason that it gives, in full, and without a secret in it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from store_kit import unprivileged
from support_workers import Drive

from holdfast.storage.folder import IDENTITY
from holdfast.tasks.probing import probe, versions

HERE = socket.gethostname()


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    made = Drive.begin(tmp_path)
    with closing(made.opened):
        yield made


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this host on which nobody listens, and nobody else can."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_fit_one(drive: Drive) -> None:
    others = {"python": versions()["python"].rpartition(".")[0] + ".99", "sqlalchemy": "0.1", "numpy": "1"}
    assert probe(drive.place()) == []
    assert probe(drive.place(versions={**versions(), **others})) == []  # which do no harm
    assert probe(drive.place(versions={})) == []
    assert ".probe" not in drive.opened.folder.root.names()


def test_versions() -> None:
    assert {"python", "holdfast", "prefect", "sqlalchemy", "cloudpickle"} <= set(versions())
    assert all(part.isdecimal() for part in versions()["python"].split("."))


def test_versions_that_must_agree(drive: Drive) -> None:
    theirs = {"python": "3.8.1", "holdfast": "9.9", "prefect": "2.1", "sqlalchemy": "1.0"}
    here = versions()
    assert probe(drive.place(versions=theirs)) == [
        f"Python is {here['python']} here and 3.8.1 at the driver, which must agree in their first two numbers; "
        "start workers with the driver's Python",
        f"holdfast is {here['holdfast']} here and 9.9 at the driver, which must be the same; install holdfast==9.9 here",
        f"prefect is {here['prefect']} here and 2.1 at the driver, which must be the same; install prefect==2.1 here",
    ]


def test_another_host(drive: Drive) -> None:
    place = drive.place(host="elsewhere/boot/1")
    one, other = probe(place)
    assert one.startswith("database sqlite:///")
    assert one.endswith(
        f"is a SQLite file, which is good on the driver's own host only, and this is {HERE}; set database to a PostgreSQL URL"
    )
    assert other == (
        f"the path {place.location} is a folder, which is good on the driver's own host only, and this is {HERE}; "
        "set storage to an object store"
    )


def test_another_experiment(drive: Drive, tmp_path: Path) -> None:
    for place in (drive.place(uuid="5c0c9b1e"), drive.place(experiment=77)):
        assert any("does not have the experiment 'sample' of the driver" in reason for reason in probe(place))
    (reason,) = [reason for reason in probe(drive.place(uuid="5c0c9b1e")) if "UUID" in reason]
    assert drive.opened.record.uuid in reason
    assert "5c0c9b1e" in reason
    file = Path(drive.place().location, IDENTITY)
    file.write_text("{")
    assert ["is damaged" in reason for reason in probe(drive.place())] == [True]
    file.unlink()
    assert ["is no experiment" in reason for reason in probe(drive.place())] == [True]


def test_a_folder_that_cannot_be_written(drive: Drive) -> None:
    folder = Path(drive.place().location)
    with unprivileged():
        found = probe(drive.place())
    assert any(f"the path {folder} cannot be used from {HERE}" in reason for reason in found)


@pytest.mark.parametrize("schema", ["0000", None])
def test_a_database_of_another_schema(drive: Drive, schema: str | None) -> None:
    with drive.opened.database.engine.begin() as connection:
        if schema is None:
            connection.exec_driver_sql("DELETE FROM alembic_version")
        else:
            connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{schema}'")
    assert [f"cannot be used from {HERE}" in reason for reason in probe(drive.place())] == [True]


def test_what_is_not_there(drive: Drive, closed_port: int, tmp_path: Path) -> None:
    """Every reason at once, and no secret in any."""
    secret = "hush-hush"
    place = drive.place(
        database=f"postgresql+psycopg://user:{secret}@127.0.0.1:{closed_port}/x",
        location=f"s3://bucket/{tmp_path.name}",
        options={"key": "key", "secret": secret, "endpoint_url": f"http://127.0.0.1:{closed_port}"},
        versions={"python": "3.8.1"},
    )
    with temporary_settings({PREFECT_API_URL: f"http://someone:{secret}@127.0.0.1:{closed_port}/api?token={secret}"}):
        found = probe(place)
    assert len(found) == 4
    assert secret not in json.dumps(found)
    assert found[3] == (
        f"Prefect's API http://127.0.0.1:{closed_port}/api cannot be reached from {HERE} (ConnectError); "
        "set PREFECT_API_URL to an address that workers reach, and what it asks for"
    )
    for reason in found:
        assert "\n" not in reason


def test_words_that_are_none(drive: Drive) -> None:
    changes: list[dict[str, Any]] = [
        {"database": "nonsense hush"},
        {"database": "mysql://u:hush@h/d"},
        {"location": "nope://x"},
    ]
    for change in changes:
        (reason,) = probe(drive.place(**change))
        assert "hush" not in reason
