"""Which experiment, or spec, a delivery may name: what lies below the configured roots, and nothing else."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.storage.root import is_url

if TYPE_CHECKING:
    from holdfast.deployments.webhook.config import Root

LONGEST = 1024
"""Bytes of a name."""

LONGEST_PART = 255
"""Bytes of what stands between two slashes, as on most file systems."""

BLOCK = "block:"
_DECEPTIVE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def parts_below(name: str, root: str) -> list[str] | None:
    """Return the parts of ``name`` below ``root``; None for a name that is not certainly there.

    A name is relative to the root, or begins with it. No part of it is empty, ``.`` or ``..``, or begins with a dot; below a
    URL none has a character that could end the path there.
    """
    prefix = root.rstrip("/") + "/"
    if name.startswith(prefix):
        name = name[len(prefix) :]
    elif name.startswith(("/", BLOCK)) or is_url(name):
        return None
    parts = name.split("/")
    bad = ":?#%*[]" if is_url(root) else ""
    if any(len(part.encode(errors="replace")) > LONGEST_PART for part in parts):
        return None
    if any(not part.strip() or part.startswith((".", "~", "-")) or any(letter in bad for letter in part) for part in parts):
        return None
    return parts


def is_name(name: str) -> bool:
    """Tell whether a name is one that a file system, a log and a screen may get."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size <= LONGEST and "\\" not in name and all(unicodedata.category(one) not in _DECEPTIVE for one in name)


def local_below(root: str, parts: Iterable[str]) -> Path | None:
    """Return the path of ``parts`` below a local root unless symbolic links lead out of it; it need not exist."""
    path = Path(root, *parts)
    try:
        real, base = os.path.realpath(path), os.path.realpath(root)
    except (OSError, ValueError):
        return None
    return path if os.path.commonpath((real, base)) == base and real != base else None


def location_below(root: str, parts: Sequence[str]) -> str | None:
    """Return the location of ``parts`` below a root: a path, a URL, or ``block:NAME/PARTS``."""
    if is_url(root) or root.startswith(BLOCK):
        return "/".join((root.rstrip("/"), *parts))
    path = local_below(root, parts)
    return None if path is None else str(path)


def candidates(name: str, roots: Sequence[Root]) -> list[tuple[Root, str]]:
    """Return where an experiment of that name may be, in the order of the roots."""
    found: list[tuple[Root, str]] = []
    for root in roots if is_name(name) else ():
        parts = parts_below(name, root.location)
        location = None if parts is None else location_below(root.location, parts)
        if location is not None:
            found.append((root, location))
    return found


def spec_below(name: str, folders: Sequence[str]) -> str | None:
    """Return a spec file below the folders, or a ``block:NAME`` that stands among them; None for anything else."""
    for folder in folders if is_name(name) else ():
        if folder.startswith(BLOCK):
            if name == folder or (folder == BLOCK + "*" and is_block(name)):
                return name
            continue
        parts = parts_below(name, folder)
        path = None if parts is None else local_below(folder, parts)
        if path is not None and path.suffix in (".yaml", ".yml") and path.is_file():
            return str(path)
    return None


def is_block(name: str) -> bool:
    """Tell whether a name is ``block:`` and the name of a block: small letters, digits and dashes."""
    rest = name.removeprefix(BLOCK)
    return rest != name and 0 < len(rest) <= 100 and all(letter in "abcdefghijklmnopqrstuvwxyz0123456789-" for letter in rest)
