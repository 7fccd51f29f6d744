"""Shipped code: kept in the experiment's path by its digest, and unpacked once on every host that runs trials of it.

<path>/code/DIGEST.zip                  an archive that :func:`holdfast.storage.packing.pack` made
<cache>/code/DIGEST/files/...           unpacked: the working directory of attempts
<cache>/code/DIGEST/names.json          what the archive held, in its order
<cache>/code/.incoming-0123456789abcdef coming in, or going: nothing

Who uses an unpacked folder holds a shared lock on it, which ends with the process; what is locked is not removed.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
import re
import secrets
import shutil
import stat
import struct
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from holdfast.core import faults
from holdfast.core.errors import Corrupt, StorageError
from holdfast.storage import transfers
from holdfast.storage.atomic import make_folder, storage_error
from holdfast.storage.checkpoints.cache import LIMIT, Hold, lock_folder, size_on_disk
from holdfast.storage.folder import CODE, OWN_CODE, Folder
from holdfast.storage.objects import ObjectRoot
from holdfast.storage.packing import LARGEST, Digest, Entry, Packed, pack
from holdfast.storage.root import Root, join

__all__ = ["KEPT", "SHIPPED", "Packed", "file_name", "keep", "pack", "release", "unnamed", "unpack"]

log = logging.getLogger(__name__)

SHIPPED = "shipped"
"""The audit row of a drive whose code travels."""
KEPT = 3
"""Drives, the newest ones, whose code ``gc`` leaves in the path."""
_INCOMING = ".incoming-"
_LOCK = ".lock-"
_FILES, _NAMES = "files", "names.json"
_DIGEST = re.compile(r"[0-9a-f]{32}")
_OWN_INCOMING = re.compile(rf"{re.escape(_INCOMING)}[0-9a-f]{{16}}")
_PATIENCE = 60.0
"""Seconds for which another process that unpacks the same code is waited for: it may be suspended."""
_TRIES = 5
_READ_ONLY, _READ_ONLY_EXECUTABLE = 0o444, 0o555
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError),
    *(ValueError, KeyError, IndexError, OverflowError),
)
"""What reading a torn or altered archive raises."""

_holds: dict[Path, list[Hold]] = {}
_holding = threading.Lock()


def file_name(digest: str) -> str:
    """Return where code is, relative to the experiment's path."""
    return f"{CODE}/{digest}.zip"


# In the path


def keep(folder: Folder, packed: Packed) -> None:
    """Have the code in the experiment's path, durably; an intact archive that is there stays as it is.

    Corrupt, and nothing is written, when the archive in hand is not what its digest says.
    """
    if packed.digest is None:
        return
    name = file_name(packed.digest)
    is_there = name.partition("/")[2] in folder.root.names(CODE)
    if is_there:
        with suppress(Corrupt):
            if _digest(_content(folder.root, name)) == packed.digest:
                return
    if _digest(packed.body) != packed.digest:
        raise Corrupt(
            f"code to be kept at {join(folder.location, name)} is not what its digest says ({len(packed.body)} bytes); "
            "nothing was written; restore the search where its code is: it ships it anew"
        )
    if is_there:
        log.warning("%s is damaged; it is written anew", join(folder.location, name))
    if isinstance(folder.root, ObjectRoot):
        with tempfile.NamedTemporaryFile(prefix="holdfast-") as file:
            try:
                file.write(packed.body)
                file.flush()
            except OSError as error:
                raise storage_error(error, Path(file.name)) from error
            folder.root.upload(Path(file.name), name)
    else:
        folder.root.write(name, packed.body)
    faults.point("code.kept")


def unnamed(root: Root, named: Collection[str]) -> list[str]:
    """Return the names, relative to the path, of code whose digest is not among ``named``; foreign files are left out."""
    found = [(name, OWN_CODE.fullmatch(name)) for name in root.names(CODE)]
    return [f"{CODE}/{name}" for name, own in found if own is not None and own[1] not in named]


def _content(root: Root, name: str) -> bytes:
    """Return an archive's bytes; Corrupt when it is missing."""
    where = join(root.location, name)
    missing = Corrupt(f"{where} is missing; put it back, or restore the search where its code is: it ships it anew")
    if not isinstance(root, ObjectRoot):
        body = root.read(name)
        if body is None:
            raise missing
        return body
    folder, _, last = name.rpartition("/")
    size = root.files(folder).get(last)
    if size is None:
        raise missing
    content = bytearray()
    with closing(transfers.download(root, [(name, size)])) as parts:
        for part in parts:
            if part is None:
                raise missing
            content += part
    return bytes(content)


def _digest(body: bytes) -> str | None:
    """Return the digest of an archive's content, or None when it is damaged."""
    hashed = Digest()
    try:
        for entry in _entries(body):
            hashed.add(entry)
    except _DAMAGE:
        return None
    return str(hashed)


def _entries(body: bytes) -> Iterator[Entry]:
    """Yield what an archive holds; one of _DAMAGE for what no archive of ours is, names that lead elsewhere among it."""
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        infos, before = archive.infolist(), ""
        if sum(info.file_size for info in infos) > LARGEST:
            raise ValueError(f"more than {LARGEST >> 20} MiB")
        for info in infos:
            name = info.filename
            parts = name.removesuffix("/").split("/")
            if name <= before or "\0" in name or any(part in ("", ".", "..") for part in parts):
                raise ValueError(f"the name {name!r}")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"the compression {info.compress_type}")
            before = name
            yield Entry(name, bool((info.external_attr >> 16) & stat.S_IXUSR), archive.read(info))


# On a host


def unpack(folder: Folder, digest: str, cache: Path) -> Path:
    """Return the folder with the files of a digest, unpacked below ``cache`` once for this host.

    It stays as long as this process, or until :func:`release`. Its files are read-only. Corrupt when the path's archive is
    missing or is not what its name says, StorageError when it cannot be fetched or written.
    """
    base = cache.absolute() / CODE
    where = join(folder.location, file_name(digest))
    if not _DIGEST.fullmatch(digest):
        raise Corrupt(f"{where} is the name of no shipped code")
    make_folder(base)
    made = False
    with _alone(base / f"{_LOCK}{digest}"):
        held = _whole(base / digest, digest)
        for _ in range(_TRIES):
            if held is not None:
                break
            body = _content(folder.root, file_name(digest))
            try:
                _bring(base, digest, body, where)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not _evict(base, 0):
                    raise storage_error(error, base) from error
                continue
            made = True
            held = _whole(base / digest, digest)
    if held is None:
        raise StorageError(f"{base / digest} cannot be kept: others remove or damage it all the time; end them, then restore")
    held.used()
    with _holding:
        _holds.setdefault(base / digest, []).append(held)
    if made:
        _evict(base, LIMIT if folder.cache_bytes is None else folder.cache_bytes)
    return base / digest / _FILES


def release(files: Path) -> None:
    """Give up one use of a folder that :func:`unpack` returned: others' need for room may remove it then."""
    with _holding:
        holds = _holds.get(files.parent, [])
        if holds:
            holds.pop().close()
        if not holds:
            _holds.pop(files.parent, None)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let one process after the other unpack a digest; whoever waits for a suspended one goes on, which harms nothing."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise storage_error(error, lock) from error
    try:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break  # a file system without locks
            else:
                break
        yield
    finally:
        os.close(descriptor)


def _whole(place: Path, digest: str) -> Hold | None:
    """Return a hold on an intact unpacked folder; a damaged one is put aside, and None returned."""
    held = lock_folder(place, fcntl.LOCK_SH)
    if held is None:
        return None
    try:
        if _found(place) == digest:
            return held
        log.warning("%s is damaged; it is unpacked anew", place)
        with suppress(OSError):
            aside = place.parent / f"{_INCOMING}{secrets.token_hex(8)}"
            os.rename(place, aside)
            held.close()
            _remove(aside)
    except BaseException:
        held.close()
        raise
    held.close()
    return None


def _found(place: Path) -> str | None:
    """Return the digest of an unpacked folder's files as they are now, or None when something is missing."""
    hashed = Digest()
    try:
        for name in json.loads((place / _NAMES).read_bytes()):
            file = place / _FILES / name
            if name.endswith("/"):
                if not stat.S_ISDIR(os.lstat(file).st_mode):
                    return None
                hashed.add(Entry(name, True, b""))
                continue
            with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0) as stream:
                mode = os.fstat(stream.fileno()).st_mode
                if not stat.S_ISREG(mode):
                    return None
                hashed.add(Entry(name, bool(mode & stat.S_IXUSR), stream.readall()))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return str(hashed)


def _bring(base: Path, digest: str, body: bytes, where: str) -> None:
    """Unpack an archive into its place; Corrupt when it is damaged. Somebody else's folder that is there stays."""
    place, held = _incoming(base)
    try:
        files, hashed, names = place / _FILES, Digest(), []
        files.mkdir()
        try:
            for entry in _entries(body):
                hashed.add(entry)
                names.append(entry.name)
                _write(files / entry.name, entry)
            damage = "" if str(hashed) == digest else f"its content has the digest {hashed}"
        except _DAMAGE as error:
            damage = f"{type(error).__name__}: {error}"
        if damage:
            raise Corrupt(f"{where} is damaged ({damage}); restore the search where its code is: it ships it anew")
        (place / _NAMES).write_text(json.dumps(names))
        faults.point("code.unpacked")
        try:
            os.rename(place, base / digest)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
    finally:
        held.close()
        _remove(place)


def _write(file: Path, entry: Entry) -> None:
    if entry.name.endswith("/"):
        file.mkdir(parents=True, exist_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "xb") as stream:
        stream.write(entry.content)
        os.fchmod(stream.fileno(), _READ_ONLY_EXECUTABLE if entry.executable else _READ_ONLY)


def _incoming(base: Path) -> tuple[Path, Hold]:
    """Make a new folder that counts for nothing yet, and that nobody removes while it is held."""
    while True:
        place = base / f"{_INCOMING}{secrets.token_hex(8)}"
        place.mkdir()
        held = lock_folder(place, fcntl.LOCK_SH)
        if held is not None:
            return place, held


def _evict(base: Path, limit: int) -> bool:
    """Remove what a crash left, and the folders used longest ago while all take more than ``limit`` bytes; tell if one went.

    What is in use stays.
    """
    copies: list[tuple[int, int, Path]] = []
    for name in sorted(os.listdir(base)):
        place = base / name
        with suppress(OSError):
            if _OWN_INCOMING.fullmatch(name):
                _remove_unused(place)
            elif _DIGEST.fullmatch(name):
                copies.append((os.stat(place).st_mtime_ns, size_on_disk(place), place))
    total, gone = sum(size for _, size, _ in copies), False
    for _, size, place in sorted(copies):
        if total <= limit:
            break
        if _remove_unused(place):
            total, gone = total - size, True
            with suppress(OSError):
                (base / f"{_LOCK}{place.name}").unlink()
    return gone


def _remove_unused(place: Path) -> bool:
    held = lock_folder(place, fcntl.LOCK_EX)
    if held is None:
        return False
    try:
        aside = place.parent / f"{_INCOMING}{secrets.token_hex(8)}"
        os.rename(place, aside)
    except OSError as error:
        log.warning("could not remove %s: %s", place, error)
        return False
    finally:
        held.close()
    _remove(aside)
    return True


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
