"""Object stores as places for experiments: an object is written by one PUT, or not at all."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from holdfast.core.errors import StorageError
from holdfast.storage.object_stores import STAMP, Connection, Fault, Multipart, Store, fault_of, open_store
from holdfast.storage.root import absolute, join

Result = TypeVar("Result")

PATIENCE = 30.0
"""Seconds for which a store that has answered before is asked again."""
MOVING = 300.0
"""Seconds for one request that carries part of a checkpoint: lines may be slow."""
LEASE_PATIENCE = 8.0
"""Seconds for one half of a conditional change: a renewal has to fail, or succeed, before the lease is in danger."""
_SECRETS = ("key", "secret", "token", "password", "credential")


class _Absent(StorageError):
    """There is no such object."""


class _Refused(StorageError):
    """The server refused a request: it does not know it, or its condition."""


class ObjectRoot:
    """A prefix of an object store, by any fsspec URL; S3 is spoken to directly.

    ``options`` are fsspec's; without them the environment counts. They are kept in memory alone. ``filesystem`` is a caller's
    own in their place; it and the location have to be as :func:`filesystems.resolve` returns them.
    """

    def __init__(self, location: str, options: Mapping[str, Any], filesystem: Any = None) -> None:
        self.location = absolute(location)
        if filesystem is not None:
            options = getattr(filesystem, "storage_options", {})
        self._hidden = _secrets(options)
        self._store: Store
        self._connection: Connection
        self._store, self._connection = open_store(self.location, options, filesystem)

    def __repr__(self) -> str:
        return f"ObjectRoot({self.location!r})"

    @property
    def conditional(self) -> bool:
        """Whether the server holds the conditions of writes: tried out, once for a bucket."""
        if not self._store.conditions:
            return False
        bucket = self.location.partition("://")[2].partition("/")[0]
        if bucket not in self._connection.conditional:
            self._connection.conditional[bucket] = self._try_conditions()
        return self._connection.conditional[bucket]

    def read(self, name: str) -> bytes | None:
        return self._read(name, PATIENCE)[0]

    def _read(self, name: str, patience: float) -> tuple[bytes | None, str | None]:
        try:
            return self._ask(name, lambda limit: self._store.get(name, limit=limit), patience)
        except _Absent:
            return None, None

    def write(self, name: str, content: bytes, *, durable: bool = True) -> None:
        self._ask(name, lambda limit: self._store.put(name, content, limit=limit))

    def append(self, name: str, content: bytes) -> bool:
        return False

    def names(self, folder: str = "") -> list[str]:
        return sorted(self._ask(folder, lambda limit: self._store.entries(folder, deep=False, limit=limit)))

    def delete(self, name: str) -> None:
        self._ask(name, lambda limit: self._store.remove([name], limit=limit))

    def delete_folder(self, name: str) -> None:
        keys = [f"{name}/{below}" for below in self.files(name)]
        self._ask(name, lambda limit: self._store.remove(keys, limit=limit))
        self._ask(name, lambda _: self._store.remove_folders(name))

    def versioned(self, name: str) -> tuple[bytes | None, str | None]:
        return self._read(name, LEASE_PATIENCE)

    def replace(self, name: str, content: bytes, version: str | None) -> bool:
        """Replace by a conditional PUT; a server that was found to have none gets a plain one.

        A PUT whose answer was lost is known again by the stamp that it carried.
        """
        if self._store.conditions:
            try:
                return self._replace(name, content, version)
            except _Refused:
                if self.conditional:
                    raise
        self.write(name, content)
        return True

    def _replace(self, name: str, content: bytes, version: str | None) -> bool:
        """Replace by a conditional PUT; _Refused when the server knows no conditions."""
        stamp = secrets.token_hex(8)
        deadline, pause = time.monotonic() + LEASE_PATIENCE, 0.1
        while True:
            left = deadline - time.monotonic()
            try:
                self._store.put(name, content, limit=left, Metadata={STAMP: stamp}, **self._condition(version))
            except Exception as error:  # every library has errors of its own
                fault = fault_of(error)
                if fault not in (Fault.CHANGED, Fault.ABSENT, Fault.PASSING):
                    raise self._error(name, error) from error
                if fault is not Fault.PASSING or self._connection.answered:
                    with suppress(StorageError):
                        found, tag = self._head(name, left)
                        if found == stamp:
                            return True
                        if fault is not Fault.PASSING and tag != version:
                            return False
                # Nobody was faster: another conditional write is under way, or the server writes ETags another way.
                if fault is Fault.CHANGED:
                    self._connection.bare_tags = not self._connection.bare_tags
                if not self._connection.answered or time.monotonic() + pause > deadline:
                    raise self._error(name, error) from error
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
            else:
                self._connection.answered = True
                return True

    def _condition(self, version: str | None) -> dict[str, Any]:
        if version is None:
            return {"IfNoneMatch": "*"}
        return {"IfMatch": version.strip('"') if self._connection.bare_tags else version}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        yield

    def files(self, folder: str) -> dict[str, int]:
        """Return the name, relative to ``folder``, and the size in bytes of every object below it."""
        found = self._ask(folder, lambda limit: self._store.entries(folder, deep=True, limit=limit))
        return {name: size for name, size in sorted(found.items()) if size is not None}

    def part(self, name: str, start: int, end: int) -> bytes | None:
        """Return the bytes from ``start`` up to ``end``, or None when there is no such object."""
        try:
            return self._move(name, lambda limit: self._store.part(name, start, end, limit=limit))
        except _Absent:
            return None

    def upload(self, file: Path, name: str) -> None:
        """Write a local file as an object by one request; see :mod:`holdfast.storage.transfers` for big ones."""
        self._move(name, lambda limit: self._store.upload(file, name, limit=limit))

    def is_beside(self, other: ObjectRoot) -> bool:
        """Tell whether the server can be asked to copy from ``other``: both are reached by the same connection."""
        return other._connection is self._connection

    def copy_from(self, other: ObjectRoot, name: str, size: int) -> bool:
        """Let the server copy an object of ``size`` bytes from another place on it; False when there is none."""
        try:
            self._move(name, lambda limit: self._store.copy(other._store, name, size, limit=limit))
        except _Absent:
            return False
        return True

    @property
    def in_parts(self) -> bool:
        """Whether :meth:`begin` and what follows can be used."""
        return self._store.multipart is not None

    @property
    def _parts(self) -> Multipart:
        assert self._store.multipart is not None
        return self._store.multipart

    def begin(self, name: str) -> str:
        """Begin an object that is sent in parts; return the upload's id."""
        return self._ask(name, lambda limit: self._parts.begin(name, limit=limit))

    def put_part(self, name: str, upload: str, number: int, content: bytes) -> dict[str, Any]:
        """Send part ``number``, from 1; return what :meth:`complete` has to be told of it."""
        return self._move(name, lambda limit: self._parts.put_part(name, upload, number, content, limit=limit))

    def complete(self, name: str, upload: str, parts: list[dict[str, Any]], size: int) -> None:
        """Make the parts an object of ``size`` bytes. Only one upload may ever be completed under this name."""
        try:
            self._move(name, lambda limit: self._parts.complete(name, upload, parts, limit=limit))
        except _Absent:  # the upload is gone: it was completed, and the answer was lost
            folder, _, last = name.rpartition("/")
            if self.files(folder).get(last) != size:
                raise

    def abort(self, name: str, upload: str) -> None:
        """Forget an upload and its parts."""
        with suppress(_Absent):
            self._ask(name, lambda limit: self._parts.abort(name, upload, limit=limit))

    def unfinished(self, folder: str) -> list[tuple[str, str]]:
        """Return (name relative to ``folder``, id) of the uploads in parts that nobody finished."""
        if not self.in_parts:
            return []
        return self._ask(folder, lambda limit: self._parts.unfinished(folder, limit=limit))

    def _head(self, name: str, limit: float) -> tuple[str | None, str | None]:
        try:
            return self._ask(name, lambda left: self._store.head(name, limit=left), limit)
        except _Absent:
            return None, None

    def _try_conditions(self) -> bool:
        name = f".holdfast-draft-{secrets.token_hex(8)}"
        self.write(name, b"1")
        try:
            if not self._refuses(name, IfNoneMatch="*") or not self._refuses(name, IfMatch='"' + "0" * 32 + '"'):
                return False
            _, version = self._read(name, LEASE_PATIENCE)
            return self._replace(name, b"2", version)
        except _Refused:
            return False
        finally:
            self.delete(name)

    def _refuses(self, name: str, **condition: str) -> bool:
        """Tell whether a write whose condition does not hold is refused for that reason."""

        def attempt(limit: float) -> bool:
            try:
                self._store.put(name, b"2", limit=limit, **condition)
            except Exception as error:
                if fault_of(error) in (Fault.CHANGED, Fault.UNSUPPORTED):
                    return fault_of(error) is Fault.CHANGED
                raise
            return False

        return self._ask(name, attempt)

    def _ask(self, name: str, call: Callable[[float], Result], patience: float = PATIENCE) -> Result:
        """Return what ``call`` returns, which gets the seconds that are left; what passes is tried again.

        Raises _Absent when there is no such object, StorageError for everything else.
        """
        deadline = time.monotonic() + patience
        return self._repeat(name, lambda: call(deadline - time.monotonic()), patience, deadline)

    def _move(self, name: str, call: Callable[[float], Result]) -> Result:
        """Do as :meth:`_ask` for many bytes: a slow line is no fault, so the patience begins with the first fault."""
        return self._repeat(name, lambda: call(MOVING), PATIENCE, None)

    def _repeat(self, name: str, call: Callable[[], Result], patience: float, deadline: float | None) -> Result:
        pause = 0.2
        while True:
            try:
                result = call()
            except Exception as error:  # every library has errors of its own
                fault = fault_of(error)
                if fault is not Fault.PASSING:
                    self._connection.answered = self._connection.answered or fault is not Fault.OTHER
                    if fault is Fault.ABSENT:
                        raise _Absent(f"there is no object {join(self.location, name)}") from error
                    raise self._error(name, error) from error
                if deadline is None:
                    deadline = time.monotonic() + patience
                if not self._connection.answered or time.monotonic() + pause > deadline:
                    raise self._error(name, error) from error
                time.sleep(pause * random.uniform(0.5, 1.0))  # those that failed together do not come back together
                pause = min(2 * pause, 5.0)
            else:
                self._connection.answered = True
                return result

    def _error(self, name: str, error: Exception) -> StorageError:
        """Return the StorageError for what the library raised; without credentials, whoever wrote them where."""
        where = join(self.location, name) if name else self.location
        words = str(error) or type(error).__name__
        for hidden in self._hidden:
            words = words.replace(hidden, "***")
        match fault_of(error):
            case Fault.NO_BUCKET:
                bucket = "/".join(self.location.split("/")[:3])
                return StorageError(f"{bucket}: there is no such bucket; create it, or name another")
            case Fault.DENIED:
                remedy = "check the credentials (storage_options or the environment) and what they may do there"
                return StorageError(f"{where}: access is denied ({words}); {remedy}")
            case Fault.PASSING:
                remedy = "check the endpoint (storage_options, AWS_ENDPOINT_URL) and the network, then restore"
                return StorageError(f"{where}: the object store does not answer ({words}); {remedy}")
            case Fault.CHANGED | Fault.UNSUPPORTED:
                return _Refused(f"{where}: the object store refused ({words}); check the URL and storage_options, then restore")
            case _:
                return StorageError(f"{where}: the object store refused ({words}); check the URL and storage_options")


def _secrets(options: Mapping[str, Any]) -> list[str]:
    """Return the texts among the options that no message may show."""
    found: list[str] = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            found += _secrets(value)
        elif isinstance(value, str) and len(value) >= 4 and any(part in name.lower() for part in _SECRETS):
            found.append(value)
    return found
