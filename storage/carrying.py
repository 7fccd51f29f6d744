"""An experiment's files at another place: by hard link, by a copy on the server, or through this process.

Files of an experiment are written once and never changed, so a link is as good as a copy: deleting one leaves the other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from holdfast.core.errors import StorageError
from holdfast.storage import transfers
from holdfast.storage.atomic import storage_error, sync_folder
from holdfast.storage.objects import ObjectRoot
from holdfast.storage.root import LocalRoot, Root, join

_AT_ONCE = 16  # requests, or folders that are made durable
_CHUNK = 8 << 20  # bytes
_BATCH = 256 << 20
"""Bytes that wait on the local disk while they go from one object store to another one, unless one file is larger."""

File = tuple[str, int]
"""A name relative to both places, and its size in bytes."""


def below(root: Root, folder: str) -> dict[str, int]:
    """Return the name, relative to ``folder``, and the size in bytes of every regular file below it; none when it is gone."""
    if isinstance(root, ObjectRoot):
        return root.files(folder)
    assert isinstance(root, LocalRoot)
    base, found = root.path / folder, {}
    for place, _, names in os.walk(base):
        for name in names:
            file = Path(place) / name
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(file)
                if stat.S_ISREG(status.st_mode):
                    found[file.relative_to(base).as_posix()] = status.st_size
    return found


class Carrier:
    """Brings files from one place to another one, under the same names. The source is only read.

    What is there after :meth:`finish` is durable. A name that is there already is refused: StorageError.
    """

    def __init__(self, source: Root, target: Root) -> None:
        self._source, self._target = source, target
        self._folders: set[Path] = set()
        self._on_server = True
        self.digests: dict[str, str] = {}
        """xxh3-128 of the files whose bytes came through this process, by name"""

    def carry(self, files: Sequence[File], *, shared: bool = True) -> set[str]:
        """Bring files; return the names of those that are not there any more.

        Without ``shared`` nothing is linked: somebody may still write to them. What was cut off then is no error.
        StorageError when a place refuses, or a file has another size than it should.
        """
        source, target = self._source, self._target
        if isinstance(target, LocalRoot):
            for name, _ in files:
                self._make(target.path / name)
            if isinstance(source, LocalRoot):
                return {name for name, _ in files if not self._link(source.path / name, target.path / name, name, shared)}
            assert isinstance(source, ObjectRoot)
            return self._download(source, files, target.path)
        assert isinstance(target, ObjectRoot)
        if isinstance(source, LocalRoot):
            return self._upload(source.path, target, files)
        assert isinstance(source, ObjectRoot)
        if self._on_server and target.is_beside(source):
            return self._copy(source, target, files)
        return self._pass_on(source, target, files)

    def check(self, files: Sequence[File], folder: str) -> None:
        """Raise StorageError unless the files, all of them below ``folder``, are there with their sizes."""
        found = below(self._target, folder)
        for name, size in files:
            there = found.get(name.removeprefix(f"{folder}/"))
            if there != size:
                place = join(self._target.location, name)
                raise StorageError(f"{place} has {there} bytes instead of {size}; nothing was made of it: try again")

    def finish(self) -> None:
        """Make the names of all files durable."""
        if not isinstance(self._target, LocalRoot):
            return
        with _storage_errors(self._target.path), ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(sync_folder, sorted(self._folders, key=lambda folder: len(folder.parts), reverse=True)))

    def _make(self, file: Path) -> None:
        if file.parent in self._folders:
            return
        assert isinstance(self._target, LocalRoot)
        with _storage_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
        for folder in (file.parent, *file.parent.parents):
            self._folders.add(folder)
            if folder == self._target.path:
                break

    def _link(self, file: Path, place: Path, name: str, shared: bool) -> bool:
        """Link a file, or copy it where links are refused; False when it is not there."""
        if shared:
            try:
                os.link(file, place)
            except FileNotFoundError:
                return False
            except FileExistsError as error:
                raise storage_error(error, place) from error
            except OSError:
                pass  # another file system, one without links, or one that has too many of this file: it is copied
            else:
                return True
        try:
            source = file.open("rb", buffering=0)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise storage_error(error, file) from error
        with source, _storage_errors(place), place.open("xb") as stream:
            hashed = xxhash.xxh3_128()
            while chunk := source.read(_CHUNK):
                hashed.update(chunk)
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        if shared:
            self.digests[name] = hashed.hexdigest()
        return True

    def _download(self, source: ObjectRoot, files: Sequence[File], folder: Path) -> set[str]:
        """Write files of an object store below a local folder, durably."""
        missing: set[str] = set()
        with contextlib.closing(transfers.download(source, files)) as parts:
            for name, size in files:
                with _storage_errors(folder / name), (folder / name).open("xb") as stream:
                    hashed = xxhash.xxh3_128()
                    for start in range(0, size, transfers.PART):
                        data = next(parts)
                        if data is None or len(data) != min(transfers.PART, size - start):
                            missing.add(name)
                        else:
                            hashed.update(data)
                            stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                if name in missing:
                    (folder / name).unlink()
                else:
                    self.digests[name] = hashed.hexdigest()
        return missing

    def _upload(self, folder: Path, target: ObjectRoot, files: Sequence[File]) -> set[str]:
        there = [name for name, _ in files if (folder / name).is_file()]
        try:
            transfers.upload(target, [(folder / name, name) for name in there])
        except (StorageError, FileNotFoundError):
            gone = {name for name in there if not (folder / name).is_file()}
            if not gone:
                raise
            return gone | self._upload(folder, target, [file for file in files if file[0] not in gone])
        return {name for name, _ in files} - set(there)

    def _copy(self, source: ObjectRoot, target: ObjectRoot, files: Sequence[File]) -> set[str]:
        """Let the server copy files; where it does not know how, they come through this process."""
        todo = list(files)
        missing: set[str] = set()
        if todo:  # the first one shows whether it can be done
            try:
                missing |= set() if target.copy_from(source, *todo[0]) else {todo[0][0]}
            except StorageError:
                self._on_server = False
                return self._pass_on(source, target, todo)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                copied = pool.map(lambda file: target.copy_from(source, *file), todo[1:])
                missing |= {name for (name, _), done in zip(todo[1:], copied, strict=True) if not done}
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return missing

    def _pass_on(self, source: ObjectRoot, target: ObjectRoot, files: Sequence[File]) -> set[str]:
        """Bring files from one object store to another one, by way of the local disk, some at a time."""
        missing: set[str] = set()
        for batch in _batches(files):
            folder = Path(tempfile.mkdtemp(prefix="holdfast-"))
            try:
                for name, _ in batch:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                gone = self._download(source, batch, folder)
                transfers.upload(target, [(folder / name, name) for name, _ in batch if name not in gone])
                missing |= gone
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return missing


def _batches(files: Sequence[File]) -> Iterator[list[File]]:
    batch: list[File] = []
    total = 0
    for file in files:
        if batch and total + file[1] > _BATCH:
            yield batch
            batch, total = [], 0
        batch.append(file)
        total += file[1]
    if batch:
        yield batch


@contextlib.contextmanager
def _storage_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, place) from error
