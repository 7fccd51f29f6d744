"""What a storage holds: the experiments in it, and those that its database knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.locate import database_url, folder_at
from holdfast.storage.database.experiments import every, open_database
from holdfast.storage.root import join, name_of


def experiments_of(storage: str, database: str | None, options: Mapping[str, Any] | None) -> dict[str, str | None]:
    """Return the paths of all experiments of a storage or a database, and the UUID of those that the database knows.

    Raises DatabaseError or Corrupt when the database is there and cannot be used.
    """
    inside = paths_in(storage, options)
    url = database_url(storage, database)
    found: dict[str, str | None] = {}
    if isinstance(url, str) or Path(str(url.database)).exists():
        with_database = open_database(url, readonly=True)
        for record in every(with_database):
            beside = join(storage, name_of(record.location))
            found[beside if beside in inside else record.location] = record.uuid
        with_database.close()
    return found | {path: found.get(path) for path in inside}


def paths_in(storage: str, options: Mapping[str, Any] | None) -> list[str]:
    """Return the paths of the experiments that lie in a storage, whatever its database says."""
    inside = [join(storage, name) for name in folder_at(storage, options).root.names()]
    return [path for path in inside if _may_be_one(path, options)]


def _may_be_one(path: str, options: Mapping[str, Any] | None) -> bool:
    try:
        return folder_at(path, options).exists()
    except OSError:
        return True  # who opens it is told why it cannot be read
