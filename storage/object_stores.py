"""What an object store is asked for, by S3's own calls or by any fsspec file system's; and what its errors mean."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeVar

from holdfast.core.errors import SpecError
from holdfast.storage.filesystems import ArrowStore, is_arrow

Result = TypeVar("Result")

STAMP = "holdfast-write"
"""Metadata by which a conditional write is known again when its answer was lost."""
_AT_ONCE = 16  # requests
LARGEST_COPY = 5 << 30
"""Bytes that one request copies at most, as S3 allows; what is larger is copied in parts of this size or less."""
_LOCAL = {"file", "local"}


class Fault(Enum):
    """What an error of a store means."""

    ABSENT = "there is no such object"
    NO_BUCKET = "there is no such bucket"
    DENIED = "the credentials are refused, or missing"
    CHANGED = "the condition of a write does not hold"
    UNSUPPORTED = "the server does not know what it was asked"
    PASSING = "the server does not answer, or asks for patience"
    OTHER = "anything else"


_CODES = {
    "NoSuchBucket": Fault.NO_BUCKET,
    "PreconditionFailed": Fault.CHANGED,
    "ConditionalRequestConflict": Fault.CHANGED,
    "ExpiredToken": Fault.DENIED,
    "InvalidToken": Fault.DENIED,
    "TokenRefreshRequired": Fault.DENIED,
    "NotImplemented": Fault.UNSUPPORTED,
    "SlowDown": Fault.PASSING,
    "RequestTimeout": Fault.PASSING,
    "InternalError": Fault.PASSING,
    "Throttling": Fault.PASSING,
    "ThrottlingException": Fault.PASSING,
    "RequestLimitExceeded": Fault.PASSING,
    "TooManyRequests": Fault.PASSING,
    "BadDigest": Fault.PASSING,  # these three: what was sent did not arrive whole
    "IncompleteBody": Fault.PASSING,
    "XAmzContentSHA256Mismatch": Fault.PASSING,
}
_STATUSES = {400: Fault.UNSUPPORTED, 401: Fault.DENIED, 403: Fault.DENIED, 404: Fault.ABSENT, 409: Fault.CHANGED}
_STATUSES |= {412: Fault.CHANGED, 429: Fault.PASSING, 501: Fault.UNSUPPORTED}
_NAMES = {
    "NoCredentialsError": Fault.DENIED,
    "PartialCredentialsError": Fault.DENIED,
    "HTTPClientError": Fault.PASSING,  # botocore's: timeouts and broken connections
    "EndpointConnectionError": Fault.PASSING,
    "ConnectionError": Fault.PASSING,
    "ClientError": Fault.PASSING,  # aiohttp's: the body of an answer broke off; botocore's has a response
    "IncompleteRead": Fault.PASSING,
    "ResponseParserError": Fault.PASSING,
}


_ARROW = re.compile(r"AWS Error ([A-Z_]+)")
_ARROW_CODES = {
    "ACCESS_DENIED": Fault.DENIED,
    "INVALID_ACCESS_KEY_ID": Fault.DENIED,
    "SIGNATURE_DOES_NOT_MATCH": Fault.DENIED,
    "NO_SUCH_BUCKET": Fault.NO_BUCKET,
    "NETWORK_CONNECTION": Fault.PASSING,
    "SLOW_DOWN": Fault.PASSING,
    "THROTTLING": Fault.PASSING,
    "SERVICE_UNAVAILABLE": Fault.PASSING,
    "INTERNAL_FAILURE": Fault.PASSING,
    "REQUEST_TIMEOUT": Fault.PASSING,
}
"""as pyarrow's errors name them in their text"""


def fault_of(error: BaseException) -> Fault:
    """Return what an error of a file system means."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, Mapping) and "Error" in response:
        code = str(response["Error"].get("Code"))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
        return _CODES.get(code) or _STATUSES.get(status) or (Fault.PASSING if status >= 500 else Fault.OTHER)
    if isinstance(error, FileNotFoundError):
        return Fault.ABSENT
    if isinstance(error, PermissionError):
        return Fault.DENIED
    if isinstance(error, (TimeoutError, ConnectionError)):
        return Fault.PASSING
    if isinstance(error, OSError) and (named := _ARROW.search(str(error))):
        return _ARROW_CODES.get(named[1], Fault.OTHER)
    return next((_NAMES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _NAMES), Fault.OTHER)


class Store(Protocol):
    """The objects below one URL, by keys relative to it. Raises whatever its library raises; :func:`fault_of` tells."""

    conditions: bool
    """whether a write can have a condition at all"""
    multipart: Multipart | None
    """how a big object is written in parts that become one object at the end, where that can be done"""

    def get(self, key: str, *, limit: float) -> tuple[bytes, str | None]:
        """Return an object's content and ETag; ``limit`` in seconds."""
        ...

    def part(self, key: str, start: int, end: int, *, limit: float) -> bytes:
        """Return the bytes of an object from ``start`` up to ``end``."""
        ...

    def put(self, key: str, content: bytes, *, limit: float, **arguments: Any) -> str | None:
        """Write an object whole; return its ETag."""
        ...

    def upload(self, file: Path, key: str, *, limit: float) -> None:
        """Write a file as an object."""
        ...

    def copy(self, source: Any, key: str, size: int, *, limit: float) -> None:
        """Copy an object of ``size`` bytes from the same key of ``source``, a store on the same connection."""
        ...

    def head(self, key: str, *, limit: float) -> tuple[str | None, str | None]:
        """Return an object's metadata STAMP and its ETag."""
        ...

    def entries(self, folder: str, *, deep: bool, limit: float) -> dict[str, int | None]:
        """Return the names below a folder (relative to it) and their sizes; of folders (not ``deep``) None."""
        ...

    def remove(self, keys: Iterable[str], *, limit: float) -> None:
        """Delete objects; missing ones do not matter."""
        ...

    def remove_folders(self, folder: str) -> None:
        """Delete what is left of a folder without objects, where folders exist by themselves."""
        ...


class Multipart(Protocol):
    """An object that is written in parts: it appears when it is completed, or not at all."""

    def begin(self, key: str, *, limit: float) -> str:
        """Return the id of a new upload."""
        ...

    def put_part(self, key: str, upload: str, number: int, content: bytes, *, limit: float) -> dict[str, Any]:
        """Send part ``number``, from 1; return what :meth:`complete` has to say of it."""
        ...

    def complete(self, key: str, upload: str, parts: list[dict[str, Any]], *, limit: float) -> None:
        """Make the parts an object."""
        ...

    def abort(self, key: str, upload: str, *, limit: float) -> None:
        """Forget an upload and its parts."""
        ...

    def unfinished(self, folder: str, *, limit: float) -> list[tuple[str, str]]:
        """Return (key below ``folder``, id) of every upload that was neither completed nor aborted."""
        ...


@dataclass
class Connection:
    """A file system's client, shared by all roots with the same options."""

    fs: Any
    answered: bool = False
    """whether it ever answered: what never did is not waited for"""
    bare_tags: bool = False
    """whether ``If-Match`` wants ETags without their quotes, as Ceph 16 does"""
    conditional: dict[str, bool] = field(default_factory=dict)
    """by bucket"""


class S3Store:
    """S3 by its own calls through s3fs: each is one request, no listing is cached, and no name is a pattern."""

    conditions = True

    def __init__(self, connection: Connection, location: str) -> None:
        self._fs = connection.fs
        self.multipart: Multipart | None = self
        self._bucket, _, self._prefix = location.partition("://")[2].partition("/")

    def get(self, key: str, *, limit: float) -> tuple[bytes, str | None]:
        return self._run(lambda: self._get(key), limit)

    def part(self, key: str, start: int, end: int, *, limit: float) -> bytes:
        return self._run(lambda: self._get(key, Range=f"bytes={start}-{end - 1}"), limit)[0]

    async def _get(self, key: str, **arguments: Any) -> tuple[bytes, str | None]:
        answer = await self._call("get_object", key, **arguments)
        async with answer["Body"] as body:
            content = bytes(await body.read())
        if len(content) != answer.get("ContentLength", len(content)):
            raise ConnectionError(f"the answer broke off after {len(content)} of {answer['ContentLength']} bytes")
        return content, answer.get("ETag")

    def put(self, key: str, content: bytes, *, limit: float, **arguments: Any) -> str | None:
        answer = self._run(lambda: self._call("put_object", key, Body=content, **arguments), limit)
        tag: str | None = answer.get("ETag")
        return tag

    def upload(self, file: Path, key: str, *, limit: float) -> None:
        self.put(key, file.read_bytes(), limit=limit)

    def copy(self, source: Any, key: str, size: int, *, limit: float) -> None:
        place = {"Bucket": source._bucket, "Key": source._key(key)}
        if size <= LARGEST_COPY:
            self._run(lambda: self._call("copy_object", key, CopySource=place), limit)
            return
        upload = self.begin(key, limit=limit)
        try:
            parts = []
            for number, start in enumerate(range(0, size, LARGEST_COPY), 1):
                piece = {"CopySource": place, "CopySourceRange": f"bytes={start}-{min(start + LARGEST_COPY, size) - 1}"}
                found = self._run(lambda: self._copy_part(key, upload, number, piece), limit)  # noqa: B023  # called at once
                parts.append({"PartNumber": number, "ETag": found["ETag"]})
            self.complete(key, upload, parts, limit=limit)
        except BaseException:
            with suppress(Exception):  # the error that brought us here counts
                self.abort(key, upload, limit=limit)
            raise

    async def _copy_part(self, key: str, upload: str, number: int, piece: Mapping[str, Any]) -> Any:
        answer = await self._call("upload_part_copy", key, UploadId=upload, PartNumber=number, **piece)
        return answer["CopyPartResult"]

    def begin(self, key: str, *, limit: float) -> str:
        return str(self._run(lambda: self._call("create_multipart_upload", key), limit)["UploadId"])

    def put_part(self, key: str, upload: str, number: int, content: bytes, *, limit: float) -> dict[str, Any]:
        part = {"UploadId": upload, "PartNumber": number}
        answer = self._run(lambda: self._call("upload_part", key, Body=content, **part), limit)
        sums = {name: value for name, value in answer.items() if name.startswith("Checksum") and name != "ChecksumType"}
        return {"PartNumber": number, "ETag": answer["ETag"], **sums}

    def complete(self, key: str, upload: str, parts: list[dict[str, Any]], *, limit: float) -> None:
        whole = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
        self._run(lambda: self._call("complete_multipart_upload", key, **whole), limit)

    def abort(self, key: str, upload: str, *, limit: float) -> None:
        self._run(lambda: self._call("abort_multipart_upload", key, UploadId=upload), limit)

    def unfinished(self, folder: str, *, limit: float) -> list[tuple[str, str]]:
        return self._run(lambda: self._unfinished(self._below(folder)), limit)

    async def _unfinished(self, prefix: str) -> list[tuple[str, str]]:
        arguments = {"Bucket": self._bucket, "Prefix": prefix}
        found: list[tuple[str, str]] = []
        while True:
            page = await self._fs._call_s3("list_multipart_uploads", **arguments)
            uploads = [(str(upload["Key"]), str(upload["UploadId"])) for upload in page.get("Uploads", ())]
            found += [(key.removeprefix(prefix), upload) for key, upload in uploads if key.startswith(prefix)]
            if not page.get("IsTruncated"):
                return found
            arguments |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def head(self, key: str, *, limit: float) -> tuple[str | None, str | None]:
        answer = self._run(lambda: self._call("head_object", key), limit)
        return answer.get("Metadata", {}).get(STAMP), answer.get("ETag")

    def entries(self, folder: str, *, deep: bool, limit: float) -> dict[str, int | None]:
        return self._run(lambda: self._list(folder, deep), limit)

    def _below(self, folder: str) -> str:
        """Return the prefix of what lies in a folder; of the bucket itself none."""
        key = self._key(folder).rstrip("/")
        return f"{key}/" if key else ""

    async def _list(self, folder: str, deep: bool) -> dict[str, int | None]:
        prefix = self._below(folder)
        arguments = {"Bucket": self._bucket, "Prefix": prefix, **({} if deep else {"Delimiter": "/"})}
        found: dict[str, int | None] = {}
        while True:
            page = await self._fs._call_s3("list_objects_v2", **arguments)
            found |= {entry["Key"][len(prefix) :]: entry["Size"] for entry in page.get("Contents", ())}
            found |= {entry["Prefix"][len(prefix) : -1]: None for entry in page.get("CommonPrefixes", ())}
            if not page.get("IsTruncated"):
                found.pop("", None)  # some tools make an object for the folder itself
                return found
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def remove(self, keys: Iterable[str], *, limit: float) -> None:
        self._run(lambda: self._remove(list(keys)), limit)

    async def _remove(self, keys: list[str]) -> None:
        # One by one: older servers want a digest with DeleteObjects that botocore no longer sends.
        for start in range(0, len(keys), _AT_ONCE):
            await asyncio.gather(*(self._call("delete_object", key) for key in keys[start : start + _AT_ONCE]))

    def remove_folders(self, folder: str) -> None:
        """Do nothing: a folder is only a part of names."""

    async def _call(self, method: str, key: str, **arguments: Any) -> Any:
        return await self._fs._call_s3(method, Bucket=self._bucket, Key=self._key(key), **arguments)

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix and key else self._prefix or key

    def _run(self, call: Callable[[], Coroutine[Any, Any, Result]], limit: float) -> Result:
        from fsspec.asyn import sync

        async def limited() -> Result:
            return await asyncio.wait_for(call(), max(limit, 0.1))

        result: Result = sync(self._fs.loop, limited)
        return result


class AnyStore:
    """Any fsspec file system whose writes appear whole. Conditions are not known to it."""

    conditions = False

    def __init__(self, connection: Connection, location: str) -> None:
        self._fs = connection.fs
        self.multipart: Multipart | None = None
        self._base = str(self._fs._strip_protocol(location)).rstrip("/")

    def get(self, key: str, *, limit: float) -> tuple[bytes, str | None]:
        return bytes(self._fs.cat_file(self._path(key))), None

    def part(self, key: str, start: int, end: int, *, limit: float) -> bytes:
        return bytes(self._fs.cat_file(self._path(key), start=start, end=end))

    def put(self, key: str, content: bytes, *, limit: float, **arguments: Any) -> str | None:
        self._in_folder(key, lambda path: self._fs.pipe_file(path, content))
        return None

    def upload(self, file: Path, key: str, *, limit: float) -> None:
        self._in_folder(key, lambda path: self._fs.put_file(str(file), path))

    def copy(self, source: Any, key: str, size: int, *, limit: float) -> None:
        self._in_folder(key, lambda path: self._fs.cp_file(source._path(key), path))

    def _in_folder(self, key: str, write: Callable[[str], Any]) -> None:
        path = self._path(key)
        try:
            write(path)
        except FileNotFoundError:  # it has folders that must be made
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            write(path)

    def head(self, key: str, *, limit: float) -> tuple[str | None, str | None]:
        return None, None

    def entries(self, folder: str, *, deep: bool, limit: float) -> dict[str, int | None]:
        self._fs.invalidate_cache()
        path = self._path(folder)
        try:
            found = self._fs.find(path, detail=True).values() if deep else self._fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        sizes = {}
        for entry in found:
            name = str(entry["name"]).rstrip("/")
            if name.startswith(path + "/"):
                sizes[name[len(path) + 1 :]] = None if entry["type"] == "directory" else int(entry["size"] or 0)
        return sizes

    def remove(self, keys: Iterable[str], *, limit: float) -> None:
        for key in keys:
            try:
                self._fs.rm_file(self._path(key))
            except FileNotFoundError:
                continue

    def remove_folders(self, folder: str) -> None:
        self._fs.invalidate_cache()
        path = self._path(folder)
        found = self._fs.find(path, withdirs=True, detail=True)
        below = [name for name, entry in found.items() if entry["type"] == "directory" and name.startswith(path + "/")]
        for name in [*sorted(below, reverse=True), path]:
            with suppress(OSError, NotImplementedError):  # object stores have none, and some file systems cannot
                self._fs.rmdir(name)

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}" if key else self._base


_connections: dict[str, Connection] = {}
_given: dict[int, Connection] = {}
"""connections of callers' own file systems, which they keep alive: by id, because not every one has a hash"""
_connecting = threading.Lock()


def open_store(location: str, options: Mapping[str, Any], filesystem: Any = None) -> tuple[Store, Connection]:
    """Return the store at a URL and its connection; nothing is asked yet.

    Raises SpecError for a URL that is none of an object store, and for a file system that is not installed. A given
    ``filesystem`` has to be as :func:`filesystems.resolve` returns it.
    """
    if filesystem is not None:
        connection = _connection_of(filesystem)
        if is_arrow(filesystem):
            return ArrowStore(filesystem, location), connection
        return _fsspec_store(connection, location), connection
    protocol, _, rest = location.partition("://")
    if "::" in location:
        raise SpecError(
            f"storage {location}: chained file systems keep copies; name the object store itself, as in s3://bucket"
        )
    if protocol in _LOCAL:
        raise SpecError(f"storage {location}: name a local folder by its path, {rest or '/'}")
    if "@" in rest.partition("/")[0]:
        raise SpecError(f"storage {protocol}://...: a URL holds no credentials; use storage_options or the environment")
    if not rest.partition("/")[0]:
        raise SpecError(f"storage {location}: it names no bucket; write {protocol}://bucket/prefix")
    connection = _connection(protocol, options)
    return _fsspec_store(connection, location), connection


def _fsspec_store(connection: Connection, location: str) -> Store:
    if any(kind.__name__ == "S3FileSystem" for kind in type(connection.fs).__mro__):
        return S3Store(connection, location)
    return AnyStore(connection, location)


def _connection_of(filesystem: Any) -> Connection:
    """Return the connection of a caller's file system; one for all roots on it."""
    with _connecting:
        found = _given.get(id(filesystem))
        if found is None or found.fs is not filesystem:
            found = _given[id(filesystem)] = Connection(filesystem)
        return found


def _connection(protocol: str, options: Mapping[str, Any]) -> Connection:
    """Return the connection for a protocol and options; one for all, because a client takes a while to be made."""
    try:
        key = json.dumps([os.getpid(), protocol, dict(options)], sort_keys=True)
    except (TypeError, ValueError):
        return Connection(_file_system(protocol, options))
    with _connecting:
        if key not in _connections:
            _connections[key] = Connection(_file_system(protocol, options))
        return _connections[key]


def _file_system(protocol: str, options: Mapping[str, Any]) -> Any:
    import fsspec
    from fsspec.registry import known_implementations

    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise SpecError(f"storage {protocol}://: fsspec knows no such file system; use s3://") from None
    except ImportError as error:
        wanted = known_implementations.get(protocol, {}).get("err") or str(error)
        raise SpecError(f"storage {protocol}:// needs a package that is not installed: {wanted}") from None
    defaults: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    given = dict(options)
    if protocol in ("s3", "s3a"):
        # s3fs repeats broken connections and SlowDown, botocore also 5xx; together they must not outlast a lease.
        retries = {"retries": {"mode": "standard", "total_max_attempts": 3}, "max_pool_connections": 32}
        given["config_kwargs"] = {**retries, **(given.get("config_kwargs") or {})}
    try:
        fs = kind(**{**defaults, **given})
    except (TypeError, ValueError) as error:
        raise SpecError(f"storage_options of {protocol}://: {error}") from None
    if protocol in ("s3", "s3a"):
        fs.retries = 2
    return fs
