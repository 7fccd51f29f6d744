"""What tests share: one real Prefect server, and laboratories in which real searches run and die."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from s3_server import S3
from support import Lab, holdfast_environment, warmed
from support_postgres import MISSING, Postgres, binaries

from holdfast.flows.server import EmbeddedServer

if TYPE_CHECKING:
    from support_own_server import Own

_NO_BYTECODE = sys.dont_write_bytecode
sys.dont_write_bytecode = False  # or every process that is started compiles the program, and every collection the tests


def pytest_collection_finish() -> None:
    """Leave no bytecode of what tests write and import."""
    sys.dont_write_bytecode = _NO_BYTECODE


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect-home")


@pytest.fixture(scope="session")
def prefect_url(prefect_home: Path) -> Iterator[str]:
    """A Prefect server in a process and on a database of its own; it ends with the tests, even with killed ones."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(holdfast_environment(PREFECT_HOME=str(prefect_home)))
    server = EmbeddedServer()
    try:
        server.begin()
    finally:
        os.environ.clear()
        os.environ.update(before)
    yield server.url()
    server.stop()


@pytest.fixture(scope="session")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    """A Prefect server for what is global to one, for a module of tests at a time (see the group ``own-server``)."""
    from support_own_server import Own  # imports Prefect, which most tests do without

    with Own.started(tmp_path_factory.mktemp("own-home")) as own:
        yield own


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server in a process of its own, or the one that HOLDFAST_TEST_S3_ENDPOINT names."""
    server = S3.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def server_environment(prefect_home: Path, prefect_url: str) -> Iterator[dict[str, str]]:
    """The environment of processes that use the tests' Prefect server."""
    environment = holdfast_environment(
        PREFECT_HOME=str(prefect_home), PREFECT_API_URL=prefect_url, XDG_CACHE_HOME=str(prefect_home / "cache")
    )
    with warmed(environment):
        yield environment


@pytest.fixture
def make_lab(tmp_path: Path, server_environment: dict[str, str]) -> Iterator[Callable[..., Lab]]:
    """A function that makes laboratories on the tests' Prefect server."""
    labs: list[Lab] = []

    def make(name: str = "lab", **options: int) -> Lab:
        labs.append(Lab(tmp_path / name, server_environment, **options))
        return labs[-1]

    yield make
    for lab in labs:
        lab.close()


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A laboratory on the tests' Prefect server."""
    return make_lab()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server; it ends with the tests."""
    if binaries() is None:
        pytest.skip(MISSING)
    with Postgres() as server:
        yield server
