"""A restore waits for the workers of drives before it, for as long as they may run something."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from restoring_kit import alter, deserted, leave, made, saved

from holdfast.flows.changing import RestoreRequest
from holdfast.flows.prepare import prepare_restore
from holdfast.flows.session import Session
from holdfast.flows.waiting import await_workers
from holdfast.locate import Opened
from holdfast.report.observer import Observer
from holdfast.storage.database import workers
from holdfast.tasks.workers import processes


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with made(tmp_path) as opened:
        yield opened


def joined(opened: Opened, epoch: int, **changes: Any) -> int:
    """Let this very process be a worker of a drive."""
    given = {
        "name": "here/1",
        "engine": "dask",
        "hostname": "here",
        "host": processes.same_host(),
        "pid": os.getpid(),
        "started": processes.identity(os.getpid()) or "",
        "about": {},
        **changes,
    }
    return workers.join(opened.database, opened.record.id, epoch, **given)


class Said(Observer):
    """Notes what it is told, and sets an event when it is told that a restore waits."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.waits = threading.Event()

    def say(self, words: str) -> None:
        self.words.append(words)
        if words.startswith("waiting until"):
            self.waits.set()


def test_a_restore_goes_on_once_the_workers_have_left(opened: Opened) -> None:
    shop = deserted(opened)
    saved(shop, 0)
    worker = joined(opened, shop.lab.epoch)
    observer, found = Said(), list[Session | None]()
    restore = threading.Thread(
        target=lambda: found.append(prepare_restore(RestoreRequest(path=opened.folder.path), observer).session), daemon=True
    )
    restore.start()
    assert observer.waits.wait(60)
    assert found == []
    workers.leave(opened.database, opened.record.id, worker, "its drive is over")
    restore.join(60)
    (session,) = found
    leave(session)
    assert sum(words.startswith("waiting until 1 worker") for words in observer.words) == 1


def test_force_does_not_wait(opened: Opened) -> None:
    shop = deserted(opened)
    saved(shop, 0)
    joined(opened, shop.lab.epoch)
    observer = Said()
    leave(prepare_restore(RestoreRequest(path=opened.folder.path, force=True), observer).session)
    assert not observer.waits.is_set()


def test_nobody_waits_for_who_cannot_work(opened: Opened) -> None:
    """Silent ones elsewhere, dead ones of this host, and those of this drive itself."""
    shop = deserted(opened)
    saved(shop, 0)
    silent = joined(opened, shop.lab.epoch, host="another/boot")
    joined(opened, shop.lab.epoch, started="a start that never was")
    alter(opened, f"UPDATE worker SET seen = seen - 31 WHERE id = {silent}")
    observer = Said()
    session = prepare_restore(RestoreRequest(path=opened.folder.path), observer).session
    assert session is not None
    joined(opened, session.runtime.epoch)
    await_workers(session, observer.say)
    leave(session)
    assert not observer.waits.is_set()


def test_an_interrupted_wait_gives_the_lease_back(opened: Opened) -> None:
    shop = deserted(opened)
    saved(shop, 0)
    joined(opened, shop.lab.epoch)

    class Impatient(Said):
        def say(self, words: str) -> None:
            super().say(words)
            if self.waits.is_set():
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_restore(RestoreRequest(path=opened.folder.path), Impatient())
    (trial,) = shop.lab.reader.trials()
    assert trial.attempt.outcome is None, "nothing was closed"
    leave(prepare_restore(RestoreRequest(path=opened.folder.path, force=True), Said()).session)
