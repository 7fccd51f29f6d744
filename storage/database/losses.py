"""Lost connections to a server: what may be repeated, for how long, and what became of a commit whose answer was lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from holdfast.core.errors import OutcomeUnknown, RolledBack

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE_SECONDS = 20.0
"""How long a call is repeated while a server restarts; a lease that is not renewed for that long is given up."""

BUSY_SECONDS = 60.0
"""How long a writer waits for another process's transaction."""

IDLE_SECONDS = 30.0
"""After which a server ends the transaction of a process that says nothing: it is suspended, and its locks bar others."""

CONNECTING = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
    "fallback_application_name": "holdfast",
}
"""What a PostgreSQL URL may override: a server that vanished without a word is noticed within half a minute."""


class Patience:
    """Pauses between repetitions: the first is none, each is longer than the one before, and their sum is bounded."""

    def __init__(self, seconds: float = PATIENCE_SECONDS) -> None:
        self._deadline = time.monotonic() + seconds
        self._next = 0.0

    def pause(self, error: Exception) -> None:
        """Wait before the next repetition; raise ``error`` when there is to be none.

        A server that has been away for long enough is not waited for again by each call.
        """
        left = self._deadline - time.monotonic()
        if left <= 0 or getattr(error, "away", 0.0) > PATIENCE_SECONDS:
            raise error
        time.sleep(min(self._next, left))
        self._next = min(max(2 * self._next, 0.02), 1.0)


_repeating = threading.local()


def repeatable(call: Callable[P, T]) -> Callable[P, T]:
    """Repeat ``call`` for a bounded time while what it wrote is certainly undone (RolledBack, ConnectionLost).

    For functions that read, or that write in exactly one transaction: they begin afresh each time.
    """

    @wraps(call)
    def repeated(*arguments: P.args, **options: P.kwargs) -> T:
        if getattr(_repeating, "within", False):
            return call(*arguments, **options)  # whoever called it repeats the whole
        patience: Patience | None = None
        _repeating.within = True
        try:
            while True:
                try:
                    return call(*arguments, **options)
                except RolledBack as error:
                    patience = patience or Patience()
                    patience.pause(error)
        finally:
            _repeating.within = False

    return repeated


# pg_xact_status() alone does not tell: after a crash the server may give the number of a transaction that was lost with
# it to another one. Its statistics are reset by recovery from a crash, and by nothing that loses transactions otherwise.
_HELLO = (
    f"SET lock_timeout = '{BUSY_SECONDS:.0f}s'; SET idle_in_transaction_session_timeout = '{IDLE_SECONDS:.0f}s';"
    " SELECT pg_backend_pid(), stats_reset::text FROM pg_stat_bgwriter"
)
ASIDE = (
    "SET LOCAL synchronous_commit = off; SET LOCAL lock_timeout = '10s';"
    f" SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS:.0f}s'"
)
"""How a server's small transaction begins that waits for no disk, and not long for others."""

_BEGIN = "BEGIN; SELECT pg_current_xact_id()::text"
_END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %s AND backend_xid = %s::xid8::xid"
_STATUS = "SELECT pg_xact_status(%s::xid8), (SELECT stats_reset::text FROM pg_stat_bgwriter)"
_IN_THE_FUTURE = "22023"


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """One connection of a writer, as the server knows it."""

    process: int
    life: str | None
    """since when the server has lost nothing"""


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """One write transaction on a server, as it can be asked about by another connection."""

    sitting: Sitting
    number: str


def sit_down(cursor: Any) -> Sitting:
    """Prepare a writer's new connection."""
    process, life = _last_row(cursor, _HELLO)
    return Sitting(process=process, life=life)


def begin(cursor: Any, sitting: Sitting) -> Ticket:
    """Begin a write transaction, in one message with the question for its number."""
    return Ticket(sitting=sitting, number=_last_row(cursor, _BEGIN)[0])


def _last_row(cursor: Any, statements: str) -> tuple[Any, ...]:
    cursor.execute(statements, prepare=False)
    while cursor.nextset():
        pass
    row: tuple[Any, ...] = cursor.fetchone()
    return row


def end(cursor: Any, ticket: Ticket) -> None:
    """End the connection that a transaction was lost with, if the server has not noticed yet: it still holds its locks."""
    cursor.execute(_END, (ticket.sitting.process, ticket.number))


def is_committed(cursor: Any, ticket: Ticket, label: str) -> bool | None:
    """Tell what became of a transaction; None while it still runs. OutcomeUnknown when that cannot be known for certain."""
    end(cursor, ticket)
    try:
        cursor.execute(_STATUS, (ticket.number,))
    except Exception as error:
        if getattr(error, "sqlstate", None) == _IN_THE_FUTURE:
            return False  # a crash took it along: its number will be given again
        raise
    status, life = cursor.fetchone()
    if status == "in progress":
        return None
    if status == "aborted":
        return False
    if status == "committed" and life is not None and life == ticket.sitting.life:
        return True
    raise unknown(label)


def unknown(label: str) -> OutcomeUnknown:
    """Return the error of a commit whose answer was lost."""
    return OutcomeUnknown(
        f"database {label}: the connection was lost while a change was committed, and whether it was cannot be found out; "
        "look at the experiment with `holdfast show`, then restore"
    )
