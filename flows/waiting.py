"""A restore waits for the workers of drives before it: what they run was fenced off, and they still have to notice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from holdfast.flows.session import Session
from holdfast.holding import liveness
from holdfast.storage.database import workers
from holdfast.storage.database.workers import WorkerRow

SILENT_SECONDS = 30.0
"""Who has not been heard of for so long does not work any more."""
PAUSE_SECONDS = 0.25


def await_workers(session: Session, say: Callable[[str], None], *, pause: Callable[[float], None] = time.sleep) -> None:
    """Return once every worker of earlier drives has left, is a dead process of this host, or has been silent for 30 s.

    They hear within seconds that their drive is over. What ended the lease of this one meanwhile is raised.
    """
    said = False
    while waiting := _working(session):
        if not said:
            hosts = ", ".join(sorted({row.hostname for row in waiting}))
            say(
                f"waiting until {len(waiting)} {'worker' if len(waiting) == 1 else 'workers'} of the drive before ({hosts}) "
                f"have left, for {SILENT_SECONDS:g} s at most after their last sign of life; --force does not wait"
            )
            said = True
        pause(PAUSE_SECONDS)
        session.keeper.check()


def _working(session: Session) -> Sequence[WorkerRow]:
    rows = workers.every(session.opened.database, session.runtime.experiment, unsettled=True)
    return [row for row in rows if row.epoch < session.runtime.epoch and is_working(row)]


def is_working(row: WorkerRow) -> bool:
    """Tell whether a worker may still run something."""
    if row.left is not None or row.silent >= SILENT_SECONDS:
        return False
    return liveness({"host": row.host, "pid": row.pid, "started": row.started}) is not False
