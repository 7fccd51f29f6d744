"""One experiment's rows in one file: to carry them from a database into another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from holdfast.core.errors import Conflict, Corrupt, InvalidInput
from holdfast.locate import Opened, database_url
from holdfast.storage import journal
from holdfast.storage.atomic import write_file
from holdfast.storage.database import rebuild
from holdfast.storage.database.experiments import Record, by_uuid, open_database
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.folder import Identity
from holdfast.storage.root import DAMAGE, parent_of

_KIND = "holdfast experiment"


def export(opened: Opened, file: Path) -> int:
    """Write the rows of an experiment into ``file``, whole or not at all; return how many trials it holds.

    The experiment may be driven meanwhile: the file holds one state of it. Checkpoints and results stay where they are.
    """
    batch = Outbox(opened.database, opened.record.id)(-1)
    identity = replace(opened.folder.identity(), location=opened.folder.location)
    header = {"kind": _KIND, "format": journal.FORMAT, "epoch": opened.record.epoch, "identity": vars(identity)}
    write_file(file, json.dumps(header).encode() + b"\n" + journal.to_line(batch))
    return sum(row[0] >= 0 for row in batch.rows["trial"])


def take_in(file: Path, database: str | None = None) -> tuple[Record, str, int]:
    """Write the rows in ``file`` into a database; return the experiment's record, the database's label, and how many trials.

    ``database`` is a URL; else it is the default one of the storage that the experiment was exported from. InvalidInput when
    the file is none that :func:`export` wrote, Corrupt when it is damaged, Conflict when the database has the experiment
    already, ExperimentExists when its name is taken; nothing is changed then.
    """
    identity, epoch, contents = _read(file)
    target = open_database(database_url(parent_of(identity.location), database), create_missing=True)
    try:
        if by_uuid(target, identity.uuid) is not None:
            raise Conflict(
                f"database {target.label} has the experiment {identity.name!r} ({identity.uuid}) already; nothing was changed"
            )
        detail = {"journal": contents.end, "seq": contents.end, "because": "imported", "location": identity.location}
        rebuild.rebuild(target, identity, contents, epoch=epoch, detail=detail)
        record = by_uuid(target, identity.uuid)
        assert record is not None  # written above
        return record, target.label, sum(number >= 0 for (number,) in contents.tables["trial"])
    finally:
        target.close()


def _read(file: Path) -> tuple[Identity, int, journal.Contents]:
    try:
        head, _, body = file.read_bytes().partition(b"\n")
    except OSError as error:
        raise InvalidInput(
            f"{file} cannot be read: {error.strerror or error}; name a file that `holdfast export` wrote"
        ) from error
    try:
        header = json.loads(head)
        if header["kind"] != _KIND:
            raise ValueError(header["kind"])
        identity, epoch, version = Identity(**header["identity"]), int(header["epoch"]), int(header["format"])
    except DAMAGE as error:
        raise InvalidInput(f"{file} is no exported experiment; name a file that `holdfast export` wrote") from error
    if version > journal.FORMAT:
        raise Corrupt(f"{file} has format {version}, this program reads {journal.FORMAT}; update holdfast")
    contents = journal.Contents(epoch=epoch)
    contents.apply(journal.from_line(body, str(file)))
    return identity, epoch, contents
