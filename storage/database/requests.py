"""What people ask of an experiment while somebody else drives it: each has its place in the order, none needs the lease."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.core.errors import Conflict, ExperimentNotFound, InvalidInput
from holdfast.core.trial import ACTIVE, TrialStatus
from holdfast.core.values import Json
from holdfast.storage.database import statements as sql
from holdfast.storage.database.driver import add_audit
from holdfast.storage.database.engine import Database, Transaction
from holdfast.storage.database.losses import repeatable


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
