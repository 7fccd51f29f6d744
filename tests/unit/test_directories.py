"""Folders of the user's own files: copied or taken in place, whole, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast.core.errors import NotStorable
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
