"""A trial's task where an engine has brought it: what is alike for all trials of a search travels as one packet."""

from __future__ import annotations

import functools
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import cloudpickle
from prefect.client.schemas import State
from prefect.context import SettingsContext, SyncClientContext, serialize_context
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
def _unpacked(packet: bytes) -> tuple[Task[..., Any], dict[str, Any], SettingsContext | None]:
    """Return the task, its context but for the settings, and these: to make them of a dictionary takes 40 ms of computing."""
    task, context = cloudpickle.loads(packet)
    settings = context.pop("settings_context", None)
    return task, context, SettingsContext(**settings) if settings else None


_kept = threading.local()


@contextmanager
def _one_client(settings: SettingsContext | None) -> Iterator[None]:
    """In the body let Prefect talk to its API by the client of this thread: it would make two for each task, of 35 ms each."""
    known: tuple[SettingsContext | None, SyncClientContext] | None = getattr(_kept, "client", None)
    if known is None or known[0] is not settings:
        if known is not None:
            known[1].client.__exit__(None, None, None)
        found = SyncClientContext()
        found.client.__enter__()
        known = _kept.client = (settings, found)
    token = SyncClientContext.__var__.set(known[1])
    try:
        yield
    finally:
        SyncClientContext.__var__.reset(token)


def execute(packet: bytes, run: uuid.UUID, parameters: dict[str, Any]) -> State[Any]:
    """Run a packed task as task run ``run`` and return its final state."""
    task, context, settings = _unpacked(packet)
    with nullcontext() if settings is None else settings.model_copy(), _one_client(settings):
        found: Any = run_task_sync(
            task=task, task_run_id=run, parameters=parameters, context=dict(context), return_type="state"
        )
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
