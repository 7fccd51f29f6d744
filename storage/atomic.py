"""Files that appear whole or not at all, and stay."""

from __future__ import annotations

import errno
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from holdfast.core.errors import StorageError

_DRAFT = re.compile(r"\.holdfast-draft-[0-9a-f]{16}")


def is_draft(name: str) -> bool:
    """Tell whether a file of this name is one that a crash cut off while it was written."""
    return _DRAFT.fullmatch(name) is not None


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create ``folder`` and what is missing above it, durably."""
    part = folder
    try:
        missing = []
        for part in (folder, *folder.parents):
            if part.exists():
                break
            missing.append(part)
        for part in reversed(missing):
            part.mkdir(exist_ok=True)
            sync_folder(part.parent)
    except OSError as error:
        raise storage_error(error, part) from error


def write_file(file: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace ``file`` with ``content`` atomically; StorageError leaves the old file and no temporary one."""
    draft = file.parent / f".holdfast-draft-{secrets.token_hex(8)}"
    try:
        try:
            with draft.open("xb") as stream:
                stream.write(content)
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            os.replace(draft, file)
        except BaseException:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(file.parent)
    except OSError as error:
        raise storage_error(error, file) from error


def storage_error(error: OSError, path: Path) -> StorageError:
    """Return the StorageError for what the operating system answered at ``path``."""
    return StorageError(f"{path}: {error.strerror or error}; free space or fix the permissions, then restore")
