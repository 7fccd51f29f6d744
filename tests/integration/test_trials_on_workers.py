"""Trials' tasks on Prefect's engine in worker processes: what they leave, and what a second execution leaves."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from s3_server import S3
from support import PATIENCE, Lab
from support_workers import Drive

from holdfast.core.values import dumps
from holdfast.storage.database import workers
from holdfast.tasks.results import WorkerResults
from holdfast.tasks.trial import run_trial

pytestmark = pytest.mark.timeout(900)  # it waits for several processes, each with patience

WORKER = """
import json, pickle, sys, threading, time
from pathlib import Path
from prefect import flow
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner
from holdfast.tasks import remote

task, parameters = (pickle.loads(Path(name).read_bytes()) for name in sys.argv[1:3])
place = parameters["place"]
work = []

def told(state):
    answer = state.result(raise_on_failure=False)
    if isinstance(answer, BaseException):
        answer = [type(answer).__name__, str(answer)]
    return [state.name, bool(getattr(state.data, "is_persisted", False)), answer]

@flow(task_runner=ThreadPoolTaskRunner(max_workers=4))
def executions():
    first = task.submit(**parameters)
    while not Path(place.workdir, "running").exists():
        time.sleep(0.01)
    second = task.submit(**parameters)
    second.wait()
    found = [told(second.state)]
    work.append(sorted(str(path.relative_to(remote.settings().cache_folder)) for path in files()))
    Path(place.workdir, "go").touch()
    first.wait()
    third = task.submit(**parameters)
    third.wait()
    return [told(first.state), *found, told(third.state)]

def files():
    return [path for path in (remote.settings().cache_folder / "work").rglob("*") if path.is_file()]

said = executions()
runtime = remote.known(place.uuid, place.epoch)
known = [*runtime._running, *runtime._closed]
remote.close_all()
print("\\n" + json.dumps({"said": said, "work": work[0], "known": known, "left": [str(path) for path in files()]}))
"""


@pytest.fixture
def drive(s3: S3, lab: Lab) -> Iterator[Drive]:
    made = Drive.begin(
        lab.folder,
        storage=s3.bucket("workers"),
        storage_options={**s3.options, "client_kwargs": {"region_name": "hush-hush"}},
        database=f"sqlite:///{lab.folder / 'holdfast.db'}",
    )
    with closing(made.opened):
        yield made


def test_one_record_and_no_trace_of_a_second_execution(drive: Drive, lab: Lab, s3: S3) -> None:
    """The task travels as Dask and Ray carry it; it runs once, whether the second comes while it runs or after."""
    number, row = drive.propose()
    place = drive.place(trainable="train.py:reporting", slots=2)
    task = run_trial.with_options()
    task.result_storage = WorkerResults(experiment=place.uuid, epoch=place.epoch)
    body = cloudpickle.dumps(task)
    for secret in (s3.options["secret"], "hush-hush", str(lab.folder), s3.endpoint):
        assert secret.encode() not in body
        assert secret not in repr(task.result_storage.model_dump())
    parameters = {
        "experiment": place.name,
        "trial": number,
        "attempt": 1,
        "config": dumps({"x": 0.5}),
        "identity": place.uuid,
        "row": row,
        "place": place,
        "engine": "dask",
    }
    files = [lab.folder / name for name in ("task", "parameters")]
    files[0].write_bytes(body)
    files[1].write_bytes(pickle.dumps(parameters))
    ended = lab.python(WORKER, *files, timeout=2 * PATIENCE)
    assert ended.code == 0, ended.output
    told: dict[str, Any] = json.loads(ended.output.splitlines()[-1])
    first, second, third = told["said"]
    assert first[:2] == ["Completed", True]
    assert second[0] == "Failed"
    assert second[2][0] == "AlreadyClaimed"
    assert third[:2] == ["Cached", True]
    assert [Path(name).name for name in told["work"] if not name.endswith((".worker", "log-a1.txt"))] == told_by_first(told)
    assert (told["known"], told["left"]) == ([], [])
    folder = drive.opened.folder
    names = sorted(folder.root.names(f"trials/{number:06d}"))
    assert names == ["checkpoints", "log-a1.txt", "result-a1.json"]
    assert folder.root.read(f"trials/{number:06d}/log-a1.txt") == b"reporting\n"
    assert len(folder.root.names(f"trials/{number:06d}/checkpoints")) == 2
    result = folder.result(number, 1)
    assert result is not None
    assert result["metrics"] == {"loss": 2.0}
    trial = drive.reader.trial(number)
    assert trial is not None
    assert (trial.attempt.number, trial.attempt.claimed, trial.step) == (1, True, 1)
    found = workers.of_attempt(drive.opened.database, row)
    assert found is not None
    assert (found.engine, found.left) == ("dask", "its process ends")
    assert trial.attempt.task_run_id is not None
    assert s3.options["secret"] not in ended.output


def told_by_first(told: dict[str, Any]) -> list[str]:
    """Return the names of the first one's copy of its checkpoint, which nobody took away."""
    names = [Path(name).name for name in told["work"] if "step_00000000" in name]
    assert names
    return names
