"""Leaving a process by force: with ``isolation: inline`` user code runs in its threads, which nothing can end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.logging.handlers import APILogWorker
from prefect.runtime import flow_run
from prefect.states import Crashed, Failed

from holdfast.core.errors import HoldfastError
from holdfast.flows.signals import signal_of

LAST_SECONDS = 10.0
"""What giving the lease back and telling Prefect may take altogether; then the process ends in any case."""
_DRAIN_SECONDS = 2


def exit_code(error: BaseException) -> int:
    """Return the exit code of a process that ``error`` ends."""
    number = signal_of(error)
    if number is not None:
        return 128 + number
    return error.exit_code if isinstance(error, HoldfastError) else 1


def ending_of(error: BaseException) -> State[Any]:
    """Return the final state of a flow run that ``error`` ends."""
    make = Failed if isinstance(error, Exception) else Crashed
    return make(message=f"{type(error).__name__}: {error}".removesuffix(": "))


def hurry(code: int) -> None:
    """See to it that this process ends soon, whatever its last words run into; further signals change nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    timer = threading.Timer(LAST_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()


def leave(state: State[Any], code: int, tasks: Sequence[str]) -> NoReturn:
    """Put the flow run into ``state`` and its task runs ``tasks`` into a final one in Prefect, and end this process."""
    try:
        words = "its code runs in a thread of the search (isolation: inline) and did not stop; the process ended by force"
        _tell(state, Crashed(message=words), tasks)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # closed, or somebody else's
                stream.flush()
    finally:
        os._exit(code)


def _tell(flow: State[Any], task: State[Any], tasks: Sequence[str]) -> None:
    """Tell Prefect how the runs end. Its states are a view: a failure here stops nothing."""
    for worker in (APILogWorker, EventsWorker):  # what is queued would say later that they run
        with suppress(Exception):
            worker.drain_all(timeout=_DRAIN_SECONDS)
    ignored = (ObjectNotFound, PrefectHTTPStatusError, httpx.HTTPError)
    with suppress(*ignored), get_client(sync_client=True) as client:
        if flow_run.id:
            with suppress(*ignored):
                client.set_flow_run_state(uuid.UUID(str(flow_run.id)), flow, force=True)
        for run in tasks:
            with suppress(*ignored):
                client.set_task_run_state(uuid.UUID(run), task, force=True)
