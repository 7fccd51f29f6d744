"""Code for other machines: files of the working directory as one archive, the same bytes for the same content."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from holdfast.core.errors import SpecError
from holdfast.storage.folder import IDENTITY

LARGEST = 256 << 20
"""Bytes of all files together, unpacked."""
LEFT_OUT = frozenset({"__pycache__", ".git", ".venv"})
"""Names of folders that are never shipped."""
_COMPILED = ".pyc"
_NAMED = 5  # of the largest files, when there is too much
_TRIES = 3
_PLAIN, _EXECUTABLE = 0o644, 0o755


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Code as it travels."""

    digest: str | None
    """of names, modes and contents; None when nothing travels"""
    body: bytes = field(default=b"", repr=False)
    trainable: str
    """as a worker names it: a file is relative to the root of the archive"""
    files: int = 0
    bytes: int = 0
    """of all files, unpacked"""


@dataclass(frozen=True)
class Entry:
    """A file of an archive, or a folder, whose name ends with a slash."""

    name: str
    executable: bool
    content: bytes


@dataclass(frozen=True)
class _Source:
    file: Path
    size: int


class Digest:
    """The identity of code: of names, modes and contents, in the order of names; no other archive or folder has it."""

    def __init__(self) -> None:
        self._hashed = hashlib.sha256()

    def add(self, entry: Entry) -> None:
        """Take in the next entry."""
        name = entry.name.encode()
        self._hashed.update(f"{len(name)} {int(entry.executable)} {len(entry.content)}\n".encode())
        self._hashed.update(name)
        self._hashed.update(entry.content)

    def __str__(self) -> str:
        return self._hashed.hexdigest()[:32]


def pack(workdir: Path, paths: Sequence[str], trainable: str, *, without: Sequence[Path] = ()) -> Packed:
    """Return the trainable's own file, where it names one, and ``paths`` below ``workdir`` as one archive.

    Symbolic links become what they point to. What searches write stays behind: folders of experiments below ``paths``, and
    files whose names begin as one of ``without``. Nothing is written. SpecError for what is missing, lies elsewhere, is no
    file or folder, cannot be read, goes on changing, or is more than 256 MiB.
    """
    root = Path(os.path.realpath(workdir))
    found: dict[str, _Source | None] = {}  # None: a folder
    for path in paths:
        found.update(_below(root, path, tuple(os.path.realpath(prefix) for prefix in without)))
    target, _, function = trainable.rpartition(":")
    if target.endswith(".py") and not target.startswith("pickle:"):
        name, source = _own_file(root, Path(os.path.abspath(workdir)), target)
        other = found.get(name, source)
        if other is None or f"{name}/" in found or not os.path.samefile(other.file, source.file):
            raise SpecError(
                f"execution.ship holds {name}, and the trainable's file {source.file} would go in under the same name; "
                "rename one of them"
            )
        found[name] = source
        trainable = f"{name}:{function}"
    if not found:
        return Packed(digest=None, trainable=trainable)
    _check_size(found)
    packed = _archive(found)
    return replace(packed, trainable=trainable)


def _own_file(root: Path, workdir: Path, target: str) -> tuple[str, _Source]:
    """Return the name of the trainable's file in the archive, and the file."""
    given = Path(os.path.abspath(workdir / target))
    for base, file in ((root, Path(os.path.realpath(given.parent)) / given.name), (workdir, given)):
        if file.is_relative_to(base):
            name = file.relative_to(base).as_posix()
            break
    else:
        name = given.name
    return _spelled(name), _file(given, "the trainable's file")


def _below(root: Path, path: str, without: tuple[str, ...]) -> Iterator[tuple[str, _Source | None]]:
    """Yield what ``path`` stands for, by its name in the archive."""
    parts = PurePosixPath(path).parts
    name, what = "/".join(parts), f"execution.ship: {path}"
    place = root / name
    if any(_is_left_out(part) for part in parts):
        raise SpecError(f"{what} is never shipped, as __pycache__, .git, .venv and *.pyc are not; drop it")
    yield from _walk(root, place, name, what, (), without)


def _walk(
    root: Path, place: Path, name: str, what: str, above: tuple[Path, ...], without: tuple[str, ...]
) -> Iterator[tuple[str, _Source | None]]:
    """Yield a file, or a folder with all that is in it."""
    real = Path(os.path.realpath(place))
    if not real.is_relative_to(root):
        raise SpecError(f"{what}: {place} leads to {real}, which is not below the working directory {root}; copy it there")
    if not real.is_dir():
        yield _spelled(name), _file(place, what)
        return
    if real in above:
        raise SpecError(f"{what}: {place} leads to a folder that holds it; remove the link, or ship what is needed alone")
    if name:
        yield f"{_spelled(name)}/", None
    try:
        entries = sorted(os.listdir(real))
    except OSError as error:
        raise _unreadable(place, what, error) from error
    for entry in entries:
        inner = os.path.join(real, entry)
        is_written = inner.startswith(without) or os.path.isfile(os.path.join(inner, IDENTITY))  # by a search, maybe this one
        if not (is_written or _is_left_out(entry)):
            yield from _walk(root, place / entry, f"{name}/{entry}" if name else entry, what, (*above, real), without)


def _is_left_out(name: str) -> bool:
    return name in LEFT_OUT or name.endswith(_COMPILED)


def _spelled(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SpecError(f"the file {os.fsencode(name)!r} has a name that is no Unicode text; rename it to ship it") from None
    return name


def _file(place: Path, what: str) -> _Source:
    try:
        status = os.stat(place)
    except FileNotFoundError:
        words = "is a link to nothing" if os.path.islink(place) else "does not exist"
        raise SpecError(f"{what}: {place} {words}; name a file or a folder below the working directory") from None
    except OSError as error:
        raise _unreadable(place, what, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise SpecError(f"{what}: {place} is {_kind(status.st_mode)}; only files and folders can be shipped")
    if not os.access(place, os.R_OK):
        raise SpecError(f"{what}: {place} cannot be read: Permission denied; fix the permissions, or leave it out")
    return _Source(place, status.st_size)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a pipe", stat.S_IFBLK: "a device", stat.S_IFCHR: "a device"}
    return kinds.get(stat.S_IFMT(mode), "a folder")


def _unreadable(place: Path, what: str, error: OSError) -> SpecError:
    return SpecError(f"{what}: {place} cannot be read: {error.strerror or error}; fix that, or leave it out")


def _check_size(found: dict[str, _Source | None]) -> None:
    sizes = {name: source.size for name, source in found.items() if source is not None}
    if sum(sizes.values()) > LARGEST:
        raise _too_much(sizes)


def _too_much(sizes: dict[str, int]) -> SpecError:
    largest = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:_NAMED]
    words = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in largest)
    return SpecError(
        f"what is shipped has {sum(sizes.values()) / 2**20:.0f} MiB, {LARGEST >> 20} MiB are allowed; the largest: {words}; "
        "put data where the workers reach it and name that in references"
    )


def _archive(found: dict[str, _Source | None]) -> Packed:
    """Return the archive; files are read one after the other."""
    hashed, buffer = Digest(), io.BytesIO()
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, source in sorted(found.items()):
            entry = Entry(name, True, b"") if source is None else _read(name, source)
            if source is not None:
                sizes[name] = len(entry.content)
                if sum(sizes.values()) > LARGEST:  # it grew since it was looked at
                    raise _too_much(sizes)
            hashed.add(entry)
            info = zipfile.ZipInfo(name)  # of 1980: nothing here depends on the clock
            info.create_system = 3  # the modes are those of Unix
            kind = stat.S_IFDIR if source is None else stat.S_IFREG
            info.external_attr = (kind | (_EXECUTABLE if entry.executable else _PLAIN)) << 16
            info.compress_type = zipfile.ZIP_STORED if source is None else zipfile.ZIP_DEFLATED
            archive.writestr(info, entry.content)
    total = sum(sizes.values())
    return Packed(digest=str(hashed), body=buffer.getvalue(), trainable="", files=len(sizes), bytes=total)


def _read(name: str, source: _Source) -> Entry:
    """Read a file as it was at one moment."""
    what = "what is shipped"
    for _ in range(_TRIES):
        try:
            descriptor = os.open(source.file, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            break
        except OSError as error:
            raise _unreadable(source.file, what, error) from error
        with open(descriptor, "rb", buffering=0) as stream:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                break
            if before.st_size > LARGEST:
                raise _too_much({name: before.st_size})
            try:
                content = stream.read(before.st_size + 1) or b""
                while len(content) < before.st_size and (more := stream.read(before.st_size - len(content))):
                    content += more
            except OSError as error:
                raise _unreadable(source.file, what, error) from error
            after = os.fstat(descriptor)
        if (after.st_mtime_ns, after.st_size, len(content)) == (before.st_mtime_ns, before.st_size, before.st_size):
            return Entry(name, bool(before.st_mode & stat.S_IXUSR), content)
    raise SpecError(f"{source.file} changes while it is packed; wait until nobody writes to it, or leave it out")
