"""Many bytes to and from an object store: several requests at once, and a bounded part of them in memory."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

from holdfast.core.errors import StorageError
from holdfast.storage.objects import ObjectRoot
from holdfast.storage.root import join

log = logging.getLogger(__name__)

PART = 16 << 20
"""Bytes that one request carries. With AT_ONCE of them under way, a transfer has 128 MiB in memory, one way or the other,
and one part more where what came is written down."""
AT_ONCE = 8
MOST_PARTS = 10_000
"""of an object, as S3 allows; the parts of a file above 156 GiB are bigger"""


def download(root: ObjectRoot, files: Iterable[tuple[str, int]]) -> Generator[bytes | None, None, None]:
    """Yield the bytes of (name, size) after (name, size) in parts of PART bytes, in order; None for an object that is missing.

    The parts that follow are on their way meanwhile. Whoever stops early must close the iterator.
    """
    parts = ((name, start, min(start + PART, size)) for name, size in files for start in range(0, size, PART))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        coming = deque(pool.submit(root.part, *part) for part in islice(parts, AT_ONCE))
        try:
            while coming:
                data = coming.popleft().result()
                coming.extend(pool.submit(root.part, *part) for part in islice(parts, 1))
                yield data
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def upload(root: ObjectRoot, files: Sequence[tuple[Path, str]]) -> None:
    """Write local files as objects, a big one in parts that become one object at the end.

    Raises StorageError when one of them cannot be; then, as on any other exception, no upload in parts is left open as far
    as the store can still be told. Whole objects that were written stay.
    """
    for file, name in files:
        if not file.is_file():
            raise StorageError(f"cannot publish {join(root.location, name)}: {file} is missing")
    begun: list[_Parts] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            running: list[Future[Any]] = []
            for file, name in files:
                size = file.stat().st_size
                if size > PART and root.in_parts:
                    begun.append(_Parts(root, file, name, size))
                    running += [pool.submit(begun[-1].send, number) for number in range(1, begun[-1].count + 1)]
                else:
                    running.append(pool.submit(root.upload, file, name))
            _first_error(running)
            _first_error([pool.submit(parts.complete) for parts in begun])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            for parts in begun:
                parts.abort()
            raise


def _first_error(running: list[Future[Any]]) -> None:
    """Wait until all are done; raise the first error as soon as there is one."""
    done, _ = wait(running, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()


class _Parts:
    """A file on its way, in parts."""

    def __init__(self, root: ObjectRoot, file: Path, name: str, size: int) -> None:
        self._root, self._file, self._name, self._size = root, file, name, size
        self._length = max(PART, -(-size // MOST_PARTS))
        self.count = -(-size // self._length)
        self._sent: list[dict[str, Any]] = [{}] * self.count
        self._done = False
        self._id = root.begin(name)

    def send(self, number: int) -> None:
        start = (number - 1) * self._length
        wanted = min(self._length, self._size - start)
        with self._file.open("rb", buffering=0) as stream:
            content = os.pread(stream.fileno(), wanted, start)
        if len(content) != wanted:
            raise StorageError(f"cannot publish {join(self._root.location, self._name)}: {self._file} was cut off meanwhile")
        self._sent[number - 1] = self._root.put_part(self._name, self._id, number, content)

    def complete(self) -> None:
        self._root.complete(self._name, self._id, self._sent, self._size)
        self._done = True

    def abort(self) -> None:
        """Take the upload back; a failure is logged, and a later sweep tries again."""
        if self._done:
            return
        try:
            self._root.abort(self._name, self._id)
        except OSError as error:
            place = join(self._root.location, self._name)
            log.warning("could not abort the upload of %s, a later sweep will: %s", place, error)
