"""Who drives an experiment: this process as the holder of a lease, other holders, and what a dead one left running."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.core.errors import LeaseHeld
from holdfast.core.trial import Attempt
from holdfast.core.values import Json
from holdfast.locate import Opened
from holdfast.storage import journal
from holdfast.storage.database.leases import Lease
from holdfast.storage.folder import PathLease
from holdfast.tasks.workers import processes


class WentOn(LeaseHeld):
    """The path tells more than the rows that were rebuilt from it a moment ago."""


def holder() -> dict[str, Json]:
    """Return who we are, for the lease."""
    pid = os.getpid()
    return {
        "hostname": socket.gethostname(),
        "host": processes.same_host(),
        "pid": pid,
        "started": processes.identity(pid) or "",
    }


def liveness(other: Mapping[str, Any]) -> bool | None:
    """Tell whether a lease's holder lives on this host; None when it is another host's.

    A process that was killed and that nobody has waited for yet is dead.
    """
    return processes.is_alive(str(other.get("host")), int(other.get("pid") or 0), str(other.get("started")))


def is_driven(lease: Lease) -> bool:
    """Tell whether somebody drives under a lease, or may do so on another host: not once its process here is gone."""
    return lease.is_held and lease.holder is not None and liveness(lease.holder) is not False


def is_driven_by_path(lease: PathLease | None, uuid: str) -> bool:
    """Tell whether somebody drives experiment ``uuid`` under the lease in its path, whatever database that one uses."""
    if lease is None or lease.holder is None or lease.uuid not in ("", uuid):
        return False
    return lease.expires > time.time() and liveness(lease.holder) is not False


def end_children(attempts: Sequence[Attempt]) -> None:
    """End the worker processes that dead drivers left on this host."""
    for attempt in attempts:
        if attempt.host == processes.same_host() and attempt.pid is not None and attempt.pid_started:
            processes.kill_group(attempt.pid, attempt.pid_started)


def check_path(opened: Opened) -> None:
    """Raise WentOn when the rows are a copy of what the path told, and the path tells more by now."""
    if opened.copied_at is not None and journal.end(opened.folder.root) > opened.copied_at:
        raise WentOn(f"{opened.folder.location} went on with another database meanwhile; nothing was changed: try again")
