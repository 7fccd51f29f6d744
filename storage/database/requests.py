"""What people ask of an experiment while somebody else drives it: each has its place in the order, none needs the lease."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from holdfast.core.checkpoint import Checkpoint, CheckpointStatus, check_step, eligible
from holdfast.core.errors import CheckpointNotFound, Conflict, ExperimentNotFound, InvalidInput
from holdfast.core.trial import ACTIVE, TrialStatus
from holdfast.core.values import Json
from holdfast.storage.database import statements as sql
from holdfast.storage.database.driver import add_audit
from holdfast.storage.database.engine import Database, Transaction
from holdfast.storage.database.losses import repeatable
from holdfast.storage.database.rows import attempts_of, checkpoints_of, storable


def begin_request(tx: Transaction, experiment: int) -> tuple[int, int]:
    """Take a place in the order of writes; return (seq, epoch). ExperimentNotFound when the experiment was deleted."""
    rows = tx.run(sql.REQUEST, experiment=experiment)
    if not rows:
        raise ExperimentNotFound("the experiment's row is gone from the database; it was deleted meanwhile")
    return int(rows[0][0]), int(rows[0][1])


@repeatable
def note(database: Database, experiment: int, action: str, detail: Mapping[str, Json]) -> None:
    """Add an audit row beside whoever drives."""
    with database.write() as tx:
        seq, epoch = begin_request(tx, experiment)
        add_audit(tx, experiment, seq, epoch, action, detail)


@repeatable
def request_stop(database: Database, experiment: int) -> None:
    """Ask the driver to save and stop every running trial and to end."""
    with database.write() as tx:
        seq, epoch = begin_request(tx, experiment)
        tx.run(sql.STOP, experiment=experiment)
        add_audit(tx, experiment, seq, epoch, "stop requested", {})


@repeatable
def request_cancel(database: Database, experiment: int, number: int) -> None:
    """Ask the driver to end one waiting or running trial; Conflict when it has ended already."""
    with database.write() as tx:
        seq, epoch = begin_request(tx, experiment)
        rows = tx.run(sql.TRIAL_STATUS, experiment=experiment, number=number)
        if not rows or number < 0:
            raise InvalidInput(f"there is no trial {number}; `holdfast trials` lists them")
        if TrialStatus(rows[0][0]) not in ACTIVE:
            raise Conflict(f"trial {number} is {rows[0][0]}; only waiting and running trials can be cancelled")
        tx.run(sql.CANCEL_TRIAL, experiment=experiment, number=number, seq=seq)
        add_audit(tx, experiment, seq, epoch, "cancel requested", {"trial": number})


@repeatable
def pin(database: Database, experiment: int, number: int, step: int, *, attempt: int | None = None, pinned: bool = True) -> int:
    """Pin a trial's checkpoint of a step, or take the pin away; return the number of the attempt that saved it.

    Without ``attempt`` it is the newest valid one of that step that counts. When this returns, no pruning takes a pinned one.
    InvalidInput when there is no such trial, CheckpointNotFound when there is no such checkpoint; nothing is written then.
    """
    check_step(step)
    with database.write() as tx:
        seq, epoch = begin_request(tx, experiment)
        chosen = _chosen(tx, experiment, number, step, attempt, pinned=pinned)
        if chosen.pinned is not pinned:
            tx.run(sql.PIN_CHECKPOINT, checkpoint=chosen.id, pinned=int(pinned), seq=seq)
            tx.run(sql.TOUCH_TRIAL, checkpoint=chosen.id, seq=seq)
            detail: dict[str, Json] = {"trial": number, "attempt": chosen.attempt, "step": step}
            add_audit(tx, experiment, seq, epoch, "pinned" if pinned else "unpinned", detail)
    return chosen.attempt


@repeatable
def to_pin(
    database: Database, experiment: int, number: int, step: int, *, attempt: int | None = None, pinned: bool = True
) -> Checkpoint:
    """Return the checkpoint that :func:`pin` would pin or let go now; raises as that does."""
    check_step(step)
    with database.write() as tx:
        return _chosen(tx, experiment, number, step, attempt, pinned=pinned)


def _chosen(tx: Transaction, experiment: int, number: int, step: int, attempt: int | None, *, pinned: bool) -> Checkpoint:
    rows = tx.run(sql.TRIAL_ROW, experiment=experiment, number=number)
    if not rows or number < 0:
        raise InvalidInput(f"there is no trial {number}; `holdfast trials` lists them")
    trial, current = rows[0]
    attempts, _ = attempts_of(tx, trial)
    found = checkpoints_of(tx, trial, number)
    on_chain = eligible(current, attempts, found)
    if attempt is not None:
        candidates = [item for item in found if item.attempt == attempt and (_is_valid(item) or (item.pinned and not pinned))]
    elif pinned:
        candidates = on_chain
    else:  # one that went off the chain, or bad, since it was pinned can be let go, too
        candidates = [*on_chain, *(item for item in reversed(found) if item.pinned)]
        candidates.sort(key=lambda item: not item.pinned)
    chosen = next((item for item in candidates if item.step == step), None)
    if chosen is None:
        raise CheckpointNotFound(_missing(number, step, attempt, on_chain if attempt is None else candidates))
    return chosen


def _is_valid(checkpoint: Checkpoint) -> bool:
    return checkpoint.status is CheckpointStatus.VALID


def _missing(number: int, step: int, attempt: int | None, others: Sequence[Checkpoint]) -> str:
    steps = ", ".join(str(each) for each in sorted({item.step for item in others})[-8:])
    whose = "" if attempt is None else f" by attempt {attempt}"
    return f"trial {number} has no valid checkpoint of step {step}{whose}; there are those of the steps {steps or 'none'}"


@repeatable
def quarantine(database: Database, experiment: int, bad: Sequence[tuple[Checkpoint, str]]) -> int:
    """Mark checkpoints that were found bad as corrupt, each with the reason; return how many were valid until now.

    What was pruned meanwhile is not bad, and stays deleted. Nothing continues from a corrupt one.
    """
    marked: list[Json] = []
    with database.write() as tx:
        seq, epoch = begin_request(tx, experiment)
        for item, reason in bad:
            place = {"number": item.trial, "attempt": item.attempt, "path": item.path}
            rows = tx.run(sql.QUARANTINE, experiment=experiment, seq=seq, reason=storable(reason), **place)
            for row in rows:
                tx.run(sql.TOUCH_TRIAL, checkpoint=row[0], seq=seq)
                marked.append(item.path)
        if marked:
            add_audit(tx, experiment, seq, epoch, "quarantined", {"checkpoints": marked[:100], "count": len(marked)})
    return len(marked)


@repeatable
def acquit(database: Database, experiment: int, good: Sequence[Checkpoint]) -> int:
    """Make corrupt checkpoints that were read and found good valid again; return how many were corrupt until now.

    What was removed meanwhile stays deleted. For who knows that nobody drives: a driver remembers what it rejected.
    """
    marked: list[Json] = []
    with database.write() as tx:
        seq, epoch = begin_request(tx, experiment)
        for item in good:
            place = {"number": item.trial, "attempt": item.attempt, "path": item.path}
            for row in tx.run(sql.ACQUIT, experiment=experiment, seq=seq, **place):
                tx.run(sql.TOUCH_TRIAL, checkpoint=row[0], seq=seq)
                marked.append(item.path)
        if marked:
            add_audit(tx, experiment, seq, epoch, "acquitted", {"checkpoints": marked[:100], "count": len(marked)})
    return len(marked)
