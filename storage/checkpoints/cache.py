"""Local copies of checkpoints that are on an object store: verified when they came, and again when they are used.

<work>/trials/000007/checkpoints/step_00000012-a2-3f9c01d2            a copy, complete; its folder's time is its last use
<work>/trials/000007/checkpoints/.trash-step_00000012-a2-77e0...      coming in, or going: nothing

Whoever uses a copy holds a shared lock on its folder, which ends with the process; what is locked is not evicted. The
work folders of one host's experiments stand side by side, and share one limit.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from holdfast.storage.checkpoints.files import storage_errors
from holdfast.storage.checkpoints.names import TRASH, is_name

log = logging.getLogger(__name__)

LIMIT = 10 << 30
"""Bytes that copies may take, where nothing else is said."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # on some network file systems, where caches do not belong
_BLOCK = 4096  # bytes: what a small file takes
_WORK = re.compile(r"[0-9a-f]{16}")  # the name of a work folder among others
Result = TypeVar("Result")


class Hold:
    """A copy, or a folder that becomes one, that nobody evicts while this lives."""

    def __init__(self, descriptor: int) -> None:
        self._close = weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor

    def used(self) -> None:
        """Note that the copy was used now."""
        with contextlib.suppress(OSError):
            now = time.time_ns()  # the kernel's own clock for this is a coarse one
            os.utime(self._descriptor, ns=(now, now))

    def close(self) -> None:
        self._close()


@dataclass(frozen=True)
class _Copy:
    folder: Path
    used: int
    bytes: int


class Cache:
    """The copies below ``work``, and those of the other experiments beside it: at most ``limit`` bytes but for what is in use.

    Threads and processes may share it.
    """

    def __init__(self, work: Path, limit: int = LIMIT) -> None:
        self.work = work.absolute()
        self.limit = limit
        self._lock = threading.Lock()
        self._total: int | None = None  # bytes, as far as is known; None before the first look
        self._added = 0  # bytes since the last look, at which others' copies are noticed too

    def hold(self, path: str) -> Hold | None:
        """Return a hold on the copy of the checkpoint ``path``, or None when there is none."""
        return lock_folder(self.work / path, fcntl.LOCK_SH)

    def incoming(self, path: str) -> tuple[Path, Hold]:
        """Make and return a new folder for a copy of ``path`` to be written into; StorageError when it cannot be made.

        Its name is that of trash: a copy that is cut off counts for nothing, and goes with the next look.
        """
        with storage_errors(f"make a copy of {path}"):
            while True:
                folder = _trash(self.work / path)
                try:
                    os.mkdir(folder)
                except FileNotFoundError:
                    os.makedirs(folder.parent, exist_ok=True)
                    continue
                if (held := lock_folder(folder, fcntl.LOCK_SH)) is not None:
                    return folder, held

    def put(self, folder: Path, path: str) -> Hold | None:
        """Make a complete folder the copy of ``path``; None when there is one, which somebody may be reading: it stays.

        StorageError when that cannot be.
        """
        with storage_errors(f"keep a copy of {path}"):
            held = lock_folder(folder, fcntl.LOCK_SH)
            if held is None:
                raise FileNotFoundError(errno.ENOENT, f"{folder} is gone")
            try:
                os.rename(folder, self.work / path)
            except OSError as error:
                held.close()
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    return None
                raise
        held.used()
        return held

    def keep_limit(self, path: str) -> None:
        """Count the new copy ``path``, and evict others when all of them take more than the limit."""
        self._account(size_on_disk(self.work / path))

    def drop(self, path: str) -> None:
        """Remove the copy of ``path``, if there is one, whoever uses it."""
        trash = _trash(self.work / path)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.work / path, trash)
            _remove(trash)

    def _account(self, added: int) -> None:
        with self._lock:
            self._added += added
            self._total = None if self._total is None else self._total + added
            if self._total is None or self._total > self.limit or self._added >= self.limit // 16:
                self._look()

    def make_room(self, wanted: int) -> int:
        """Evict the copies that were used longest ago until ``wanted`` bytes were freed; return how many were."""
        with self._lock:
            return self._look(wanted)

    def _look(self, wanted: int = 0) -> int:
        """Look at all copies, remove what was left by a crash, and evict; a bit more than needed, so that it is seldom."""
        copies = sorted(self._copies(), key=lambda copy: copy.used)
        total = sum(copy.bytes for copy in copies)
        target = total - wanted if wanted else self.limit - self.limit // 10
        freed = 0
        if wanted or total > self.limit:
            for copy in copies:
                if total - freed <= target:
                    break
                if _evict(copy.folder):
                    freed += copy.bytes
        self._total, self._added = total - freed, 0
        return freed

    def _copies(self) -> Iterator[_Copy]:
        for trial in self._trials():
            for name in _names(trial):
                folder = trial / name
                if name.startswith(TRASH) and is_name(name.removeprefix(TRASH)):
                    _evict(folder)
                elif is_name(name):
                    with contextlib.suppress(OSError):
                        yield _Copy(folder, os.stat(folder).st_mtime_ns, size_on_disk(folder))

    def _trials(self) -> Iterator[Path]:
        """Yield the folders in which copies may be."""
        works = [self.work]
        if _WORK.fullmatch(self.work.name):
            works = [self.work.parent / name for name in _names(self.work.parent) if _WORK.fullmatch(name)]
        for work in works:
            yield work  # of a store of its own
            for number in _names(work / "trials"):
                if number.isdecimal():
                    yield work / "trials" / number / "checkpoints"

    def with_room(self, wanted: int, write: Callable[[], Result]) -> Result:
        """Return what ``write`` returns; when the disk is full, evict and call it once more.

        Any other error passes, and so does that one when nothing could be evicted, or when it comes again.
        """
        try:
            return write()
        except OSError as error:
            if error.errno not in _FULL or not self.make_room(wanted):
                raise
            log.warning("the disk is full; copies of other checkpoints were removed: %s", error)
            return write()


def lock_folder(folder: Path, kind: int) -> Hold | None:
    """Lock a folder without waiting, and be sure that it still has its name; None when that is not so."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise
    held = Hold(descriptor)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    held.close()
    return None


def _evict(folder: Path) -> bool:
    """Remove a copy that nobody uses, by way of a trash name; tell whether it is gone."""
    try:
        held = lock_folder(folder, fcntl.LOCK_EX)
        if held is None:
            return False
        try:
            trash = _trash(folder)
            os.rename(folder, trash)
            return _remove(trash)
        finally:
            held.close()
    except OSError as error:
        log.warning("could not remove the copy %s: %s", folder, error)
        return False


def _trash(folder: Path) -> Path:
    """Return a new trash name beside a copy, which a sweep of its trial knows, too."""
    name = folder.name.removeprefix(TRASH)
    return folder.parent / f"{TRASH}{name.rpartition('-')[0]}-{secrets.token_hex(12)}"


def _remove(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not os.path.lexists(folder)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def size_on_disk(folder: Path) -> int:
    """Return about how many bytes a folder takes on the disk; what vanishes meanwhile takes none."""
    total = _BLOCK
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += size_on_disk(Path(entry.path))
            else:
                with contextlib.suppress(OSError):
                    total += -(-entry.stat(follow_symlinks=False).st_size // _BLOCK) * _BLOCK
    return total
