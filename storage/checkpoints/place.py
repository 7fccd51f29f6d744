"""Where a store of its own is, and what is known of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.core.errors import CheckpointNotFound, InvalidInput
from holdfast.storage.checkpoints.catalog import Catalog, Entry
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.checkpoints.names import FLAT
from holdfast.storage.checkpoints.ports import DirectCheckpoints
from holdfast.storage.root import LocalRoot, Root, is_url, join, open_root


@dataclass
class Place:
    """A store's root, the checkpoints below it, and their catalog; ``folder`` where it is local."""

    root: Root
    folder: Path | None
    checkpoints: DirectCheckpoints
    catalog: Catalog
    verified: set[str] = field(default_factory=set)
    """the checkpoint that was last read back and found good"""

    @classmethod
    def at(
        cls,
        path: str | os.PathLike[str],
        *,
        options: Mapping[str, Any] | None = None,
        filesystem: Any = None,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
    ) -> Place:
        """Return the place at a path or URL; SpecError for a URL that makes no sense. Nothing is read or made."""
        location = os.fspath(path)
        where = location if is_url(location) or filesystem is not None else os.path.abspath(location)
        root = open_root(where, options, filesystem)
        checkpoints: DirectCheckpoints
        if isinstance(root, LocalRoot):
            checkpoints = LocalCheckpoints(root.path, layout=FLAT)
            return cls(root=root, folder=root.path, checkpoints=checkpoints, catalog=Catalog(root, checkpoints, root.path))
        from holdfast.storage.checkpoints.cache import LIMIT
        from holdfast.storage.checkpoints.remote import RemoteCheckpoints
        from holdfast.storage.objects import ObjectRoot

        assert isinstance(root, ObjectRoot)
        work = Path(cache).absolute() if cache is not None else _temporary(root.location)
        checkpoints = RemoteCheckpoints(root, work, LIMIT if cache_bytes is None else cache_bytes, layout=FLAT)
        return cls(root=root, folder=None, checkpoints=checkpoints, catalog=Catalog(root, checkpoints, None))

    def where(self, name: str) -> Path | str:
        """Return the path or URL of a checkpoint."""
        return self.folder / name if self.folder is not None else join(self.root.location, name)

    def newest(self) -> Entry | None:
        """Return the newest checkpoint whose folder is still there, None when there is none at all."""
        while True:
            for entry in self.catalog.newest_first():
                if self.folder is None or self.catalog.exists(entry.path):
                    return entry
            if not self.catalog.changed():  # all that was listed may have been pruned meanwhile
                return None

    def missing(self, which: int | str) -> CheckpointNotFound:
        """Return the error for a checkpoint that is not there."""
        steps = [entry.step for entry in self.catalog.all()]
        few = ", ".join(map(str, steps if len(steps) <= 6 else [*steps[:3], "...", *steps[-3:]]))
        there = f"there are {len(steps)}, of the steps {few}" if steps else "there is none at all"
        what = f"of step {which}" if isinstance(which, int) else f"to take as {which!r}"
        return CheckpointNotFound(f"{self.root.location}: there is no checkpoint {what}; {there}")

    def refuse_experiments(self) -> None:
        """Raise InvalidInput when the folder is that of a trial's checkpoints, which rows decide about."""
        if self.folder is not None and self.folder.name == "checkpoints":
            experiment = self.folder.parent.parent.parent
            if (experiment / "experiment.json").exists():
                raise InvalidInput(f"{self.folder} belongs to a trial of {experiment}; it can be read here, not written")


_folders: dict[tuple[int, str], tempfile.TemporaryDirectory[str]] = {}


def _temporary(location: str) -> Path:
    """Return this process's folder for copies of what is at a location; it is removed when the process ends."""
    key = (os.getpid(), location)
    if key not in _folders:
        _folders[key] = tempfile.TemporaryDirectory(prefix="holdfast-checkpoints-")
    return Path(_folders[key].name)
