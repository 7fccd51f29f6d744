"""What a worker process sets up before it runs trials of an experiment: its row, its children, where its code is."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from holdfast.core.spec import ExperimentSpec
from holdfast.core.values import Json
from holdfast.settings import settings, visible_gpus
from holdfast.storage.code import release, unpack
from holdfast.storage.database import workers
from holdfast.storage.database.engine import Database
from holdfast.storage.database.reads import Reader
from holdfast.storage.folder import TRAINABLE, Folder
from holdfast.tasks.place import Place
from holdfast.tasks.probing import versions
from holdfast.tasks.workers import processes
from holdfast.tasks.workers.pool import WorkerPool
from holdfast.tasks.working import WorkFolder


def make_pool(spec: ExperimentSpec, place: Place) -> WorkerPool:
    """Return the child processes of a worker, none started yet; SpecError when it has too few devices for one trial.

    With devices, there are as many slots as those are enough for: the whole search may run more trials than fit here.
    """
    resources = spec.execution.resources
    if not resources.gpu:
        return WorkerPool(place.slots, cpu_per_trial=resources.cpu)
    gpus = visible_gpus(needed=resources.gpu)
    slots = min(place.slots, len(gpus) // resources.gpu)
    return WorkerPool(slots, cpu_per_trial=resources.cpu, gpus=gpus, gpus_per_trial=resources.gpu)


def join(database: Database, place: Place, engine: str) -> int:
    """Add this process to the drive's workers and return its row id; Fenced when the epoch is over."""
    hostname, pid = socket.gethostname(), os.getpid()
    about: dict[str, Json] = {**versions(), "cpus": os.cpu_count() or 1, "slots": place.slots, "engine": engine}
    return workers.join(
        database,
        place.experiment,
        place.epoch,
        name=f"{hostname}/{pid}",
        engine=engine,
        hostname=hostname,
        host=processes.same_host(),
        pid=pid,
        started=processes.identity(pid) or "",
        about=about,
    )


def workdir_of(place: Place, folder: Folder, work: WorkFolder) -> tuple[Path, Callable[[], None]]:
    """Return where attempts run, and what gives it back: the shipped code, the driver's own folder, or an empty one."""
    if place.code is not None:
        files = unpack(folder, place.code, settings().cache_folder)
        return files, lambda: release(files)
    given = Path(place.workdir)
    return (given if given.is_dir() else work.path), lambda: None


def trainable_of(place: Place, folder: Folder) -> str:
    """Return the trainable as a child finds it: a pickled one is brought here."""
    kind, _, rest = place.trainable.partition(":")
    if kind != "pickle":
        return place.trainable
    folder.bring(TRAINABLE)
    return f"pickle:{folder.path / rest}"


def began(reader: Reader, epoch: int) -> float:
    """Return when the drive began, by this process's monotonic clock, as far as the hosts' clocks agree."""
    begun = next((row.happened for row in reader.audit() if row.epoch == epoch), None)
    since = 0.0 if begun is None else (datetime.now(UTC) - begun).total_seconds()
    return time.monotonic() - max(since, 0.0)
