"""A trial's task where an engine has brought it: what is alike for all trials of a search travels as one packet."""

from __future__ import annotations

import functools
import signal
import socket
import threading
import uuid
from contextlib import suppress
from typing import Any

import cloudpickle
from prefect.client.schemas import State
from prefect.context import serialize_context
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.task_engine import run_task_sync
from prefect.tasks import Task

from holdfast.core.errors import HoldfastError
from holdfast.tasks.place import Place

FLUSH_SECONDS = 5.0
END_SECONDS = 20.0
"""How long a worker process may take to end what it has of searches."""


def pack_task(task: Task[..., Any]) -> bytes:
    """Return a task with the context of the flow run that this is called in: both are alike for every trial of it."""
    return bytes(cloudpickle.dumps((task, serialize_context())))


@functools.lru_cache(maxsize=8)
def _unpacked(packet: bytes) -> tuple[Task[..., Any], dict[str, Any]]:
    task, context = cloudpickle.loads(packet)
    return task, context


def execute(packet: bytes, run: uuid.UUID, parameters: dict[str, Any]) -> State[Any]:
    """Run a packed task as task run ``run`` and return its final state."""
    task, context = _unpacked(packet)
    found: Any = run_task_sync(task=task, task_run_id=run, parameters=parameters, context=dict(context), return_type="state")
    state: State[Any] = found
    return state


def execute_alone(packet: bytes, run: uuid.UUID, parameters: dict[str, Any]) -> State[Any]:
    """Run a packed task in the main thread of a process that has nothing else to do.

    An engine that takes a task back interrupts the process that has begun it; what has begun is ended by rows alone.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return execute(packet, run, parameters)
    finally:
        flush()  # Ray ends a process that has nothing to do without asking it


def flush() -> None:
    """Let Prefect send what this process has logged and told of its runs so far, within a few seconds."""
    for service in (APILogWorker, EventsWorker):
        with suppress(Exception):  # an API that is away stops nothing
            service.drain_all(timeout=FLUSH_SECONDS)


def end() -> None:
    """End this process's runtimes, so that their rows say that they left, and :func:`flush`; within END_SECONDS.

    In a thread of its own: an engine may call this in its event loop, where Prefect does not wait for what it sends.
    """
    thread = threading.Thread(target=_end, name="holdfast-end", daemon=True)
    thread.start()
    thread.join(END_SECONDS)


def _end() -> None:
    from holdfast.tasks.remote import close_all

    with suppress(Exception):  # whoever drives sees to what could not be told
        close_all()
    flush()


def ask(place: Place) -> tuple[str, list[str]]:
    """Return this host's name, and why this process cannot run trials of ``place``."""
    from holdfast.tasks.probing import probe

    try:
        return socket.gethostname(), probe(place)
    except (HoldfastError, OSError, ImportError) as error:
        return socket.gethostname(), [f"{type(error).__name__}: {error}"]
