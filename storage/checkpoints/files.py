"""Files that are durable and digested while they are written, and verified while they are read.

Digests are computed beside the reading and the writing where there is enough to gain from a second thread.
"""

from __future__ import annotations

import errno
import functools
import itertools
import mmap
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from holdfast.core.errors import CheckpointCorrupt, HoldfastError, NotACheckpoint, StorageError
from holdfast.storage.checkpoints.manifest import FileEntry

_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not block
CHUNK = 4 << 20
"""bytes of one read or write; from twice as many on, a second thread takes part"""
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


def fsync_folder(folder: str | Path) -> None:
    """Make the entries of ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no fsync of a directory
            raise
    finally:
        os.close(descriptor)


def read_regular(path: str | Path) -> bytes:
    """Return the content of a file that must be one: NotACheckpoint for a pipe, which is not waited for, a link, a folder."""
    try:
        descriptor = os.open(path, _PLAIN)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise NotACheckpoint(f"{path} is no regular file") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotACheckpoint(f"{path} is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


class Sink:
    """Write one new file; leaving the block without an error fsyncs it. StorageError when the file system refuses."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._path = f"{folder}/{name}"
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
            if len(view) < 2 * CHUNK:
                self._hash.update(view)
                self._append(view)
            else:
                digested = _beside(lambda: self._hash.update(view))
                try:
                    self._append(view)
                finally:
                    digested()  # the caller may change the data again
                _start_writeback(self._descriptor, self.size, len(view))
        self.size += len(view)
        return len(view)

    def _append(self, view: memoryview) -> None:
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            while chunk:
                chunk = chunk[os.write(self._descriptor, chunk) :]

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
        self.path = self._path = f"{folder}/{entry.name}"
        self._entry = entry
        self._hash = xxhash.xxh3_128()
        self.position = 0

    @property
    def size(self) -> int:
        """The bytes of the whole file."""
        return self._entry.size

    def __enter__(self) -> Source:
        try:
            self._descriptor = os.open(self._path, _PLAIN)
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

    def readinto(self, *views: memoryview) -> None:
        """Fill ``views``, one after the other, with the bytes that follow; CheckpointCorrupt when there are fewer."""
        chunks: list[tuple[int, memoryview]] = []
        for view in views:
            for start in range(0, len(view), CHUNK):
                chunks.append((self.position, view[start : start + CHUNK]))
                self.position += len(chunks[-1][1])
        _Filling(chunks, self._fill, self._hash).run()

    def _fill(self, position: int, chunk: memoryview) -> None:
        filled = 0
        while filled < len(chunk):
            with storage_errors(f"read {self._path}"):
                count = os.preadv(self._descriptor, [chunk[filled:]], position + filled)
            if count == 0:
                raise CheckpointCorrupt(f"{self._path} ends at byte {position + filled}: it is too short")
            filled += count

    def read(self) -> bytearray:
        """Return all the bytes that follow."""
        data = bytearray(self._entry.size - self.position)
        self.readinto(memoryview(data))
        return data

    def map(self) -> memoryview:
        """Return the whole file, mapped: it may be changed there, which never reaches the file. Nothing was read before."""
        self.position = self._entry.size
        if not self._entry.size:
            return memoryview(bytearray())
        with storage_errors(f"map {self._path}"):
            view = memoryview(mmap.mmap(self._descriptor, self._entry.size, access=mmap.ACCESS_COPY))
        for start in range(0, len(view), CHUNK):
            self._hash.update(view[start : start + CHUNK])
        return view

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


class _Filling:
    """Fill chunks by two threads where there are enough, and digest them in order, whoever comes by.

    Fresh memory costs more than reading does, and that cost is halved so.
    """

    def __init__(self, chunks: Sequence[tuple[int, memoryview]], fill: Callable[[int, memoryview], None], seen: Any) -> None:
        self._chunks = chunks
        self._fill = fill
        self._hash = seen
        self._numbers = itertools.count()
        self._filled = [False] * len(chunks)
        self._digested = 0
        self._digesting = threading.Lock()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Fill everything; the first error is raised when nothing is written to any more."""
        helped = _beside(self._work) if sum(len(chunk) for _, chunk in self._chunks[:16]) >= 2 * CHUNK else None
        self._work()
        if helped is not None:
            helped()
        if self._error is not None:
            raise self._error
        self._digest()

    def _work(self) -> None:
        for number in self._numbers:  # shared: every chunk is taken once
            if number >= len(self._chunks) or self._error is not None:
                return
            try:
                self._fill(*self._chunks[number])
            except BaseException as error:  # noqa: BLE001  # it is raised where it was asked for
                self._error = error
                return
            self._filled[number] = True
            if self._digesting.acquire(blocking=False):
                try:
                    self._digest()
                finally:
                    self._digesting.release()

    def _digest(self) -> None:
        while self._digested < len(self._chunks) and self._filled[self._digested]:
            self._hash.update(self._chunks[self._digested][1])
            self._digested += 1


def _beside(call: Callable[[], object]) -> Callable[[], None]:
    """Start ``call``, which does not raise, in a thread of its own; return what waits for its end."""
    thread = threading.Thread(target=call, name="holdfast-digest", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no thread can be had, as when the interpreter is ending
        call()
        return lambda: None
    return thread.join


def _start_writeback(descriptor: int, start: int, count: int) -> None:
    """Have the kernel begin to write what it will be told to fsync: the disk works while the next bytes are copied.

    It neither waits for the disk nor takes note of errors: both are fsync's.
    """
    if (call := _sync_file_range()) is not None:
        call(descriptor, start, count, 2)  # SYNC_FILE_RANGE_WRITE


@functools.cache
def _sync_file_range() -> Any:
    """Return the system call, or None where there is none."""
    if sys.platform != "linux":
        return None
    import ctypes

    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call
