"""Checkpoints in a local directory: staged, published by a rename, verified on load, deleted by way of a trash name.

trials/000007/checkpoints/.staging-step_00000012-a2-3f9c01d2   being written; nothing yet
trials/000007/checkpoints/step_00000012-a2-3f9c01d2            published, with manifest.json
trials/000007/checkpoints/.trash-step_00000012-a2-3f9c01d2     being deleted; nothing any more
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.checkpoint import check_step
from holdfast.core.errors import (
    CheckpointCorrupt,
    CheckpointNotFound,
    Corrupt,
    InvalidInput,
    NewerFormat,
    NotACheckpoint,
    StorageError,
)
from holdfast.core.faults import point
from holdfast.core.values import Metrics
from holdfast.storage.checkpoints.files import Sink, fsync_folder, read_regular, storage_errors
from holdfast.storage.checkpoints.manifest import MANIFEST, Manifest, digest_of
from holdfast.storage.checkpoints.names import OWN, STAGING, TRASH, TRIALS, Layout, is_name
from holdfast.storage.checkpoints.serializers import read_state, verify_files

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A checkpoint that is durable: ``path`` relative to the root, ``digest`` of its manifest, ``bytes`` on disk."""

    path: str
    digest: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A verified checkpoint; ``path`` is its folder, and so is ``state`` when it holds the user's own files."""

    step: int
    metrics: Metrics
    path: Path
    state: object


class LocalCheckpoints:
    """The checkpoints below ``root``, the experiment's path.

    A checkpoint exists from the rename in :meth:`publish` on, complete and durable, or not at all. Threads and processes
    may share a root: every staged directory is one writer's own. Which of two published ones counts, and whether a writer
    may still publish, is for the rows to say.

    With ``own``, a folder in that of the checkpoints, whatever is staged or deleted goes by way of it: whoever takes it away
    stops this store from publishing and deleting, at once and for good.
    """

    def __init__(self, root: Path, *, layout: Layout = TRIALS, own: str | None = None) -> None:
        self.root = root.absolute()  # user code may change the working directory
        self.layout = layout
        self.own = own
        self._synced: set[int] = set()  # trials whose folders are known to be durable

    def stage(self, trial: int, attempt: int, step: int) -> Path:
        """Make and return a new empty directory to write the checkpoint's files into; StorageError when it cannot."""
        check_step(step)
        folder = self._trial(trial)
        aside = folder / (self.own or "")
        with storage_errors(f"stage a checkpoint in {aside}"):
            while True:
                name = f"step_{step:08d}-a{attempt}-{secrets.token_hex(4)}"
                if os.path.lexists(folder / name):
                    continue
                try:
                    os.mkdir(aside / (STAGING + name))
                except FileNotFoundError:
                    if self.own is not None:
                        raise
                    os.makedirs(folder, exist_ok=True)
                except FileExistsError:
                    continue
                else:
                    return aside / (STAGING + name)

    def publish(self, staged: Path, manifest: Manifest) -> Published:
        """Make the staged files, which are fsynced already, a checkpoint: manifest, fsync, rename, fsync of every parent.

        Raises StorageError when the file system refuses; then the staged files are gone, and nothing else has changed.
        """
        path = self.published_path(staged, manifest)
        data = manifest.to_bytes()
        final = self.root / path
        renamed = False
        try:
            with storage_errors(f"publish {path}"):
                point("checkpoint.staged")
                with Sink(staged, MANIFEST) as sink:
                    sink.write(data)
                for folder in sorted({folder for entry in manifest.files for folder in _folders(entry.name)}, reverse=True):
                    fsync_folder(staged / folder)
                fsync_folder(staged)
                point("checkpoint.manifest-written")
                os.rename(staged, final)
                renamed = True
                point("checkpoint.renamed")
                self._sync_parents(manifest.trial)
        except OSError:
            if renamed:
                self._retire(final)  # not known to be durable
            else:
                _remove(staged)
            raise
        return Published(path=path, digest=digest_of(data), bytes=manifest.size + len(data))

    def discard(self, staged: Path) -> None:
        """Remove a staged directory, if it is there; a failure is logged, and :meth:`sweep` tries again."""
        self._published(staged)
        _remove(staged)

    def read_manifest(self, path: str) -> tuple[Manifest, str]:
        """Return the manifest and its digest.

        Raises CheckpointNotFound when the directory is gone, NotACheckpoint when it has no valid manifest,
        CheckpointCorrupt when the manifest is another directory's, NewerFormat, and StorageError.
        """
        named = self.layout.match(path)
        folder = self.root / path
        with storage_errors(f"read {folder / MANIFEST}"):
            try:
                data = read_regular(folder / MANIFEST)
            except (FileNotFoundError, NotADirectoryError):
                if not os.path.lexists(folder):
                    raise CheckpointNotFound(f"there is no checkpoint {folder}") from None
                raise NotACheckpoint(f"{folder} has no {MANIFEST}: it is not a checkpoint") from None
        try:
            manifest = Manifest.parse(data)
        except (NotACheckpoint, NewerFormat) as error:
            raise type(error)(f"{folder / MANIFEST}: {error}") from error
        compare(folder, manifest, named)
        return manifest, digest_of(data)

    def verify(
        self,
        path: str,
        *,
        digest: str | None = None,
        trial: int | None = None,
        attempt: int | None = None,
        step: int | None = None,
    ) -> Manifest:
        """Read every file and return the manifest; what is given besides must agree with it.

        Raises as :meth:`read_manifest`, and CheckpointCorrupt naming the file and what differs.
        """
        manifest = self._checked(path, digest, {"trial": trial, "attempt": attempt, "step": step})
        with _while_it_is_there(self.root / path):
            verify_files(self.root / path, manifest)
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
        """Return the checkpoint with its state, verified while it is read; raises as :meth:`verify`."""
        manifest = self._checked(path, digest, {"trial": trial, "attempt": attempt, "step": step})
        folder = self.root / path
        with _while_it_is_there(folder):
            state = read_state(folder, manifest)
        return Loaded(step=manifest.step, metrics=manifest.metrics, path=folder, state=state)

    def scan(self, trial: int) -> list[tuple[str, Manifest, str]]:
        """Return (path, manifest, digest) of the trial's checkpoints by attempt and step; those without a valid manifest
        do not exist, but one of a newer holdfast does: NewerFormat. Their files are not read."""
        found: list[tuple[str, Manifest, str]] = []
        for name in self._own(trial):
            if not name.startswith("."):
                path = (self._trial(trial) / name).relative_to(self.root).as_posix()
                with contextlib.suppress(NotACheckpoint, CheckpointCorrupt, CheckpointNotFound):
                    found.append((path, *self.read_manifest(path)))
        return sorted(found, key=lambda entry: (entry[1].attempt, entry[1].step, entry[0]))

    def delete(self, path: str, *, spared: Callable[[], bool] | None = None) -> None:
        """Delete a checkpoint, if it is there: into the trash, then its files, foreign ones inside it too.

        ``spared`` tells whether it is to stay; it is asked last, when nobody can find it any more. A failure is logged, and
        :meth:`sweep` tries again.
        """
        self.layout.match(path)
        self._retire(self.root / path, spared)

    def fetch(self, path: str, *, digest: str, trial: int, attempt: int, step: int) -> None:
        """Do nothing: workers load where checkpoints are, and verify them then."""

    def release(self, trial: int) -> None:
        """Do nothing: nothing is kept only for workers."""

    def sweep(self, trial: int, keep: Collection[str]) -> list[str]:
        """Remove what holdfast left of the trial and ``keep`` (relative paths) does not name; return what was removed.

        Staged and trashed directories go too, so nobody may be writing to this trial. Names that holdfast did not make
        are let be, and so is what a newer holdfast published. A failure is logged.
        """
        removed: list[str] = []
        folder = self._trial(trial)
        for name in self._own(trial):
            path = (folder / name).relative_to(self.root).as_posix()
            if path in keep or not (name.startswith(".") or may_go(self, path)):
                continue
            if (_remove if name.startswith(".") else self._retire)(folder / name):
                removed.append(path)
        return removed

    def _trial(self, trial: int) -> Path:
        return self.root / self.layout.folder(trial)

    def _own(self, trial: int) -> list[str]:
        """Return the names of the directories that holdfast made for the trial."""
        with storage_errors(f"list {self._trial(trial)}"):
            try:
                with os.scandir(self._trial(trial)) as entries:
                    return sorted(
                        entry.name for entry in entries if OWN.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
                    )
            except FileNotFoundError:
                return []

    def published_path(self, staged: Path, manifest: Manifest) -> str:
        """Return the path that a staged directory is published as; InvalidInput when it was not staged for that."""
        path = self._published(staged)
        named = {"trial": manifest.trial, **self.layout.match(path)}
        if named != {"trial": manifest.trial, "attempt": manifest.attempt, "step": manifest.step}:
            raise InvalidInput(
                f"{staged} was not staged for trial {manifest.trial}, attempt {manifest.attempt}, step {manifest.step}"
            )
        return path

    def _published(self, staged: Path) -> str:
        """Return the path that belongs to a staged directory; InvalidInput when it is none."""
        text, root = str(staged), f"{self.root}/"
        folder, _, name = text[len(root) :].rpartition("/")
        if self.own is not None:
            folder, _, own = folder.rpartition("/")
        if text.startswith(root) and name.startswith(STAGING) and (self.own is None or own == self.own):
            path = f"{folder}/{name.removeprefix(STAGING)}" if folder else name.removeprefix(STAGING)
            with contextlib.suppress(InvalidInput):
                self.layout.match(path)
                return path
        raise InvalidInput(f"{staged} is no staged checkpoint of {self.root}")

    def _checked(self, path: str, digest: str | None, expected: dict[str, int | None]) -> Manifest:
        manifest, found = self.read_manifest(path)
        compare(self.root / path, manifest, expected)
        compare_digest(self.root / path, found, digest)
        return manifest

    def _sync_parents(self, trial: int) -> None:
        """Make the rename durable, and the first time for a trial every folder on the way to it."""
        folder = self._trial(trial)
        fsync_folder(folder)
        if trial not in self._synced:
            for parent in folder.parents[: len(folder.relative_to(self.root).parts)]:
                fsync_folder(parent)
            self._synced.add(trial)

    def _retire(self, folder: Path, spared: Callable[[], bool] | None = None) -> bool:
        """Rename a published directory into the trash and remove it, or what an earlier try left; tell whether it is gone."""
        trash = folder.parent / (self.own or "") / (TRASH + folder.name)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, trash)
                if spared is not None and spared():
                    os.rename(trash, folder)
                    return False
                point("checkpoint.pruned-renamed")
                fsync_folder(folder.parent)
        except OSError as error:
            log.warning("could not delete the checkpoint %s, a later sweep will: %s", folder, error)
            return False
        return _remove(trash) and not os.path.lexists(folder)

    def held(self, trial: int) -> list[str]:
        """Return the path of everything that holdfast made for the trial: what :meth:`sweep` looks at."""
        return [(self._trial(trial) / name).relative_to(self.root).as_posix() for name in self._own(trial)]

    def present(self, trial: int) -> set[str]:
        """Return the path of every published checkpoint of which anything is there, be it a link to another disk."""
        folder = self._trial(trial)
        with storage_errors(f"list {folder}"):
            try:
                names = os.listdir(folder)
            except FileNotFoundError:
                return set()
        return {(folder / name).relative_to(self.root).as_posix() for name in names if is_name(name)}


@contextlib.contextmanager
def _while_it_is_there(folder: Path) -> Iterator[None]:
    """Raise CheckpointNotFound for whatever goes wrong because the checkpoint was deleted meanwhile."""
    try:
        yield
    except (CheckpointCorrupt, StorageError) as error:
        if os.path.lexists(folder):
            raise
        raise CheckpointNotFound(f"the checkpoint {folder} was deleted while it was being read") from error


def may_go(store: Any, path: str) -> bool:
    """Tell whether a checkpoint that nothing names may be deleted: not when a newer holdfast wrote it, or may have."""
    try:
        store.read_manifest(path)
    except (NewerFormat, StorageError) as error:
        log.warning("%s is left alone: %s", path, error)
        return False
    except (Corrupt, CheckpointNotFound):
        pass
    return True


def compare(folder: object, manifest: Manifest, expected: Mapping[str, int | None]) -> None:
    """Raise CheckpointCorrupt when a manifest in ``folder`` says something else than what is expected of it."""
    for name, value in expected.items():
        if value is not None and getattr(manifest, name) != value:
            raise CheckpointCorrupt(
                f"{folder} is another checkpoint: its manifest says {name} {getattr(manifest, name)}, expected is {value}"
            )


def compare_digest(folder: object, found: str, recorded: str | None) -> None:
    """Raise CheckpointCorrupt when the manifest in ``folder`` is another one than was recorded, if one was."""
    if recorded is not None and found != recorded:
        raise CheckpointCorrupt(f"{folder} is another checkpoint: its manifest's digest is {found}, recorded is {recorded}")


def _folders(name: str) -> list[str]:
    return [parent.as_posix() for parent in Path(name).parents if parent.name]


def _remove(folder: Path) -> bool:
    """Remove a directory that is no checkpoint, if it is there; tell whether it is gone. A failure is logged."""
    import shutil

    try:
        if folder.is_symlink() or folder.is_file():
            os.unlink(folder)  # user code put it there, in place of a staged directory
        else:
            shutil.rmtree(folder)
    except FileNotFoundError:
        return not os.path.lexists(folder)
    except OSError as error:
        log.warning("could not remove %s, a later sweep will: %s", folder, error)
        return False
    return True
