"""Where Prefect persists results: files that appear whole or not at all, under the experiment's path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.filesystems import LocalFileSystem

from holdfast.storage.atomic import make_folder, write_file

SIDE_FOLDER = ".prefect"
"""For what Prefect writes under keys of its own (the exceptions of failed tasks): swept, never read."""


class HoldfastResults(LocalFileSystem):
    """An experiment's folder as Prefect result storage.

    Prefect's own local storage writes in place without fsync: a crash leaves a torn record, which then counts as absent,
    and the trial would run again.
    """

    _block_type_name = "Holdfast Results"
    _block_type_slug = "holdfast-results"

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> str:  # type: ignore[override]  # as Prefect's engine calls it
        file = self._file(path)
        if not file.parent.is_dir():
            make_folder(file.parent)
        write_file(file, content)
        return str(file)

    async def awrite_path(self, path: str, content: bytes) -> str:
        return self.write_path(path, content)

    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]  # as Prefect's engine calls it
        return self._file(path).read_bytes()

    async def aread_path(self, path: str) -> bytes:
        return self._file(path).read_bytes()

    def _file(self, path: str) -> Path:
        name = Path(path)
        if len(name.parts) == 1:
            path = f"{SIDE_FOLDER}/{path}"
        return Path(self._resolve_path(path))


def results_in(folder: Path) -> Any:
    """Return the result storage of the experiment in ``folder``."""
    return HoldfastResults(basepath=str(folder))
