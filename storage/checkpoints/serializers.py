"""Serializers: a state, or a folder of the user's own files, as the digested files of a checkpoint, and back.

``safe`` writes ``state.json``, with small arrays inside it, so that a small checkpoint is one file and one fsync. When
its buffers exceed 64 KiB together they stand in ``arrays.bin`` instead, each aligned so that it can be memory-mapped.
Tensors stand in ``tensors.safetensors``. docs/checkpoint-format.md describes the files for other programs.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Literal, Protocol

import xxhash

from holdfast.core.errors import CheckpointCorrupt, HoldfastError, InvalidInput, NewerFormat, NotStorable
from holdfast.storage.checkpoints.files import CHUNK, Sink, Source, fsync_folder, storage_errors
from holdfast.storage.checkpoints.manifest import MANIFEST, FileEntry, Manifest, name_fault
from holdfast.storage.checkpoints.safe import MAX_DEPTH, Buffers, Decoder, Encoder, class_name, parts
from holdfast.storage.checkpoints.tensors import TENSORS, TensorReader

STATE = "state.json"
ARRAYS = "arrays.bin"
PICKLE = "state.pkl"
STATE_FORMAT = 2
"""2 added ordered dicts, counters and tensors"""
INLINE = 64 << 10  # bytes of buffers that go into the JSON: there, base64 costs less than one more fsync
ALIGN = 64


class Prepared(Protocol):
    """A state that is ready to be written, once."""

    serializer: Literal["safe", "cloudpickle"]

    def write(self, folder: Path) -> list[FileEntry]:
        """Write it into the existing ``folder``, every file fsynced. Raises NotStorable and StorageError."""
        ...


FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, functools.partial)
"""What a state is called as; a model is often callable too, and is a value."""


def called(state: Any) -> Any:
    """Return ``state``, or what it returns when it is a function."""
    return state() if isinstance(state, FUNCTIONS) else state


def prepare(state: object, *, serializer: str, copy: bool = False) -> Prepared:
    """Return ``state`` ready to be written by ``serializer`` (safe or cloudpickle).

    With ``copy`` it may be changed afterwards, and written by another thread: then it is copied once, here. Raises
    NotStorable where the serializer can tell already.
    """
    if serializer == "safe":
        return _Safe(state, copy=copy)
    if serializer == "cloudpickle":
        return _Pickle(state, copy=copy)
    raise InvalidInput(f"serializer is {serializer!r}; allowed are safe and cloudpickle")


def write_state(state: object, folder: Path, *, serializer: str) -> list[FileEntry]:
    """Write ``state`` into the existing ``folder`` by ``serializer`` (safe or cloudpickle), every file fsynced.

    Raises NotStorable, before anything is written where the serializer can tell, and StorageError.
    """
    return prepare(state, serializer=serializer).write(folder)


def read_state(folder: Path, manifest: Manifest, *, mmap: bool = False) -> object:
    """Return the state, or ``folder`` itself when it holds the user's own files; verified while it is read.

    With ``mmap`` large arrays and tensors of the safe serializer are not copied into memory but mapped: verified once, read
    again from the disk when memory is short, and to be changed freely, which never reaches the file. The files may be
    deleted meanwhile, not shortened. Raises CheckpointCorrupt naming the file and what differs, NewerFormat, and
    MissingLibrary for tensors where PyTorch is not installed. Executes no pickle unless the manifest says cloudpickle.
    """
    if manifest.serializer == "directory":
        verify_files(folder, manifest)
        return folder
    check_names(folder, manifest)
    entries = {entry.name: entry for entry in manifest.files}
    names = set(entries)
    if manifest.serializer == "cloudpickle" and names == {PICKLE}:
        return _read_pickle(folder, entries[PICKLE])
    if manifest.serializer == "safe" and {STATE} <= names <= {STATE, ARRAYS, TENSORS}:
        return _read_safe(folder, entries[STATE], entries.get(ARRAYS), entries.get(TENSORS), mapped=mmap)
    raise CheckpointCorrupt(f"{folder} lists {sorted(names)}, which the serializer {manifest.serializer} does not write")


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Read every file of the checkpoint; CheckpointCorrupt when one is missing, too many, or differs."""
    check_names(folder, manifest)
    for entry in manifest.files:
        with Source(folder, entry):
            pass  # leaving the block reads the rest and compares


def check_names(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointCorrupt when ``folder`` holds what the manifest does not list; hidden files are let be."""
    listed = {entry.name for entry in manifest.files} | {MANIFEST}
    with storage_errors(f"list {folder}"):
        for name in _walk(folder):
            if name not in listed and not any(part.startswith(".") for part in name.split("/")):
                raise CheckpointCorrupt(f"{folder / name} is not in the manifest")


def ingest_directory(source: Path, folder: Path) -> list[FileEntry]:
    """Copy the regular files below ``source`` into the existing ``folder``, with digests, all of it fsynced.

    Links to files are followed. NotStorable for anything that is neither file nor folder, and for names that cannot
    stand in a manifest; then nothing was copied. Empty folders are not kept.
    """
    with _given(f"read {source}"):
        if not source.is_dir():
            raise NotStorable(f"{source} is no folder; directory takes a folder of files")
        names = [_checked(source, name, follow=True) for name in _walk(source)]
    made = sorted({parent for name in names for parent in _parents(name)})
    with storage_errors(f"write below {folder}"):
        for name in made:
            os.mkdir(folder / name)
    entries = [_copy(source, folder, name) for name in names]
    with storage_errors(f"fsync {folder}"):
        for name in reversed(made):
            fsync_folder(folder / name)
    return entries


def hash_directory(folder: Path) -> list[FileEntry]:
    """Digest and fsync the files that were written into ``folder`` in place, and fsync the folders among them.

    NotStorable for anything that is neither file nor folder: a link would leave the checkpoint. The folder itself may have
    been removed or replaced since it was staged.
    """
    with _given(f"read {folder}"):
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise NotStorable(
                f"{folder} was staged as a folder, and is none any more; write into it, and leave it in its place"
            )
        names = [_checked(folder, name, follow=False) for name in _walk(folder)]
    entries = [_hash(folder, name) for name in names]
    with _given(f"fsync {folder}"):
        for parent in sorted({parent for name in names for parent in _parents(name)}, reverse=True):
            fsync_folder(folder / parent)
    return entries


class _Safe:
    serializer: Literal["safe", "cloudpickle"] = "safe"

    def __init__(self, state: object, *, copy: bool) -> None:
        encoder = Encoder(copy=copy)
        self._document: dict[str, Any] = {"format": STATE_FORMAT, "state": encoder.encode(state)}
        self._buffers = encoder.buffers
        self._tensors = encoder.tensors

    def write(self, folder: Path) -> list[FileEntry]:
        document, buffers = self._document, self._buffers
        entries: list[FileEntry] = []
        if sum(piece.size for piece in buffers) <= INLINE:
            document["inline"] = [base64.b64encode(piece.memory()).decode() for piece in buffers]
        else:
            document["sizes"] = [piece.size for piece in buffers]
            with Sink(folder, ARRAYS) as sink:
                for piece in buffers:
                    if gap := -sink.size % ALIGN:
                        sink.write(bytes(gap))
                    sink.write(piece.memory())
            entries.append(sink.entry())
        # as ASCII: a file of it survives any editor; unsorted: a dict keeps its order
        text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
        with Sink(folder, STATE) as sink:
            sink.write(text)
        entries.append(sink.entry())
        if self._tensors is not None:
            entries.append(self._tensors.write(folder))
        return entries


def _read_safe(folder: Path, state: FileEntry, arrays: FileEntry | None, tensors: FileEntry | None, *, mapped: bool) -> object:
    with Source(folder, state) as source:
        data = source.read()
    reading = state
    try:
        document = json.loads(data)
        version = document["format"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format {version!r}")
        if version > STATE_FORMAT:
            raise NewerFormat(
                f"{folder / STATE} has format {version}, and this holdfast reads up to {STATE_FORMAT}:"
                " update holdfast to load it"
            )
        found = None
        if tensors is not None:
            reading = tensors
            with Source(folder, tensors) as source:
                found = TensorReader(source, mapped=mapped)
        reading = state
        if arrays is None:
            return Decoder(_Inline(document["inline"]), found).decode(document["state"])
        with Source(folder, arrays) as source:
            sizes = document["sizes"]
            buffers: _Filed = _Mapped(source.map(), sizes) if mapped else _Packed(source, sizes)
            value = Decoder(buffers, found).decode(document["state"])
            buffers.finish()
        return value
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        if isinstance(error, HoldfastError):
            raise
        raise CheckpointCorrupt(f"{folder / reading.name} makes no sense: {error}") from error


class _Inline(Buffers):
    """Buffers that stand in the JSON."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def take(self, index: int) -> bytes:
        return base64.b64decode(self._texts[index], validate=True)

    def fill(self, index: int, view: memoryview) -> None:
        data = self.take(index)
        if len(data) != len(view):
            raise ValueError(f"buffer {index} has {len(data)} bytes, {len(view)} are needed")
        view[:] = data

    def map(self, index: int, size: int) -> memoryview | None:
        return None


class _Filed(Buffers):
    """Buffers that stand in a file of their own, one behind the other."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._next = 0
        self._end = 0

    def _place(self, index: int, size: int) -> tuple[int, int]:
        """Return the bytes to leave out before the next buffer, and where it begins; ValueError when it is another."""
        if index != self._next or self._sizes[index] != size:
            raise ValueError(f"buffer {index} of {size} bytes is not the next")
        gap = -self._end % ALIGN
        start = self._end + gap
        self._next, self._end = index + 1, start + size
        return gap, start

    def finish(self) -> None:
        """Have every buffer where it was asked for."""


class _Packed(_Filed):
    """Buffers that are read straight into their arrays, as many at once as can be."""

    def __init__(self, source: Source, sizes: list[int]) -> None:
        super().__init__(sizes)
        self._source = source
        self._waiting: list[memoryview] = []

    def take(self, index: int) -> bytes:
        data = bytearray(self._sizes[index])
        self.fill(index, memoryview(data))
        self.finish()
        return bytes(data)

    def fill(self, index: int, view: memoryview) -> None:
        gap, _ = self._place(index, len(view))
        self._waiting += [memoryview(bytearray(gap)), view]

    def map(self, index: int, size: int) -> memoryview | None:
        return None

    def finish(self) -> None:
        self._source.readinto(*self._waiting)
        self._waiting.clear()


class _Mapped(_Filed):
    """Buffers that stand in mapped memory."""

    def __init__(self, memory: memoryview, sizes: list[int]) -> None:
        super().__init__(sizes)
        self._memory = memory

    def take(self, index: int) -> bytes:
        return bytes(self.map(index, self._sizes[index]))

    def fill(self, index: int, view: memoryview) -> None:
        view[:] = self.map(index, len(view))

    def map(self, index: int, size: int) -> memoryview:
        _, start = self._place(index, size)
        if start + size > len(self._memory):
            raise ValueError(f"buffer {index} ends behind the file")
        return self._memory[start : start + size]


class _Pickle:
    serializer: Literal["safe", "cloudpickle"] = "cloudpickle"

    def __init__(self, state: object, *, copy: bool) -> None:
        self._state = state
        self._data: bytes | None = None
        if copy:
            stream = io.BytesIO()
            self._dump(stream)
            self._data = stream.getvalue()

    def write(self, folder: Path) -> list[FileEntry]:
        with Sink(folder, PICKLE) as sink:
            if self._data is None:
                self._dump(sink)
            else:
                sink.write(self._data)
        return [sink.entry()]

    def _dump(self, stream: Any) -> None:
        import cloudpickle

        try:
            cloudpickle.dump(self._state, stream, protocol=5)
        except HoldfastError:
            raise
        except Exception as error:  # __reduce__ and __getstate__ are the user's code
            path, value = _unpicklable(self._state)
            raise NotStorable(f"state{path}: {class_name(value)} cannot be pickled: {error}") from error


def _unpicklable(value: Any) -> tuple[str, Any]:
    """Return the innermost part of ``value`` that cannot be pickled, and its path, as far as one leads there."""
    path = ""
    for _ in range(MAX_DEPTH):
        inner = next(((name, part) for name, part in parts(value) if not _pickles(part)), None)
        if inner is None:
            break
        path, value = path + inner[0], inner[1]
    return path, value


def _pickles(value: object) -> bool:
    import cloudpickle

    try:
        cloudpickle.dump(value, _Nowhere(), protocol=5)
    except Exception:  # noqa: BLE001  # __reduce__ and __getstate__ are the user's code
        return False
    return True


class _Nowhere:
    def write(self, data: Any) -> int:
        return memoryview(data).nbytes


def _read_pickle(folder: Path, entry: FileEntry) -> object:
    import pickle

    with Source(folder, entry) as source:
        data = source.read()
    try:
        return pickle.loads(data)  # only after its digest was compared
    except Exception as error:
        error.add_note(f"while loading {folder / entry.name}: is the code that the state was saved with still there?")
        raise


def _walk(folder: Path, prefix: str = "") -> Iterator[str]:
    """Yield whatever is no folder below ``folder``, by relative posix path, in order of name."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name


def _checked(folder: Path, name: str, *, follow: bool) -> str:
    if fault := name_fault(name):
        raise NotStorable(f"{str(folder / name)!r} cannot be stored: its name {fault}")
    try:
        mode = os.stat(folder / name, follow_symlinks=follow).st_mode
    except FileNotFoundError:
        raise NotStorable(f"{folder / name} is a link to nothing, or vanished") from None
    if not stat.S_ISREG(mode):
        allowed = "files, folders and links to files" if follow else "files and folders"
        raise NotStorable(f"{folder / name} is no regular file; a checkpoint holds {allowed}")
    return name


def _parents(name: str) -> list[str]:
    """Return the folders that ``name`` lies in, outermost first."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[: end + 1]) for end in range(len(parts))]


def _copy(source: Path, folder: Path, name: str) -> FileEntry:
    with _given(f"read {source / name}"), open(source / name, "rb", buffering=0) as file, Sink(folder, name) as sink:
        while chunk := file.read(CHUNK):
            sink.write(chunk)
    return sink.entry()


def _hash(folder: Path, name: str) -> FileEntry:
    seen = xxhash.xxh3_128()
    size = 0
    with _given(f"read {folder / name}"), open(folder / name, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            seen.update(chunk)
            size += len(chunk)
        os.fsync(file.fileno())
    return FileEntry(name=name, size=size, digest=seen.hexdigest())


_GIVERS_FAULT = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENXIO,
)


@contextlib.contextmanager
def _given(doing: str) -> Iterator[None]:
    """Turn an OSError about files that somebody handed over into NotStorable where it says that they are at fault.

    Any other, as when the disk fails or is full, is a StorageError: that one is about the storage, and stops a search.
    """
    with storage_errors(doing):
        try:
            yield
        except HoldfastError:
            raise
        except OSError as error:
            if error.errno not in _GIVERS_FAULT:
                raise
            where = "" if error.filename is None or str(error.filename) in doing else f" ({error.filename})"
            raise NotStorable(
                f"cannot {doing}: {error.strerror}{where}; a checkpoint is made of files that are there and can be read"
            ) from error
