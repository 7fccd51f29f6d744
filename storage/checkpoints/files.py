"""Files that are durable and digested while they are written, and verified while they are read."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import xxhash

from holdfast.core.errors import CheckpointCorrupt, HoldfastError, StorageError
from holdfast.storage.checkpoints.manifest import FileEntry

CHUNK = 1 << 20  # digested and written while it is still in the processor's cache
Buffer = bytes | bytearray | memoryview


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what was being done; holdfast's own errors pass."""
    try:
        yield
    except HoldfastError:
        raise
    except OSError as error:
        raise StorageError(error.errno, f"cannot {doing}: {error.strerror or error}") from error


def fsync_folder(folder: Path) -> None:
    """Make the entries of ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no fsync of a directory
            raise
    finally:
        os.close(descriptor)


class Sink:
    """Write one new file; leaving the block without an error fsyncs it. StorageError when the file system refuses."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._path = folder / name
        self._hash = xxhash.xxh3_128()
        self.size = 0

    def __enter__(self) -> Sink:
        with storage_errors(f"create {self._path}"):
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        return self

    def write(self, data: Buffer) -> int:
        """Append ``data`` and return its length in bytes."""
        view = memoryview(data).cast("B")
        with storage_errors(f"write {self._path}"):
            for start in range(0, len(view), CHUNK):
                chunk = view[start : start + CHUNK]
                self._hash.update(chunk)
                while chunk:
                    chunk = chunk[os.write(self._descriptor, chunk) :]
        self.size += len(view)
        return len(view)

    def entry(self) -> FileEntry:
        """Return what the manifest has to say of the bytes written so far."""
        return FileEntry(name=self._name, size=self.size, digest=self._hash.hexdigest())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with storage_errors(f"fsync {self._path}"):
            try:
                if kind is None:
                    os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)


class Source:
    """Read one file of a checkpoint; leaving the block without an error compares the digest.

    CheckpointCorrupt when the file is missing, is no regular file, or differs in size or digest. What was read counts
    for nothing until the block is left.
    """

    def __init__(self, folder: Path, entry: FileEntry) -> None:
        self._path = folder / entry.name
        self._entry = entry
        self._hash = xxhash.xxh3_128()
        self.position = 0

    def __enter__(self) -> Source:
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not block
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise CheckpointCorrupt(f"{self._path} is missing") from None
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise CheckpointCorrupt(f"{self._path} is no regular file") from None
            raise StorageError(error.errno, f"cannot open {self._path}: {error.strerror}") from error
        try:
            self._check_size()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def _check_size(self) -> None:
        with storage_errors(f"read {self._path}"):
            found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointCorrupt(f"{self._path} is no regular file")
        if found.st_size != self._entry.size:
            raise CheckpointCorrupt(f"{self._path} has a size of {found.st_size} bytes, its manifest says {self._entry.size}")

    def readinto(self, view: memoryview) -> None:
        """Fill ``view`` with the bytes that follow; CheckpointCorrupt when there are fewer."""
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            filled = 0
            while filled < len(chunk):
                with storage_errors(f"read {self._path}"):
                    count = os.readv(self._descriptor, [chunk[filled:]])
                if count == 0:
                    raise CheckpointCorrupt(f"{self._path} ends at byte {self.position + filled}: it is too short")
                filled += count
            self._hash.update(chunk)
            self.position += filled

    def read(self) -> bytearray:
        """Return all the bytes that follow."""
        data = bytearray(self._entry.size - self.position)
        self.readinto(memoryview(data))
        return data

    def skip(self) -> None:
        """Read the rest for its digest alone."""
        view = memoryview(bytearray(min(CHUNK, self._entry.size - self.position)))
        while left := self._entry.size - self.position:
            self.readinto(view[:left])

    def check(self) -> None:
        """Read the rest and compare the digest; CheckpointCorrupt when it differs."""
        self.skip()
        if self._hash.hexdigest() != self._entry.digest:
            raise CheckpointCorrupt(
                f"{self._path} has the digest {self._hash.hexdigest()}, its manifest says {self._entry.digest}"
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            os.close(self._descriptor)
