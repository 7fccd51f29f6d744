"""What the tests of forks share: searches without processes, and whole stories of an experiment."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from store_kit import create
from upkeep_kit import Shop, end

from holdfast.core.trial import ErrorInfo, Outcome
from holdfast.engines.factory import make_proposer
from holdfast.experiment import Experiment
from holdfast.locate import Opened, open_path
from holdfast.storage.database.driver import Driver, Ending
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.database.reads import Reader
from holdfast.storage.journal import JournalWriter
from holdfast.testing.lab import Lab
from holdfast.testing.proposers import objective_of

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


def writer_of(opened: Opened, epoch: int) -> JournalWriter:
    return JournalWriter(opened.folder.root, epoch, Outbox(opened.database, opened.record.id, epoch))


def story(storage: Path, name: str = "exp", **changes: Any) -> Opened:
    """Make an experiment that was cut off: 0 completed, 1 failed, 2 running with checkpoints, 3 waiting after a preemption,
    4 never started, 5 queued; a pinned checkpoint, telemetry, results, logs, requests."""
    opened = create(storage, name, **changes)
    shop = Shop.of(opened)
    lab, folder = shop.lab, opened.folder
    for number in range(5):
        assert lab.driver.propose({"x": number / 10}, state=b"state %d" % number) == number
    first = lab.claim(0)
    for step in range(3):
        shop.save(first, step)
    first.telemetry([(1, "watt", 1.5)])
    folder.root.write(folder.result_name(0, 1), b'{"result": "{}"}')
    folder.root.write("trials/000000/log-a1.txt", b"trial 0 says\n")
    lab.end(first, loss=0.5)
    failed = lab.claim(1)
    shop.save(failed, 0, trial=1)
    lab.driver.end(failed.attempt, Ending(outcome=Outcome.FAILED, error=ErrorInfo(kind="E", message="m", traceback="T")))
    running = lab.claim(2)
    shop.save(running, 0, trial=2)
    shop.save(running, 1, trial=2)
    folder.root.write("trials/000002/log-a1.txt", b"trial 2 says\n")
    waiting = lab.claim(3)
    shop.save(waiting, 0, trial=3)
    end(shop, waiting, Outcome.PREEMPTED)
    with closing(open_path(folder.path)) as again:
        experiment = Experiment(again)
        experiment.enqueue({"x": 0.9})
        experiment.pin(0, 1)
        experiment.cancel(4)
    (folder.path / "foreign.txt").write_text("mine")
    writer_of(opened, 1).start()
    return opened
