"""The part of the store's contract that is about attempts: who may write, who comes next, what a trial becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from holdfast.core.errors import (
    AlreadyFinished,
    Conflict,
    Fenced,
    HoldfastError,
    InvalidInput,
    LeaseHeld,
)
from holdfast.core.seeding import trial_seed
from holdfast.core.trial import Outcome, TrialStatus
from holdfast.storage.database import experiments, requests
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.driver import Driver, Ending
from holdfast.storage.database.engine import Database
from holdfast.storage.database.leases import Leases
from holdfast.testing.lab import FAILED, Lab, dump


class AttemptContract:
    """What every database keeps of attempts; part of ``DatabaseContract``."""

    @pytest.fixture
    def database(self) -> Iterator[Database]:
        raise NotImplementedError("the subclass gives it")

    @pytest.fixture
    def lab(self, database: Database) -> Lab:
        return Lab.new(database, "sample")

    # Fencing

    def test_nothing_of_an_older_epoch_gets_in(self, lab: Lab) -> None:
        writer, driver = lab.started(), lab.driver
        lab.save(writer, 0)
        waiting = driver.propose({"x": 0.1})
        attempt, rows = lab.trial(waiting).attempt.id, lab.reader.trial_ids()
        checkpoint = lab.reader.checkpoints()[0].id
        leases = Leases(lab.database, lab.id)
        lab.take_over()
        before = dump(lab.database)
        saved = Saved(path="late", digest="d", bytes=1)
        writes: dict[str, Callable[[], object]] = {
            "propose": lambda: driver.propose({"x": 0.9}, state=b"s"),
            "start": lambda: driver.start({"x": 0.9}, token="late", state=b"s"),
            "end": lambda: driver.end(writer.attempt, Ending(outcome=Outcome.COMPLETED, metrics={"loss": 0.0})),
            "end, retry": lambda: driver.end(writer.attempt, FAILED, retry=True),
            "skip": lambda: driver.skip([rows[waiting]]),
            "skip, nothing": lambda: driver.skip([]),
            "cancel": lambda: driver.cancel(rows[waiting]),
            "rerun": lambda: driver.rerun(rows[waiting], restart=True),
            "evolve": lambda: driver.evolve(0, []),
            "reject": lambda: driver.reject({checkpoint: "bad"}),
            "driver.forget": lambda: driver.forget({checkpoint: "superseded"}),
            "change_spec": lambda: driver.change_spec({}, {}),
            "set_code": lambda: driver.set_code(trainable_digest="x", workdir="/x", location="/x"),
            "tell": lambda: driver.tell("kill"),
            "audit": lambda: driver.audit("late", {}),
            "claim": lambda: AttemptWriter.claim(lab.database, lab.id, 1, attempt, token="late"),
            "check": writer.check,
            "report": lambda: writer.report(1, {"loss": 0.0}, saved=saved),
            "save": lambda: writer.save(1, saved),
            "forget": lambda: writer.forget([checkpoint]),
            "give_back": writer.give_back,
            "telemetry": lambda: writer.telemetry([(1, "cpu", 1.0)]),
            "fail": lambda: writer.fail(FAILED, max_failures=3),
            "writer.end": lambda: writer.end(Ending(outcome=Outcome.PREEMPTED)),
            "renew": lambda: leases.renew(epoch=1, active=5.0),
            "release": lambda: leases.release(epoch=1, active=5.0, ended="late"),
        }
        reads = {"kept", "pins"}
        for kind in (Driver, AttemptWriter):
            methods = {name for name, value in vars(kind).items() if not name.startswith("_") and hasattr(value, "__get__")}
            assert methods - reads <= {name.partition(",")[0].rpartition(".")[2] for name in writes}
        for name, write in writes.items():
            with pytest.raises(Fenced):
                write()
            assert dump(lab.database) == before, name

    @pytest.mark.parametrize("event", ["lost", "retry", "ended", "other token"])
    def test_nothing_of_an_older_attempt_gets_in(self, lab: Lab, event: str) -> None:
        writer = lab.started()
        lab.save(writer, 0)
        match event:
            case "lost":
                lab.driver.end(writer.attempt, Ending(outcome=Outcome.LOST))
                lab.claim(0, token="next")
            case "retry":
                assert writer.fail(FAILED, max_failures=1) is TrialStatus.PENDING
            case "ended":
                lab.end(writer, loss=1.0)
            case _:
                number = lab.driver.propose({"x": 0.2})
                lab.claim(number, token="mine")
                writer = AttemptWriter(
                    database=lab.database,
                    experiment=lab.id,
                    epoch=1,
                    attempt=lab.trial(number).attempt.id,
                    trial=lab.row(number),
                    number=1,
                    token="guessed",
                )
        before = dump(lab.database)
        for write in (
            writer.check,
            lambda: writer.report(1, {"loss": 0.0}, saved=Saved(path="late", digest="d", bytes=1)),
            lambda: writer.save(1, Saved(path="late", digest="d", bytes=1)),
            lambda: writer.forget([lab.reader.checkpoints()[0].id]),
            writer.give_back,
            lambda: writer.telemetry([(1, "cpu", 1.0)]),
            lambda: writer.fail(FAILED, max_failures=3),
            lambda: writer.end(Ending(outcome=Outcome.PREEMPTED)),
        ):
            with pytest.raises(Fenced):
                write()
        if event != "other token":
            with pytest.raises((Fenced, AlreadyFinished)):
                lab.driver.end(writer.attempt, Ending(outcome=Outcome.COMPLETED))
        assert dump(lab.database) == before

    def test_a_lease_goes_to_one(self, lab: Lab) -> None:
        leases = Leases(lab.database, lab.id)
        before = dump(lab.database)
        with pytest.raises(LeaseHeld):
            leases.take(seen=0, epoch=1, holder={"pid": 3}, action="late", detail={})
        assert dump(lab.database) == before
        assert 25 < leases.look().remaining <= 30
        leases.renew(epoch=1, active=1.5)
        seq, stop, active = leases.renew(epoch=1, active=1.5)
        assert (seq, stop, active) == (lab.reader.seq(), False, 3.0)
        requests.request_stop(lab.database, lab.id)
        assert leases.renew(epoch=1, active=0.0)[1]
        leases.release(epoch=1, active=0.5, ended="done")
        assert not leases.look().is_held
        record = experiments.by_uuid(lab.database, lab.record.uuid)
        assert record is not None
        assert (record.active_seconds, record.ended, record.epoch) == (3.5, "done", 1)

    # Attempts

    def test_retries_within_the_budget_wait_in_the_same_transaction(self, lab: Lab) -> None:
        writer = lab.started()
        for number in (1, 2):
            assert writer.fail(FAILED, max_failures=2) is TrialStatus.PENDING
            found = lab.attempts(0)
            assert (found[number].outcome, found[number + 1].reason) == (Outcome.FAILED, "retry")
            writer = lab.claim(0, token=f"token {number}")
        assert writer.fail(FAILED, max_failures=2) is TrialStatus.FAILED
        assert sorted(lab.attempts(0)) == [1, 2, 3]
        assert lab.trial(0).attempts == 3

    def test_a_waiting_retry_tells_how_often_its_trial_has_failed(self, lab: Lab) -> None:
        """Failures of the epoch that made it wait, also after another one has begun; lost and preempted ones are none."""
        lab.started().fail(FAILED, max_failures=9)
        assert lab.claim(0, token="a").end(Ending(outcome=Outcome.PREEMPTED)) is TrialStatus.PENDING
        assert (lab.trial(0).failures, lab.trial(0).attempt.reason) == (0, "resume")
        lab.claim(0, token="b").fail(FAILED, max_failures=9)
        waiting = lab.trial(0)
        assert (waiting.failures, waiting.attempt.reason, waiting.attempt.number) == (2, "retry", 4)
        assert waiting.attempt.created is not None
        before = lab.attempts(0)[3]
        assert before.ended is not None
        assert waiting.attempt.created >= before.ended
        lab.take_over()
        lab.epoch = 2
        lab.driver.rerun(lab.row(0), restart=False)
        assert lab.trial(0).attempt == waiting.attempt
        assert lab.trial(0).failures == 2
        lab.claim(0, token="c").fail(FAILED, max_failures=9)
        assert lab.trial(0).failures == 1
        assert lab.claim(0, token="d").end(Ending(outcome=Outcome.COMPLETED)) is TrialStatus.COMPLETED
        assert lab.trial(0).failures == 0

    def test_a_takeover_gives_a_fresh_budget_and_lost_attempts_do_not_count(self, lab: Lab) -> None:
        writer = lab.started()
        assert writer.fail(FAILED, max_failures=1) is TrialStatus.PENDING
        for outcome in (Outcome.LOST, Outcome.PREEMPTED):
            writer = lab.claim(0, token=outcome)
            assert writer.end(Ending(outcome=outcome)) is TrialStatus.PENDING
        lab.take_over()
        lab.epoch = 2
        assert lab.claim(0).fail(FAILED, max_failures=1) is TrialStatus.PENDING
        assert lab.claim(0).fail(FAILED, max_failures=1) is TrialStatus.FAILED

    def test_a_trial_that_starts_at_once_is_as_one_that_was_claimed(self, lab: Lab) -> None:
        class Child:
            host, pid, started = "here", 7, "then"

        number = lab.driver.propose({"x": 0.5}, state=b"s")
        attempt = lab.trial(number).attempt.id
        options: dict[str, Any] = {"token": "t", "process": Child(), "flow_run_id": "flow", "task_run_id": "task"}
        writers = [
            AttemptWriter.claim(lab.database, lab.id, 1, attempt, **options),
            lab.driver.start({"x": 0.5}, state=b"s", **options),
        ]
        trials = lab.reader.trials()
        assert [trial.number for trial in trials] == [0, 1]
        assert [(trial.status, trial.attempts, trial.config_id) for trial in trials] == [
            (TrialStatus.RUNNING, 1, trials[0].config_id)
        ] * 2
        first, second = (replace(trial.attempt, id=0, created=None, started=None) for trial in trials)
        assert first == second
        assert [trial.seed for trial in trials] == [trial_seed(lab.record.seed, place) for place in range(2)]
        assert [row[1:3] for row in dump(lab.database)["proposer_state"]] == [(0, b"s"), (1, b"s")]
        for writer in writers:
            writer.check()
            lab.save(writer, 0)
            lab.end(writer, loss=1.0)
        assert lab.reader.counts() == {TrialStatus.COMPLETED: 2}
        assert lab.driver.propose({"x": 0.5}) == 2

    def test_what_cannot_start_leaves_nothing(self, lab: Lab) -> None:
        before = dump(lab.database)
        with pytest.raises(HoldfastError):
            lab.driver.start({"x": 0.1}, token=object())  # type: ignore[arg-type]  # no value for the last statement
        assert dump(lab.database) == before
        assert lab.driver.start({"x": 0.5}, token="t").number == 1

    def test_a_cancelled_attempt_is_not_retried(self, lab: Lab) -> None:
        ending = Ending(outcome=Outcome.CANCELLED)
        assert lab.started().fail(ending, max_failures=9) is TrialStatus.CANCELLED

    def test_a_successor_continues_from_the_newest_checkpoint(self, lab: Lab) -> None:
        writer = lab.started()
        for step in (0, 1, 2):
            lab.save(writer, step)
        writer.report(3, {"loss": 3.0})
        lab.driver.reject({lab.reader.checkpoints()[-1].id: "its digest differs"})
        lab.driver.end(writer.attempt, Ending(outcome=Outcome.LOST))
        second = lab.attempts(0)[2]
        assert (second.parent, second.parent_step, second.reason) == (1, 1, "resume")
        assert [checkpoint.step for checkpoint in lab.reader.candidates(0, 2)] == [1, 0]

    def test_a_restart_ends_the_chain(self, lab: Lab) -> None:
        writer = lab.started()
        lab.save(writer, 4)
        lab.driver.end(writer.attempt, FAILED)
        lab.driver.rerun(lab.row(0), restart=True)
        second = lab.attempts(0)[2]
        assert (second.parent, second.parent_step, second.reason) == (None, None, "restart")
        assert lab.reader.candidates(0, 2) == []
        # Claimed, and dead before its first checkpoint: still from 0.
        lab.driver.end(lab.claim(0).attempt, Ending(outcome=Outcome.LOST))
        lab.driver.rerun(lab.row(0), restart=False)
        assert (lab.attempts(0)[3].parent, lab.reader.candidates(0, 3)) == (None, [])
        assert sorted(lab.attempts(0)) == [1, 2, 3]

    def test_a_waiting_attempt_is_used_and_begins_where_the_call_says(self, lab: Lab) -> None:
        writer = lab.started()
        for step in (1, 2):
            lab.save(writer, step)
        lab.driver.end(writer.attempt, Ending(outcome=Outcome.LOST))
        lab.driver.rerun(lab.row(0), restart=False, note="step 3 is not used: torn")
        assert (lab.attempts(0)[2].parent_step, lab.attempts(0)[2].note) == (2, "step 3 is not used: torn")
        lab.driver.reject({lab.reader.checkpoints()[-1].id: "torn"})
        lab.driver.rerun(lab.row(0), restart=False)
        assert (lab.attempts(0)[2].parent_step, lab.attempts(0)[2].reason) == (1, "resume")
        lab.driver.rerun(lab.row(0), restart=True)
        second = lab.attempts(0)[2]
        assert (second.parent, second.parent_step, second.reason) == (None, None, "restart")
        assert sorted(lab.attempts(0)) == [1, 2]
        assert lab.trial(0).status is TrialStatus.PENDING

    def test_history_has_one_canonical_row_a_step(self, lab: Lab) -> None:
        writer = lab.started()
        for step in (0, 1):
            lab.save(writer, step, loss=1.0)
        writer.report(2, {"loss": 1.0})
        lab.driver.end(writer.attempt, Ending(outcome=Outcome.LOST))
        writer = lab.claim(0)
        for step in (2, 3):
            writer.report(step, {"loss": 2.0})
        rows = {(row.step, row.attempt): row.canonical for row in lab.reader.history()}
        assert rows == {(0, 1): True, (1, 1): True, (2, 1): False, (2, 2): True, (3, 2): True}
        lab.driver.end(writer.attempt, Ending(outcome=Outcome.LOST))
        assert (lab.trial(0).metrics, lab.trial(0).step) == ({"loss": 1.0}, 1)

    def test_what_stopping_rules_look_at_is_what_counts(self, lab: Lab) -> None:
        first, second = lab.started(), lab.started()
        for step in range(3):
            first.report(step, {"loss": float(step), "size": True})
        lab.save(first, 3, loss=2**53 + 2, size="s")
        first.report(4, {"loss": math.nan, "size": 1})
        second.report(0, {"loss": -math.inf, "other": 1.0})
        second.report(2, {"loss": None, "size": 10**400})
        lab.driver.end(second.attempt, Ending(outcome=Outcome.COMPLETED, metrics={"loss": -1.0}))
        of_second = [(1, 0, -math.inf)]
        of_first = [(0, 0, 0.0), (0, 1, 1.0), (0, 2, 2.0), (0, 3, 2.0**53 + 2)]
        both = lab.reader.measured(["loss", "size", "none"])
        assert repr(both["loss"]) == repr([*of_first, (0, 4, math.nan), *of_second])
        assert both["size"] == [(0, 4, 1.0), (1, 2, math.inf)]
        assert both["none"] == []
        lab.end(first, Outcome.LOST)
        assert lab.reader.measured(["loss"])["loss"] == [*of_first, *of_second]
        assert lab.reader.measured(["loss"], first=1, last=1)["loss"] == of_second
        third = lab.claim(0)
        third.report(4, {"loss": 4.0})
        assert lab.reader.measured(["loss"], first=0, last=0)["loss"] == [*of_first, (0, 4, 4.0)]
        lab.end(third)
        lab.driver.rerun(lab.row(0), restart=True)
        assert lab.reader.measured(["loss"])["loss"] == of_second

    def test_why_a_report_was_answered_as_it_was_is_added_to_the_note(self, lab: Lab) -> None:
        writer = lab.started()
        writer.report(0, {"loss": 1.0})
        before = lab.trial(0)
        assert (before.attempt.note, before.ended_seq) == ("", None)
        for step, note in enumerate(("first: it's 50 % worse", "second"), start=1):
            writer.report(step, {"loss": 1.0}, decision="prune", note=note)
        assert lab.trial(0).attempt.note == "first: it's 50 % worse; second"
        assert lab.trial(0).seq > before.seq
        lab.end(writer, Outcome.PRUNED)
        ended = lab.trial(0)
        assert ended.attempt.note == "first: it's 50 % worse; second"
        assert ended.ended_seq == ended.seq

    def test_metrics_of_an_attempt_that_has_not_reported_are_its_chains(self, lab: Lab) -> None:
        writer = lab.started()
        lab.save(writer, 5, loss=1.0)
        lab.driver.end(writer.attempt, Ending(outcome=Outcome.PREEMPTED))
        assert (lab.trial(0).metrics, lab.trial(0).step) == ({"loss": 1.0}, 5)
        writer = lab.claim(0)
        lab.end(writer, final=2.0)
        assert (lab.trial(0).metrics, lab.trial(0).step) == ({"loss": 1.0, "final": 2.0}, 5)
        lab.driver.rerun(lab.row(0), restart=True)
        assert (lab.trial(0).metrics, lab.trial(0).step, lab.trial(0).attempts) == ({}, None, 2)

    def test_pruning_marks_rows(self, lab: Lab) -> None:
        writer = lab.started()
        for step, loss in ((0, 0.5), (1, math.nan), (2, 0.1)):
            lab.save(writer, step, loss=loss, note="x")
        kept, superseded = writer.kept()
        assert [(item.step, item.metrics) for item in kept] == [(0, {"loss": 0.5}), (1, {}), (2, {"loss": 0.1})]
        assert superseded == []
        assert writer.kept(after=kept[1].id) == (kept[2:], [])
        assert writer.pins() == {item.id: False for item in kept}
        assert writer.forget([kept[0].id]) == {kept[0].id}
        assert writer.forget([kept[0].id]) == set()  # it was deleted already: its files are not to be deleted again
        assert [item.step for item in writer.kept()[0]] == [1, 2]
        assert set(writer.pins()) == {item.id for item in kept[1:]}

    # Trials

    @pytest.mark.parametrize("restart", [False, True])
    @pytest.mark.parametrize("outcome", ["completed", "pruned", "failed", "timed_out", "cancelled"])
    def test_ended_trials_run_again_under_their_number(self, lab: Lab, outcome: str, restart: bool) -> None:
        lab.end(lab.started(), Outcome(outcome), loss=1.0)
        lab.driver.rerun(lab.row(0), restart=restart)
        found = lab.trial(0)
        assert (found.status, found.attempt.number, found.attempts) == (TrialStatus.PENDING, 2, 1)
        assert lab.reader.ended_since(-1) == []
        lab.end(lab.claim(0), loss=2.0)
        assert (lab.trial(0).status, lab.trial(0).metrics) == (TrialStatus.COMPLETED, {"loss": 2.0})

    def test_running_trials_are_neither_rerun_nor_skipped_nor_cancelled(self, lab: Lab) -> None:
        lab.started()
        row, before = lab.row(0), dump(lab.database)
        with pytest.raises(Conflict):
            lab.driver.rerun(row, restart=False)
        with pytest.raises(Conflict):
            lab.driver.skip([row])
        with pytest.raises(Conflict):
            lab.driver.cancel(row)
        assert dump(lab.database) == before

    def test_left_out_trials_can_run_later(self, lab: Lab) -> None:
        for _ in range(2):
            lab.driver.propose({"x": 0.5})
        lab.driver.skip([lab.row(0), lab.row(1)])
        assert lab.reader.counts() == {TrialStatus.SKIPPED: 2}
        lab.driver.rerun(lab.row(0), restart=False)
        lab.driver.cancel(lab.row(1))
        assert lab.reader.counts() == {TrialStatus.PENDING: 1, TrialStatus.CANCELLED: 1}
        assert (lab.trial(0).attempt.number, lab.trial(0).attempts) == (1, 0)
        lab.claim(0)

    def test_one_bad_trial_of_a_list_changes_none(self, lab: Lab) -> None:
        lab.driver.propose({"x": 0.5})
        lab.started()
        before = dump(lab.database)
        with pytest.raises(Conflict):
            lab.driver.skip([lab.row(0), lab.row(1)])
        assert dump(lab.database) == before

    def test_a_waiting_attempt_cannot_end(self, lab: Lab) -> None:
        lab.driver.propose({"x": 0.5})
        before = dump(lab.database)
        for outcome in (Outcome.COMPLETED, Outcome.FAILED, Outcome.LOST):
            with pytest.raises(Conflict):
                lab.driver.end(lab.trial(0).attempt.id, Ending(outcome=outcome))
        assert dump(lab.database) == before

    def test_a_request_to_cancel_outlives_a_retry_and_ends_with_the_trial(self, lab: Lab) -> None:
        writer = lab.started()
        requests.request_cancel(lab.database, lab.id, 0)
        writer.fail(FAILED, max_failures=1)
        assert lab.reader.cancel_requests() == {0}
        lab.driver.rerun(lab.row(0), restart=False)
        assert lab.reader.cancel_requests() == {0}
        lab.driver.cancel(lab.row(0))
        assert lab.reader.cancel_requests() == set()
        with pytest.raises(Conflict):
            requests.request_cancel(lab.database, lab.id, 0)
        lab.driver.rerun(lab.row(0), restart=False)
        assert lab.reader.cancel_requests() == set()
        with pytest.raises(InvalidInput):
            requests.request_cancel(lab.database, lab.id, 1)
