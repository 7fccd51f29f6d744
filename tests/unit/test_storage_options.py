"""How storage options are given, and where they must not show up."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from holdfast import locate
from holdfast.cli import main
from holdfast.cli.common import storage_options
from holdfast.core.errors import SpecError
from holdfast.locate import folder_at
from holdfast.report.observer import restore_command
from holdfast.settings import settings
from holdfast.testing.samples import sample_spec


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], None),
        (["endpoint_url=http://127.0.0.1:9000"], {"endpoint_url": "http://127.0.0.1:9000"}),
        (["anon=true", "retries=3"], {"anon": True, "retries": 3}),
        (["client_kwargs={region_name: eu-1}", "secret=a=b"], {"client_kwargs": {"region_name": "eu-1"}, "secret": "a=b"}),
        (["client_kwargs.region_name=eu-1"], {"client_kwargs": {"region_name": "eu-1"}}),
    ],
)
def test_pairs_on_the_command_line(pairs: list[str], expected: object) -> None:
    assert storage_options(argparse.Namespace(storage_option=pairs)) == expected


@pytest.mark.parametrize("pair", ["secretword", "=secretword", ""])
def test_what_is_no_pair_is_refused_and_not_shown(pair: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SpecError, match="KEY=VALUE"):
        storage_options(argparse.Namespace(storage_option=[pair]))
    assert main(["show", "s3://bucket/exp", "--storage-option", pair]) == 2
    said = capsys.readouterr().err
    assert "KEY=VALUE" in said
    assert "secretword" not in said


def test_a_remote_experiment_needs_no_database_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings.cache_clear()
    try:
        spec = sample_spec(name="exp", storage="memory://bucket/of its own")
        monkeypatch.setattr(locate, "check_storage", lambda _: None)  # memory:// has no conditional writes
        opened = locate.create(spec, seed=1, workdir=".")
        assert restore_command(opened) == "holdfast restore 'memory://bucket/of its own/exp'"
        assert opened.folder.place == "memory://bucket/of its own/exp"
        assert opened.database.file is not None
        assert opened.database.file.parent == tmp_path / "data" / "holdfast"
        opened.close()
        assert folder_at("memory://bucket/of its own/exp").exists()
        opened.folder.delete()
        assert folder_at("memory://bucket/of its own/exp").root.names() == []
        assert list((tmp_path / "cache").rglob("work/*")) == []
    finally:
        settings.cache_clear()
