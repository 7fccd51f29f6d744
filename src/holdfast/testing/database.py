"""The contract of the experiment store, executable: subclass :class:`DatabaseContract` and give one fixture.

class TestMine(DatabaseContract):
    @pytest.fixture
    def database(self, tmp_path):
        with closing(open_database(...)) as database:       # with its schema, and nothing else in it
            yield database
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import text

from holdfast.core.errors import (
    AlreadyClaimed,
    AlreadyFinished,
    CheckpointConflict,
    Conflict,
    ExperimentExists,
    Fenced,
    HoldfastError,
    InvalidInput,
    InvalidStep,
    NotStorable,
)
from holdfast.core.trial import ERRORED, SCORED, ErrorInfo, Outcome, TrialStatus
from holdfast.core.values import Config, Metrics
from holdfast.storage.database import experiments, requests
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.driver import Driver, Ending, add_trial
from holdfast.storage.database.engine import Statement, Transaction
from holdfast.storage.database.loading import load
from holdfast.testing import racing
from holdfast.testing.attempts import AttemptContract
from holdfast.testing.lab import FAILED, TYPED, Lab, dump, same
from holdfast.testing.populations import PopulationContract
from holdfast.testing.queueing import QueueContract
from holdfast.testing.racing import Racers, url_of
from holdfast.testing.recovery import RecoveryContract
from holdfast.testing.samples import sample_spec
from holdfast.testing.upkeep import UpkeepContract
from holdfast.testing.workers import WorkersContract

PROCESSES = 8


def sorted_by_key(metrics: Metrics | None) -> Metrics | None:
    return None if metrics is None else dict(sorted(metrics.items()))


class DatabaseContract(AttemptContract, PopulationContract, QueueContract, RecoveryContract, UpkeepContract, WorkersContract):
    """What every database keeps. Give the fixture ``database``."""

    @pytest.fixture(scope="class")
    @classmethod
    def racers(cls) -> Iterator[Racers]:
        with Racers(PROCESSES) as racers:
            yield racers

    # Experiments

    def test_a_new_experiment_is_empty(self, lab: Lab) -> None:
        assert (lab.reader.trials(), lab.reader.history(), lab.reader.checkpoints()) == ([], [], [])
        assert lab.reader.counts() == {}

    def test_a_taken_name_is_refused_with_the_restore_command(self, lab: Lab) -> None:
        before = dump(lab.database)
        with pytest.raises(ExperimentExists, match="holdfast restore /nowhere/sample"):
            experiments.create(lab.database, sample_spec(), uuid="other", location="/there", seed=1, workdir="/")
        assert dump(lab.database) == before

    def test_deleting_leaves_other_experiments_and_shared_configs(self, lab: Lab) -> None:
        other = Lab.new(lab.database, "other")
        for each in (lab, other):
            writer = each.started()
            each.save(writer, 0)
            writer.telemetry([(1, "cpu", 0.5)])
            each.driver.end(writer.attempt, Ending(outcome=Outcome.LOST))
        experiments.delete(lab.database, lab.id)
        assert experiments.by_name(lab.database, "sample") is None
        assert [trial.config for trial in other.reader.trials()] == [{"x": 0.5}]
        assert len(other.reader.history()) == len(other.reader.checkpoints()) == len(other.reader.telemetry()) == 1
        with pytest.raises(Fenced):
            lab.driver.propose({"x": 0.1})

    # Values

    def test_metrics_come_back_as_they_were_given(self, lab: Lab) -> None:
        writer = lab.started()
        writer.report(0, TYPED)
        assert same(lab.trial(0).metrics, TYPED)
        lab.driver.end(writer.attempt, Ending(outcome=Outcome.COMPLETED, metrics={"final": math.nan}))
        assert same(lab.trial(0).metrics, {**TYPED, "final": math.nan})
        assert same(lab.reader.history()[0].metrics, TYPED)

    @pytest.mark.parametrize("value", [{1, 2}, object(), b"x", {"a": {3: 4}}], ids=["set", "object", "bytes", "int key"])
    def test_what_cannot_be_stored_is_refused_and_nothing_is_written(self, lab: Lab, value: object) -> None:
        writer = lab.started()
        before = dump(lab.database)
        with pytest.raises(NotStorable):
            writer.report(0, {"good": 1, "bad": value})
        with pytest.raises(NotStorable):
            writer.telemetry([(1, "good", 1), (1, "bad", value)])
        assert dump(lab.database) == before

    @pytest.mark.parametrize("step", [-1, True, 2.0, "3", None])
    def test_a_step_that_is_none_is_refused(self, lab: Lab, step: Any) -> None:
        writer = lab.started()
        before = dump(lab.database)
        with pytest.raises(InvalidStep):
            writer.report(step, {"loss": 1.0})
        with pytest.raises(InvalidStep):
            writer.save(step, Saved(path="p", digest="d", bytes=1))
        assert dump(lab.database) == before

    @pytest.mark.parametrize(
        "value",
        [math.nan, math.inf, -math.inf, {1, 2}, object(), b"x", [1.0], {"a": 1}, "caf\udce9"],
        ids=["nan", "inf", "-inf", "set", "object", "bytes", "list", "dict", "surrogate"],
    )
    def test_a_config_that_is_none_is_refused_and_nothing_is_written(self, lab: Lab, value: Any) -> None:
        before = dump(lab.database)
        with pytest.raises(InvalidInput, match="'x'"):
            lab.driver.propose({"good": 1.0, "x": value})
        with pytest.raises(InvalidInput):
            lab.driver.propose({3: 1.0})  # type: ignore[dict-item]  # what else it is given
        assert dump(lab.database) == before

    @pytest.mark.parametrize("unknown", [-1, 10**9, 2**63, -(2**70)])
    def test_ids_that_nothing_has_are_refused_and_nothing_is_written(self, lab: Lab, unknown: int) -> None:
        writer = lab.started()
        before = dump(lab.database)
        calls: dict[str, Callable[[], object]] = {
            "claim": lambda: AttemptWriter.claim(lab.database, lab.id, 1, unknown, token="t"),
            "end": lambda: lab.driver.end(unknown, FAILED),
            "skip": lambda: lab.driver.skip([unknown]),
            "cancel": lambda: lab.driver.cancel(unknown),
            "rerun": lambda: lab.driver.rerun(unknown, restart=False),
            "reject": lambda: lab.driver.reject({unknown: "bad"}),
            "forget": lambda: writer.forget([unknown]),
            "driver.forget": lambda: lab.driver.forget({unknown: "superseded"}),
            "pin": lambda: requests.pin(lab.database, lab.id, unknown, 0),
            "request": lambda: requests.request_cancel(lab.database, lab.id, unknown),
            "note": lambda: requests.note(lab.database, unknown, "noted", {}),
            "driver": lambda: Driver(lab.database, unknown, 1, seed=1).propose({"x": 0.5}),
        }
        for name, call in calls.items():
            with pytest.raises(HoldfastError):
                call()
            assert dump(lab.database) == before, name
        assert lab.reader.trials(first=10**9) == []

    def test_text_that_no_database_holds_finds_nothing(self, lab: Lab) -> None:
        for name in ("caf\udce9", "nul\0"):
            with suppress(HoldfastError):  # refused is as good
                assert experiments.by_name(lab.database, name) is None

    def test_configs_and_seeds_come_back(self, lab: Lab) -> None:
        config: Config = {"f": 1.0, "i": 1, "b": True, "n": None, "s": "ü'\"\\", "$float": "NaN"}
        number = lab.driver.propose(config)
        assert same(lab.trial(number).config, dict(sorted(config.items())))
        assert same(lab.reader.config(lab.trial(number).config_id), lab.trial(number).config)

    def test_times_are_aware_and_exact(self, lab: Lab) -> None:
        start = datetime(2026, 3, 29, 2, 30, 0, 123457, tzinfo=timezone(timedelta(hours=5, minutes=45)))
        lab.queue(start)
        assert lab.trial(0).ts_start == start
        assert lab.trial(0).ts_start.utcoffset() == timedelta(0)  # type: ignore[union-attr]  # it has one
        with pytest.raises(InvalidInput, match="time zone"):
            lab.queue(datetime(2026, 3, 29))

    # Results

    def test_ended_trials_have_what_they_ended_with(self, lab: Lab) -> None:
        first, second, _ = (lab.started(x) for x in (0.1, 0.2, 0.3))
        lab.driver.end(first.attempt, FAILED)
        lab.end(second, loss=1.5, note="good", n=2)
        found = [(trial.number, trial.status, trial.config, trial.metrics) for trial in lab.reader.trials()]
        assert found == [
            (0, TrialStatus.FAILED, {"x": 0.1}, {}),
            (1, TrialStatus.COMPLETED, {"x": 0.2}, {"loss": 1.5, "note": "good", "n": 2}),
            (2, TrialStatus.RUNNING, {"x": 0.3}, {}),
        ]
        assert [trial.number for trial in lab.reader.trials(first=1, last=1)] == [1]

    def test_failed_trials_keep_their_metrics_and_traceback(self, lab: Lab) -> None:
        writer = lab.started()
        writer.report(0, {"loss": 2.0})
        trace = 'File "caf\udce9.py", line 1\nValueError: \0'
        error = ErrorInfo(kind="ValueError", message="in caf\udce9.py", traceback=trace)
        assert writer.fail(Ending(outcome=Outcome.FAILED, error=error), max_failures=0) is TrialStatus.FAILED
        found = lab.trial(0)
        assert (found.metrics, found.step) == ({"loss": 2.0}, 0)
        assert found.error is not None
        assert (found.error.kind, found.error.message) == ("ValueError", "in caf\\udce9.py")
        assert found.error.traceback == 'File "caf\\udce9.py", line 1\nValueError: \\x00'

    def test_a_long_error_keeps_its_head_and_tail(self, lab: Lab) -> None:
        writer = lab.started()
        error = ErrorInfo(kind="ValueError", message="a" * 10**6 + "z", traceback="a" * 10**6 + "\udce9" * 10**5 + "z")
        writer.fail(Ending(outcome=Outcome.FAILED, error=error), max_failures=0)
        found = lab.trial(0).error
        assert found is not None
        for kept, limit in ((found.message, 10_000), (found.traceback, 100_000)):
            assert kept.startswith("aaa")
            assert kept.endswith("z")
            assert len(kept.encode()) <= limit

    def test_the_first_final_update_stands(self, lab: Lab) -> None:
        writer = lab.started()
        lab.end(writer, loss=1.0)
        before = dump(lab.database)
        with pytest.raises(AlreadyFinished):
            lab.end(writer, loss=2.0)
        for again in (
            lambda: writer.fail(FAILED, max_failures=0),
            lambda: writer.end(Ending(outcome=Outcome.PREEMPTED)),
            lambda: writer.report(5, {"loss": 3.0}),
        ):
            with pytest.raises(Fenced):
                again()
        assert dump(lab.database) == before

    def test_incremental_load_by_completion(self, lab: Lab) -> None:
        writers = [lab.started(x) for x in (0.1, 0.2, 0.3)]
        assert lab.reader.ended_since(-1) == []
        lab.end(writers[2], loss=1.0)
        ((number, cursor),) = lab.reader.ended_since(-1)
        assert number == 2
        lab.end(writers[1], loss=1.0)
        lab.driver.end(writers[0].attempt, FAILED)
        assert [number for number, _ in lab.reader.ended_since(cursor)] == [1, 0]

    def test_load_says_what_trials_say(self, lab: Lab) -> None:
        overlaid, whole, pruned, failed, resumed, again, bare, _ = (lab.started(place / 10) for place in range(8))
        lab.driver.propose({"x": 0.9})
        for step in range(3):
            overlaid.report(step, {**TYPED, "loss": float(step), "step": step})
        lab.end(overlaid, loss=math.nan, final=2**60)
        lab.end(whole, **TYPED)
        pruned.report(0, {"loss": 3.0, "n": 1})
        lab.end(pruned, Outcome.PRUNED)
        failed.report(0, {"loss": 2.0})
        failed.fail(FAILED, max_failures=0)
        lab.save(resumed, 4, loss=4.0, note="x")
        lab.driver.end(resumed.attempt, Ending(outcome=Outcome.PREEMPTED))
        lab.end(lab.claim(4), final=0.5)  # its last report is its predecessor's
        lab.save(again, 0, loss=1.0, gone=True)
        lab.driver.end(again.attempt, Ending(outcome=Outcome.LOST))
        lab.claim(5).report(1, {"loss": 0.25})
        lab.driver.end(lab.trial(5).attempt.id, Ending(outcome=Outcome.COMPLETED))
        lab.end(bare)
        for first in (0, 1, 4, 6, 7):
            listed = [trial for trial in lab.reader.trials(first=first) if trial.status in SCORED | ERRORED]
            numbers, configs, found, statuses, origins = load(lab.reader, first=first)
            assert numbers == [trial.number for trial in listed]
            assert configs == [trial.config for trial in listed]
            assert statuses == [trial.status for trial in listed]
            assert origins == [trial.origin for trial in listed]
            for trial, score in zip(listed, found, strict=True):
                expected = trial.metrics if trial.status in SCORED else None
                assert same(sorted_by_key(score), sorted_by_key(expected)), trial.number
        assert load(lab.reader, first=4)[2] == [{"loss": 4.0, "note": "x", "final": 0.5}, {"loss": 0.25}, {}]

    def test_changes_since_a_seq(self, lab: Lab) -> None:
        writers = [lab.started(x) for x in (0.1, 0.2)]
        seq = lab.reader.seq()
        assert lab.reader.trials(since=seq) == []
        lab.end(writers[0], loss=1.0)
        assert [trial.number for trial in lab.reader.trials(since=seq)] == [0]

    def test_a_report_is_unique_per_attempt_and_step(self, lab: Lab) -> None:
        writer = lab.started()
        lab.save(writer, 3, loss=1.0)
        before = dump(lab.database)
        with pytest.raises(CheckpointConflict):
            writer.report(3, {"loss": 2.0})
        with pytest.raises(CheckpointConflict):
            writer.save(3, Saved(path="other", digest="d", bytes=1))
        assert dump(lab.database) == before

    def test_telemetry_sent_again_is_stored_once(self, lab: Lab) -> None:
        writer = lab.started()
        rows = [(place * 1000, name, value) for place in range(50) for name, value in (("cpu", place / 7), ("gpu", None))]
        for _ in range(3):
            writer.telemetry(rows)
        writer.telemetry([])
        found = [row[1:] for row in lab.reader.telemetry(first=0, last=0)]
        assert len(found) == 100
        assert found == sorted(found, key=lambda row: row[:2])
        assert found[0] == (datetime(1970, 1, 1, tzinfo=UTC), "cpu", 0.0)

    # Configs and numbers

    def test_equal_configs_share_a_row(self, lab: Lab) -> None:
        other = Lab.new(lab.database, "other")
        config: Config = {"a": 1, "b": "x"}
        lab.driver.propose(config)
        lab.driver.propose({"b": "x", "a": 1})
        other.driver.propose(config)
        lab.driver.propose({"a": 1.0, "b": "x"})
        lab.driver.propose({"a": True, "b": "x"})
        identities = [trial.config_id for trial in [*lab.reader.trials(), *other.reader.trials()]]
        assert identities[0] == identities[1] == identities[4]
        assert len(set(identities)) == len(dump(lab.database)["config"]) == 3

    def test_processes_at_once_share_configs_and_get_dense_numbers(self, lab: Lab, racers: Racers) -> None:
        count = 12
        job = {"url": url_of(lab.database), "experiment": lab.id, "epoch": 1}
        jobs = [{**job, "configs": [{"x": place / 4} for place in range(count)]} for _ in range(PROCESSES)]
        answers = racers.race(racing.propose, jobs)
        assert all(isinstance(answer, list) for answer in answers), answers
        assert sorted(number for answer in answers for number in answer) == list(range(PROCESSES * count))
        assert len(dump(lab.database)["config"]) == count
        assert [trial.number for trial in lab.reader.trials()] == list(range(PROCESSES * count))

    def test_processes_at_once_share_configs_between_experiments(self, lab: Lab, racers: Racers) -> None:
        labs = [Lab.new(lab.database, f"other {place}") for place in range(PROCESSES)]
        configs = [{"x": place / 4} for place in range(6)]
        jobs = [{"url": url_of(lab.database), "experiment": each.id, "epoch": 1, "configs": configs} for each in labs]
        assert racers.race(racing.propose, jobs) == [list(range(6))] * PROCESSES
        assert len(dump(lab.database)["config"]) == 6

    # Claiming

    def test_of_two_claimers_one_wins(self, lab: Lab) -> None:
        lab.driver.propose({"x": 0.5})
        winner = lab.claim(0, token="a")
        before = dump(lab.database)
        with pytest.raises(AlreadyClaimed):
            lab.claim(0, token="b")
        assert dump(lab.database) == before
        winner.check()

    def test_of_many_processes_one_wins_each_attempt(self, lab: Lab, racers: Racers) -> None:
        numbers = [lab.driver.propose({"x": place / 20}) for place in range(10)]
        attempts = [lab.trial(number).attempt.id for number in numbers]
        job = {"url": url_of(lab.database), "experiment": lab.id, "epoch": 1, "attempts": attempts}
        answers = racers.race(racing.claim, [{**job, "token": f"racer {place}"} for place in range(PROCESSES)])
        assert sorted(attempt for answer in answers for attempt in answer) == attempts
        assert lab.reader.counts() == {TrialStatus.RUNNING: 10}

    def test_a_left_out_or_cancelled_trial_cannot_be_claimed(self, lab: Lab) -> None:
        for _ in range(2):
            lab.driver.propose({"x": 0.5})
        lab.driver.skip([lab.row(0)])
        lab.driver.cancel(lab.row(1))
        before = dump(lab.database)
        for number in range(2):
            with pytest.raises(Conflict):
                lab.claim(number)
        assert dump(lab.database) == before

    def test_rows_of_another_experiment_are_refused(self, lab: Lab) -> None:
        other = Lab.new(lab.database, "other")
        running, waiting = lab.started(), lab.driver.propose({"x": 0.1})
        before = dump(lab.database)
        attempt = lab.trial(waiting).attempt.id
        with pytest.raises(AlreadyClaimed):
            AttemptWriter.claim(lab.database, other.id, 1, attempt, token="t")
        for write in (
            lambda: other.driver.end(running.attempt, Ending(outcome=Outcome.COMPLETED)),
            lambda: other.driver.skip([lab.row(waiting)]),
            lambda: other.driver.cancel(lab.row(waiting)),
            lambda: other.driver.rerun(lab.row(waiting), restart=False),
            lambda: other.driver.end(10**9, Ending(outcome=Outcome.COMPLETED)),
        ):
            with pytest.raises(Conflict):
                write()
        assert dump(lab.database) == before

    # Reads

    def test_reads_take_as_many_statements_however_many_trials(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        executed = 0
        run = Transaction.run

        def counting(self: Transaction, *arguments: Any, **values: Any) -> Any:
            nonlocal executed
            executed += 1
            return run(self, *arguments, **values)

        monkeypatch.setattr(Transaction, "run", counting)
        reads: dict[str, Callable[[], Any]] = {
            "trials": lab.reader.trials,
            "attempts": lab.reader.attempts,
            "checkpoints": lab.reader.checkpoints,
            "history": lab.reader.history,
            "telemetry": lab.reader.telemetry,
            "ended_since": lambda: lab.reader.ended_since(-1),
            "last_decisions": lab.reader.last_decisions,
        }
        counts = []
        for target in (10, 60):
            for number in range(sum(lab.reader.counts().values()), target):
                writer = lab.started(number / 1000)
                lab.save(writer, 0)
                lab.driver.end(writer.attempt, Ending(outcome=Outcome.LOST if number % 2 else Outcome.COMPLETED))
            found = {}
            for name, read in reads.items():
                executed = 0
                read()
                found[name] = executed
            counts.append(found)
        assert counts[0] == counts[1]
        assert max(counts[0].values()) <= 3
        assert len(lab.reader.trials()) == 60

    def test_a_read_sees_one_state(self, lab: Lab) -> None:
        lab.driver.propose({"x": 0.5})
        count = Statement(text("SELECT COUNT(*) FROM trial WHERE experiment_id = :experiment"))
        with lab.database.snapshot() as state:
            assert state.run(count, experiment=lab.id) == [(1,)]
            lab.driver.propose({"x": 0.6})
            assert state.run(count, experiment=lab.id) == [(1,)]
        assert len(lab.reader.trials()) == 2

    def test_a_failed_transaction_leaves_nothing_and_the_next_one_works(self, lab: Lab) -> None:
        before = dump(lab.database)
        starts = [None, datetime(2026, 1, 1)]  # the second one is refused
        with pytest.raises(InvalidInput), lab.database.write() as tx:
            [add_trial(tx, lab.id, 5, {"x": 0.5}, seed=1, source="queued", ts_start=start) for start in starts]
        assert dump(lab.database) == before
        assert lab.driver.propose({"x": 0.5}) == 0

    def test_a_transaction_in_a_transaction_is_refused_and_harms_nothing(self, lab: Lab) -> None:
        with lab.database.write() as tx:
            add_trial(tx, lab.id, 5, {"x": 0.5}, seed=1, source="proposed")
            with pytest.raises(RuntimeError, match="open"):
                lab.driver.propose({"x": 0.6})
        assert [trial.config for trial in lab.reader.trials()] == [{"x": 0.5}]

    def test_errors_are_ours(self, lab: Lab) -> None:
        with pytest.raises(HoldfastError), lab.database.read() as connection:
            connection.execute(text("SELECT nonsense FROM nowhere"))
        with pytest.raises(HoldfastError), lab.database.write() as tx:
            add_trial(tx, 10**9, 5, {"x": 0.5}, seed=1, source="proposed")  # a foreign key that leads nowhere
        assert lab.reader.trials() == []
