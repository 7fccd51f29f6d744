"""Where Prefect persists results: files that appear whole or not at all, under the experiment's path."""

from __future__ import annotations

from pathlib import Path, PurePath

from prefect.filesystems import LocalFileSystem, WritableFileSystem
from pydantic import PrivateAttr

from holdfast.core.errors import StorageError
from holdfast.storage.atomic import make_folder, sync_folder, write_file
from holdfast.storage.folder import Folder
from holdfast.storage.root import Root
from holdfast.tasks.remote import known

_MADE = 1000
"""Folders that are remembered at most."""


class HoldfastResults(LocalFileSystem):
    """An experiment's folder as Prefect result storage.

    Prefect's own local storage writes in place without fsync: a crash leaves a torn record, which then counts as absent,
    and the trial would run again. What Prefect stores under keys of its own (the exceptions of failed tasks) is not kept: the
    failure is committed by then, and a task that failed because it lost its experiment must not write to it.
    """

    _block_type_name = "Holdfast Results"
    _block_type_slug = "holdfast-results"

    _made: set[Path] = PrivateAttr(default_factory=set)
    """folders whose own names are known to be durable"""

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> str:  # type: ignore[override]  # as Prefect's engine calls it
        file = self._file(path)
        if file.parent == Path(str(self.basepath)):
            return str(file)
        if file.parent not in self._made:
            if len(self._made) >= _MADE:  # a trial's folder is written to a few times, and then no more
                self._made.clear()
            make_folder(file.parent)
            sync_folder(file.parent.parent)  # a worker may have made it for the trial's log
            self._made.add(file.parent)
        write_file(file, content)
        return str(file)

    async def awrite_path(self, path: str, content: bytes) -> str:
        return self.write_path(path, content)

    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]  # as Prefect's engine calls it
        return self._file(path).read_bytes()

    async def aread_path(self, path: str) -> bytes:
        return self._file(path).read_bytes()

    def _file(self, path: str) -> Path:
        root, name = Path(str(self.basepath)), PurePath(path)
        if name.is_absolute():  # what an earlier call returned
            name = name.relative_to(root)
        if ".." in name.parts:
            raise StorageError(f"result key {path!r} leaves the experiment's folder")
        return root / name

    def _resolve_path(self, path: str) -> Path:
        return Path(str(self.basepath)) / path  # Prefect's own resolves links, at the price of a stat for each part


class RemoteResults(WritableFileSystem):
    """An experiment's prefix on an object store as Prefect result storage: a record is one PUT.

    It has no fields: Prefect stores those, and the place knows credentials.
    """

    _block_type_name = "Holdfast Remote Results"
    _block_type_slug = "holdfast-remote-results"

    _root: Root = PrivateAttr()

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> str:  # type: ignore[override]  # as Prefect's engine calls it
        if "/" in _inside(path):  # else one of Prefect's own keys, as above
            self._root.write(path, content)
        return path

    async def awrite_path(self, path: str, content: bytes) -> str:
        return self.write_path(path, content)

    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]  # as Prefect's engine calls it
        found = self._root.read(_inside(path))
        if found is None:
            raise FileNotFoundError(f"there is no result {path}")
        return found

    async def aread_path(self, path: str) -> bytes:
        return self.read_path(path)

    def _resolve_path(self, path: str) -> None:
        """Say that keys are what they are: Prefect would resolve them against the working directory."""


class WorkerResults(WritableFileSystem):
    """Prefect result storage that travels with a task to a worker: it says which experiment, and nothing about where that is.

    The runtime of the process that it is in then knows the place, and that it still is this worker's to write to. Before a
    trial has reached its experiment there, there is nothing to be read.
    """

    _block_type_name = "Holdfast Worker Results"
    _block_type_slug = "holdfast-worker-results"

    experiment: str
    """UUID"""
    epoch: int

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> str:  # type: ignore[override]  # as Prefect's engine calls it
        if "/" in _inside(path):  # else one of Prefect's own keys, as above
            runtime = known(self.experiment, self.epoch)
            if runtime is None or not runtime.enter():
                raise StorageError(f"result {path} is not written: this worker is none of the experiment's any more")
            try:
                runtime.held()
                runtime.folder.root.write(path, content)
            finally:
                runtime.leave()
        return path

    async def awrite_path(self, path: str, content: bytes) -> str:
        return self.write_path(path, content)

    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]  # as Prefect's engine calls it
        runtime = known(self.experiment, self.epoch)
        found = None if runtime is None else runtime.folder.root.read(_inside(path))
        if found is None:
            raise FileNotFoundError(f"there is no result {path}")
        return found

    async def aread_path(self, path: str) -> bytes:
        return self.read_path(path)

    def _resolve_path(self, path: str) -> None:
        """Say that keys are what they are, as above."""


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise StorageError(f"result key {path!r} leaves the experiment's folder")
    return path


def results_in(folder: Folder) -> HoldfastResults | RemoteResults:
    """Return the result storage of an experiment."""
    if folder.is_local:
        return HoldfastResults(basepath=str(folder.path))
    results = RemoteResults()
    results._root = folder.root
    return results
