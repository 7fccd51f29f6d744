"""Folders of the user's own files: copied or taken in place, whole, or refused."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from store_kit import unprivileged

from holdfast.core.errors import NotStorable, StorageError
from holdfast.storage.checkpoints.serializers import hash_directory, ingest_directory, verify_files
from holdfast.testing.saving import manifest_of


def test_links_to_files_are_followed_and_the_source_stays(tmp_path: Path) -> None:
    source, folder = tmp_path / "in", tmp_path / "out"
    (source / "a" / "b").mkdir(parents=True)
    folder.mkdir()
    (source / "a" / "b" / "file").write_bytes(b"1")
    (source / "link").symlink_to(source / "a" / "b" / "file")
    (source / ".hidden").write_bytes(b"2")
    entries = ingest_directory(source, folder)
    assert {entry.name: entry.size for entry in entries} == {".hidden": 1, "a/b/file": 1, "link": 1}
    assert not (folder / "link").is_symlink()
    verify_files(folder, manifest_of(entries, serializer="directory"))
    assert hash_directory(folder) == entries
    assert (source / "a" / "b" / "file").read_bytes() == b"1"


@pytest.mark.parametrize("kind", ["folder link", "broken link", "pipe", "manifest", "backslash", "not utf-8"])
def test_anything_else_is_refused(kind: str, tmp_path: Path) -> None:
    source, folder = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    (source / "a").touch()
    match kind:
        case "folder link":
            (source / "x").symlink_to(tmp_path)
        case "broken link":
            (source / "x").symlink_to(tmp_path / "nowhere")
        case "pipe":
            os.mkfifo(source / "x")
        case "manifest":
            (source / "manifest.json").touch()
        case "backslash":
            (source / "..\\x").touch()
        case "not utf-8":
            (source / os.fsdecode(b"\xff")).touch()
    with pytest.raises(NotStorable):
        ingest_directory(source, folder)
    with pytest.raises(NotStorable):
        hash_directory(source)
    assert list(folder.iterdir()) == []


def test_a_link_written_in_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(__file__)
    with pytest.raises(NotStorable, match="files and folders"):
        hash_directory(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotStorable, match="takes a folder"):
        ingest_directory(tmp_path / "none", tmp_path)


@pytest.mark.parametrize("kind", ["missing", "file", "loop", "link", "below a file", "name too long"])
def test_a_folder_that_is_none_is_refused_by_its_path(kind: str, tmp_path: Path) -> None:
    place, folder = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    match kind:
        case "file":
            place.touch()
        case "loop":
            place.symlink_to(place)
        case "link":
            place.symlink_to(folder)
        case "below a file":
            place.touch()
            place = place / "more"
        case "name too long":
            place = tmp_path / ("x" * 300)
    with pytest.raises(NotStorable) as caught:
        hash_directory(place)
    assert str(place) in str(caught.value)
    if kind != "link":  # the user's own folder may be behind one
        with pytest.raises(NotStorable) as caught:
            ingest_directory(place, folder)
        assert str(place) in str(caught.value)
    assert list(folder.iterdir()) == []


def test_a_loop_of_links_among_the_files_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "deep" / "loop").symlink_to("loop")
    with pytest.raises(NotStorable, match="deep/loop"):
        ingest_directory(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", ["deep/file", "deep", "."])
def test_what_may_not_be_read_is_refused_by_its_path(name: str, tmp_path: Path) -> None:
    source, folder = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").touch()
    folder.mkdir()
    for parent in [tmp_path, *tmp_path.parents[:2]]:
        parent.chmod(0o755)
    folder.chmod(0o777)
    (source / name).chmod(0)
    try:
        for call in (lambda: ingest_directory(source, folder), lambda: hash_directory(source)):
            with unprivileged(), pytest.raises(NotStorable, match="Permission denied") as caught:
                call()
            assert os.path.normpath(source / name) in str(caught.value)
    finally:
        (source / name).chmod(0o755)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_a_disk_that_fails_is_of_the_storage(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    (source / "file").touch()

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    for call in ("scandir", "stat", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            if call != "stat":
                with pytest.raises(StorageError):
                    hash_directory(source)
            with pytest.raises(StorageError):
                ingest_directory(source, folder)
        shutil.rmtree(folder)
        folder.mkdir()


def test_what_vanishes_while_it_is_read_is_no_fault_of_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = tmp_path / "in", tmp_path / "out"
    real = os.scandir

    def removing(place: Any) -> Any:
        found = real(place)
        if str(place).endswith("deep"):
            entries = [*found]
            shutil.rmtree(place)
            return Listed(entries)
        return found

    monkeypatch.setattr(os, "scandir", removing)
    for call in (lambda: ingest_directory(source, folder), lambda: hash_directory(source)):
        (source / "deep").mkdir(parents=True)
        folder.mkdir()
        (source / "deep" / "file").touch()
        with pytest.raises(NotStorable, match="deep/file"):
            call()
        shutil.rmtree(source)
        shutil.rmtree(folder)


class Listed(list[os.DirEntry[str]]):
    """What was listed of a folder, as ``os.scandir`` gives it."""

    def __enter__(self) -> Listed:
        return self

    def __exit__(self, *error: object) -> None:
        pass
