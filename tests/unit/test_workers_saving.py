"""Saves in the background: what is stored, who waits for whom, and that no error or checkpoint is lost on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from workers_kit import PATIENCE, Bell, Recorder, make_job, publish, runs, wait_for_end

from holdfast.core.errors import Fenced, StorageError, TrialCrashed, TrialFailed, TrialTimedOut
from holdfast.core.trial import Outcome
from holdfast.storage.checkpoints.local import LocalCheckpoints, Published
from holdfast.tasks.workers.inline import run_inline
from holdfast.tasks.workers.messages import Decision, Ended, Job, Report, Supervision
from holdfast.tasks.workers.pool import WorkerPool

TRAINABLES = Path(__file__).with_name("workers_saves.py")
Runner = Callable[[Job, Supervision], Ended]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(1) as made:
        yield made


@pytest.fixture(params=["process", "inline"])
def runner(request: pytest.FixtureRequest, pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.chdir(tmp_path)
    return pool.run if request.param == "process" else run_inline


def recorder_of(root: Path, function: str, *, config: dict[str, Any] | None = None, **changes: Any) -> Recorder:
    given = {"trainable": f"{TRAINABLES}:{function}", "asynchronous": True, "config": config or {}, **changes}
    return Recorder(make_job(root, "", **given))


def states(recorder: Recorder) -> list[Any]:
    """Return the states that count, oldest first."""
    store = LocalCheckpoints(Path(recorder.job.root))
    return [store.load(one.path, digest=one.digest).state for one in reversed(recorder.candidates)]


def saved(recorder: Recorder) -> list[int]:
    return [one.step for one in reversed(recorder.candidates)]


def leftovers(recorder: Recorder) -> list[str]:
    return [path.name for path in Path(recorder.job.root).rglob(".staging-*")]


def refuse(job: Job, report: Report) -> Published:
    raise StorageError(28, f"cannot publish step {report.step}: no space left")


class TestContent:
    def test_what_is_changed_after_the_report_is_stored_as_it_was(self, runner: Runner, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "changed_at_once")
        runner(recorder.job, recorder)
        assert saved(recorder) == [0, 1, 2]
        for step, state in enumerate(states(recorder)):
            assert np.array_equal(state["w"], np.full(50_000, step))
            assert np.array_equal(state["small"], np.full(3, step))
            assert (state["l"], state["deep"]) == (b"abc"[step : step + 1] * 3, [[step]])

    def test_pickles_are_copied_too(self, runner: Runner, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "changed_at_once", serializer="cloudpickle")
        runner(recorder.job, recorder)
        assert [float(state["w"][0]) for state in states(recorder)] == [0, 1, 2]
        assert [state["deep"] for state in states(recorder)] == [[[0]], [[1]], [[2]]]

    def test_folders(self, runner: Runner, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "changed_folder")
        runner(recorder.job, recorder)
        copied, staged = states(recorder)
        assert (copied / "w.txt").read_text() == "good"
        assert (staged / "big.bin").stat().st_size == 200_000
        assert leftovers(recorder) == []

    def test_a_staged_folder_that_cannot_be_stored(self, runner: Runner, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "staged_link")
        with pytest.raises(TrialFailed, match="no regular file") as caught:
            runner(recorder.job, recorder)
        assert caught.value.kind == "NotStorable"
        assert "step 0 was written in the background" in caught.value.traceback
        assert (recorder.steps, saved(recorder), leftovers(recorder)) == ([0], [], [])

    @pytest.mark.parametrize("asynchronous", [True, False])
    @pytest.mark.parametrize("kind", ["gone", "file", "link", "loop"])
    def test_a_folder_that_is_bad_fails_its_trial_alone(
        self, runner: Runner, tmp_path: Path, kind: str, asynchronous: bool
    ) -> None:
        recorder = recorder_of(tmp_path, "bad_folder", config={"kind": kind}, asynchronous=asynchronous)
        with pytest.raises(TrialFailed, match="loop/a" if kind == "loop" else "staging-step_00000000") as caught:
            runner(recorder.job, recorder)
        assert caught.value.kind == "NotStorable"
        assert (recorder.steps, saved(recorder), leftovers(recorder)) == (
            [0] if kind != "loop" and asynchronous else [],
            [],
            [],
        )

    def test_a_folder_that_is_removed_before_it_is_published_fails_its_trial_alone(
        self, runner: Runner, tmp_path: Path
    ) -> None:
        with Bell(tmp_path / "removed") as removed:

            def later(job: Job, report: Report) -> Published:
                removed.wait()
                return publish(job, report)

            recorder = recorder_of(tmp_path, "removes_what_it_reported")
            recorder.publish = later
            with pytest.raises(TrialFailed, match="staging-step_00000000") as caught:
                runner(recorder.job, recorder)
        assert caught.value.kind == "NotStorable"
        assert (recorder.steps, saved(recorder), leftovers(recorder)) == ([0], [], [])

    def test_a_state_that_cannot_be_stored_is_refused_by_its_report(self, runner: Runner, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "unstorable")
        ended = runner(recorder.job, recorder)
        assert ended.metrics is not None
        assert "bad" in ended.metrics["error"]
        assert (recorder.steps, saved(recorder), leftovers(recorder)) == ([0, 1], [0], [])

    def test_classes(self, runner: Runner, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "Stepped")
        runner(recorder.job, recorder)
        assert states(recorder) == [{"w": [1]}, {"w": [2]}, {"w": [3]}]


class TestOrder:
    def test_reports_go_on_while_one_is_published_and_the_next_save_waits(self, pool: WorkerPool, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "steps", config={"steps": 7}, save_period=3)
        arrived = threading.Event()

        def slow(job: Job, report: Report) -> Published:
            if report.step == 0:
                assert arrived.wait(PATIENCE)  # the report of step 2, while this is going on
            return publish(job, report)

        def answer(report: Report) -> Decision:
            if report.step == 2:
                arrived.set()
            return Decision.CONTINUE

        recorder.publish, recorder.answer = slow, answer
        pool.run(recorder.job, recorder)
        begin = [("reported", 0), ("publishing", 0), ("reported", 1), ("reported", 2), ("saved", 0), ("reported", 3)]
        assert [event for event in recorder.events if event != ("publishing", 0)] == [
            event for event in [*begin, *recorder.events[6:]] if event != ("publishing", 0)
        ]
        assert recorder.events.index(("saved", 3)) < recorder.events.index(("reported", 6))
        assert recorder.events[-1] == ("saved", 6)
        assert [report.staged for report in recorder.reports] == [None] * 7
        assert saved(recorder) == [0, 3, 6]

    def test_inline_a_save_is_published_by_a_later_report(self, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "steps", config={"steps": 7}, save_period=3)
        threads = set()

        def here(job: Job, report: Report) -> Published:
            threads.add(threading.get_ident())
            return publish(job, report)

        recorder.publish = here
        run_inline(recorder.job, recorder)
        assert threads == {threading.get_ident()}
        for step, later in ((0, 3), (3, 6)):
            assert recorder.events.index(("reported", step)) < recorder.events.index(("publishing", step))
            assert recorder.events.index(("saved", step)) < recorder.events.index(("reported", later))
        assert recorder.events[-1] == ("saved", 6)

    def test_word_of_a_save_may_come_before_a_decision(self, pool: WorkerPool, tmp_path: Path) -> None:
        """The supervisor is held up until the child begins its next report, whose answer so comes second."""
        recorder = recorder_of(tmp_path, "reports_when_told", config={"steps": 5}, save_period=2)
        count = recorder._count

        with Bell(tmp_path / "saving") as saving, Bell(tmp_path / "reporting") as reporting:

            def held(report: Report, published: Published) -> None:
                if report.step == 0:
                    saving.ring()
                    reporting.wait()
                count(report, published)

            recorder._count = held  # type: ignore[method-assign]
            pool.run(recorder.job, recorder)
        assert recorder.steps == [0, 1, 2, 3, 4]
        assert saved(recorder) == [0, 2, 4]

    def test_many_saves(self, runner: Runner, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "steps", config={"steps": 200})
        runner(recorder.job, recorder)
        assert recorder.steps == saved(recorder) == list(range(200))
        assert [state["step"] for state in states(recorder)] == list(range(200))
        assert leftovers(recorder) == []


class TestErrors:
    def test_of_writing_are_raised_once(self, runner: Runner, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "catches", config={"limited": True})
        ended = runner(recorder.job, recorder)
        assert ended.metrics is not None
        ((step, kind, message),) = ended.metrics["errors"]
        assert (step, kind) == (1, "StorageError")
        assert "File too large" in message
        assert recorder.steps == [0, 1, 2, 3]
        assert saved(recorder) == [1, 2, 3]
        assert leftovers(recorder) == []

    def test_of_publishing_are_raised_once(self, runner: Runner, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "catches")
        recorder.publish = lambda job, report: refuse(job, report) if report.step == 0 else publish(job, report)
        ended = runner(recorder.job, recorder)
        assert ended.metrics is not None
        ((step, kind, message),) = ended.metrics["errors"]
        assert (step, kind) == (1, "StorageError")
        assert "no space left" in message
        assert (recorder.steps, saved(recorder)) == ([0, 1, 2, 3], [1, 2, 3])

    @pytest.mark.parametrize("end", ["return", "report"])
    @pytest.mark.parametrize("where", ["writing", "publishing"])
    def test_uncaught_ones_are_the_storages(self, runner: Runner, tmp_path: Path, end: str, where: str) -> None:
        recorder = recorder_of(tmp_path, "too_large" if where == "writing" else "saves_and", config={"end": end})
        if where == "publishing":
            recorder.publish = refuse
        with pytest.raises(StorageError, match="File too large" if where == "writing" else "no space left"):
            runner(recorder.job, recorder)
        assert (recorder.steps, saved(recorder)) == ([0], [])

    @pytest.mark.parametrize(("end", "kind"), [("raise", "KeyError"), ("exit", "SystemExit")])
    @pytest.mark.parametrize("where", ["writing", "publishing"])
    def test_the_users_own_error_counts(self, runner: Runner, tmp_path: Path, where: str, end: str, kind: str) -> None:
        recorder = recorder_of(tmp_path, "too_large" if where == "writing" else "saves_and", config={"end": end})
        if where == "publishing":
            recorder.publish = refuse
        with pytest.raises(TrialFailed) as caught:
            runner(recorder.job, recorder)
        assert caught.value.kind == kind
        assert "Besides, a checkpoint was not saved: StorageError" in caught.value.traceback
        assert saved(recorder) == []

    @pytest.mark.parametrize("method", ["publication", "saved", "publish"])
    def test_whatever_else_the_supervision_raises_ends_the_attempt(self, runner: Runner, tmp_path: Path, method: str) -> None:
        recorder = recorder_of(tmp_path, "saves_and_waits_for_thread", config={"end": "report"})

        def fenced(*_: object) -> Any:
            raise Fenced("epoch 3 took over")

        setattr(recorder, method, fenced)
        with pytest.raises(Fenced, match="epoch 3"):
            runner(recorder.job, recorder)
        assert (recorder.steps, saved(recorder)) == ([0], [])
        if recorder.process is not None:
            assert not runs(recorder.pid)


class TestEnds:
    @pytest.mark.parametrize("end", ["return", "raise", "exit"])
    def test_the_last_save_is_finished(self, runner: Runner, tmp_path: Path, end: str) -> None:
        recorder = recorder_of(tmp_path, "saves_and", config={"end": end})
        if end == "return":
            assert runner(recorder.job, recorder) == Ended(outcome=Outcome.COMPLETED, metrics={"loss": 1.0})
        else:
            with pytest.raises(TrialFailed) as caught:
                runner(recorder.job, recorder)
            assert "Besides" not in caught.value.traceback
        assert recorder.events[-1] == ("saved", 0)
        assert [len(state["w"]) for state in states(recorder)] == [200_000]

    @pytest.mark.parametrize("decision", [Decision.PREEMPT, Decision.PRUNE, Decision.CANCEL])
    def test_told_to_stop(self, runner: Runner, tmp_path: Path, decision: Decision) -> None:
        recorder = recorder_of(tmp_path, "steps", config={"steps": 10**6})
        recorder.answer = lambda report: decision if report.step == 4 else Decision.CONTINUE
        assert runner(recorder.job, recorder).outcome.value == {"prune": "pruned", "cancel": "cancelled"}.get(
            decision.value, "preempted"
        )
        assert recorder.steps == [0, 1, 2, 3, 4]
        assert saved(recorder) == [0, 1, 2, 3, 4]

    def test_preempted_at_a_step_that_is_not_due(self, runner: Runner, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "steps", config={"steps": 10**6}, save_period=100)
        recorder.answer = lambda report: Decision.PREEMPT if report.step == 2 else Decision.CONTINUE
        assert runner(recorder.job, recorder).outcome is Outcome.PREEMPTED
        assert recorder.steps == [0, 1, 2, 2]
        assert recorder.events.index(("saved", 0)) < len(recorder.events) - 1
        assert recorder.events[-1] == ("reported", 2)
        assert saved(recorder) == [0, 2]

    def test_preempted_after_a_failed_save(self, runner: Runner, tmp_path: Path) -> None:
        """The newer state is saved all the same, and the error is not passed over in silence."""
        recorder = recorder_of(tmp_path, "steps", config={"steps": 10**6}, save_period=100)
        recorder.publish = refuse
        recorder.answer = lambda report: Decision.PREEMPT if report.step == 2 else Decision.CONTINUE
        with pytest.raises(StorageError, match="no space left"):
            runner(recorder.job, recorder)
        assert saved(recorder) == [2]

    def test_a_forked_copy_saves_nothing(self, pool: WorkerPool, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "forks_while_saving")
        assert pool.run(recorder.job, recorder).metrics == {"status": 0}
        assert (recorder.steps, saved(recorder)) == ([0], [0])


class TestLostProcesses:
    def test_killed_while_its_checkpoint_is_published(self, pool: WorkerPool, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "saves_and", config={"end": "wait"})

        def kill_first(job: Job, report: Report) -> Published:
            os.kill(recorder.pid, signal.SIGKILL)
            wait_for_end(recorder.pid)
            return publish(job, report)

        recorder.publish = kill_first
        with pytest.raises(TrialCrashed, match="SIGKILL"):
            pool.run(recorder.job, recorder)
        assert saved(recorder) == [0]
        assert [len(state["w"]) for state in states(recorder)] == [200_000]

    def test_one_that_is_handed_over_is_published_though_its_process_died_since(self, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "saves_and_waits_for_thread", config={"end": "segv"})
        with WorkerPool(1) as pool, pytest.raises(TrialCrashed, match="SIGSEGV"):
            pool.run(recorder.job, recorder)
        assert saved(recorder) == [0]

    def test_one_behind_a_report_whose_answer_finds_nobody(self, pool: WorkerPool, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "dies_unanswered", save_period=100)

        with Bell(tmp_path / "arrived") as arrived:

            def answer(report: Report) -> Decision:
                if report.step == 1:
                    arrived.ring()
                    wait_for_end(recorder.pid)
                return Decision.CONTINUE

            recorder.answer = answer
            with pytest.raises(TrialCrashed, match="SIGKILL"):
                pool.run(recorder.job, recorder)
        assert recorder.steps == [0, 1]
        assert saved(recorder) == [0]

    def test_how_it_died_counts_when_the_save_fails_too(self, pool: WorkerPool, tmp_path: Path) -> None:
        recorder = recorder_of(tmp_path, "saves_and_waits_for_thread", config={"end": "segv"})
        recorder.publish = refuse
        with pytest.raises(TrialCrashed, match="SIGSEGV"):
            pool.run(recorder.job, recorder)
        assert saved(recorder) == []
        assert any("the checkpoint of step 0 was not stored: " in line and "no space left" in line for line in recorder.lines)

    @pytest.mark.parametrize("ending", ["timeout", "kill", "close"])
    def test_ended_while_its_checkpoint_is_published(
        self, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recorder = recorder_of(tmp_path, "saves_and", config={"end": "wait"}, timeout=3600.0 if ending == "timeout" else None)
        began = threading.Event()
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600.0 * began.is_set())
        monkeypatch.setattr("holdfast.tasks.workers.supervise.time", clock)
        with WorkerPool(1) as pool:

            def slow(job: Job, report: Report) -> Published:
                began.set()
                if ending == "close":
                    pool.close()
                wait_for_end(recorder.pid)
                return publish(job, report)

            recorder.publish = slow
            recorder.wish = lambda: Decision.KILL if ending == "kill" and began.is_set() else Decision.CONTINUE
            if ending == "timeout":
                with pytest.raises(TrialTimedOut):
                    pool.run(recorder.job, recorder)
            else:
                assert pool.run(recorder.job, recorder) == Ended(outcome=Outcome.PREEMPTED)
        assert saved(recorder) == [0]
