"""What becomes of attempts whose tasks ended without saying so: rows decide."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from holdfast.core.errors import AlreadyClaimed, Fenced, Infrastructure, StorageError, Unfit
from holdfast.core.trial import Attempt, Outcome, Trial, TrialStatus
from holdfast.flows.lost import MOST_LOSSES, MOST_REFUSALS, SILENT_SECONDS, Losses, Refusals, Verdict, fatal, gone, judge
from holdfast.flows.runners.port import How
from holdfast.storage.database.workers import WorkerRow
from holdfast.tasks.workers import processes

OPEN = Trial(
    number=3,
    status=TrialStatus.RUNNING,
    config={},
    config_id=1,
    seed=1,
    seq=1,
    attempt=Attempt(id=7, number=2, claimed=True),
)
WAITING = replace(OPEN, status=TrialStatus.PENDING, attempt=Attempt(id=7, number=2))
CLOSED = replace(OPEN, status=TrialStatus.PENDING, attempt=Attempt(id=8, number=3))
ENDED = replace(OPEN, status=TrialStatus.COMPLETED, attempt=replace(OPEN.attempt, outcome=Outcome.COMPLETED))
CANCELLED = replace(WAITING, status=TrialStatus.CANCELLED)


class TestJudged:
    @pytest.mark.parametrize("how", list(How))
    @pytest.mark.parametrize("trial", [None, CLOSED, ENDED, CANCELLED])
    def test_what_has_ended_stays_as_it_is(self, trial: Trial | None, how: How) -> None:
        assert judge(trial, 2, how) is Verdict.OVER

    @pytest.mark.parametrize("how", list(How))
    @pytest.mark.parametrize("error", [None, Unfit("no database"), Fenced("x"), AlreadyClaimed("x"), RuntimeError("x")])
    def test_what_nobody_claimed_is_handed_out_again(self, how: How, error: object) -> None:
        assert judge(WAITING, 2, how, error) is Verdict.AGAIN

    @pytest.mark.parametrize("error", [AlreadyClaimed("by another"), Fenced("given up"), Unfit("a second worker")])
    def test_a_second_execution_says_nothing_of_the_first(self, error: object) -> None:
        assert judge(OPEN, 2, How.STATE, error) is Verdict.WATCH

    def test_what_an_engine_lost_sight_of_may_run(self) -> None:
        assert judge(OPEN, 2, How.UNCLEAR) is Verdict.WATCH

    def test_what_lost_its_worker_is_lost(self) -> None:
        assert judge(OPEN, 2, How.LOST) is Verdict.LOSE
        assert judge(OPEN, 2, How.STATE, StorageError("the disk is full")) is Verdict.LOSE


def worker(**changes: object) -> WorkerRow:
    pid = os.getpid()
    row = WorkerRow(
        id=1,
        name="here/1",
        engine="dask",
        hostname="here",
        host=processes.same_host(),
        pid=pid,
        started=processes.identity(pid) or "",
        about={},
        epoch=1,
        silent=0.5,
        left=None,
    )
    return replace(row, **changes)  # type: ignore[arg-type]  # any of its fields


class TestWorkers:
    def test_who_lives_and_says_so_is_not_gone(self) -> None:
        assert gone([worker(), worker(host="another/boot", pid=1, silent=SILENT_SECONDS - 0.1)]) == []

    def test_who_left_fell_silent_or_died_is_gone(self) -> None:
        rows = [worker(left="idle"), worker(silent=SILENT_SECONDS), worker(started="another start"), worker()]
        assert [row for row, _ in gone(rows)] == rows[:3]
        assert [why for _, why in gone(rows)] == ["it left: idle", "it has been silent for 30 s", "its process is gone"]

    def test_a_process_of_another_host_is_judged_by_its_silence_alone(self) -> None:
        assert gone([worker(host="another/boot", started="another start")]) == []


class TestLosses:
    def test_a_trial_that_takes_worker_after_worker_with_it_is_to_blame(self) -> None:
        losses = Losses()
        last = []
        for _ in range(MOST_LOSSES):
            last.append(losses.is_last(OPEN))
            losses.add(OPEN)
        assert last == [False] * (MOST_LOSSES - 1) + [True]
        assert losses.add(OPEN) == MOST_LOSSES + 1
        assert fatal("gone").outcome is Outcome.CRASHED

    def test_one_that_comes_further_is_not(self) -> None:
        losses = Losses()
        for step in range(3 * MOST_LOSSES):
            assert not losses.is_last(replace(OPEN, step=step))
            assert losses.add(replace(OPEN, step=step)) == 1

    def test_one_that_comes_to_about_the_same_step_each_time_is(self) -> None:
        losses = Losses()
        assert [losses.add(replace(OPEN, step=step)) for step in (100, 97, 99, 96, 100)] == [1, 2, 3, 4, 5]

    def test_each_trial_is_on_its_own(self) -> None:
        losses = Losses()
        assert {losses.add(replace(OPEN, number=number)) for number in range(3 * MOST_LOSSES)} == {1}


class TestRefusals:
    def test_each_wait_is_longer_and_a_reason_is_said_once(self) -> None:
        said: list[str] = []
        now = [0.0]
        refusals = Refusals(said.append, lambda: now[0])
        for pause in (0.5, 1.0, 2.0, 4.0):
            refusals.add(4, "worker a is unfit")
            assert refusals.waiting == {4}
            now[0] += pause - 0.01
            assert refusals.due() == []
            now[0] += 0.02
            assert refusals.due() == [4]
        assert refusals.waiting == set()
        assert len(said) == 1

    def test_too_many_in_a_row_interrupt_the_search_with_the_reason(self) -> None:
        now = [0.0]
        refusals = Refusals(lambda words: None, lambda: now[0])
        for _ in range(MOST_REFUSALS - 1):
            refusals.add(4, "no disk")
            now[0] += 1
        with pytest.raises(Infrastructure, match=r"10 times in a row no worker began trial 4, .*no disk"):
            refusals.add(4, "no disk")
        assert now[0] < 60

    def test_many_workers_that_say_the_same_for_a_while_interrupt_nothing(self) -> None:
        now = [0.0]
        refusals = Refusals(lambda words: None, lambda: now[0])
        for number in range(5 * MOST_REFUSALS):
            refusals.add(number, "the database is away")
            now[0] += 1

    def test_while_others_run_a_worker_that_refuses_all_interrupts_nothing(self) -> None:
        now = [0.0]
        refusals = Refusals(lambda words: None, lambda: now[0])
        for _ in range(5 * MOST_REFUSALS):
            refusals.add(4, "unfit", running=True)
            now[0] += 1
        with pytest.raises(Infrastructure, match="unfit"):
            refusals.add(4, "unfit")

    def test_a_trial_that_begins_in_between_counts(self) -> None:
        now = [0.0]
        refusals = Refusals(lambda words: None, lambda: now[0])
        for count in range(5 * MOST_REFUSALS):
            refusals.add(4, "no disk")
            now[0] += 1
            if count % (MOST_REFUSALS - 1) == 0:
                refusals.begun(7)
                assert 4 in refusals.waiting
