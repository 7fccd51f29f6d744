"""Code for workers on other machines: packed before anything is written, in the path before the first task. No Prefect here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from holdfast import references
from holdfast.core.spec import ExperimentSpec
from holdfast.flows.session import Session
from holdfast.locate import database_url
from holdfast.report.observer import Observer
from holdfast.storage.code import SHIPPED, Packed, keep, pack
from holdfast.storage.database.engine import connect
from holdfast.storage.root import absolute


class Shipped(TypedDict):
    """What a ``Place`` says of code."""

    code: str | None
    trainable: str
    workdir: str


def packed_of(spec: ExperimentSpec, workdir: str) -> Packed | None:
    """Return the code that travels to the spec's workers, None where trials run on this machine; SpecError when it cannot."""
    execution = spec.execution
    if not execution.is_remote:
        return None
    location, _ = references.place(spec.storage, spec.storage_options)
    database = connect(database_url(absolute(str(location)), spec.database))
    files = [] if database.file is None else [database.file]
    database.close()
    return pack(Path(workdir), execution.ship, spec.trainable, without=files)


def ship(session: Session, observer: Observer) -> None:
    """Have the session's code in the path, and note it in the audit; say so when it is not what the drive before had.

    Nothing is done for trials on this machine, nor when the drive goes on in another flow run: its code was kept, and is not
    in memory any more. The lease is held; the journal tells of it before a task is submitted.
    """
    packed = session.packed
    if packed is None or session.runs > 0:
        return
    before = next((row.detail["digest"] for row in reversed(session.reader.audit()) if row.action == SHIPPED), packed.digest)
    keep(session.opened.folder, packed)
    detail = {"digest": packed.digest, "trainable": packed.trainable, "files": packed.files, "bytes": packed.bytes}
    session.driver.audit(SHIPPED, detail)
    if before != packed.digest:
        then, now = before or "nothing", packed.digest or "nothing"
        observer.say(f"the code that travels to workers has changed since the last drive: {then} was shipped, now {now} is")
    session.packed = replace(packed, body=b"")


def shipped(session: Session) -> Shipped:
    """Return what the workers are told of the session's code."""
    packed, workdir = session.packed, session.opened.record.workdir
    trainable = session.spec.trainable if packed is None else packed.trainable
    return Shipped(code=None if packed is None else packed.digest, trainable=trainable, workdir=workdir)
