"""A worker process's own local folder: two of one host never share one, and what a dead one left is swept by the next."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from holdfast.storage.atomic import make_folder, storage_error
from holdfast.storage.checkpoints.cache import NO_LOCKS

_OWNER = ".worker"
"""The file in such a folder that its process holds locked; a lock ends with its process, whatever ends that."""

_PROBE = ".probe"
_ROOM = 1 << 16
"""Bytes that are written to see whether there is room."""


class WorkFolder:
    """A new folder below ``base`` that stays while it is held; caches of checkpoints count what is in it among their own.

    StorageError when it cannot be made. What processes that are gone left below ``base`` is removed.
    """

    def __init__(self, base: Path) -> None:
        make_folder(base)
        sweep(base)
        while True:
            self.path = base / secrets.token_hex(8)
            try:
                os.mkdir(self.path)
                self._descriptor = os.open(self.path / _OWNER, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except OSError as error:
                raise storage_error(error, self.path) from error
            try:
                if _lock(self._descriptor, self.path / _OWNER):
                    return
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return  # nobody can lock it: it is never swept
            self.close()  # a sweep came between the two

    def lacks(self) -> list[str]:
        """Return why nothing can be written here, or nothing."""
        file = self.path / _PROBE
        try:
            file.write_bytes(bytes(_ROOM))
            file.unlink()
        except OSError as error:
            with suppress(OSError):
                file.unlink()
            return [f"{self.path} cannot be written on {socket.gethostname()}: {error.strerror}; make room there"]
        return []

    def close(self) -> None:
        """Remove the folder with all that is in it. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(descriptor)


def sweep(base: Path) -> None:
    """Remove the folders below ``base`` whose processes are gone; others, and those that have no owner, stay."""
    with suppress(FileNotFoundError):
        for name in os.listdir(base):
            with suppress(OSError):
                descriptor = os.open(base / name / _OWNER, os.O_WRONLY)
                try:
                    if _lock(descriptor, base / name / _OWNER):
                        shutil.rmtree(base / name, ignore_errors=True)
                finally:
                    os.close(descriptor)


def _lock(descriptor: int, file: Path) -> bool:
    """Lock the file, and tell whether it is still there; OSError when another process holds it."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False
