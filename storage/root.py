"""Where the files of an experiment are: one protocol over local folders and object stores."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from holdfast.core.errors import Corrupt, StorageError
from holdfast.storage.atomic import make_folder, storage_error, sync_folder, write_file

LOCK = ".lock"


def is_url(location: str | Path) -> bool:
    """Tell whether a location is an object store's URL, and not a local path."""
    return "://" in str(location)


def absolute(location: str | Path) -> str:
    """Return a location without what depends on the working directory, and without a slash at its end."""
    if not is_url(location):
        return os.path.abspath(location)
    protocol, separator, rest = str(location).partition("://")
    return protocol + separator + rest.rstrip("/")


def parent_of(location: str) -> str:
    """Return the storage that an experiment's location lies in."""
    return location.rpartition("/")[0] if is_url(location) else str(Path(location).parent)


def name_of(location: str) -> str:
    """Return the last part of a location."""
    return location.rpartition("/")[2]


def join(location: str, name: str) -> str:
    """Return the location ``name`` below ``location``."""
    return f"{location}/{name}" if is_url(location) else str(Path(location) / name)


class Root(Protocol):
    """A place for files with posix names relative to it. Each file appears whole or not at all, and is durable then.

    Every method raises StorageError when the place refuses. ``location`` is a path or a URL without credentials.
    """

    location: str

    @property
    def conditional(self) -> bool:
        """Whether :meth:`replace` holds between hosts."""
        ...

    def read(self, name: str) -> bytes | None:
        """Return the content of a file as it is now, or None when there is none; never what a cache remembers."""
        ...

    def write(self, name: str, content: bytes, *, durable: bool = True) -> None:
        """Create or replace a file."""
        ...

    def append(self, name: str, content: bytes) -> bool:
        """Append to a file, durably, and create it if it is missing; False where nothing can be appended."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly in ``folder``, sorted; none when it is missing."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        ...

    def delete_folder(self, name: str) -> None:
        """Delete everything below ``name``, if there is anything."""
        ...

    def versioned(self, name: str) -> tuple[bytes | None, str | None]:
        """Return a file's content and what :meth:`replace` takes to see that it is still this one."""
        ...

    def replace(self, name: str, content: bytes, version: str | None) -> bool:
        """Replace a file if it still has ``version`` (None: if it is missing); False when somebody was faster.

        A local place decides under :meth:`exclusive`, which the caller holds.
        """
        ...

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the place's lock against other processes, where it has one; else :meth:`replace` decides alone."""
        ...


class LocalRoot:
    """A folder. It need not exist yet: writing makes it."""

    conditional = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)

    def read(self, name: str) -> bytes | None:
        file = self.path / name
        try:
            return file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise storage_error(error, file) from error

    def write(self, name: str, content: bytes, *, durable: bool = True) -> None:
        file = self.path / name
        if not file.parent.is_dir():
            make_folder(file.parent)
        write_file(file, content, durable=durable)

    def append(self, name: str, content: bytes) -> bool:
        file = self.path / name
        try:
            try:
                descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
                fresh = False
            except FileNotFoundError:
                make_folder(file.parent)
                descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                fresh = True
            try:
                _append(descriptor, content)
            finally:
                os.close(descriptor)
            if fresh:
                sync_folder(file.parent)
        except OSError as error:
            raise storage_error(error, file) from error
        return True

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.path / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise storage_error(error, self.path / folder) from error

    def delete(self, name: str) -> None:
        file = self.path / name
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, file) from error

    def delete_folder(self, name: str) -> None:
        import shutil

        shutil.rmtree(self.path / name, ignore_errors=True)

    def versioned(self, name: str) -> tuple[bytes | None, str | None]:
        return self.read(name), None

    def replace(self, name: str, content: bytes, version: str | None) -> bool:
        self.write(name, content)
        return True

    @contextmanager
    def exclusive(self, *, patience: float = 30.0) -> Iterator[None]:
        """Hold the folder's lock, for the moment of one read and write; a process that dies lets it go.

        StorageError when another process, suspended perhaps, holds it for ``patience`` seconds.
        """
        try:
            stream = self._lock(time.monotonic() + patience)
        except StorageError:
            raise
        except OSError as error:
            raise storage_error(error, self.path / LOCK) from error
        with stream:
            yield

    def _lock(self, deadline: float) -> IO[str]:
        file = self.path / LOCK
        while True:
            stream = file.open("a")
            try:
                with suppress(BlockingIOError, FileNotFoundError):
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(stream.fileno()), os.stat(file)):
                        return stream  # not one that was deleted while we waited for it
            except BaseException:
                stream.close()
                raise
            stream.close()
            if time.monotonic() > deadline:
                raise StorageError(f"{file} is held by another process, suspended perhaps; end that process")
            time.sleep(0.005)


def _append(descriptor: int, content: bytes) -> None:
    """Append all of ``content`` and make it durable; a part that a full disk let through is taken back."""
    before = os.fstat(descriptor).st_size
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, before)
        raise


def open_root(location: str, options: Mapping[str, Any] | None = None, filesystem: Any = None) -> Root:
    """Return the place at a location; ``options`` are an object store's, credentials among them.

    ``filesystem`` is a caller's own, one of fsspec's or pyarrow's, and excludes options; it may also stand among them, as
    ``filesystem``. Raises SpecError for what cannot be used; nothing is looked at yet.
    """
    options = dict(options or {})
    filesystem = options.pop("filesystem", None) if filesystem is None else filesystem
    if filesystem is not None:
        from holdfast.storage.filesystems import place_on

        place, placed = place_on(location, options, filesystem)
        location = str(place)
        if placed is not None:
            from holdfast.storage.objects import ObjectRoot

            return ObjectRoot(location, {}, placed["filesystem"])
    if not is_url(location):
        return LocalRoot(Path(location))
    from holdfast.storage.objects import ObjectRoot

    return ObjectRoot(location, options)


DAMAGE = (ValueError, KeyError, TypeError, RecursionError)
"""What reading a torn or altered JSON file raises."""


def checked(body: Any, kinds: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Return the named values of ``body``; TypeError for one of another type, KeyError for a missing one."""
    for name, kind in kinds.items():
        if not isinstance(body[name], kind) or isinstance(body[name], bool):
            raise TypeError(f"{name} is {body[name]!r}")
    return {name: body[name] for name in kinds}


def damaged(location: str, name: str, error: Exception) -> Corrupt:
    """Return the Corrupt for a file that does not say what it should."""
    return Corrupt(f"{join(location, name)} is damaged ({type(error).__name__}: {error}); put an intact copy back")
