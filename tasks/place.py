"""What a worker on any machine needs to find an experiment and to run one of its attempts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.core.errors import NotStorable
from holdfast.core.values import plain


@dataclass(frozen=True, kw_only=True)
class Place:
    """An experiment as one drive shows it to its workers. Travels with each task, never into a row, a log or an artifact."""

    uuid: str
    name: str
    experiment: int
    """row id"""
    epoch: int
    location: str
    """of the experiment's folder: a path of this machine, or a URL"""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """of the object store; may hold credentials"""
    database: str = field(repr=False)
    """URL of the experiment store; may hold a password"""
    workdir: str
    """the working directory of the search, where a worker runs attempts if nothing was shipped and it is there"""
    code: str | None = None
    """digest of the shipped code (``storage.code``)"""
    trainable: str
    """as a spec names it; a file is relative to the shipped code's folder where code was shipped"""
    host: str
    """``tasks.workers.processes.same_host()`` of the driver: SQLite and local paths are good there alone"""
    versions: Mapping[str, str] = field(default_factory=dict)
    """of Python and packages at the driver, by name"""
    references: Mapping[str, Any] | None = field(default=None, repr=False)
    """what trials are handed in this drive; None: what the stored spec names; may hold credentials"""
    slots: int = 1
    """how many attempts one worker process runs at once, at most"""


def own_references(given: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the references of a drive as a place has them: None when the stored spec names the same, as JSON."""
    try:
        if json.dumps(plain(given), sort_keys=True) == json.dumps(plain(stored), sort_keys=True):
            return None
    except NotStorable:
        pass  # the stored ones are JSON
    return dict(given)
