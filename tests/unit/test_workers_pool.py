"""Children that run user code: clean and unclean ends, death, timeouts, stopping, reuse."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from workers_kit import TRAINABLES, Recorder, log_of, make_job, runs

from holdfast.core.errors import Conflict, Fenced, SpecError, StorageError, TrialCrashed, TrialFailed, TrialTimedOut
from holdfast.core.trial import Outcome
from holdfast.tasks.workers import supervise
from holdfast.tasks.workers.messages import Decision, Ended, Report
from holdfast.tasks.workers.pool import WorkerPool

COMPLETED = Outcome.COMPLETED


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(1) as made:
        yield made


def run(pool: WorkerPool, root: Path, function: str, **changes: object) -> tuple[Ended, Recorder]:
    recorder = Recorder(make_job(root, function, **changes))
    return pool.run(recorder.job, recorder), recorder


def fail(pool: WorkerPool, root: Path, function: str, **changes: object) -> tuple[Exception, Recorder]:
    recorder = Recorder(make_job(root, function, **changes))
    with pytest.raises(Exception) as raised:  # noqa: PT011  # each test looks at it
        pool.run(recorder.job, recorder)
    assert not runs(recorder.pid)
    return raised.value, recorder


def test_a_clean_child_is_used_again(pool: WorkerPool, tmp_path: Path) -> None:
    first, one = run(pool, tmp_path, "noop")
    second, two = run(pool, tmp_path, "nothing", trial=8)
    assert (first.outcome, first.metrics) == (COMPLETED, {"loss": 1.0})
    assert (second.outcome, second.metrics) == (COMPLETED, None)
    assert one.pid == two.pid != os.getpid()


def test_what_a_trial_knows(pool: WorkerPool, tmp_path: Path) -> None:
    with WorkerPool(1, cpu_per_trial=3) as fresh:
        ended, _ = run(fresh, tmp_path, "who", references={"data": "/mnt/x", "shape": [2, 3]}, attempt=4)
    assert ended.metrics == {
        "number": 7,
        "attempt": 4,
        "seed": 11,
        "experiment": "digits",
        "config": {"lr": 0.5, "act": "relu"},
        "references": {"data": "/mnt/x", "shape": [2, 3]},
        "fresh": True,
        "cwd": str(tmp_path),
        "threads": os.environ.get("OMP_NUM_THREADS", "3"),
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "heavy": [],
    }


def test_the_users_own_thread_limit_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with WorkerPool(1, cpu_per_trial=3) as pool:
        ended, _ = run(pool, tmp_path, "who")
    assert ended.metrics is not None
    assert ended.metrics["threads"] == "5"


def test_devices_are_shared_out(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="need 4 devices, 3 are given"):
        WorkerPool(2, gpus=["0", "1", "2"], gpus_per_trial=2)
    seen = set()
    with WorkerPool(2, gpus=["0", "1", "2", "3"], gpus_per_trial=2) as pool:

        def nested(report: Report) -> Decision:  # while the first slot is taken
            ended, _ = run(pool, tmp_path, "who")
            seen.add((ended.metrics or {})["devices"])
            return Decision.PRUNE

        recorder = Recorder(make_job(tmp_path, "reports_forever"), answer=nested)
        pool.run(recorder.job, recorder)
        ended, _ = run(pool, tmp_path, "who")
        seen.add((ended.metrics or {})["devices"])
    assert seen == {"0,1", "2,3"}


def test_an_exception_comes_back_as_it_was(pool: WorkerPool, tmp_path: Path) -> None:
    error, first = fail(pool, tmp_path, "raises")
    assert isinstance(error, TrialFailed)
    assert (error.kind, str(error)) == ("KeyError", "'grün'")
    assert 'secret["grün"]' in error.traceback
    assert "in raises" in error.traceback
    assert "holdfast/tasks" not in error.traceback
    _, second = run(pool, tmp_path, "noop")
    assert second.pid != first.pid


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        ("raises_unspeakable", "Unspeakable", "cannot be shown"),
        ("raises_surrogate", "ValueError", "bad \udcff name"),
        ("exits", "SystemExit", "enough"),
        ("unstorable_metric", "NotStorable", "'loss'.*set"),
        ("unstorable_state", "NotStorable", "Model"),
        ("unstorable_return", "NotStorable", "returned a float"),
        ("same_step", "InvalidStep", "greater than the last reported step, 4"),
        ("two_contents", "InvalidInput", "state and directory"),
        ("prints_to_closed", "ValueError", "closed file"),
        ("naive_timestamp", "InvalidInput", "time zone"),
        ("no_such_function", "TrainableError", "has no 'no_such_function'"),
    ],
)
def test_errors_of_user_code(pool: WorkerPool, tmp_path: Path, function: str, kind: str, message: str) -> None:
    error, _ = fail(pool, tmp_path, function)
    assert isinstance(error, TrialFailed)
    assert error.kind == kind
    assert re.search(message, str(error))


def test_death_says_how(pool: WorkerPool, tmp_path: Path) -> None:
    error, _ = fail(pool, tmp_path, "hard_exit")
    assert isinstance(error, TrialCrashed)
    assert "exited with code 3" in str(error)
    assert "about to leave" in str(error)
    error, _ = fail(pool, tmp_path, "segfault")
    assert "killed by SIGSEGV" in str(error)
    assert "in segfault" in str(error)  # where in the user's code


def test_killed_from_outside(pool: WorkerPool, tmp_path: Path) -> None:
    recorder = Recorder(make_job(tmp_path, "reports_forever"))

    def kill(report: Report) -> Decision:
        os.kill(recorder.pid, signal.SIGKILL)
        return Decision.CONTINUE

    recorder.answer = kill
    with pytest.raises(TrialCrashed, match="killed by SIGKILL"):
        pool.run(recorder.job, recorder)
    assert recorder.steps == [0]


def test_an_idle_child_that_died_is_replaced(pool: WorkerPool, tmp_path: Path) -> None:
    _, first = run(pool, tmp_path, "noop")
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    ended, second = run(pool, tmp_path, "noop")
    assert ended.outcome is COMPLETED
    assert second.pid != first.pid


@pytest.mark.parametrize("function", ["endless", "blocked"])
def test_timeouts_end_anything(pool: WorkerPool, tmp_path: Path, function: str) -> None:
    error, _ = fail(pool, tmp_path, function, timeout=0.3)
    assert isinstance(error, TrialTimedOut)
    assert "trial_timeout of 0.3 s" in str(error)


def test_cancelled_while_it_is_silent(pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "CANCEL_GRACE", 0.0)
    recorder = Recorder(make_job(tmp_path, "endless"), wish=lambda: Decision.CANCEL)
    assert pool.run(recorder.job, recorder).outcome is Outcome.CANCELLED
    assert not runs(recorder.pid)


def test_killed_on_demand_counts_as_preempted(pool: WorkerPool, tmp_path: Path) -> None:
    recorder = Recorder(make_job(tmp_path, "blocked"), wish=lambda: Decision.KILL)
    assert pool.run(recorder.job, recorder).outcome is Outcome.PREEMPTED
    assert not runs(recorder.pid)
    recorder = Recorder(make_job(tmp_path, "reports_forever"), answer=lambda report: Decision.KILL)
    assert pool.run(recorder.job, recorder).outcome is Outcome.PREEMPTED
    assert recorder.steps == [0]


@pytest.mark.parametrize("decision", [Decision.PRUNE, Decision.CANCEL, Decision.PREEMPT])
def test_a_wish_is_told_at_the_next_report(pool: WorkerPool, tmp_path: Path, decision: Decision) -> None:
    recorder = Recorder(make_job(tmp_path, "reports_forever", saves=False), wish=lambda: decision)
    ended = pool.run(recorder.job, recorder)
    assert ended.outcome.name.startswith(decision.name)
    assert recorder.steps == list(range(len(recorder.reports)))
    _, after = run(pool, tmp_path, "noop")
    assert after.pid == recorder.pid  # a clean end


@pytest.mark.parametrize("function", ["swallows", "fails_when_stopped", "dies_when_stopped"])
def test_told_to_stop_is_what_counts(pool: WorkerPool, tmp_path: Path, function: str) -> None:
    recorder = Recorder(make_job(tmp_path, function), answer=lambda report: Decision.PRUNE)
    assert pool.run(recorder.job, recorder) == Ended(outcome=Outcome.PRUNED)
    assert recorder.steps == [0]


def test_one_that_does_not_stop_is_ended(pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "STOP_GRACE", 0.0)
    recorder = Recorder(make_job(tmp_path, "waits_with_child"), answer=lambda report: Decision.CANCEL)
    assert pool.run(recorder.job, recorder).outcome is Outcome.CANCELLED
    assert not runs(recorder.pid)
    assert not runs(recorder.reports[0].metrics["child"])


@pytest.mark.parametrize("error", [Fenced("epoch 3 took over"), StorageError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["started", "report", "poll"])
def test_an_error_of_the_supervision_ends_the_child(
    pool: WorkerPool, tmp_path: Path, error: BaseException, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(make_job(tmp_path, "endless" if method == "poll" else "reports_forever"))

    def refuse(*arguments: object) -> Decision:
        if method == "started":
            recorder.process = arguments[0]  # type: ignore[assignment]
        raise error

    monkeypatch.setattr(recorder, method, refuse)
    with pytest.raises(type(error)) as raised:
        pool.run(recorder.job, recorder)
    assert raised.value is error
    assert not runs(recorder.pid)


def test_noise_harms_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    ended, recorder = run(pool, tmp_path, "noise")
    assert ended.metrics == {"loss": 1.0}
    text = log_of(recorder.job)
    assert text.startswith("line 0\nline 1\n")
    assert "line 99999\n" in text
    assert "to stderr" in text
    assert "INFO mine: a record" in text
    assert len(recorder.lines) < 2000
    assert any("left out" in line for line in recorder.lines)


def test_closed_streams_are_opened_again(pool: WorkerPool, tmp_path: Path) -> None:
    ended, first = run(pool, tmp_path, "closes_streams")
    assert ended.outcome is COMPLETED
    job = make_job(tmp_path, "prints", log=str(tmp_path / "other.log"))
    second = Recorder(job)
    pool.run(job, second)
    assert second.pid == first.pid
    assert log_of(job) == "hello from 7\nno newline"
    assert second.lines == ["hello from 7", "no newline"]


@pytest.mark.parametrize("function", ["closes_everything", "scribbles"])
def test_a_broken_pipe_is_one_attempts_end(pool: WorkerPool, tmp_path: Path, function: str) -> None:
    error, _ = fail(pool, tmp_path, function)
    assert isinstance(error, (TrialCrashed, TrialFailed))
    assert run(pool, tmp_path, "noop")[0].outcome is COMPLETED


@pytest.mark.parametrize("function", ["changes_handlers", "leaves_thread", "leaves_process"])
def test_who_leaves_something_behind_is_replaced(pool: WorkerPool, tmp_path: Path, function: str) -> None:
    ended, first = run(pool, tmp_path, function)
    assert ended.outcome is COMPLETED
    assert not runs(first.pid)
    if ended.metrics:
        assert not runs(ended.metrics["left"])
    assert run(pool, tmp_path, "noop")[1].pid != first.pid


def test_the_working_directory_is_put_back(pool: WorkerPool, tmp_path: Path) -> None:
    _, first = run(pool, tmp_path, "changes_directory")
    ended, second = run(pool, tmp_path, "who")
    assert second.pid == first.pid
    assert (ended.metrics or {})["cwd"] == str(tmp_path)


def test_a_fork_cannot_speak_for_its_trial(pool: WorkerPool, tmp_path: Path) -> None:
    ended, recorder = run(pool, tmp_path, "forks")
    assert ended.metrics == {"refused": "WrongProcess"}
    assert [report.metrics for report in recorder.reports] == [{"loss": 1.0}]


def test_death_is_noticed_while_another_process_holds_the_pipe(pool: WorkerPool, tmp_path: Path) -> None:
    error, recorder = fail(pool, tmp_path, "orphans_holding_pipe")
    assert "exited with code 5" in str(error)
    assert not runs(recorder.reports[0].metrics["pid"])


def test_signals_to_the_whole_job_are_the_parents(pool: WorkerPool, tmp_path: Path) -> None:
    assert run(pool, tmp_path, "survives_sigterm")[0].metrics == {"code": -signal.SIGTERM}


def test_forks_can_be_ended_from_their_first_moment(pool: WorkerPool, tmp_path: Path) -> None:
    assert run(pool, tmp_path, "ends_its_forks")[0].metrics == {"codes": [-signal.SIGTERM]}


def test_multiprocessing_works(pool: WorkerPool, tmp_path: Path) -> None:
    assert run(pool, tmp_path, "uses_pool")[0].metrics == {"forked": [1, 2], "spawned": [10, 20]}


def test_two_at_once(tmp_path: Path) -> None:
    meet = threading.Barrier(2, timeout=30)
    outcomes = []

    def answer(report: Report) -> Decision:
        meet.wait()
        return Decision.PRUNE if report.step == 2 else Decision.CONTINUE

    with WorkerPool(2) as pool:

        def one(number: int) -> None:
            recorder = Recorder(make_job(tmp_path, "reports_forever", trial=number), answer=answer)
            outcomes.append((pool.run(recorder.job, recorder).outcome, recorder.pid, recorder.steps))

        threads = [threading.Thread(target=one, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [(outcome, steps) for outcome, _, steps in outcomes] == [(Outcome.PRUNED, [0, 1, 2])] * 2
    assert len({pid for _, pid, _ in outcomes}) == 2


def test_close_preempts_what_runs(tmp_path: Path) -> None:
    pool = WorkerPool(1)
    recorder = Recorder(make_job(tmp_path, "endless"))
    ended: list[Ended] = []
    thread = threading.Thread(target=lambda: ended.append(pool.run(recorder.job, recorder)))
    thread.start()
    assert recorder.running.wait(30)
    pool.close()
    thread.join()
    assert ended == [Ended(outcome=Outcome.PREEMPTED)]
    assert not runs(recorder.pid)
    pool.close()
    with pytest.raises(Conflict, match="closed"):
        pool.run(recorder.job, recorder)


@pytest.mark.parametrize("function", ["endless", "blocked", "waits_with_child"])
def test_no_child_outlives_its_parent(tmp_path: Path, function: str) -> None:
    script = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from workers_kit import Recorder, make_job
from holdfast.tasks.workers.pool import WorkerPool
class Telling(Recorder):
    def started(self, process, resumed, rejected):
        super().started(process, resumed, rejected)
        print(process.pid, flush=True)
    def report(self, report):
        print(report.metrics["child"], flush=True)
        return super().report(report)
recorder = Telling(make_job(Path(sys.argv[2]), sys.argv[3]))
WorkerPool(2).run(recorder.job, recorder)
"""
    command = [sys.executable, "-c", script, str(TRAINABLES.parent), str(tmp_path), function]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        expected = 2 if function == "waits_with_child" else 1
        descriptors = [os.pidfd_open(int(parent.stdout.readline())) for _ in range(expected)]
        parent.kill()
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], 20)[0], "a process still runs"
        os.close(descriptor)


def test_throughput(pool: WorkerPool, tmp_path: Path) -> None:
    recorder = Recorder(make_job(tmp_path, "noop"))
    pool.run(recorder.job, recorder)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(500):
        recorder.running.clear()
        pool.run(recorder.job, recorder)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{500 / wall:.0f} no-op jobs/s, {processor / 500 * 1e6:.0f} µs of the parent's processor time each")
