"""A fork onto a file system of its own that is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from support import small_disk
from support_forks import story

import holdfast
from holdfast.core.errors import DatabaseError, StorageError
from holdfast.upkeep import verify


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of one MiB."""
    with small_disk(tmp_path / "small", megabytes=1) as place:
        yield place


def fill(small: Path, left: int) -> Path:
    """Leave so many bytes free."""
    state = os.statvfs(small)
    ballast = small / "ballast"
    ballast.write_bytes(b"\0" * (state.f_bavail * state.f_frsize - left))
    return ballast


def open_files() -> list[str]:
    """Return what this process has open, by the names that the system knows."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_full_disk_leaves_nothing_and_the_next_try_works(tmp_path: Path, small: Path) -> None:
    """In the mark, the files, the journal, and the database, which comes last."""
    storage = small / "below" / "forks"
    with closing(story(tmp_path / "runs")) as original:
        path = original.folder.path
        before = content(path)
        refused: list[type[Exception]] = []
        for left in (0, 16 << 10, 96 << 10, 200_000, 300_000):
            ballast = fill(small, left)
            try:
                with holdfast.fork(path, "fork", storage=str(storage)):
                    raise AssertionError(f"{left} bytes are to be too few")
            except (StorageError, DatabaseError) as error:
                refused.append(type(error))
            assert not (storage / "fork").exists()
            assert {entry.name for entry in small.rglob("*")} <= {"ballast", "below", "forks", "holdfast.db"}
            assert content(path) == before
            assert not [file for file in open_files() if file.startswith(str(small))]
            ballast.unlink()
        assert set(refused) == {StorageError, DatabaseError}
        with holdfast.fork(path, "fork", storage=str(storage)) as forked:
            assert len(forked.trials) == 6
            assert not verify(forked._opened, forked.checkpoints()).bad
        assert content(path) == before
