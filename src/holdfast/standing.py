"""Whether a path and a database tell the same story of an experiment, and what is done when they do not."""

from __future__ import annotations

import tempfile
import time
import uuid as uuids
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from holdfast.core.errors import Corrupt, HoldfastError
from holdfast.storage import journal, recovery
from holdfast.storage.checkpoints.ports import checkpoints_in
from holdfast.storage.database import rebuild
from holdfast.storage.database.engine import Database, sqlite_url
from holdfast.storage.database.experiments import Record, by_uuid, open_database
from holdfast.storage.folder import Folder, Identity, PathLease
from holdfast.storage.journal import Contents, Epoch
from holdfast.storage.root import is_url, join, name_of, parent_of


class Verdict(StrEnum):
    """What a database is to a path."""

    CURRENT = "current"
    """it holds all that the path tells, and perhaps more"""
    UNKNOWN = "unknown"
    """it does not have the experiment"""
    BEHIND = "behind"
    """the experiment went on with another database"""
    DIVERGED = "diverged"
    """both went on, each without the other"""


@dataclass(frozen=True, kw_only=True)
class Story:
    """What a database tells of an experiment, as far as it matters here."""

    epochs: Sequence[Epoch]
    seq: int
    touched: int
    """seq of the newest change of a trial"""
    copied_at: int | None
    """the journal's end when it was rebuilt from it; None once somebody drove with it"""


def judge(story: Story, path: Sequence[Epoch], end: int) -> Verdict:
    """Compare a database with a path whose journal reaches seq ``end`` (-1: there is none)."""
    mine = list(story.epochs)
    while mine and mine[-1] not in path and mine[-1].seq >= story.touched and not _is_prefix(path, mine):
        mine.pop()  # a lease that was taken, and nothing was done under it
    if not _is_prefix(mine, path):
        return Verdict.CURRENT if _is_prefix(path, mine) else Verdict.DIVERGED
    if len(mine) < len(path):
        return Verdict.BEHIND
    reached = story.seq if story.copied_at is None else story.copied_at
    return Verdict.CURRENT if end <= reached else Verdict.BEHIND


def _is_prefix(first: Sequence[Epoch], second: Sequence[Epoch]) -> bool:
    return list(second[: len(first)]) == list(first)


def own_lease(folder: Folder, identity: Identity) -> PathLease | None:
    """Return the path's lease unless it is an original's, whose copy this is; None where it is damaged, too."""
    try:
        lease = folder.lease()
    except Corrupt:
        return None  # whoever wants to take it is told
    return lease if lease is not None and lease.uuid in ("", identity.uuid) else None


def verdict(folder: Folder, identity: Identity, database: Database, record: Record) -> Verdict:
    """Tell what the database is to the path; reads the whole journal only where the newest epoch differs.

    The path is read before the database: whoever drives writes the database first, so one that goes on meanwhile is never
    behind what was read of its path.
    """
    lease = own_lease(folder, identity)
    newest = None if lease is None else Epoch(lease.epoch, lease.token, 0)
    try:
        end = journal.end(folder.root)
    except Corrupt:
        mine = _story(database, record)
        if _drove_last(mine, newest) and mine.copied_at is None:
            return Verdict.CURRENT  # it holds what the journal told; the next driver writes that anew
        raise
    story = _story(database, record)  # also where the path says nothing: rows that cannot be read are noticed
    if lease is None and end == -1:
        return Verdict.CURRENT
    if _drove_last(story, newest):
        return judge(story, story.epochs, end)
    path = _epochs(journal.read(folder.root), newest)
    return judge(_story(database, record), path, end)


def _drove_last(story: Story, newest: Epoch | None) -> bool:
    return newest is not None and bool(story.epochs) and story.epochs[-1] == newest


def _story(database: Database, record: Record) -> Story:
    """Read what the database tells now; the record may have been read before the path was."""
    now = by_uuid(database, record.uuid) or record
    return Story(
        epochs=rebuild.epochs(database, record.id),
        seq=now.seq,
        touched=rebuild.touched(database, record.id),
        copied_at=rebuild.copied_at(database, record.id),
    )


def driven_elsewhere(folder: Folder, database: Database, record: Record) -> str | None:
    """Return the database that the experiment is driven with now, as the path's lease says, if it is another one."""
    lease = own_lease(folder, Identity(**{**vars(folder.identity()), "uuid": record.uuid}))
    if lease is None or lease.holder is None or lease.expires < time.time():
        return None
    mine = rebuild.epochs(database, record.id)
    ours = bool(mine) and any(epoch == Epoch(lease.epoch, lease.token, 0) for epoch in mine[-1:])
    return None if ours and rebuild.copied_at(database, record.id) is None else lease.database


def _epochs(contents: Contents | None, newest: Epoch | None) -> list[Epoch]:
    """Return the epochs that a path tells of: the journal's, and the lease's if that was taken since."""
    rows = [] if contents is None else sorted(contents.tables["audit"].values(), key=lambda row: row["seq"])
    found = journal.lineage([(row["epoch"], row["seq"], row["detail"]) for row in rows])
    if newest is not None and (not found or newest.number > found[-1].number):
        found.append(newest)
    return found


def contents_of(folder: Folder, identity: Identity) -> Contents | None:
    """Return all that the path tells, or None when it tells nothing though there were trials."""
    contents = journal.read(folder.root)
    if contents is None:
        # Nobody has driven it since journals are written: then the description is all there is, or rows are lost.
        return None if folder.root.names("trials") else Contents(end=1)
    recovery.complete(contents, identity, folder, checkpoints_in(folder))
    return contents


@dataclass(frozen=True)
class Told:
    """All that a path tells of its experiment."""

    contents: Contents
    journal: int
    """the seq that the journal reached before it was read"""


def told(folder: Folder, identity: Identity, database: str) -> Told:
    """Read all that the path tells, for ``database`` (its label), which lacks it; Corrupt when rows are lost or damaged."""
    end = journal.end(folder.root)
    contents = contents_of(folder, identity)
    if contents is None:
        raise Corrupt(
            f"database {database} does not know the experiment in {folder.location} ({identity.uuid}), which has no "
            "journal to rebuild it from; name the database that it was made with by --database"
        )
    return Told(contents, end)


def bring(
    folder: Folder, identity: Identity, database: Database, why: Verdict, found: Told, before: Record | None
) -> tuple[Record, str]:
    """Write what the path told into the database, in place of what that has; return the record and words about it.

    ``before`` is what was judged: AlreadyClaimed when that is not what is there.
    """
    lease = own_lease(folder, identity)
    here = replace(identity, location=folder.location)
    contents = found.contents
    detail = {"journal": found.journal, "seq": contents.end, "because": why.value, "location": folder.location}
    judged = None if before is None else (before.seq, before.epoch)
    rebuild.rebuild(database, here, contents, epoch=0 if lease is None else lease.epoch, detail=detail, judged=judged)
    record = by_uuid(database, identity.uuid)
    assert record is not None  # written above
    trials = sum(number >= 0 for (number,) in contents.tables["trial"])
    reason = "did not know the experiment" if why is Verdict.UNKNOWN else "had an older state of the experiment"
    return record, f"database {database.label} {reason}: rebuilt from {folder.location}, {trials} trials"


def diverged(folder: Folder, identity: Identity, database: Database) -> Corrupt:
    """Return the error for a database and a path that went separate ways."""
    lease = own_lease(folder, identity)
    other = "" if lease is None else f" ({lease.database})"
    return Corrupt(
        f"database {database.label} and {folder.location} went separate ways: each holds work on experiment {identity.name!r} "
        f"that the other does not know, and nothing is mixed; name the database that drove it last{other} by --database, or "
        "one that does not know the experiment, which is then rebuilt from the path"
    )


def scratch() -> tuple[Database, tempfile.TemporaryDirectory[str]]:
    """Return an empty database that goes with its folder, to read an experiment in that nothing may be written for."""
    place = tempfile.TemporaryDirectory(prefix="holdfast-")
    return open_database(sqlite_url(Path(place.name) / "view.db"), create_missing=True), place


# Copies


def original_of(folder: Folder, identity: Identity, options: Mapping[str, Any] | None = None) -> Folder | None:
    """Return the folder that ``folder`` is a copy of, or None when it is the only one that can be seen.

    It is looked for where the experiment was last driven and, in case the whole storage was moved, beside the folder.
    """
    beside = join(parent_of(folder.location), name_of(identity.location))
    for location in (identity.location, beside):
        if location == folder.location or is_url(location) != is_url(folder.location):
            continue
        original = Folder.at(location, options=options, work=folder.path)
        with suppress(HoldfastError, OSError):
            same = folder.is_local and original.path.samefile(folder.path)
            if not same and original.identity().uuid == identity.uuid:
                return original
    return None


def adopt_copy(folder: Folder, identity: Identity, database: Database | None) -> Identity:
    """Give a copy an identity of its own, named after its folder; return it. The original is not touched."""
    with folder.root.exclusive():
        found = folder.identity()
        if found.uuid != identity.uuid:
            return found  # another process was faster
        own = replace(
            identity, uuid=str(uuids.uuid4()), location=folder.location, ancestors=[identity.uuid, *identity.ancestors]
        )
        base, count = name_of(folder.location), 1
        name = base
        while database is not None and rebuild.name_taken(database, name, identity.uuid if _is_own(database, folder) else ""):
            count += 1
            name = f"{base}-{count}"
        own = replace(own, name=name, spec={**own.spec, "name": name})
        folder.rewrite(own)
        return own


def _is_own(database: Database, folder: Folder) -> bool:
    """Tell whether a database lies in the folder's own storage: one that was copied along with it."""
    return database.file is not None and folder.is_local and database.file.parent == folder.path.parent


def follow_copy(folder: Folder, identity: Identity, database: Database) -> None:
    """Let the rows of a database that was copied along with the whole storage be the copy's."""
    if identity.ancestors and identity.forked_from == identity.ancestors[0]:
        return  # the rows are the original's, wherever that is now
    record = by_uuid(database, identity.ancestors[0]) if identity.ancestors else None
    if record is None or by_uuid(database, identity.uuid) is not None:
        return
    if _is_own(database, folder) and parent_of(record.location) != parent_of(folder.location):
        rebuild.rename(database, replace(identity, location=folder.location), record.uuid)
