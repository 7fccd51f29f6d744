"""Garbage of every experiment of storages, one after the other. Nothing here imports Prefect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from holdfast import standing
from holdfast.core.errors import LeaseHeld
from holdfast.flows.abandoned import Places, paths_of, said
from holdfast.locate import Opened, folder_at, open_path
from holdfast.report.tables import size
from holdfast.storage.database import requests
from holdfast.storage.database.reads import Reader
from holdfast.storage.root import name_of
from holdfast.upkeep import collect, driven, verify

DRIVEN = "driven"
LEFT = "left alone"
CLEAN = "nothing to do"
COLLECTED = "collected"
WOULD = "would be collected"
BROKEN = "cannot be collected"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What became of the garbage of one experiment."""

    path: str
    name: str
    outcome: str
    why: str = ""
    removed: int = 0
    bytes: int = 0
    left: int = 0
    """what could not be removed"""
    corrupt: int = 0
    """checkpoints that were found damaged, or gone"""

    @property
    def line(self) -> str:
        """What a log says of it."""
        words = [self.outcome]
        if self.removed:
            words.append(f"{self.removed} removed, {size(self.bytes)}")
        if self.left:
            words.append(f"{self.left} could not be removed")
        if self.corrupt:
            words.append(f"{self.corrupt} checkpoint{'s' if self.corrupt > 1 else ''} damaged or gone")
        if self.why:
            words.append(self.why)
        return f"{self.name}: {'; '.join(words)}"


def collect_all(
    places: Places, say: Callable[[str], None], *, verified: bool = False, dry_run: bool = False
) -> Iterator[Found]:
    """Yield what became of each experiment: one that is broken stops no other; one that is driven is not written to.

    ``verified``: each checkpoint is read, and damaged ones are marked so that nothing continues from them; ``dry_run``: nothing
    is written, it is only told what would go.
    """
    for path, why in paths_of(places):
        start = Found(path=path, name=name_of(path), outcome=BROKEN)
        try:
            yield replace(start, why=why) if why is not None else _one(start, places, say, verified, dry_run)
        except LeaseHeld as error:
            yield replace(start, outcome=DRIVEN, why=str(error))
        except Exception as error:  # noqa: BLE001  # rows that nobody can read, say: the others are looked after all the same
            yield replace(start, why=said(error))


def _one(start: Found, places: Places, say: Callable[[str], None], verified: bool, dry_run: bool) -> Found:
    options = places.options_of(start.path)
    folder = folder_at(start.path, options)
    original = standing.original_of(folder, folder.identity(), options)
    if original is not None:
        return replace(start, outcome=LEFT, why=f"a copy of {original.location} that nobody drove")
    # Looked at first: what has nothing to do is not opened for writing.
    with closing(open_path(start.path, database=places.database, readonly=True, options=options)) as opened:
        start = replace(start, name=opened.record.name)
        if driven(opened):
            return replace(start, outcome=DRIVEN)
        bad = _bad(opened) if verified else []
        found = collect(opened, dry_run=True, say=say)
    if not dry_run and (found.removed or found.missing or found.good or bad):
        with closing(open_path(start.path, database=places.database, options=options)) as opened:
            if bad:
                requests.quarantine(opened.database, opened.record.id, bad)
            found = collect(opened, say=say)
    outcome = (WOULD if dry_run else COLLECTED) if found.removed else CLEAN
    damaged = {item.path for item, _ in [*bad, *found.missing]}
    return replace(
        start,
        outcome=outcome,
        removed=len(found.removed),
        bytes=found.bytes,
        left=len(found.left),
        corrupt=len(damaged),
    )


def _bad(opened: Opened) -> list[Any]:
    """Read every checkpoint that counts; return those that are damaged, with the reason."""
    rows = Reader(opened.database, opened.record.id).checkpoints()
    return verify(opened, rows).bad


def summary(found: list[Found], *, dry_run: bool) -> dict[str, Any]:
    """Return what became of all of them, as JSON values."""
    counts: dict[str, int] = {}
    for one in found:
        counts[one.outcome] = counts.get(one.outcome, 0) + 1
    return {
        "found": len(found),
        "counts": counts,
        "dry_run": dry_run,
        "removed": sum(one.removed for one in found),
        "bytes": sum(one.bytes for one in found),
        "experiments": [asdict(one) for one in found],
    }


def is_trouble(one: Found) -> bool:
    """Tell whether a person has to see to it."""
    return one.outcome == BROKEN or bool(one.left or one.corrupt)
