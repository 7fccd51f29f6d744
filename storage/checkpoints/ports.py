"""What drives a search asks of a store of checkpoints, and which store an experiment has."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from holdfast.storage.checkpoints.local import Loaded, LocalCheckpoints, Published
from holdfast.storage.checkpoints.manifest import Manifest

if TYPE_CHECKING:
    from holdfast.storage.folder import Folder


class Checkpoints(Protocol):
    """A store of checkpoints. Workers stage into, and load from, the local folder that :class:`LocalCheckpoints` has there."""

    def publish(self, staged: Path, manifest: Manifest) -> Published:
        """Make the staged files a checkpoint, durably; StorageError when it cannot, and then the staged files are gone."""
        ...

    def verify(
        self,
        path: str,
        *,
        digest: str | None = None,
        trial: int | None = None,
        attempt: int | None = None,
        step: int | None = None,
    ) -> Manifest:
        """Read every file and return the manifest; Corrupt or CheckpointNotFound say what is wrong."""
        ...

    def fetch(self, path: str, *, digest: str, trial: int, attempt: int, step: int) -> None:
        """Have a checkpoint where workers load it from; raises as :meth:`verify` where that reads its files."""
        ...

    def release(self, trial: int) -> None:
        """Drop what is kept of the trial only for its workers: none of them runs now."""
        ...

    def scan(self, trial: int) -> list[tuple[str, Manifest, str]]:
        """Return (path, manifest, digest) of the trial's checkpoints by attempt and step."""
        ...

    def delete(self, path: str, *, spared: Callable[[], bool] | None = None) -> None:
        """Delete a checkpoint, if it is there and not ``spared``; a failure is logged, and :meth:`sweep` tries again."""
        ...

    def load(
        self,
        path: str,
        *,
        digest: str | None = None,
        trial: int | None = None,
        attempt: int | None = None,
        step: int | None = None,
    ) -> Loaded:
        """Return a checkpoint with its state, verified while it is read; raises as :meth:`verify`."""
        ...

    def held(self, trial: int) -> list[str]:
        """Return the path of everything that holdfast made for the trial and :meth:`sweep` could remove."""
        ...

    def present(self, trial: int) -> set[str]:
        """Return the path of every published checkpoint of the trial that is not simply gone, whatever it holds."""
        ...

    def sweep(self, trial: int, keep: Collection[str]) -> list[str]:
        """Remove what holdfast left of the trial and ``keep`` does not name; return what was removed."""
        ...


class DirectCheckpoints(Checkpoints, Protocol):
    """A store of checkpoints with what a trial's process does, too; ``LocalCheckpoints`` says what each call promises."""

    def stage(self, trial: int, attempt: int, step: int) -> Path: ...

    def discard(self, staged: Path) -> None: ...

    def read_manifest(self, path: str) -> tuple[Manifest, str]: ...


def checkpoints_in(folder: Folder) -> Checkpoints:
    """Return the store of an experiment's checkpoints."""
    if folder.is_local:
        return LocalCheckpoints(folder.path)
    from holdfast.storage.checkpoints.cache import LIMIT
    from holdfast.storage.checkpoints.remote import RemoteCheckpoints
    from holdfast.storage.objects import ObjectRoot

    assert isinstance(folder.root, ObjectRoot)
    limit = LIMIT if folder.cache_bytes is None else folder.cache_bytes
    return RemoteCheckpoints(folder.root, folder.path, limit)
