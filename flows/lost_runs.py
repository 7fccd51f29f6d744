"""Task runs whose process was lost stay Running in Prefect: nobody else says that they ended."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
import uuid
from contextlib import suppress

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Crashed

from holdfast.flows.prefect_runs import impatient_client

PATIENCE_SECONDS = 30.0
"""How long a run is looked for that the server does not know: it records them late, or never hears of them."""
_PAUSE_SECONDS = 1.0


class LostRuns:
    """Puts task runs into the state Crashed, in a thread of its own; one that has a final state keeps it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[uuid.UUID, str, float] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, run: uuid.UUID, why: str) -> None:
        """Have a task run closed."""
        if self._thread is None:
            work = contextvars.copy_context().run
            self._thread = threading.Thread(target=work, args=(self._work,), name="holdfast-lost-runs", daemon=True)
            self._thread.start()
        self._queue.put((run, why, time.monotonic() + PATIENCE_SECONDS))

    def finish(self, seconds: float = 5.0) -> None:
        """Close what is left, and wait for it, not for long."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(seconds)

    def _work(self) -> None:
        waiting: list[tuple[uuid.UUID, str, float]] = []
        ended = False
        with impatient_client() as client:
            while not (ended and not waiting):
                with suppress(queue.Empty):
                    item = self._queue.get(timeout=_PAUSE_SECONDS)
                    ended = ended or item is None
                    if item is not None:
                        waiting.append(item)
                waiting = [item for item in waiting if not _close(client, item[0], item[1]) and time.monotonic() < item[2]]


def _close(client: SyncPrefectClient, run: uuid.UUID, why: str) -> bool:
    """Put a task run into its final state; tell whether nothing is left to do."""
    with suppress(ObjectNotFound, PrefectHTTPStatusError, httpx.HTTPError, OSError):
        state = client.read_task_run(run).state
        if state is None or not state.is_final():
            client.set_task_run_state(run, Crashed(message=why), force=True)
        return True
    return False
