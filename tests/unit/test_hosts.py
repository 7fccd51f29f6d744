"""Specs whose workers could not reach what they need are refused before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from holdfast import references
from holdfast.core.errors import SpecError
from holdfast.core.spec import ExperimentSpec
from holdfast.flows import hosts
from holdfast.flows.hosts import check_hosts
from holdfast.references import Saved

POSTGRES = "postgresql+psycopg://somebody:secret@db.example/holdfast"
CLUSTER = {"runner": "dask", "address": "tcp://scheduler.example:8786"}


class Lookup:
    """Blocks that are known here alone."""

    def storage(self, name: str) -> tuple[str, dict[str, Any]]:
        return {"far": ("s3://bucket/runs", {"key": "k"}), "near": ("/data/runs", {})}[name]

    def database(self, name: str) -> str:
        return {"far": POSTGRES, "near": "sqlite:////data/x.db"}[name]

    def spec(self, name: str) -> Saved:
        raise KeyError(name)


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.delenv("PREFECT_PROFILES_PATH", raising=False)
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example/api")
    monkeypatch.setattr(references, "_lookup", {"load": Lookup})


def spec(execution: Mapping[str, Any], **places: str) -> ExperimentSpec:
    return ExperimentSpec.parse(
        {
            "name": "x",
            "trainable": "train.py:train",
            "objectives": {"loss": "min"},
            "space": {"x": {"type": "float", "low": 0.0, "high": 1.0}},
            "search": {"num_trials": 2},
            "execution": dict(execution),
            **places,
        }
    )


def refused(*words: str, execution: Mapping[str, Any] = CLUSTER, **places: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_hosts(spec(execution, **places))
    for word in words:
        assert word in str(caught.value)
    assert "secret" not in str(caught.value)


def test_local_places_are_refused_with_what_mends_them(tmp_path: Path) -> None:
    refused("storage: s3://bucket/prefix", "database: postgresql+psycopg://", "scheduler.example")
    refused("storage: s3://bucket/prefix", database=POSTGRES)
    refused("database: postgresql+psycopg://", storage="s3://bucket/runs")
    refused("storage: s3://bucket/prefix", storage="file:///runs", database=POSTGRES)
    refused("storage: s3://bucket/prefix", execution={"runner": "ray", "address": "auto"}, database=POSTGRES)
    assert not list(tmp_path.iterdir())


def test_blocks_are_looked_up() -> None:
    check_hosts(spec(CLUSTER, storage="block:far", database="block:far"))
    refused("/data/runs", storage="block:near", database="block:far")
    refused("database: postgresql+psycopg://", storage="block:far", database="block:near")


def test_the_database_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from holdfast.settings import settings

    monkeypatch.setenv("HOLDFAST_DATABASE_URL", POSTGRES)
    settings.cache_clear()
    try:
        check_hosts(spec(CLUSTER, storage="s3://bucket/runs"))
    finally:
        monkeypatch.undo()
        settings.cache_clear()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:4200/api", "http://localhost:4200/api", "http://me:secret@[::1]:4200/api", ""]
)
def test_an_api_that_this_machine_alone_reaches_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)
    refused("PREFECT_API_URL", storage="s3://bucket/runs", database=POSTGRES)


def test_the_api_of_a_profile_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL")
    (tmp_path / "prefect").mkdir()
    for url in ("https://prefect.example/api", "http://127.0.0.1:4200/api"):
        profile = f'active = "lab"\n[profiles.lab]\nPREFECT_API_URL = "{url}"\n'
        (tmp_path / "prefect" / "profiles.toml").write_text(profile)
        if "127" in url:
            refused("PREFECT_API_URL", storage="s3://bucket/runs", database=POSTGRES)
        else:
            check_hosts(spec(CLUSTER, storage="s3://bucket/runs", database=POSTGRES))


@pytest.mark.parametrize(
    "execution",
    [{}, {"runner": "dask"}, {"runner": "ray"}, {"runner": "dask", "address": "tcp://127.0.0.1:8786"}],
    ids=["threads", "dask", "ray", "loopback"],
)
def test_a_cluster_of_this_machine_needs_nothing(execution: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL")
    check_hosts(spec(execution))


def test_memory_is_shared_with_no_other_process() -> None:
    refused("memory", execution={"runner": "dask"}, storage="memory://runs")
    check_hosts(spec({}, storage="memory://runs"))


def test_an_engine_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "EXTRAS", {"dask": "prefect_dask_that_nobody_has"})
    refused("pip install 'holdfast[dask]'", execution={"runner": "dask"})


@pytest.mark.parametrize(
    ("runner", "address"),
    [
        ("dask", "tls://me:secret@scheduler.example:8786"),
        ("dask", "ws://scheduler.example:8786?token=secret"),
        ("dask", "me:secret@scheduler.example:8786"),
        ("dask", "tcp://scheduler.example:8786#secret"),
        ("ray", "ray://secret@head.example:10001"),
        ("ray", "head.example:6379?token=secret"),
    ],
)
def test_an_address_holds_no_credentials(runner: str, address: str) -> None:
    """It is shown, and stored in rows."""
    with pytest.raises(SpecError, match=r"execution.*reached by host and port.*configuration of the cluster") as caught:
        spec({"runner": runner, "address": address})
    assert "secret" not in str(caught.value)
