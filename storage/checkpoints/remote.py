"""Checkpoints on an object store: uploaded under a prefix of their own, the manifest last, and read by way of local copies.

trials/000007/checkpoints/step_00000012-a2-3f9c01d2/state.json      uploaded; nothing yet
trials/000007/checkpoints/step_00000012-a2-3f9c01d2/manifest.json   the checkpoint
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path

import xxhash

from holdfast.core.errors import CheckpointCorrupt, CheckpointNotFound, Corrupt, NewerFormat, NotACheckpoint, StorageError
from holdfast.core.faults import point
from holdfast.storage import transfers
from holdfast.storage.checkpoints.cache import LIMIT, Cache, Hold
from holdfast.storage.checkpoints.files import storage_errors
from holdfast.storage.checkpoints.local import Loaded, LocalCheckpoints, Published, compare, compare_digest, may_go
from holdfast.storage.checkpoints.manifest import MANIFEST, Manifest, digest_of
from holdfast.storage.checkpoints.names import TRIALS, Layout, is_name
from holdfast.storage.objects import ObjectRoot

log = logging.getLogger(__name__)


class RemoteCheckpoints:
    """The checkpoints below an object store's ``root``; ``work`` is a local folder in which trials stage and load.

    A checkpoint exists from the PUT of its manifest on, or not at all. What was published or fetched here leaves a copy in
    ``work``, which counts for nothing. Copies take ``limit`` bytes at most (:class:`Cache`); of each trial that is not
    released, the newest one and the one that was used last are not evicted.
    """

    def __init__(self, root: ObjectRoot, work: Path, limit: int = LIMIT, *, layout: Layout = TRIALS) -> None:
        self.root = root
        self.layout = layout
        self._local = LocalCheckpoints(work, layout=layout)
        self._cache = Cache(work, limit)
        self._held: dict[int, dict[str, Hold]] = {}  # by trial and path
        self._holding = threading.Lock()

    def stage(self, trial: int, attempt: int, step: int) -> Path:
        """Make and return a new empty local directory; see :meth:`LocalCheckpoints.stage`."""
        return self._local.stage(trial, attempt, step)

    def discard(self, staged: Path) -> None:
        """Remove a staged directory, if it is there."""
        self._local.discard(staged)

    def publish(self, staged: Path, manifest: Manifest) -> Published:
        """Upload the staged files, and last the manifest.

        Raises StorageError when the store or the local disk refuses; what was uploaded is deleted then as far as that goes,
        and the staged files are gone.
        """
        path = self._local.published_path(staged, manifest)
        if not staged.is_dir():
            raise StorageError(errno.ENOENT, f"cannot publish {self._place(path)}: {staged} is gone")
        data = manifest.to_bytes()
        point("checkpoint.staged")
        try:
            transfers.upload(self.root, [(staged / entry.name, f"{path}/{entry.name}") for entry in manifest.files])
            point("checkpoint.manifest-written")  # it is known, and nowhere yet
            self.root.write(f"{path}/{MANIFEST}", data)
            point("checkpoint.renamed")
        except BaseException:
            self._unpublish(path)
            self._local.discard(staged)
            raise
        try:
            self._cache.with_room(len(data), lambda: self._keep(staged, path, data))
        except OSError as error:
            log.warning("no copy of %s is kept here: %s", path, error)
            self._local.discard(staged)
        return Published(path=path, digest=digest_of(data), bytes=manifest.size + len(data))

    def read_manifest(self, path: str) -> tuple[Manifest, str]:
        """Return the manifest and its digest, as the store has them now; raises as :meth:`LocalCheckpoints.read_manifest`."""
        manifest, data = self._manifest(path)
        return manifest, digest_of(data)

    def _manifest(self, path: str) -> tuple[Manifest, bytes]:
        named = self.layout.match(path)
        place = self._place(path)
        data = self.root.read(f"{path}/{MANIFEST}")
        if data is None:
            if not self.root.names(path):
                raise CheckpointNotFound(f"there is no checkpoint {place}")
            raise NotACheckpoint(f"{place} has no {MANIFEST}: it is not a checkpoint")
        try:
            manifest = Manifest.parse(data)
        except (NotACheckpoint, NewerFormat) as error:
            raise type(error)(f"{place}/{MANIFEST}: {error}") from error
        compare(place, manifest, named)
        return manifest, data

    def verify(
        self,
        path: str,
        *,
        digest: str | None = None,
        trial: int | None = None,
        attempt: int | None = None,
        step: int | None = None,
    ) -> Manifest:
        """Read every file and return the manifest; raises as :meth:`LocalCheckpoints.verify`."""
        manifest, _ = self._checked(path, digest, {"trial": trial, "attempt": attempt, "step": step})
        self._read(path, manifest, None)
        return manifest

    def load(
        self,
        path: str,
        *,
        digest: str | None = None,
        trial: int | None = None,
        attempt: int | None = None,
        step: int | None = None,
    ) -> Loaded:
        """Return the checkpoint with its state, as the store has it now; its folder is a local copy.

        The user's own files are safe from eviction until two other checkpoints of the trial were used here.
        """
        manifest, data = self._checked(path, digest, {"trial": trial, "attempt": attempt, "step": step})
        for last in (False, False, True):
            self._download(path, manifest, data)
            if (held := self._cache.hold(path)) is not None:
                self._hold(path, held)
            try:
                return self._local.load(path, digest=digest_of(data))
            except (Corrupt, CheckpointNotFound):  # the copy that was there already
                if last:
                    raise
                self._cache.drop(path)
        raise AssertionError

    def fetch(self, path: str, *, digest: str, trial: int, attempt: int, step: int) -> None:
        """Have a checkpoint in the work folder, verified: the copy that is there, or a new one.

        Raises CheckpointNotFound, NotACheckpoint or CheckpointCorrupt when the store has no such checkpoint, StorageError
        when store or disk refuse.
        """
        manifest, data = self._checked(path, digest, {"trial": trial, "attempt": attempt, "step": step})
        for last in (False, False, True):
            if (held := self._cache.hold(path)) is not None:
                try:
                    self._local.verify(path, digest=digest)
                    self._hold(path, held)
                    return
                except (Corrupt, CheckpointNotFound):
                    if last:
                        raise
                    self._cache.drop(path)
            if self._download(path, manifest, data):
                return
        raise StorageError(f"cannot keep a copy of {path}: other processes go on removing it; restore again")

    def release(self, trial: int) -> None:
        """Remove the trial's copies, and what was staged and not published."""
        with self._holding:
            self._held.pop(trial, None)
        self._local.sweep(trial, ())
        folder = self._local.root / self.layout.folder(trial)
        with contextlib.suppress(OSError):
            folder.rmdir()

    def scan(self, trial: int) -> list[tuple[str, Manifest, str]]:
        """Return (path, manifest, digest) of the trial's checkpoints by attempt and step; see :meth:`LocalCheckpoints.scan`."""
        found: list[tuple[str, Manifest, str]] = []
        for path in self._own(trial):
            with contextlib.suppress(NotACheckpoint, CheckpointCorrupt, CheckpointNotFound):
                found.append((path, *self.read_manifest(path)))
        return sorted(found, key=lambda entry: (entry[1].attempt, entry[1].step, entry[0]))

    def delete(self, path: str, *, spared: Callable[[], bool] | None = None) -> None:
        """Delete a checkpoint, if it is there and not ``spared``: its manifest first.

        A failure is logged, and :meth:`sweep` tries again.
        """
        if spared is not None and spared():
            return
        trial = self._trial(path)
        self._unpublish(path)
        with self._holding:
            self._held.get(trial, {}).pop(path, None)
        self._local.delete(path)

    def sweep(self, trial: int, keep: Collection[str]) -> list[str]:
        """Remove what holdfast left of the trial and ``keep`` does not name, uploads too; return what was removed.

        Nobody may be writing to this trial. Names that holdfast did not make are let be. A failure is logged.
        """
        self.abort_uploads(trial)
        unnamed = [path for path in self._own(trial) if path not in keep]
        removed = [path for path in unnamed if may_go(self, path) and self._unpublish(path)]
        return sorted({*removed, *self._local.sweep(trial, keep)})

    def _own(self, trial: int) -> list[str]:
        """Return the paths that holdfast made for the trial, whether there is a manifest or not."""
        folder = self.layout.folder(trial)
        return [folder + name for name in self.root.names(folder.rstrip("/")) if is_name(name)]

    def _trial(self, path: str) -> int:
        return self.layout.match(path).get("trial", 0)

    def abort_uploads(self, trial: int) -> None:
        """Abort what a killed process left half sent: it is in no listing, and is paid for. A failure is logged."""
        folder = self.layout.folder(trial)
        try:
            for name, upload in self.root.unfinished(folder.rstrip("/")):
                if is_name(name.partition("/")[0]):
                    self.root.abort(folder + name, upload)
        except OSError as error:
            log.warning("could not abort unfinished uploads below %s: %s", self._place(folder), error)

    def _place(self, path: str) -> str:
        return f"{self.root.location}/{path}"

    def _unpublish(self, path: str) -> bool:
        """Delete the manifest, then the rest; tell whether all is gone. A failure is logged."""
        try:
            self.root.delete(f"{path}/{MANIFEST}")
            point("checkpoint.pruned-renamed")
            self.root.delete_folder(path)
        except OSError as error:
            log.warning("could not delete the checkpoint %s, a later sweep will: %s", self._place(path), error)
            return False
        return True

    def _checked(self, path: str, digest: str | None, expected: dict[str, int | None]) -> tuple[Manifest, bytes]:
        """Return a manifest that is the expected one, over the files that it lists and no others; their content is not read."""
        manifest, data = self._manifest(path)
        place = self._place(path)
        compare(place, manifest, expected)
        compare_digest(place, digest_of(data), digest)
        sizes = self.root.files(path)
        for entry in manifest.files:
            found = sizes.pop(entry.name, None)
            if found is None:
                raise CheckpointCorrupt(f"{place}/{entry.name} is missing")
            if found != entry.size:
                raise CheckpointCorrupt(f"{place}/{entry.name} has a size of {found} bytes, its manifest says {entry.size}")
        for name in sizes:
            if name != MANIFEST and not any(part.startswith(".") for part in name.split("/")):
                raise CheckpointCorrupt(f"{place}/{name} is not in the manifest")
        return manifest, data

    def _download(self, path: str, manifest: Manifest, data: bytes) -> bool:
        """Make a copy of what the store has now, verified while it comes; False when another copy was there first."""
        return self._cache.with_room(manifest.size + len(data), lambda: self._receive(path, manifest, data))

    def _receive(self, path: str, manifest: Manifest, data: bytes) -> bool:
        folder, held = self._cache.incoming(path)
        try:
            for parent in sorted({parent for entry in manifest.files for parent in Path(entry.name).parents}):
                with storage_errors(f"make {folder / parent}"):
                    (folder / parent).mkdir(exist_ok=True)
            self._read(path, manifest, folder)
            if self._keep(folder, path, data):
                return True
            shutil.rmtree(folder, ignore_errors=True)
            return False
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            held.close()

    def _read(self, path: str, manifest: Manifest, folder: Path | None) -> None:
        """Read every file, into ``folder`` if there is one; CheckpointCorrupt when one is not what the manifest says."""
        names = [(f"{path}/{entry.name}", entry.size) for entry in manifest.files]
        with contextlib.closing(transfers.download(self.root, names)) as parts:
            for entry in manifest.files:
                with contextlib.nullcontext() if folder is None else _File(folder / entry.name) as file:
                    place = f"{self._place(path)}/{entry.name}"
                    hashed = xxhash.xxh3_128()
                    for start in range(0, entry.size, transfers.PART):
                        data = next(parts)
                        if data is None:
                            raise CheckpointCorrupt(f"{place} is missing")
                        if len(data) != min(transfers.PART, entry.size - start):
                            raise CheckpointCorrupt(f"{place} ends at byte {start + len(data)}: it is too short")
                        hashed.update(data)
                        if file is not None:
                            file.write(data)
                if hashed.hexdigest() != entry.digest:
                    raise CheckpointCorrupt(f"{place} has the digest {hashed.hexdigest()}, its manifest says {entry.digest}")

    def _keep(self, folder: Path, path: str, data: bytes) -> bool:
        """Make a complete folder the local copy of ``path``; False when there is one."""
        with storage_errors(f"keep a copy of {path}"):
            (folder / MANIFEST).write_bytes(data)
        held = self._cache.put(folder, path)
        if held is None:
            return False
        self._hold(path, held)
        self._cache.keep_limit(path)
        return True

    def _hold(self, path: str, held: Hold) -> None:
        """Keep a copy that was used now from eviction, and the trial's newest one; let its others go."""
        held.used()
        trial = self._trial(path)
        with self._holding:
            known = {**self._held.get(trial, {}), path: held}
            newest = max(known, key=self._order)
            self._held[trial] = {name: known[name] for name in {newest, path}}

    def _order(self, path: str) -> tuple[int, int]:
        named = self.layout.match(path)
        return named["attempt"], named["step"]

    def held(self, trial: int) -> list[str]:
        """Return the path of everything that holdfast made for the trial on the store, published or not."""
        return self._own(trial)

    def present(self, trial: int) -> set[str]:
        """Return the path of every published checkpoint whose manifest is there."""
        folder = self.layout.folder(trial)
        split = (name.rpartition("/") for name in self.root.files(folder.rstrip("/")))
        return {folder + name for name, _, file in split if file == MANIFEST and is_name(name)}


class _File:
    """A new file of a copy, written from its beginning; it need not survive a crash."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _File:
        with storage_errors(f"create {self._path}"):
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        return self

    def write(self, content: bytes) -> None:
        view = memoryview(content)
        with storage_errors(f"write {self._path}"):
            while view:
                view = view[os.write(self._descriptor, view) :]

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)
