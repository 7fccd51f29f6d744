"""Where a store of its own is, and what is known of it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.core.errors import CheckpointNotFound, InvalidInput, SpecError, StorageError
from holdfast.storage.checkpoints.catalog import Catalog, Entry
from holdfast.storage.checkpoints.leaving import temporary_folder
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.checkpoints.manifest import MANIFEST
from holdfast.storage.checkpoints.names import FLAT, is_name
from holdfast.storage.checkpoints.ports import DirectCheckpoints
from holdfast.storage.root import LocalRoot, Root, is_url, join, open_root

log = logging.getLogger(__name__)

_OF_A_TRIAL = re.compile(r"[/\\]trials[/\\][0-9]{6,}[/\\]checkpoints$")
_URL_AS_PATH = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)")


@dataclass
class Place:
    """A store's root, the checkpoints below it, and their catalog; ``folder`` where it is local."""

    root: Root
    folder: Path | None
    checkpoints: DirectCheckpoints
    catalog: Catalog
    verified: set[str] = field(default_factory=set)
    """the checkpoints that were read back and found good"""

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
        location = _checked(path)
        if cache is not None and any((Path(cache) / name).exists() for name in ("writer.json", "experiment.json")):
            raise SpecError(f"cache {cache} holds checkpoints of its own; give copies a folder that nothing else is in")
        if cache_bytes is not None and (type(cache_bytes) is not int or cache_bytes < 0):
            raise SpecError(f"cache_bytes is {cache_bytes!r}; it must be a whole number from 0")
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
        work = Path(cache).absolute() if cache is not None else temporary_folder(root.location)
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

    def sweep(self) -> None:
        """Remove from an object store what earlier writers began to upload and did not publish; a failure is logged."""
        from holdfast.storage.checkpoints.remote import RemoteCheckpoints
        from holdfast.storage.objects import ObjectRoot

        assert isinstance(self.root, ObjectRoot)
        assert isinstance(self.checkpoints, RemoteCheckpoints)
        self.checkpoints.abort_uploads(0)
        try:
            names = {name for name in self.root.names() if is_name(name)}
            published = {file.rpartition("/")[0] for file in self.root.files("") if file.endswith(f"/{MANIFEST}")}
        except StorageError as error:
            log.warning("what was uploaded in vain to %s stays there for now: %s", self.root.location, error)
            return
        for name in names - published:
            self.checkpoints.delete(name)

    def refuse_experiments(self) -> None:
        """Raise InvalidInput when the place is that of a trial's checkpoints, which rows decide about."""
        found = _OF_A_TRIAL.search(self.root.location)
        if found is None:
            return
        experiment = self.root.location[: found.start()]
        if self.folder is None or os.path.exists(os.path.join(experiment, "experiment.json")):
            raise InvalidInput(f"{self.root.location} belongs to a trial of {experiment}; it can be read here, not changed")


def _checked(path: object) -> str:
    try:
        location = os.fspath(path)  # type: ignore[call-overload]  # it may be anything
    except TypeError:
        location = None
    if not isinstance(location, str) or not location.strip() or "\0" in location:
        raise SpecError(f"path is {path!r}; name a folder, or a URL such as s3://bucket/prefix")
    if isinstance(path, os.PathLike) and _URL_AS_PATH.match(location):
        raise SpecError(f"path is {path!r}, a URL that has lost a slash as a path; give it as a string")
    return location
