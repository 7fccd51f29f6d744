"""A caller's own file system, fsspec's or pyarrow's: what it stands for, and whether it can hold experiments."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.core.errors import SpecError

if TYPE_CHECKING:
    from holdfast.storage.object_stores import Multipart

_CHUNK = 8 << 20  # bytes
_LOCAL = {"file", "local"}
_ALIASES = {"gcs": ("gs", "gcs"), "s3": ("s3", "s3a")}  # of pyarrow's names; fsspec's say theirs themselves
_IN_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "az", "abfss", "memory"}


def is_arrow(filesystem: object) -> bool:
    """Tell whether a file system is one of pyarrow's, without importing pyarrow."""
    return any(kind.__module__.partition(".")[0] == "pyarrow" for kind in type(filesystem).__mro__)


def resolve(location: str | Path, filesystem: Any) -> tuple[str, Any]:
    """Return a location and the file system that it is on, as they are used from here on.

    That is the absolute path and None for a local one, else a URL and the file system itself; a file system for a folder
    of another one is replaced by that other one. What was returned comes back unchanged. Raises SpecError for what cannot
    be used; nothing is asked yet.
    """
    place = str(location)
    while True:
        names = {kind.__name__ for kind in type(filesystem).__mro__}
        if "DirFileSystem" in names:
            place, filesystem = _below(filesystem.path, place), filesystem.fs
        elif is_arrow(filesystem) and "SubTreeFileSystem" in names:
            place, filesystem = _below(filesystem.base_path, place), filesystem.base_fs
        elif is_arrow(filesystem) and hasattr(getattr(filesystem, "handler", None), "fs"):
            filesystem = filesystem.handler.fs  # one of fsspec's within one of pyarrow's
        else:
            break
    protocols = _protocols(filesystem, names, place)
    scheme, separator, rest = place.rpartition("://")
    if separator and scheme not in protocols:
        raise SpecError(
            f"storage {place}: the file system that was given is for {protocols[0]}://; give the one for it, or none"
        )
    if "LocalFileSystem" in names:
        return os.path.abspath(rest), None
    _check_async(filesystem, place)
    if protocols[0] in _IN_BUCKETS:
        rest = rest.lstrip("/")
    if not rest.strip("/"):
        raise SpecError(f"storage {place or '(empty)'}: it names no folder; write {protocols[0]}://bucket/prefix")
    return f"{scheme or protocols[0]}://{rest.rstrip('/')}", filesystem


def place_on(
    location: str | Path, options: Mapping[str, Any] | None, filesystem: Any
) -> tuple[str | Path, Mapping[str, Any] | None]:
    """Return a location and its storage options, where a caller may have given a file system instead of options.

    The file system stands among the options then, which are kept in memory alone. Raises SpecError as :func:`resolve`.
    """
    if filesystem is None:
        return location, options
    if options:
        raise SpecError("storage_options and filesystem are both given; a file system has its own options")
    place, own = resolve(location, filesystem)
    return place, None if own is None else {"filesystem": own}


def _below(base: str, location: str) -> str:
    """Return a location on the file system that another one shows a folder of."""
    return f"{base.rstrip('/')}/{location.rpartition('://')[2].strip('/')}"


def _protocols(filesystem: Any, names: set[str], place: str) -> tuple[str, ...]:
    """Return the names by which URLs may name the file system."""
    if is_arrow(filesystem) and hasattr(filesystem, "type_name"):
        name = str(filesystem.type_name)
        return (*_LOCAL,) if name == "local" else _ALIASES.get(name, (name,))
    if "AbstractFileSystem" not in names:
        raise SpecError(
            f"filesystem is a {type(filesystem).__qualname__}; give an instance of one of fsspec's or pyarrow's file systems"
        )
    if "CachingFileSystem" in names:
        raise SpecError(f"storage {place}: a caching file system keeps copies; give the one that it caches")
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _check_async(filesystem: Any, place: str) -> None:
    """Raise SpecError unless calls from any thread are answered: a file system may run on a loop of the caller's."""
    if getattr(filesystem, "asynchronous", False):
        raise SpecError(f"storage {place}: the file system is asynchronous; make it without asynchronous=True")
    if not getattr(filesystem, "async_impl", False) or is_arrow(filesystem):
        return
    try:
        loop = filesystem.loop
    except RuntimeError:  # made before a fork
        raise SpecError(f"storage {place}: the file system was made in another process; make one in this process") from None
    try:
        own = asyncio.get_running_loop() is loop
    except RuntimeError:
        own = False
    if own or loop is None or not loop.is_running():
        where = "the loop that calls" if own else "a loop that does not run"
        raise SpecError(f"storage {place}: the file system belongs to {where}; make it without loop=, so that it has its own")


class ArrowStore:
    """One of pyarrow's file systems, asked directly: it takes any name. Conditions are not known to it."""

    conditions = False

    def __init__(self, filesystem: Any, location: str) -> None:
        self._fs = filesystem
        self._base = location.partition("://")[2].rstrip("/")
        self.multipart: Multipart | None = None

    def get(self, key: str, *, limit: float) -> tuple[bytes, str | None]:
        with self._fs.open_input_file(self._path(key)) as stream:
            return bytes(stream.read()), None

    def part(self, key: str, start: int, end: int, *, limit: float) -> bytes:
        with self._fs.open_input_file(self._path(key)) as stream:
            stream.seek(start)
            return bytes(stream.read(end - start))

    def put(self, key: str, content: bytes, *, limit: float, **arguments: Any) -> str | None:
        self._in_folder(key, lambda stream: stream.write(content))
        return None

    def upload(self, file: Path, key: str, *, limit: float) -> None:
        def copy(stream: Any) -> None:
            with file.open("rb", buffering=0) as source:
                while chunk := source.read(_CHUNK):
                    stream.write(chunk)

        self._in_folder(key, copy)

    def _in_folder(self, key: str, write: Callable[[Any], Any]) -> None:
        path = self._path(key)
        try:
            stream = self._fs.open_output_stream(path, compression=None)
        except FileNotFoundError:  # it has folders that must be made
            self._fs.create_dir(path.rpartition("/")[0], recursive=True)
            stream = self._fs.open_output_stream(path, compression=None)
        with stream:
            write(stream)

    def copy(self, source: Any, key: str, size: int, *, limit: float) -> None:
        path = self._path(key)
        self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        self._fs.copy_file(source._path(key), path)

    def head(self, key: str, *, limit: float) -> tuple[str | None, str | None]:
        return None, None

    def entries(self, folder: str, *, deep: bool, limit: float) -> dict[str, int | None]:
        kinds = importlib.import_module("pyarrow.fs")
        path = self._path(folder)
        selector = kinds.FileSelector(path, recursive=deep, allow_not_found=True)
        try:
            found = self._fs.get_file_info(selector)
        except NotADirectoryError:
            return {}
        sizes: dict[str, int | None] = {}
        for entry in found:
            if entry.path.startswith(path + "/"):
                sizes[entry.path[len(path) + 1 :].rstrip("/")] = None if entry.type == kinds.FileType.Directory else entry.size
        return sizes

    def remove(self, keys: Iterable[str], *, limit: float) -> None:
        for key in keys:
            try:
                self._fs.delete_file(self._path(key))
            except FileNotFoundError:
                continue

    def remove_folders(self, folder: str) -> None:
        try:
            self._fs.delete_dir(self._path(folder))
        except FileNotFoundError:
            return

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}" if key else self._base
