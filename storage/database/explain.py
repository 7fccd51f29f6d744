"""What a database's driver raises, in words that say what to do."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from holdfast.core.errors import Corrupt, DatabaseError, HoldfastError, RolledBack
from holdfast.storage.database.losses import BUSY_SECONDS

_UNDONE = ("40001", "40P01")
"""What a server says of a transaction that it undid for the sake of another one."""


def explained(error: Exception, label: str) -> HoldfastError:
    """Return our error for what a driver raised about the database that ``label`` shows."""
    origin = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = str(origin).strip() or type(origin).__name__
    damage = {
        "malformed": "the file is damaged; restore it from a backup",
        "not a database": "the file is damaged or is something else; restore it from a backup",
    }
    hints = {
        "readonly": "make the file and its folder writable",
        "unable to open": "check that the folder exists and may be written",
        "locked": f"another process held it for more than {BUSY_SECONDS:.0f} s; end that process",
        "authentication failed": "check user and password in its URL",
        "no password supplied": "put the password into its URL",
        "resolve host": "check the host in its URL",
        "refused": "check that the server runs, and host and port in its URL",
        "timeout expired": "check that the server runs, and host and port in its URL",
        "does not exist": "create it, or name another one in its URL",
        "lock timeout": f"another process held it for more than {BUSY_SECONDS:.0f} s; end that process",
        "No space left": "free some space on the server and restore",
        "full": "free some space and restore",
        "disk I/O": "check the disk and its free space, then restore",
    }
    undone = getattr(origin, "sqlstate", None) in _UNDONE
    kind: type[HoldfastError] = RolledBack if undone else DatabaseError
    if any(sign in text for sign in damage):
        kind = Corrupt
    hint = next((remedy for sign, remedy in {**damage, **hints}.items() if sign in text), "see the cause above")
    return kind(f"database {label}: {text}; {hint}")
