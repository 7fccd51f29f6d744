"""Write the golden database of the present schema: ``python tests/golden/make.py`` makes ``schema-<VERSION>.db`` beside it.

Run it once for each version of the schema, with the program that wrote that version, and keep the file for good: the tests
open, refuse and upgrade what every released version left behind. A file that exists is never written again.

It holds two experiments that share a config: trials of every status, retries, a chain of attempts, a restart, reports with
every kind of value, telemetry, checkpoints of every status, an engine's state, workers, audit rows and names in many scripts.
"""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ErrorInfo, Outcome
from holdfast.storage.database import experiments, requests, workers
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.driver import Driver, Ending, add_trial
from holdfast.storage.database.engine import Database, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.reads import Reader
from holdfast.storage.database.schema import VERSION
from holdfast.testing.lab import TYPED
from holdfast.testing.samples import sample_spec

NAMES = ("golden", "süß 蜂蜜 🍯 'quoted\" %41")
HOLDER = {"host": "a-host-that-is-gone", "hostname": "gone", "pid": 1, "started": "0", "flow_run": None}


def main() -> None:
    """Write the golden file of this program's schema."""
    file = Path(__file__).parent / f"schema-{VERSION}.db"
    if file.exists():
        sys.exit(f"{file} exists: a golden file is never written again")
    write(file)
    print(f"{file}: {file.stat().st_size} bytes")


def write(file: Path) -> None:
    """Write a database of the present schema with both experiments to ``file``, as one file without a log."""
    with closing(open_database(sqlite_url(file), create_missing=True)) as database:
        first = create(database, NAMES[0])
        every_status(database, first)
        release(database, first)
        second = create(database, NAMES[1])  # its driver dies: the lease runs out
        config: dict[str, object] = {"x": 0.25, "üñí": "ß 蜂", "choice": True, "many": 3}
        writer = started(database, second, config, worker=joined(database, second))
        Driver(database, second, 1, seed=7).tell("preempt")
        Leases(database, second).renew(epoch=1, active=0.5, journaled=5)
        writer.report(0, {"loss": 0.125, "naïve/精度": 1})
        writer.telemetry([(1, "température", 21.5)])
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("VACUUM")
        connection.execute("PRAGMA journal_mode=DELETE")


def create(database: Database, name: str) -> int:
    """Create an experiment and take its lease for epoch 1; return its row id."""
    record = experiments.create(
        database,
        spec_of(name),
        uuid=f"00000000-0000-4000-8000-{len(experiments.every(database)):012}",
        location=f"/nowhere/{name}",
        seed=7,
        workdir="/nowhere",
        spec_source="# süß\nname: golden\n",
        git_commit="0123456789abcdef0123456789abcdef01234567",
        code_digest="0123456789abcdef0123456789abcdef",
    )
    Leases(database, record.id).take(seen=0, epoch=1, holder=HOLDER, action="started", detail={"by": "süß"})
    return record.id


def spec_of(name: str, *, num_trials: int = 20) -> ExperimentSpec:
    """Return the spec of both experiments."""
    return sample_spec(
        name=name,
        trainable="train.py:train",
        objectives={"loss": "min", "naïve/精度": "max"},
        space={
            "x": {"type": "float", "low": 0.0, "high": 1.0},
            "üñí": {"type": "categorical", "choices": ["ß 蜂", "b"]},
            "choice": {"type": "categorical", "choices": [True, None, "3", 3]},
            "many": {"type": "int", "low": 1, "high": 9},
        },
        search={"engine": "random", "num_trials": num_trials, "seed": 1},
    )


def release(database: Database, experiment: int) -> None:
    """Give the lease back, as a driver does at the end."""
    leases = Leases(database, experiment)
    leases.renew(epoch=1, active=2.5)
    leases.release(epoch=1, active=0.25, ended="every trial has ended")


def proposed(database: Database, experiment: int, config: dict[str, object], state: bytes | None = None) -> int:
    """Propose a trial; return its number."""
    return Driver(database, experiment, 1, seed=7).propose(config, state=state)  # type: ignore[arg-type]  # scalars, all of them


def joined(database: Database, experiment: int) -> int:
    """Let two workers join, of which one leaves; return the row id of the other one."""
    about = {"python": "3.11.9", "wer": "süß"}
    for name in ("tcp://蜂:1", "tcp://蜂:2"):
        worker = workers.join(
            database,
            experiment,
            1,
            name=name,
            engine="dask",
            hostname="gone",
            host=Gone.host,
            pid=Gone.pid,
            started=Gone.started,
            about=about,
        )
        if name.endswith("1"):
            workers.leave(database, experiment, worker, "it is not fit: größer")
    return worker


def claimed(database: Database, experiment: int, number: int, worker: int | None = None) -> AttemptWriter:
    """Claim the current attempt of a trial."""
    trial = Reader(database, experiment).trial(number)
    assert trial is not None
    token = f"token-{number}-{trial.attempt.number}"
    return AttemptWriter.claim(
        database,
        experiment,
        1,
        trial.attempt.id,
        token=token,
        flow_run_id="flow",
        task_run_id="task",
        process=Gone(),
        worker=worker,
    )


def started(database: Database, experiment: int, config: dict[str, object], worker: int | None = None) -> AttemptWriter:
    """Propose a trial and claim it."""
    return claimed(database, experiment, proposed(database, experiment, config), worker)


class Gone:
    """A process that ran on another host, long ago."""

    host = "a-host-that-is-gone"
    pid = 1
    started = "0"


def saved(writer: AttemptWriter, step: int) -> Saved:
    """Return the description of a checkpoint of a step."""
    path = f"trials/{writer.trial:06d}/checkpoints/step_{step:08d}-a{writer.number}-0000"
    return Saved(path=path, digest=f"{step:032x}", bytes=1000 + step)


def every_status(database: Database, experiment: int) -> None:
    """Write trials of every status."""
    driver = Driver(database, experiment, 1, seed=7)
    shared = {"x": 0.25, "üñí": "ß 蜂", "choice": True, "many": 3}
    error = ErrorInfo(kind="ValueError", message="schön\nkaputt", traceback='File "café.py", line 1\nValueError: schön')

    def end(writer: AttemptWriter, outcome: Outcome, **options: object) -> None:
        driver.end(writer.attempt, Ending(outcome=outcome, **options))  # type: ignore[arg-type]  # as its fields say

    # 0 COMPLETED: failed once after three checkpoints, went on from the second, since the third was bad.
    writer = claimed(database, experiment, proposed(database, experiment, shared, b"\x00state \xff 0"))
    for step in range(3):
        writer.report(step, {**TYPED, "loss": 1.0 - step / 8}, saved=saved(writer, step))
    writer.forget([Reader(database, experiment).checkpoints()[0].id])
    driver.reject({Reader(database, experiment).checkpoints()[2].id: "its digest differs: größer"})
    writer.telemetry([(place * 1_000_000, name, value) for place in range(3) for name, value in TYPED.items()])
    writer.fail(Ending(outcome=Outcome.FAILED, error=error), max_failures=1)
    writer = claimed(database, experiment, 0)
    writer.report(2, {"loss": 0.5})
    writer.report(3, {"loss": 0.25}, saved=saved(writer, 3), decision="continue")
    end(writer, Outcome.COMPLETED, metrics={"loss": 0.125, "naïve/精度": 1}, result="trials/000000/result.json")
    # 1 PRUNED, 2 FAILED, 3 TIMED_OUT after a crash, 4 CANCELLED while it ran, 5 CANCELLED while it waited
    writer = started(database, experiment, {**shared, "choice": None})
    writer.report(0, {"loss": 9.0}, decision="prune")
    end(writer, Outcome.PRUNED)
    writer = started(database, experiment, {**shared, "choice": "3"})
    writer.report(0, {"loss": 2.0})
    writer.fail(Ending(outcome=Outcome.FAILED, error=error), max_failures=0)
    writer = started(database, experiment, {**shared, "choice": 3})
    writer.fail(Ending(outcome=Outcome.CRASHED, error=error), max_failures=5)
    claimed(database, experiment, 3).fail(Ending(outcome=Outcome.TIMED_OUT, error=error), max_failures=0)
    writer = started(database, experiment, {**shared, "many": 4})
    requests.request_cancel(database, experiment, 4)
    writer.end(Ending(outcome=Outcome.CANCELLED))
    proposed(database, experiment, {**shared, "many": 5}, b"")
    driver.cancel(Reader(database, experiment).trial_ids()[5])
    # 6 RUNNING again after an end and a restart, 7 PENDING after a preemption, 8 PENDING and asked to cancel, 9 SKIPPED
    writer = started(database, experiment, {**shared, "many": 6})
    writer.report(0, {"loss": 3.0}, saved=saved(writer, 0))
    end(writer, Outcome.COMPLETED, metrics={"loss": 3.0})
    driver.rerun(writer.trial, restart=True, note="noch einmal, größer")
    claimed(database, experiment, 6).report(0, {"loss": 2.5})
    writer = started(database, experiment, {**shared, "many": 7})
    writer.report(4, {"loss": 0.75}, saved=saved(writer, 4))
    end(writer, Outcome.PREEMPTED)
    proposed(database, experiment, shared)
    requests.request_cancel(database, experiment, 8)
    number = proposed(database, experiment, {**shared, "many": 8})
    driver.skip([Reader(database, experiment).trial_ids()[number]])
    # 10 and 11 queued from outside: one to be started in 2100, one that repeats it
    due = datetime(2100, 1, 1, 12, 30, 0, 1, tzinfo=UTC)
    for repeat in range(2):
        with database.write() as tx:
            add_trial(
                tx,
                experiment,
                Reader(database, experiment).seq(),
                {**shared, "many": 9},  # type: ignore[dict-item]  # scalars, all of them
                seed=7,
                source="queued",
                ts_start=due if repeat == 0 else None,
                metadata={"wer": "süß", "'": '"'},
                group=10 if repeat else None,
                repeat=repeat,
            )
    spec = spec_of(NAMES[0], num_trials=30)
    driver.change_spec(spec.stored(), {"search.num_trials": [20, 30]})
    requests.request_stop(database, experiment)


if __name__ == "__main__":
    main()
