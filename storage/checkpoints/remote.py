"""Checkpoints on an object store: uploaded under a prefix of their own, the manifest last, and read through a local mirror.

trials/000007/checkpoints/step_00000012-a2-3f9c01d2/state.json      uploaded; nothing yet
trials/000007/checkpoints/step_00000012-a2-3f9c01d2/manifest.json   the checkpoint
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from holdfast.core.errors import CheckpointCorrupt, CheckpointNotFound, Corrupt, NotACheckpoint, StorageError
from holdfast.core.faults import point
from holdfast.storage.checkpoints.files import Sink, fsync_folder, storage_errors
from holdfast.storage.checkpoints.local import Loaded, LocalCheckpoints, Published, compare
from holdfast.storage.checkpoints.manifest import MANIFEST, FileEntry, Manifest, digest_of
from holdfast.storage.checkpoints.names import TRIALS, Layout, is_name
from holdfast.storage.objects import ObjectRoot

log = logging.getLogger(__name__)

_PART = 16 << 20  # bytes that are read at a time
_AT_ONCE = 4  # files


class RemoteCheckpoints:
    """The checkpoints below an object store's ``root``; ``work`` is a local folder in which trials stage and load.

    A checkpoint exists from the PUT of its manifest on, or not at all. What was published or fetched here stays in ``work``
    until the trial's attempt has ended; it is a copy, which counts for nothing.
    """

    def __init__(self, root: ObjectRoot, work: Path, *, layout: Layout = TRIALS) -> None:
        self.root = root
        self._local = LocalCheckpoints(work, layout=layout)
        self.layout = layout

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
            raise StorageError(f"cannot publish {self._place(path)}: {staged} is gone")
        data = manifest.to_bytes()
        point("checkpoint.staged")
        try:
            _all(lambda entry: self.root.upload(staged / entry.name, f"{path}/{entry.name}"), manifest.files)
            point("checkpoint.manifest-written")  # it is known, and nowhere yet
            self.root.write(f"{path}/{MANIFEST}", data)
            point("checkpoint.renamed")
        except OSError:
            self._unpublish(path)
            self._local.discard(staged)
            raise
        try:
            self._keep(staged, path, data)
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
        except NotACheckpoint as error:
            raise NotACheckpoint(f"{place}/{MANIFEST}: {error}") from error
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
        _all(lambda entry: self._read(path, entry, lambda _: None), manifest.files)
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
        """Return the checkpoint with its state, as the store has it now, by way of the local mirror."""
        self._download(path, digest, {"trial": trial, "attempt": attempt, "step": step})
        return self._local.load(path, digest=digest, trial=trial, attempt=attempt, step=step)

    def fetch(self, path: str, *, digest: str, trial: int, attempt: int, step: int) -> None:
        """Have a checkpoint in the local mirror, verified: the copy that is there, or a new one.

        Raises CheckpointNotFound, NotACheckpoint or CheckpointCorrupt when the store has no such checkpoint, StorageError
        when store or disk refuse.
        """
        named: dict[str, int | None] = {"trial": trial, "attempt": attempt, "step": step}
        if (self._local.root / path).is_dir():
            with contextlib.suppress(Corrupt, CheckpointNotFound):
                self._local.verify(path, digest=digest, trial=trial, attempt=attempt, step=step)
                return
        self._download(path, digest, named)

    def release(self, trial: int) -> None:
        """Remove the trial's copies from the local mirror, and what was staged and not published."""
        self._local.sweep(trial, ())
        folder = self._local.root / "trials" / f"{trial:06d}" / "checkpoints"
        with contextlib.suppress(OSError):
            folder.rmdir()

    def scan(self, trial: int) -> list[tuple[str, Manifest, str]]:
        """Return (path, manifest, digest) of the trial's checkpoints by attempt and step; see :meth:`LocalCheckpoints.scan`."""
        found: list[tuple[str, Manifest, str]] = []
        for path in self._own(trial):
            with contextlib.suppress(NotACheckpoint, CheckpointCorrupt, CheckpointNotFound):
                found.append((path, *self.read_manifest(path)))
        return sorted(found, key=lambda entry: (entry[1].attempt, entry[1].step, entry[0]))

    def delete(self, path: str) -> None:
        """Delete a checkpoint, if it is there: its manifest first. A failure is logged, and :meth:`sweep` tries again."""
        self.layout.match(path)
        self._unpublish(path)
        self._local.delete(path)

    def sweep(self, trial: int, keep: Collection[str]) -> list[str]:
        """Remove what holdfast left of the trial and ``keep`` does not name; return what was removed.

        Nobody may be writing to this trial. Names that holdfast did not make are let be. A failure is logged.
        """
        removed = [path for path in self._own(trial) if path not in keep and self._unpublish(path)]
        return sorted({*removed, *self._local.sweep(trial, keep)})

    def _own(self, trial: int) -> list[str]:
        """Return the paths that holdfast made for the trial, whether there is a manifest or not."""
        folder = self.layout.folder(trial).rstrip("/")
        return [f"{folder}/{name}" for name in self.root.names(folder) if is_name(name)]

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
        if digest is not None and digest_of(data) != digest:
            raise CheckpointCorrupt(
                f"{place} is another checkpoint: its manifest's digest is {digest_of(data)}, recorded is {digest}"
            )
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

    def _download(self, path: str, digest: str | None, expected: dict[str, int | None]) -> None:
        """Replace the copy in the local mirror by what the store has now, verified while it comes."""
        manifest, data = self._checked(path, digest, expected)
        staged = self._local.stage(manifest.trial, manifest.attempt, manifest.step)
        try:
            for folder in sorted({parent for entry in manifest.files for parent in Path(entry.name).parents}):
                with storage_errors(f"make {staged / folder}"):
                    (staged / folder).mkdir(exist_ok=True)
            _all(lambda entry: self._fetch(path, entry, staged), manifest.files)
            self._keep(staged, path, data)
        except BaseException:
            self._local.discard(staged)
            raise

    def _fetch(self, path: str, entry: FileEntry, folder: Path) -> None:
        with Sink(folder, entry.name) as sink:
            self._read(path, entry, sink.write)

    def _read(self, path: str, entry: FileEntry, write: Callable[[bytes], object]) -> None:
        """Read a file of a checkpoint in parts; CheckpointCorrupt when it is not what its manifest says."""
        place = f"{self._place(path)}/{entry.name}"
        hashed = xxhash.xxh3_128()
        for start in range(0, entry.size, _PART):
            end = min(start + _PART, entry.size)
            data = self.root.part(f"{path}/{entry.name}", start, end)
            if data is None:
                raise CheckpointCorrupt(f"{place} is missing")
            if len(data) != end - start:
                raise CheckpointCorrupt(f"{place} ends at byte {start + len(data)}: it is too short")
            hashed.update(data)
            write(data)
        if hashed.hexdigest() != entry.digest:
            raise CheckpointCorrupt(f"{place} has the digest {hashed.hexdigest()}, its manifest says {entry.digest}")

    def _keep(self, staged: Path, path: str, data: bytes) -> None:
        """Make a staged directory the local copy of ``path``; one that is there already goes."""
        final = self._local.root / path
        with storage_errors(f"keep a copy of {path}"):
            (staged / MANIFEST).write_bytes(data)
            if os.path.lexists(final):
                self._local.delete(path)
            os.rename(staged, final)
            fsync_folder(final.parent)

    def held(self, trial: int) -> list[str]:
        """Return the path of everything that holdfast made for the trial on the store, published or not."""
        return self._own(trial)


def _all(call: Callable[[FileEntry], None], entries: Iterable[FileEntry]) -> None:
    """Call for each entry, some at a time; the first error is raised once none runs any more, and the rest is left out."""
    entries = list(entries)
    if len(entries) < 2:
        for entry in entries:
            call(entry)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = [pool.submit(call, entry) for entry in entries]
        try:
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
