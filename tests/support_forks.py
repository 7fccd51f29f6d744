"""What the tests of forks share: searches without processes, and whole stories of an experiment."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast import locate
from holdfast.core.trial import ErrorInfo, Outcome
from holdfast.engines.factory import make_proposer
from holdfast.experiment import Experiment
from holdfast.locate import Opened, open_path
from holdfast.storage.checkpoints.ports import checkpoints_in
from holdfast.storage.checkpoints.serializers import write_state
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.driver import Driver, Ending
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.database.reads import Reader
from holdfast.storage.journal import JournalWriter
from holdfast.testing.lab import Lab
from holdfast.testing.proposers import objective_of
from holdfast.testing.samples import sample_spec
from holdfast.testing.saving import manifest_of

SPACE = {
    "x": {"type": "float", "low": -2.0, "high": 2.0},
    "y": {"type": "float", "low": 0.0, "high": 1.0, "step": 0.25},
    "n": {"type": "int", "low": 1, "high": 4},
}


def searched(opened: Opened, until: int) -> None:
    """Drive an experiment as the loop does, one trial at a time, until it has so many; then let it go."""
    record, leases = opened.database, Leases(opened.database, opened.record.id)
    epoch = leases.look().epoch + 1
    leases.take(seen=epoch - 1, epoch=epoch, holder={"pid": 1, "host": "gone"}, action="restored", detail={"token": str(epoch)})
    lab, reader = Lab(record, opened.record, epoch), Reader(opened.database, opened.record.id)
    proposer, states = make_proposer(opened.spec, opened.record.seed), reader.states()
    driver = Driver(opened.database, opened.record.id, epoch, seed=opened.record.seed)

    def tell(number: int) -> None:
        trial = lab.trial(number)
        proposer.observe(replace(trial, state=states.get(number)))

    for trial in reader.trials():
        tell(trial.number)
    for number in range(len(reader.trials()), until):
        offered: Any = proposer.propose(number)
        config, state = getattr(offered, "config", offered), getattr(offered, "state", None)
        group = {"group": getattr(offered, "group", None), "repeat": getattr(offered, "repeat", 0)}
        driver.propose(config, number=number, state=state, **group)
        if state is not None:
            states[number] = state
        tell(number)
        writer = lab.claim(number)
        writer.report(0, {"loss": objective_of(config) * 2})
        lab.end(writer, *([Outcome.PRUNED] if number % 5 == 3 else []), loss=objective_of(config))
        tell(number)
    writer_of(opened, epoch).start()
    leases.release(epoch=epoch, active=3.0, ended="the budget is used up")


def save(opened: Opened, writer: AttemptWriter, step: int, *, trial: int = 0) -> str:
    """Publish a checkpoint with its row and report; return its path."""
    store: Any = checkpoints_in(opened.folder)
    staged = store.stage(trial, writer.number, step)
    files = write_state({"step": step, "w": list(range(3000))}, staged, serializer="safe")
    manifest = manifest_of(files, trial=trial, attempt=writer.number, step=step)
    published = store.publish(staged, replace(manifest, experiment=opened.record.uuid))
    saved = Saved(path=published.path, digest=published.digest, bytes=published.bytes)
    writer.report(step, {"loss": float(step)}, saved=saved)
    return str(published.path)


def writer_of(opened: Opened, epoch: int) -> JournalWriter:
    return JournalWriter(opened.folder.root, epoch, Outbox(opened.database, opened.record.id, epoch))


def story(storage: Path | str, name: str = "exp", **changes: Any) -> Opened:
    """Make an experiment that was cut off: 0 completed, 1 failed, 2 running with checkpoints, 3 waiting after a preemption,
    4 never started, 5 queued; a pinned checkpoint, telemetry, results, logs, requests."""
    opened = locate.create(sample_spec(name=name, storage=str(storage), **changes), seed=1, workdir=".")
    Leases(opened.database, opened.record.id).take(
        seen=0, epoch=1, holder={"pid": 1, "host": "gone"}, action="started", detail={}
    )
    lab, folder = Lab(opened.database, opened.record), opened.folder
    for number in range(5):
        assert lab.driver.propose({"x": number / 10}, state=b"state %d" % number) == number
    first = lab.claim(0)
    for step in range(3):
        save(opened, first, step)
    first.telemetry([(1, "watt", 1.5)])
    folder.root.write(folder.result_name(0, 1), b'{"result": "{}"}')
    folder.root.write("trials/000000/log-a1.txt", b"trial 0 says\n")
    lab.end(first, loss=0.5)
    failed = lab.claim(1)
    save(opened, failed, 0, trial=1)
    lab.driver.end(failed.attempt, Ending(outcome=Outcome.FAILED, error=ErrorInfo(kind="E", message="m", traceback="T")))
    running = lab.claim(2)
    save(opened, running, 0, trial=2)
    save(opened, running, 1, trial=2)
    folder.root.write("trials/000002/log-a1.txt", b"trial 2 says\n")
    waiting = lab.claim(3)
    save(opened, waiting, 0, trial=3)
    lab.end(waiting, Outcome.PREEMPTED)
    again = open_path(folder.location, database=changes.get("database"), options=changes.get("storage_options"))
    with closing(again):
        experiment = Experiment(again)
        experiment.enqueue({"x": 0.9})
        experiment.pin(0, 1)
        experiment.cancel(4)
    folder.root.write("foreign.txt", b"mine")
    writer_of(opened, 1).start()
    return opened
