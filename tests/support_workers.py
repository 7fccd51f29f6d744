"""What the tests of workers share: an experiment that is driven by hand, and the place that its drive shows to workers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import locate
from holdfast.locate import Opened
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.leases import Leases, Terms
from holdfast.storage.database.reads import Reader
from holdfast.tasks.place import Place
from holdfast.tasks.probing import versions
from holdfast.tasks.remote import RemoteRuntime
from holdfast.tasks.workers.processes import same_host
from holdfast.testing.samples import sample_spec

TRAINABLE = """
import pathlib, time

def quick(trial):
    trial.report({"loss": trial.config["x"]}, state={"step": 0})

def endless(trial):
    pathlib.Path("running").write_text("x")
    while True:
        time.sleep(0.01)

def reporting(trial):
    print("reporting")
    trial.report({"loss": 1.0}, state={"step": 0})
    pathlib.Path("running").write_text("x")
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    trial.report({"loss": 2.0}, state={"step": 1})
    return {"loss": 2.0}
"""


@dataclass
class Drive:
    """One drive of an experiment, whose lease runs for an hour unless it is given back."""

    opened: Opened
    epoch: int = 1

    @classmethod
    def begin(cls, folder: Path, **changes: Any) -> Drive:
        (folder / "train.py").write_text(TRAINABLE)
        values = {"name": "sample", "trainable": "train.py:quick", "storage": str(folder / "runs"), **changes}
        opened = locate.create(sample_spec(**values), seed=1, workdir=str(folder))
        drive = cls(opened)
        drive.leases.take(seen=0, epoch=1, holder={"pid": 1}, action="started", detail={})
        return drive

    @property
    def leases(self) -> Leases:
        return Leases(self.opened.database, self.opened.record.id, Terms(duration=3600))

    @property
    def driver(self) -> Driver:
        return Driver(self.opened.database, self.opened.record.id, self.epoch, seed=1)

    @property
    def reader(self) -> Reader:
        return Reader(self.opened.database, self.opened.record.id)

    def take_over(self) -> None:
        self.leases.take(seen=self.epoch, epoch=self.epoch + 1, holder={"pid": 2}, action="taken over", detail={})
        self.epoch += 1

    def place(self, **changes: Any) -> Place:
        opened = self.opened
        values: dict[str, Any] = {
            "uuid": opened.record.uuid,
            "name": opened.record.name,
            "experiment": opened.record.id,
            "epoch": self.epoch,
            "location": opened.folder.location,
            "options": opened.spec.storage_options,
            "database": opened.database.engine.url.render_as_string(hide_password=False),
            "workdir": opened.record.workdir,
            "trainable": "train.py:quick",
            "host": same_host(),
            "versions": versions(),
        }
        return Place(**{**values, **changes})

    def propose(self, x: float = 0.5) -> tuple[int, int]:
        """Return the number of a new trial, and the row of its attempt."""
        number = self.driver.propose({"x": x})
        trial = self.reader.trial(number)
        assert trial is not None
        return number, trial.attempt.id

    def claim(self, runtime: RemoteRuntime) -> AttemptWriter:
        """Claim a new trial for a worker."""
        _, row = self.propose()
        writer = AttemptWriter.claim(
            runtime.database, runtime.experiment, runtime.epoch, row, token="token", worker=runtime.worker
        )
        runtime.claimed(writer)
        return writer


def descriptors() -> dict[str, str]:
    """Return what the open descriptors of this process are, but for what is shared by all."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return {name: target for name, target in found.items() if "/proc/" not in target}


def children() -> set[int]:
    """Return the numbers of this process's children."""
    folder = Path(f"/proc/{os.getpid()}/task")
    return {int(pid) for task in folder.iterdir() for pid in (task / "children").read_text().split()}


def in_threads(count: int, call: Callable[[], Any]) -> list[Any]:
    """Call a function in several threads at once; return what each returned, or raised."""
    found: list[Any] = []
    barrier = threading.Barrier(count)

    def run() -> None:
        barrier.wait()
        try:
            found.append(call())
        except BaseException as error:  # noqa: BLE001  # it is looked at
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
