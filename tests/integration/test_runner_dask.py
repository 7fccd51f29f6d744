"""Trials on a Dask cluster of this machine, of real processes, on SQLite and a local path."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import distributed
import pytest
from prefect.logging import disable_run_logger
from support import Lab
from support_runners import goes_through_everything
from support_workers import Drive

from holdfast.core.errors import Infrastructure
from holdfast.core.execution_section import Resources
from holdfast.flows.runners import dask
from holdfast.flows.runners.dask import DaskRunner
from holdfast.report.observer import Observer, watching

pytestmark = [pytest.mark.xdist_group("dask"), pytest.mark.timeout(1800)]


def test_a_search_goes_through_everything(lab: Lab) -> None:
    goes_through_everything(lab, "dask")


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Heard(Observer):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


FREE = threading.Event()


def _occupied() -> None:
    FREE.wait()


class Cluster:
    """Three workers of one thread each within this process: the first two have a device, the third has none."""

    def __init__(self, stack: ExitStack) -> None:
        scheduler: Any = {"cls": distributed.Scheduler, "options": {"dashboard": False, "protocol": "inproc://"}}
        workers = {
            name: {"cls": distributed.Worker, "options": {"nthreads": 1, "resources": resources, "memory_limit": 0}}
            for name, resources in (("a", {"GPU": 1}), ("b", {"GPU": 1}), ("c", {}))
        }
        made: Any = distributed.SpecCluster
        self.cluster = stack.enter_context(made(scheduler=scheduler, workers=workers, silence_logs=50))
        self.client = stack.enter_context(dask._make_client(self.cluster))
        self.address = {str(name): str(worker.address) for name, worker in self.cluster.workers.items()}
        FREE.clear()
        stack.callback(FREE.set)
        self.runner = stack.enter_context(DaskRunner(self.cluster.scheduler_address, Resources(gpu=1), 2))

    def occupy(self, *names: str) -> None:
        """Let somebody else's tasks take all threads of workers."""
        self.tasks = [self.client.submit(_occupied, workers=[self.address[name]], pure=False) for name in names]
        until(lambda: all(self.client.processing().get(self.address[name]) for name in names))

    def pause(self, name: str) -> None:
        """Let a worker begin nothing, as one that is suspended or cut off."""

        def paused(dask_worker: Any) -> None:
            dask_worker.status = distributed.Status.paused

        self.client.run(paused, workers=[self.address[name]])
        until(lambda: self.client.scheduler_info()["workers"][self.address[name]]["status"] == "paused")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack)


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    made = Drive.begin(tmp_path)
    with closing(made.opened):
        yield made


@pytest.fixture
def heard() -> Iterator[Heard]:
    heard = Heard()
    token = watching.set(heard)
    with disable_run_logger():
        yield heard
    watching.reset(token)


def test_workers_that_trials_may_be_sent_to_are_asked_and_busy_ones_not_waited_for(
    cluster: Cluster, drive: Drive, heard: Heard
) -> None:
    cluster.runner.check(drive.place())
    assert heard.said == []
    cluster.occupy("b", "c")
    cluster.runner.check(drive.place())
    (said,) = heard.said
    assert cluster.address["b"] in said
    assert cluster.address["c"] not in said
    with pytest.raises(Infrastructure, match="Python is") as refused:
        cluster.runner.check(drive.place(versions={"python": "3.8.1"}))
    assert [cluster.address[name] in str(refused.value) for name in "abc"] == [True, False, False]


def test_workers_that_do_not_answer_are_named(
    cluster: Cluster, drive: Drive, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask, "ANSWER_SECONDS", 0.5)
    cluster.pause("a")
    with pytest.raises(Infrastructure, match=r"no answer in 0\.5 s") as refused:
        cluster.runner.check(drive.place())
    assert cluster.address["a"] in str(refused.value)
    cluster.occupy("b")
    with pytest.raises(Infrastructure, match=r"no answer in 0\.5 s") as refused:
        cluster.runner.check(drive.place())
    assert [cluster.address[name] in str(refused.value) for name in "abc"] == [True, True, False]
    assert heard.said == []
