"""The manifest: what a published checkpoint is, and what each of its files holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import xxhash

from holdfast.core.errors import InvalidInput, NewerFormat, NotACheckpoint
from holdfast.core.values import Metrics, dumps, loads

MANIFEST = "manifest.json"
FORMAT = 2
"""2 added ``info`` and ``run_config``, and tensors"""
Kind = Literal["safe", "cloudpickle", "directory"]

_DIGEST = re.compile(r"[0-9a-f]{32}")
_ENVELOPE = re.compile(rb'\{"checksum":"([0-9a-f]{32})","manifest":(.*)\}\n', re.DOTALL)


def digest_of(data: bytes) -> str:
    """Return the xxh3-128 of ``data`` as 32 hex digits."""
    return xxhash.xxh3_128(data).hexdigest()


def name_fault(name: str) -> str | None:
    """Return why ``name`` may not stand in a manifest, or None when it may."""
    if name == MANIFEST:
        return "is the manifest's own name"
    if "\\" in name or "\x00" in name:
        return "holds a backslash or a null character"
    if any(part in ("", ".", "..") for part in name.split("/")):  # an absolute path begins with an empty part
        return "is no relative path without . and .."
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        return "is not UTF-8"
    return None


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file: ``name`` is a relative posix path, ``size`` in bytes, ``digest`` the xxh3-128 of its bytes."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a published checkpoint says of itself. InvalidInput for names that leave its folder, or that repeat."""

    experiment: str
    """the experiment's UUID"""
    trial: int
    attempt: int
    step: int
    writer: str
    created: str
    """ISO 8601, UTC"""
    serializer: Kind
    metrics: Metrics = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()
    beside: dict[str, Any] = field(default_factory=dict)
    """what the experiment's journal may not hold yet: where the attempt began, and its latest reports"""
    info: dict[str, Any] = field(default_factory=dict)
    """what a training loop noted with the checkpoint: JSON values"""
    run_config: dict[str, Any] | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.files]
        for name in names:
            if fault := name_fault(name):
                raise InvalidInput(f"file name {name!r} {fault}")
        if len(set(names)) != len(names):
            raise InvalidInput(f"a file name stands twice among {sorted(names)}")

    @property
    def size(self) -> int:
        """The bytes of all files together, without the manifest."""
        return sum(entry.size for entry in self.files)

    def to_bytes(self) -> bytes:
        """Write the manifest as canonical JSON within its own checksum, so that a torn or altered one is noticed."""
        values = vars(self) | {"files": [vars(entry) for entry in self.files]}  # asdict would copy the metrics
        body = dumps(values).encode("utf-8", "surrogatepass")  # as json reads it: a metric may hold any text
        return b'{"checksum":"%s","manifest":%s}\n' % (digest_of(body).encode(), body)

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read what :meth:`to_bytes` wrote; NotACheckpoint when it is torn, altered or foreign.

        NewerFormat for what a newer holdfast wrote: it is no damage, and must not be treated as such.
        """
        envelope = _ENVELOPE.fullmatch(data)
        if envelope is None:
            raise NotACheckpoint("the manifest is torn, or holdfast did not write it")
        checksum, body = envelope.groups()
        if digest_of(body).encode() != checksum:
            raise NotACheckpoint("the manifest was altered: its checksum differs")
        try:
            values = loads(body)
            version = _typed(values, "format", int)
            if version > FORMAT:
                raise NewerFormat(
                    f"the manifest has format {version}, and this holdfast reads up to {FORMAT}: update holdfast to load it"
                )
            return cls(
                format=version,
                experiment=_typed(values, "experiment", str),
                trial=_typed(values, "trial", int),
                attempt=_typed(values, "attempt", int),
                step=_typed(values, "step", int),
                writer=_typed(values, "writer", str),
                created=_typed(values, "created", str),
                serializer=_kind(_typed(values, "serializer", str)),
                metrics=_typed(values, "metrics", dict),
                beside=_typed(values, "beside", dict) if "beside" in values else {},
                info=_typed(values, "info", dict) if version > 1 else {},
                run_config=_typed(values, "run_config", dict) if values.get("run_config") is not None else None,
                files=_entries(_typed(values, "files", list)),
            )
        except ValueError as error:
            raise NotACheckpoint(f"the manifest makes no sense: {error}") from error


def _typed(values: object, name: str, kind: type) -> Any:
    value = values.get(name) if isinstance(values, dict) else None
    if type(value) is not kind or (isinstance(value, int) and value < 0):  # type, because True is no number here
        raise ValueError(f"{name} is {value!r}")
    return value


def _kind(name: str) -> Any:
    if name not in get_args(Kind):
        raise ValueError(f"serializer is {name!r}; known are {', '.join(get_args(Kind))}")
    return name


def _entries(values: Sequence[object]) -> tuple[FileEntry, ...]:
    entries = tuple(
        FileEntry(name=_typed(value, "name", str), size=_typed(value, "size", int), digest=_typed(value, "digest", str))
        for value in values
    )
    for entry in entries:
        if not _DIGEST.fullmatch(entry.digest):
            raise ValueError(f"the digest of {entry.name!r} is {entry.digest!r}")
    return entries
