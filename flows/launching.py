"""Carrying a claimed restore out: in a child process, or by a Prefect deployment. Imports no Prefect before it is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from holdfast.core.errors import EngineError
from holdfast.core.values import Json
from holdfast.flows.abandoned import Claimed, Places, restore_words
from holdfast.holding import holder, liveness
from holdfast.references import is_reference
from holdfast.settings import environment_of_a_restore, settings
from holdfast.tasks.workers.processes import identity

LONGEST_LINE = 2000
"""Characters of a line of a restore's output that are kept."""

ENDING_SECONDS = 10.0
"""What a restore gets to end after the grace period of its trials."""


class Restoring(Protocol):
    """A restore that was started."""

    detail: dict[str, Json]
    """who carries it out, for the audit"""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""

    def lines(self) -> list[str]:
        """Return what it has said since the last call."""

    def end(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it at once."""


class Launcher(Protocol):
    """Starts restores."""

    awaits: bool
    """whether a started restore belongs to us until it ends"""

    def check(self) -> None:
        """Raise EngineError where no restore could be started at all: nothing is claimed then."""

    def start(self, claimed: Claimed) -> Restoring:
        """Start a claimed restore; EngineError when that is not possible."""


class Child:
    """``holdfast restore`` in a process and session of its own."""

    def __init__(self, words: list[str], environment: Mapping[str, str]) -> None:
        # A file, not a pipe: should this process die, the restore goes on, and what it says must not end it.
        self._output: IO[bytes] = tempfile.TemporaryFile(prefix="holdfast-watch-")  # noqa: SIM115  # closed when it has ended
        self._rest = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "holdfast.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=dict(environment),
        )
        self._read = 0
        pid = self._process.pid
        self.detail: dict[str, Json] = {**holder(), "pid": pid, "started": identity(pid) or ""}

    def poll(self) -> int | None:
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def lines(self) -> list[str]:
        if self._output.closed:
            return []
        found = os.pread(self._output.fileno(), 1 << 20, self._read)
        self._read += len(found)
        *whole, self._rest = (self._rest + found).split(b"\n")
        if self._process.poll() is not None and not found:
            whole, self._rest = [*whole, self._rest], b""
            self._output.close()
        lines = [line.decode(errors="replace").rstrip()[:LONGEST_LINE] for line in whole]
        return [line for line in lines if line]

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Children:
    """Restores in child processes of this one."""

    awaits = True

    def __init__(self, places: Places, environment: Callable[[], Mapping[str, str]] = dict) -> None:
        self._places = places
        self._environment = environment

    def check(self) -> None:
        """Do nothing: a process can always be started, as far as can be known."""

    def start(self, claimed: Claimed) -> Child:
        # Not by the command line: everybody can read that, and the URL and the options may hold a password.
        told = {"HOLDFAST_DATABASE_URL": self._places.database} if self._places.database else {}
        if self._places.options and (options := self._places.options_of(claimed.examined.row.path)):
            told["HOLDFAST_STORAGE_OPTIONS"] = json.dumps(dict(options))
        environment = environment_of_a_restore(**self._environment(), **told)
        return Child(restore_words(claimed, self._places), environment)


class HandedOver:
    """A flow run of a deployment: somebody else's from now on."""

    def __init__(self, flow_run: str) -> None:
        self.detail: dict[str, Json] = {"flow_run_id": flow_run}

    def poll(self) -> int | None:
        return None

    def lines(self) -> list[str]:
        return []

    def end(self) -> None:
        """Leave it alone."""

    def kill(self) -> None:
        """Leave it alone."""


class Deployment:
    """Restores as flow runs of a deployment of the flow ``restore``."""

    awaits = False

    def __init__(self, name: str, places: Places) -> None:
        self.name = name
        self._places = places

    def check(self) -> None:
        from holdfast.flows.forms import SAVE_STORAGE, secret_in
        from holdfast.flows.watched_runs import check_deployment

        if (found := secret_in(self._places.options)) is not None:
            raise EngineError(f"the storage options hold the credential {found!r}; {SAVE_STORAGE}")
        check_deployment(self.name)

    def start(self, claimed: Claimed) -> HandedOver:
        from holdfast.flows.watched_runs import run_restore

        recovery = claimed.examined.recovery
        parameters: dict[str, Any] = {"path": self._places.name_of(claimed.examined.row.path)}
        if recovery.unfinished != "resume":
            parameters["policy"] = {"unfinished": recovery.unfinished, "errored": recovery.errored}
        elif recovery.errored != "skip":
            parameters[f"{recovery.errored}_errored"] = True
        if self._places.options:
            parameters["storage_options"] = dict(self._places.options)
        # Prefect keeps parameters: a password is for the environment of whoever runs the deployment.
        if self._places.database and (is_reference(self._places.database) or urlsplit(self._places.database).password is None):
            parameters["database"] = self._places.database
        return HandedOver(run_restore(self.name, parameters, claimed.key))


def alive(who: Mapping[str, Any]) -> bool | None:
    """Tell whether a process, or a flow run, is still at it; None when it cannot be seen from here."""
    run = who.get("flow_run_id")
    if run is None:
        return liveness(who)
    from holdfast.flows.watched_runs import is_open

    return is_open(str(run))


def end_all(running: list[Restoring], pause: Callable[[float], object] = time.sleep) -> None:
    """Let restores save and end, as SIGTERM does, and wait for them; those that do not end in time are killed."""
    for one in running:
        one.end()
    deadline = time.monotonic() + settings().grace_seconds + ENDING_SECONDS
    while any(one.poll() is None for one in running) and time.monotonic() < deadline:
        pause(0.1)
    for one in running:
        if one.poll() is None:
            one.kill()
