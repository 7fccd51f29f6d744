"""Whatever user code raises ends one attempt with a record that people can read, from a process and inline."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from workers_kit import Recorder, make_job

from holdfast.core.errors import TrialFailed
from holdfast.core.trial import ErrorInfo, Outcome
from holdfast.storage import journal
from holdfast.storage.database import rebuild
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.engine import sqlite_url
from holdfast.storage.database.experiments import by_uuid, open_database
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.database.reads import Reader
from holdfast.storage.database.rows import storable
from holdfast.storage.folder import Identity
from holdfast.storage.root import LocalRoot
from holdfast.tasks.workers.inline import run_inline
from holdfast.tasks.workers.pool import WorkerPool
from holdfast.testing.lab import Lab

ERRORS = Path(__file__).with_name("user_errors.py")

CASES: dict[str, tuple[str, str, list[str], list[str]]] = {
    "chained": ("ValueError", "third", ["KeyError: 'first'", "OSError: second", "ValueError: third"], ["builtins.ValueError"]),
    "group": (
        "ExceptionGroup",
        "both (2 sub-exceptions)",
        ["ConnectionResetError: one", "inner (1 sub-exception)", "BrokenPipeError: two"],
        ["ExceptionGroup", "ConnectionError", "OSError"],
    ),
    "mixed": ("BaseExceptionGroup", "mixed (2 sub-exceptions)", ["KeyboardInterrupt: two"], ["BaseException"]),
    "unspeakable": ("Unspeakable", "(its Unspeakable cannot be shown)", [], ["user_errors.Unspeakable"]),
    "unspeakable_cause": ("ValueError", "outside", [], ["ValueError"]),
    "no_text": ("NoText", "(its NoText cannot be shown)", ["raise NoText"], ["NoText"]),
    "unpicklable": ("Unpicklable", "kept", ["in unpicklable"], ["Unpicklable", "user_errors.Unpicklable", "OSError"]),
    "long": ("ValueError", "begin", ["raise ValueError"], ["ValueError"]),
    "long_name": ("EEE", "of a class with a long name", [], ["ValueError"]),
    "system_exit": ("SystemExit", "SystemExit", ["raise SystemExit"], ["SystemExit", "BaseException"]),
    "exit_code": ("SystemExit", "0", ["raise SystemExit(0)"], ["SystemExit"]),
    "interrupt": ("KeyboardInterrupt", "KeyboardInterrupt", ["raise KeyboardInterrupt"], ["KeyboardInterrupt"]),
    "generator_exit": ("GeneratorExit", "odd", [], ["GeneratorExit"]),
    "strange": ("Strange", "seen", ["Outer.Strange"], ["Strange", "user_errors.Outer.Strange"]),
    "recursion": ("RecursionError", "maximum recursion", ["more times"], ["RuntimeError"]),
    "memory": ("MemoryError", "MemoryError", ["raise MemoryError"], ["MemoryError"]),
    "cannot_allocate": ("MemoryError", "MemoryError", ["bytearray"], ["MemoryError"]),
    "end_of_file": ("EOFError", "the input ended", ["raise EOFError"], ["EOFError"]),
    "reads_input": ("EOFError", "Ran out of input", ["pickle.load"], ["EOFError"]),
    "noted": ("ValueError", "seen", ["in the third batch"], ["ValueError"]),
    "cycle": ("ValueError", "first", ["ValueError: second"], ["ValueError"]),
    "stops_itself": ("InvalidInput", "nothing told the trial to stop", ["TrialStopped"], ["InvalidInput", "ValueError"]),
    "null": ("ValueError", "a\0b\udcffc", ["raise ValueError"], ["ValueError"]),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


def failure_of(run: Any, folder: Path, function: str, trainable: str | None = None) -> TrialFailed:
    """Run a function in a thread, as a search does, and return what its attempt failed with."""
    caught: list[BaseException] = []

    def attempt() -> None:
        job = make_job(folder, function, trainable=trainable or f"{ERRORS}:{function}")
        try:
            run(job, Recorder(job))
        except BaseException as error:  # noqa: BLE001  # it is looked at below
            caught.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    (error,) = caught
    assert isinstance(error, TrialFailed), (function, error)
    return error


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_each_ends_one_attempt_with_its_record(isolation: str, pool: WorkerPool, tmp_path: Path) -> None:
    run = pool.run if isolation == "process" else run_inline
    for function, (kind, message, traces, names) in CASES.items():
        failure = failure_of(run, tmp_path, function)
        assert failure.kind.startswith(kind), function
        assert message in str(failure), function
        for trace in traces:
            assert trace in failure.traceback, (function, failure.traceback)
        assert set(names) <= set(failure.names), (function, failure.names)
        assert len(failure.kind) <= 200, function
        assert len(str(failure).encode("utf-8", "replace")) <= 10_000, function
        assert len(failure.traceback.encode("utf-8", "replace")) <= 100_000, function
    assert "OSError" not in failure_of(run, tmp_path, "mixed").names
    assert str(failure_of(run, tmp_path, "long")).endswith("end")


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_a_trainable_that_cannot_be_imported(isolation: str, pool: WorkerPool, tmp_path: Path) -> None:
    run = pool.run if isolation == "process" else run_inline
    cases = {
        "syntax": ("def train(trial:\n", "SyntaxError", "SyntaxError"),
        "exits": ("raise SystemExit('not today')\n", "SystemExit: not today", "SystemExit"),
        "interrupts": ("raise KeyboardInterrupt\n", "KeyboardInterrupt", "KeyboardInterrupt"),
        "mute": ("class E(OSError):\n    def __str__(self):\n        raise E\nraise E\n", "E: (it cannot be shown)", "OSError"),
        "flaky": ("raise ConnectionError('no network')\n", "no network", "OSError"),
    }
    for name, (code, message, caught) in cases.items():
        (tmp_path / f"{name}_{isolation}.py").write_text(code)
        failure = failure_of(run, tmp_path, name, f"{name}_{isolation}.py:train")
        assert failure.kind == "TrainableError"
        assert message in str(failure), name
        assert {caught, "TrainableError"} <= set(failure.names), name
    assert f"syntax_{isolation}.py" in failure_of(run, tmp_path, "syntax", f"syntax_{isolation}.py:train").traceback


def test_the_records_of_every_attempt_stay(pool: WorkerPool, tmp_path: Path) -> None:
    """Through takeovers and restores, and in a database made from the journal; only what none can hold is escaped."""
    root = LocalRoot(tmp_path / "exp")
    with closing(open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True)) as database:
        lab = Lab.new(database, "kept")
        writer = lab.started()
        expected: dict[int, ErrorInfo] = {}
        for place, function in enumerate(CASES):
            failure = failure_of(pool.run, tmp_path, function)
            error = ErrorInfo(kind=failure.kind, message=str(failure), traceback=failure.traceback)
            writer.fail(Ending(outcome=Outcome.FAILED, error=error), max_failures=99)
            kept = ErrorInfo(kind=error.kind, message=storable(error.message) or "", traceback=storable(error.traceback) or "")
            expected[writer.number] = kept
            if place % 7 == 3:  # the driver dies, or is told to stop, in the next attempt
                outcome = Outcome.PREEMPTED if place % 2 else Outcome.LOST
                lab.claim(0, token=f"{function} interrupted").end(Ending(outcome=outcome))
                lab.take_over()
                lab.epoch += 1
                lab.driver.rerun(lab.row(0), restart=bool(place % 2))
            writer = lab.claim(0, token=function)
        attempts = lab.reader.attempts()[0]
        assert {number: attempt.error for number, attempt in attempts.items() if attempt.error is not None} == expected
        assert len(expected) == len(CASES)

        log = journal.JournalWriter(root, lab.epoch, Outbox(database, lab.id))
        log.start()
        log.flush()
        told = journal.read(root)
        assert told is not None
        with closing(open_database(sqlite_url(tmp_path / "other.db"), create_missing=True)) as other:
            record = lab.record
            identity = Identity(
                uuid=record.uuid, name=record.name, location="/elsewhere", spec=record.spec, workdir=record.workdir, seed=1
            )
            rebuild.rebuild(other, identity, told, epoch=lab.epoch, detail={"journal": told.end})
            found = by_uuid(other, record.uuid)
            assert found is not None
            again = Reader(other, found.id).attempts()[0]
            assert {number: attempt.error for number, attempt in again.items()} == {
                number: attempt.error for number, attempt in attempts.items()
            }
