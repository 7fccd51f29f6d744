"""What the next flow run of a deployed search is told of its database, however this one was told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from store_kit import create

from holdfast import references
from holdfast.core.errors import EngineError
from holdfast.flows import continuing
from holdfast.flows.session import Session
from holdfast.references import Saved
from holdfast.settings import settings
from holdfast.specfile import ExperimentSpec
from holdfast.storage.database.engine import connect

PASSWORD = "canary"
PLAIN = "postgresql+psycopg://me@db.example/x"
SECRET = f"postgresql+psycopg://me:{PASSWORD}@db.example/x"
QUERY = f"postgresql+psycopg://me@db.example/x?password={PASSWORD}"


class Lookup:
    """A block that is known here alone."""

    def storage(self, name: str) -> tuple[str, dict[str, Any]]:
        raise KeyError(name)

    def database(self, name: str) -> str:
        return {"main": SECRET}[name]

    def spec(self, name: str) -> Saved:
        raise KeyError(name)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HOLDFAST_DATABASE_URL", raising=False)
    monkeypatch.setattr(references, "_lookup", {"load": Lookup})
    monkeypatch.setattr(references, "_databases", {})
    settings.cache_clear()
    yield
    monkeypatch.undo()
    settings.cache_clear()


def told(tmp_path: Path, database: str | None, used: str | None = None) -> dict[str, Any]:
    """Return the parameters after a search whose spec's file names ``database``; no server is asked."""
    with closing(create(tmp_path / "runs", database=f"sqlite:///{tmp_path}/runs/holdfast.db")) as opened:
        given = {**opened.spec.stored(), "storage": str(tmp_path / "runs"), **({"database": database} if database else {})}
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(given))
        spec = ExperimentSpec.from_file(tmp_path / "spec.yaml")
        url = references.database(used or spec.database)
        where = opened.database if url is None else connect(url)
        session = SimpleNamespace(opened=replace(opened, database=where, spec=spec), spec=spec, new_trials=True)
        parameters = continuing._parameters(cast(Session, session))
        where.close()
    assert parameters.pop("path") == str(tmp_path / "runs" / "sample")
    return parameters


def test_the_database_of_a_spec_given_by_path_goes_along(tmp_path: Path) -> None:
    assert told(tmp_path, None) == {}  # the storage's own is found
    file = f"sqlite:///{tmp_path}/elsewhere.db"
    for number, (database, expected) in enumerate([(file, file), (PLAIN, PLAIN), ("block:main", "block:main")]):
        (tmp_path / str(number)).mkdir()
        assert told(tmp_path / str(number), database) == {"database": expected}


def test_a_database_that_the_spec_of_a_restore_does_not_name_goes_along(tmp_path: Path) -> None:
    assert told(tmp_path, None, used=PLAIN) == {"database": PLAIN}


@pytest.mark.parametrize("url", [SECRET, QUERY], ids=["user", "query"])
def test_a_password_is_for_the_environment(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    with pytest.raises(EngineError, match=r"db\.example.*block:NAME.*HOLDFAST_DATABASE_URL") as refused:
        told(tmp_path / "a", url)
    assert PASSWORD not in str(refused.value)
    monkeypatch.setenv("HOLDFAST_DATABASE_URL", "postgresql+psycopg://me@other.example/x")
    settings.cache_clear()
    with pytest.raises(EngineError):
        told(tmp_path / "b", url)
    monkeypatch.setenv("HOLDFAST_DATABASE_URL", url)
    settings.cache_clear()
    assert told(tmp_path / "c", url) == {}
