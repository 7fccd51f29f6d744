"""Small conversions between rows and values, shared by every part of the store."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from holdfast.core.checkpoint import Checkpoint, CheckpointStatus, eligible
from holdfast.core.errors import InvalidInput, NotStorable
from holdfast.core.trial import Attempt
from holdfast.core.values import Metrics, plain, plain_metrics, to_row
from holdfast.storage.database import statements as sql
from holdfast.storage.database.engine import Transaction

FINAL_STEP = -1
"""The step under which an attempt's final record is kept."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def micros(moment: datetime) -> int:
    """Return ``moment`` as microseconds since 1970 UTC; a naive time is refused, because it names no moment."""
    if moment.tzinfo is None:
        raise InvalidInput(f"time {moment.isoformat()} has no time zone; add one, such as datetime.now(timezone.utc)")
    return (moment - _EPOCH) // _MICROSECOND


def moment(value: int | None) -> datetime | None:
    """Return the aware UTC time that ``micros`` wrote."""
    return None if value is None else _EPOCH + timedelta(0, 0, value)


def now() -> int:
    """Return the present as microseconds since 1970 UTC."""
    return micros(datetime.now(UTC))


def storable(text: str | None) -> str | None:
    """Return ``text`` as every database takes it: what is no Unicode (undecodable file names) and NUL are escaped."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def typed(name: str, value: object) -> dict[str, object]:
    """Return the columns of one named value; NotStorable when it is none that can be stored."""
    if storable(name) != name:
        raise NotStorable(f"metrics has the key {name!r}; keys must be Unicode text without NUL")
    kind, number, text = to_row(plain(value, f"metrics[{name!r}]"))
    if text is not None and storable(text) != text:
        # JSON can spell what the text column cannot hold.
        kind, text = "json", json.dumps(value if kind == "str" else json.loads(text))
    return {"name": name, "kind": kind, "number": number, "text": text}


def add_metrics(tx: Transaction, report: int, metrics: Metrics) -> None:
    """Write the values of one report."""
    tx.many(sql.ADD_METRIC, [{"report": report, **typed(name, value)} for name, value in plain_metrics(metrics).items()])


def attempts_of(tx: Transaction, trial: int) -> tuple[dict[int, Attempt], dict[int, int]]:
    """Return a trial's attempts by number (their links only), and their row ids by number."""
    rows = tx.run(sql.ATTEMPTS_OF, trial=trial)
    attempts = {row[1]: Attempt(id=row[0], number=row[1], parent=row[2], parent_step=row[3]) for row in rows}
    return attempts, {row[1]: row[0] for row in rows}


def checkpoints_of(tx: Transaction, trial: int, number: int = 0) -> list[Checkpoint]:
    """Return a trial's checkpoints by attempt and step, without their metrics."""
    return [to_checkpoint(number, row) for row in tx.run(sql.CHECKPOINTS_OF, trial=trial)]


def to_checkpoint(trial: int, row: tuple[Any, ...], metrics: Metrics | None = None) -> Checkpoint:
    """Build a checkpoint from (id, attempt, step, path, digest, bytes, status, reason, pinned)."""
    return Checkpoint(
        id=row[0],
        trial=trial,
        attempt=row[1],
        step=row[2],
        path=row[3],
        digest=row[4],
        bytes=row[5],
        status=CheckpointStatus(row[6]),
        reason=row[7],
        pinned=bool(row[8] & 1),
        lent=bool(row[8] & 2),
        metrics=metrics or {},
    )


def newest(tx: Transaction, trial: int, current: int) -> tuple[int, int] | None:
    """Return (attempt row id, step) of the checkpoint that a successor of attempt ``current`` resumes from."""
    attempts, _ = attempts_of(tx, trial)
    found = eligible(current, attempts, checkpoints_of(tx, trial), borrowed_of(tx, trial))
    return place_of(tx, found[0]) if found else None


def place_of(tx: Transaction, checkpoint: Checkpoint) -> tuple[int, int]:
    """Return (attempt row id, step) of a checkpoint, whosever it is."""
    return int(tx.run(sql.OWNER_OF, checkpoint=checkpoint.id)[0][0]), checkpoint.step


def borrowed_of(tx: Transaction, trial: int) -> dict[int, Checkpoint]:
    """Return the other trials' checkpoints that attempts of a trial (row id) go on from, by the number of the attempt."""
    return {row[0]: to_checkpoint(row[1], row[2:]) for row in tx.run(sql.BORROWED_OF, trial=trial)}
