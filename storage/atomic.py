"""Files that appear whole or not at all, and stay."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from holdfast.core.errors import StorageError


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create ``folder`` and what is missing above it, durably."""
    missing = [folder, *folder.parents]
    missing = missing[: next((place for place, part in enumerate(missing) if part.exists()), len(missing))]
    for part in reversed(missing):
        try:
            part.mkdir(exist_ok=True)
        except OSError as error:
            raise storage_error(error, part) from error
        sync_folder(part.parent)


def write_file(file: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace ``file`` with ``content`` atomically; StorageError leaves the old file and no temporary one."""
    try:
        descriptor, draft = tempfile.mkstemp(dir=file.parent, prefix=".tmp-")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            os.replace(draft, file)
        except BaseException:
            os.unlink(draft)
            raise
        if durable:
            sync_folder(file.parent)
    except OSError as error:
        raise storage_error(error, file) from error


def storage_error(error: OSError, path: Path) -> StorageError:
    """Return the StorageError for what the operating system answered at ``path``."""
    return StorageError(f"{path}: {error.strerror or error}; free space or fix the permissions, then restore")
