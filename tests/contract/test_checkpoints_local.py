"""The contract of checkpoints over a local directory, and what only a directory has."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from holdfast.core.errors import CheckpointCorrupt, NotACheckpoint
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.testing.checkpoints import CheckpointContract
from holdfast.testing.saving import save


class TestLocal(CheckpointContract):
    @pytest.fixture(params=["plain", "ex [a-z] * ? ü {date} %s"])
    def checkpoints(self, tmp_path: Path, request: pytest.FixtureRequest) -> LocalCheckpoints:
        return LocalCheckpoints(tmp_path / "runs" / request.param)


def test_foreign_files_survive(tmp_path: Path) -> None:
    store = LocalCheckpoints(tmp_path)
    published = save(store, 1)
    folder = (tmp_path / published.path).parent
    foreign = [
        "notes.txt",
        "step_00000001",
        "step_1-a1-3f9c",
        "step_000000001-a1-3f9c",
        "step_00000001-a0-3f9c",
        "step_00000001-a1-XYZW",
        "step_00000001-a1-3f9c.bak",
        ".staging-mine",
        ".trash-",
        ".trash-.staging-step_00000001-a1-3f9c",
        "step_٠٠٠٠٠٠٠١-a1-3f9c",
        "[*]",
    ]
    for name in foreign:
        (folder / name).mkdir()
        (folder / name / "file").touch()
    (folder / "step_00000009-a1-3f9c").touch()  # a file, no folder
    (tmp_path / "elsewhere").mkdir()
    (folder / "step_00000008-a1-3f9c").symlink_to(tmp_path / "elsewhere")
    assert [path for path, _, _ in store.scan(7)] == [published.path]
    assert store.sweep(7, []) == [published.path]
    assert {entry.name for entry in folder.iterdir()} == {*foreign, "step_00000009-a1-3f9c", "step_00000008-a1-3f9c"}
    assert all((folder / name / "file").exists() for name in foreign)


def test_a_failing_delete_warns_and_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalCheckpoints(tmp_path)
    published = save(store, 1)

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "unlink", fail)
        store.delete(published.path)
    assert "Permission denied" in caplog.text
    assert store.scan(7) == []
    folder = (tmp_path / published.path).parent
    assert [entry.name for entry in folder.iterdir()] == [".trash-" + Path(published.path).name]
    assert len(store.sweep(7, [])) == 1
    assert list(folder.iterdir()) == []


def test_a_file_replaced_by_something_else_is_noticed(tmp_path: Path) -> None:
    store = LocalCheckpoints(tmp_path)
    published = save(store, 1)
    file = tmp_path / published.path / "state.json"
    file.rename(tmp_path / "state.json")
    file.symlink_to(tmp_path / "state.json")
    with pytest.raises(CheckpointCorrupt, match="no regular file"):
        store.load(published.path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointCorrupt, match="no regular file"):
        store.load(published.path)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointCorrupt, match="no regular file"):
        store.load(published.path)


def test_the_working_directory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = LocalCheckpoints(Path("runs"))
    monkeypatch.chdir("/")
    published = save(store, 1)
    assert LocalCheckpoints(tmp_path / "runs").load(published.path).state == 1


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "dangling link"])
def test_a_manifest_that_is_no_regular_file_is_none(tmp_path: Path, kind: str) -> None:
    """A pipe above all: to open one waits for whoever writes into it."""
    store = LocalCheckpoints(tmp_path)
    published = save(store, 1)
    manifest = tmp_path / published.path / "manifest.json"
    manifest.rename(tmp_path / "aside")
    if kind == "pipe":
        os.mkfifo(manifest)
    elif kind == "folder":
        manifest.mkdir()
    else:
        manifest.symlink_to(tmp_path / ("aside" if kind == "link" else "nothing"))
    for call in (store.read_manifest, store.verify, store.load):
        with pytest.raises(NotACheckpoint, match=r"manifest\.json is no regular file"):
            call(published.path)
    assert store.scan(7) == []
    manifest.rmdir() if kind == "folder" else manifest.unlink()
    os.mknod(manifest, 0o644 | stat.S_IFSOCK)
    with pytest.raises(NotACheckpoint, match="no regular file"):
        store.verify(published.path)
