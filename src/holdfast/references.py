"""References to what is saved elsewhere: ``block:NAME`` where a location, a database or a spec may stand.

Nothing here knows who has saved it: whoever can look it up says so with :func:`use`, and is asked when a reference is met.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from holdfast.core.errors import SpecError
from holdfast.storage.root import absolute, join

PREFIX = "block:"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A saved spec."""

    data: Mapping[str, Any] = field(repr=False)
    workdir: str | None = None
    """where its trainable is imported from"""


class Blocks(Protocol):
    """Looks blocks up. SpecError for one that is not there, EngineError where nobody can be asked."""

    def storage(self, name: str) -> tuple[str, dict[str, Any]]:
        """Return the location of a storage, and its options, credentials included."""

    def database(self, name: str) -> str:
        """Return the URL of a database, with its password."""

    def spec(self, name: str) -> Saved:
        """Return a saved spec."""


_lookup: dict[str, Callable[[], Blocks]] = {}
"""who can be asked, once somebody has said so"""
_locations: dict[str, str] = {}
"""the reference that each location was found by in this process: what people are told"""
_databases: dict[str, str] = {}
"""the same by the URLs of databases, as they may be shown"""


def use(load: Callable[[], Blocks]) -> None:
    """Look references up with what ``load`` returns, which is called when there is one to be looked up."""
    _lookup["load"] = load


def is_reference(given: object) -> bool:
    """Tell whether something given is a reference."""
    return isinstance(given, (str, Path)) and str(given).startswith(PREFIX)


def place(location: str | Path, options: Mapping[str, Any] | None = None) -> tuple[str | Path, Mapping[str, Any] | None]:
    """Return a location and its storage options; a reference's own are returned with ``options`` over them.

    What is no reference comes back as it is. Raises SpecError for a reference that names nothing.
    """
    if not is_reference(location):
        return location, options
    given = str(location)
    name, _, below = given.removeprefix(PREFIX).partition("/")
    parts = [part for part in below.split("/") if part]
    if "\0" in below or any(part in (".", "..") for part in parts):
        raise SpecError(f"{given!r} leads out of the storage that it names; write block:NAME or block:NAME/EXPERIMENT")
    found, own = _blocks().storage(_checked(name, given))
    found = absolute(found)
    _locations[found] = f"{PREFIX}{name}"
    for part in parts:
        found = join(found, part)
    return found, {**own, **(options or {})} or None


def database(url: str | None) -> str | None:
    """Return the URL of a database, where a reference may stand for it."""
    if url is None or not is_reference(url):
        return url
    from holdfast.storage.database.engine import parse_url, shown

    found = _blocks().database(_checked(url.removeprefix(PREFIX), url))
    _databases[shown(parse_url(found).render_as_string(hide_password=False))] = url
    return found


def saved_spec(reference: str) -> Saved:
    """Return the spec that a reference names."""
    return _blocks().spec(_checked(reference.removeprefix(PREFIX), reference))


def name_of_location(location: str) -> str:
    """Return a location as people reach it from here: by the reference that it was found by, if it was."""
    for place, reference in _locations.items():
        if location == place or location.startswith(place.rstrip("/") + "/"):
            return reference + location[len(place.rstrip("/")) :]
    return location


def name_of_database(label: str) -> str:
    """Return the reference by which a database was found, or what it is shown as otherwise."""
    return _databases.get(label, label)


def _checked(name: str, given: str) -> str:
    if not _NAME.fullmatch(name):
        raise SpecError(f"{given!r} names no block; a block's name has small letters, digits and dashes: write block:NAME")
    return name


def _blocks() -> Blocks:
    load = _lookup.get("load")
    if load is None:
        raise SpecError("nothing here can look up a block; name the folder or the URL itself")
    return load()
