"""The trial object: reports, checkpoints, resuming, telemetry, seeds; in a child and inline."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workers_kit import Recorder, log_of, make_job

from holdfast.core.errors import Fenced, StorageError, TrialFailed, TrialTimedOut
from holdfast.core.trial import Outcome
from holdfast.tasks.workers.inline import run_inline
from holdfast.tasks.workers.messages import Candidate, Decision, Ended, Job, Report, Supervision
from holdfast.tasks.workers.pool import WorkerPool

Runner = Callable[[Job, Supervision], Ended]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(1) as made:
        yield made


@pytest.fixture(params=["process", "inline"])
def runner(request: pytest.FixtureRequest, pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.chdir(tmp_path)
    return pool.run if request.param == "process" else run_inline


def run(runner: Runner, root: Path, function: str, **changes: Any) -> tuple[Any, Recorder]:
    recorder = Recorder(make_job(root, function, **changes))
    ended = runner(recorder.job, recorder)
    assert ended.outcome is Outcome.COMPLETED
    return ended.metrics, recorder


def test_resuming_from_the_newest(runner: Runner, tmp_path: Path) -> None:
    metrics, first = run(runner, tmp_path, "reports_three")
    assert metrics == {"start": 0}
    assert [report.metrics["loss"] for report in first.reports] == [1.0, 0.5, 1 / 3]
    metrics, second = run(runner, tmp_path, "reload_state", attempt=2, candidates=tuple(first.candidates))
    assert metrics == {"step": 2, "same": True, "w": [2] * 4, "absolute": True, "metrics": {"loss": 1 / 3}}
    assert second.resumed == first.candidates[0]
    assert list(second.rejected) == []
    metrics, third = run(runner, tmp_path, "reports_three", attempt=3, candidates=tuple(first.candidates[1:]))
    assert metrics == {"start": 2}
    assert third.steps == [2]


def test_a_damaged_one_is_passed_over(runner: Runner, tmp_path: Path) -> None:
    _, first = run(runner, tmp_path, "reports_three")
    newest, middle, oldest = first.candidates
    root = Path(first.job.root)
    (root / newest.path / "state.json").write_text("{}")
    (root / middle.path / "manifest.json").unlink()
    gone = Candidate(attempt=1, step=9, path=newest.path.replace("step_00000002", "step_00000009"), digest="0" * 32)
    metrics, second = run(runner, tmp_path, "reload_state", attempt=2, candidates=(gone, newest, middle, oldest))
    assert metrics["step"] == 0
    assert metrics["w"] == [0] * 4
    assert second.resumed == oldest
    assert [one.candidate for one in second.rejected] == [gone, newest, middle]
    assert "no checkpoint" in second.rejected[0].reason
    assert "state.json" in second.rejected[1].reason
    assert "manifest" in second.rejected[2].reason
    metrics, third = run(runner, tmp_path, "reports_three", attempt=2, candidates=(newest, middle))
    assert metrics == {"start": 0}
    assert third.resumed is None
    assert len(third.rejected) == 2


def test_exchanged_checkpoints_are_noticed(runner: Runner, tmp_path: Path) -> None:
    _, first = run(runner, tmp_path, "reports_three")
    newest, middle, _ = first.candidates
    swapped = Candidate(attempt=1, step=newest.step, path=newest.path, digest=middle.digest)
    _, second = run(runner, tmp_path, "reports_three", attempt=2, candidates=(swapped,))
    assert second.resumed is None
    assert "another checkpoint" in second.rejected[0].reason


def test_state_is_asked_for_only_when_due(runner: Runner, tmp_path: Path) -> None:
    metrics, recorder = run(runner, tmp_path, "thunks", save_period=2)
    assert metrics == {"calls": [0, 2, 4]}
    assert [report.metrics["due"] for report in recorder.reports] == [True, False, True, False, True]
    assert [report.staged is not None for report in recorder.reports] == [True, False, True, False, True]
    metrics, recorder = run(runner, tmp_path, "thunks", saves=False)
    assert metrics == {"calls": []}
    assert not recorder.candidates


def test_a_callable_model_is_a_value(runner: Runner, tmp_path: Path) -> None:
    _, recorder = run(runner, tmp_path, "callable_state", serializer="cloudpickle")
    assert recorder.reports[0].staged is not None
    assert recorder.reports[0].staged.serializer == "cloudpickle"
    _, recorder = run(runner, tmp_path, "partial_state")
    state = Path(recorder.job.root, recorder.candidates[0].path, "state.json").read_text()
    assert '"a"' in state


def test_preemption_saves_a_step_that_is_not_due(runner: Runner, tmp_path: Path) -> None:
    job = make_job(tmp_path, "reports_forever", save_period=100)
    recorder = Recorder(job, answer=lambda report: Decision.PREEMPT if report.step == 3 else Decision.CONTINUE)
    assert runner(job, recorder).outcome is Outcome.PREEMPTED
    assert recorder.steps == [0, 1, 2, 3, 3]
    assert [report.staged is not None for report in recorder.reports] == [True, False, False, False, True]
    assert recorder.candidates[0].step == 3


def test_preemption_at_a_due_step_saves_once(runner: Runner, tmp_path: Path) -> None:
    recorder = Recorder(make_job(tmp_path, "reports_forever"), answer=lambda report: Decision.PREEMPT)
    assert runner(recorder.job, recorder).outcome is Outcome.PREEMPTED
    assert recorder.steps == [0]


def test_folders_of_files(runner: Runner, tmp_path: Path) -> None:
    _, recorder = run(runner, tmp_path, "directories")
    staged, copied = (Path(recorder.job.root, candidate.path) for candidate in recorder.candidates)
    assert (copied / "sub" / "model.txt").read_text() == "weights"
    assert (staged / "big.bin").read_bytes() == b"big" * 1000
    assert {folder.name for folder in staged.parent.iterdir()} == {staged.name, copied.name}  # nothing staged is left
    metrics, _ = run(runner, tmp_path, "read_directory", attempt=2, candidates=tuple(recorder.candidates))
    assert metrics == {"content": 3000}


def test_an_undue_staged_folder_is_removed(runner: Runner, tmp_path: Path) -> None:
    _, recorder = run(runner, tmp_path, "directories", save_period=100)
    assert [candidate.step for candidate in recorder.candidates] == [0]
    folder = Path(recorder.job.root, recorder.candidates[0].path).parent
    assert len(list(folder.iterdir())) == 1


def test_not_a_number_survives(runner: Runner, tmp_path: Path) -> None:
    metrics, recorder = run(runner, tmp_path, "nan")
    assert math.isnan(recorder.reports[0].metrics["loss"])
    assert recorder.reports[0].metrics["list"] == [math.inf, None]
    assert metrics == {"loss": -math.inf}


def test_steps_go_on_by_themselves(runner: Runner, tmp_path: Path) -> None:
    assert run(runner, tmp_path, "default_steps")[1].steps == [0, 5, 6]
    _, first = run(runner, tmp_path, "reports_three")
    resumed = run(runner, tmp_path, "default_steps", attempt=2, candidates=tuple(first.candidates))[1]
    assert resumed.steps == [3, 5, 6]
    with pytest.raises(TrialFailed, match="greater than the checkpoint's step, 2"):
        run(runner, tmp_path, "thunks", attempt=2, candidates=tuple(first.candidates))


def test_numpy_values_and_seeds(runner: Runner, tmp_path: Path) -> None:
    drawn = [run(runner, tmp_path, "numpy_values", attempt=attempt)[0] for attempt in (1, 2)]
    metrics, recorder = run(runner, tmp_path, "numpy_values", attempt=3)
    assert drawn == [metrics, metrics]
    assert recorder.reports[0] == Report(step=2, metrics={"loss": 0.5, "n": 3, "ok": True})
    assert run(runner, tmp_path, "numpy_values", seed=12)[0] != metrics


def test_seeds_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Also where numpy is imported only while the attempt runs, and where it was before."""
    drawn = []
    for _ in range(2):
        with WorkerPool(1) as pool:
            drawn += [run(pool.run, tmp_path, "numpy_values")[0] for _ in range(2)]
    assert drawn == drawn[:1] * 4


def test_big_messages(runner: Runner, tmp_path: Path) -> None:
    metrics, recorder = run(runner, tmp_path, "big", config={"text": "x" * 1_000_000})
    assert metrics == {"echo": 1_000_000}
    assert len(recorder.reports[0].metrics["text"]) == 500_000


def test_any_letter(runner: Runner, tmp_path: Path) -> None:
    metrics, recorder = run(runner, tmp_path, "unicode_text", config={"ключ": "значение"})
    assert metrics == {"é": "значение"}
    assert recorder.reports[0].metrics == {"смысл": "жизни 🎉 \u2028"}
    if recorder.process is not None:
        assert log_of(recorder.job) == "naïve ☃ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢\n"
        assert recorder.lines == ["naïve ☃ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢"]


def test_telemetry(runner: Runner, tmp_path: Path) -> None:
    _, recorder = run(runner, tmp_path, "telemetry")
    assert recorder.rows[0] == (12.5, "load", 0.5)
    assert [value for _, name, value in recorder.rows if name == "many"] == list(range(500))
    assert recorder.rows[-1][1:] == ("last", {"nested": [1, None]})


def test_telemetry_that_is_not_finite_or_of_another_age(runner: Runner, tmp_path: Path) -> None:
    _, recorder = run(runner, tmp_path, "strange_telemetry")
    found = [value for _, name, value in recorder.rows if name == "strange"]
    assert repr(found) == "[nan, inf, [-inf, {'a': nan}], [1.0, nan]]"
    assert [moment for moment, name, _ in recorder.rows if name == "ends"] == [-62135596800, 253402300798.5]


@pytest.mark.parametrize("when", [1e13, 1e300, -1e12, 253402300800, 10**400, math.nan, -math.inf, "now", True])
def test_telemetry_at_a_time_that_is_none_is_refused(runner: Runner, tmp_path: Path, when: Any) -> None:
    with pytest.raises(TrialFailed, match=r"timestamp is .*seconds since 1970") as caught:
        run(runner, tmp_path, "telemetry_when", config={"when": when})
    assert caught.value.kind == "InvalidInput"


def test_a_long_error_is_cut_in_the_middle(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(TrialFailed) as caught:
        run(runner, tmp_path, "long_error")
    message, trace = str(caught.value), caught.value.traceback
    assert message.startswith("headé")
    assert message.endswith("étail")
    assert "bytes left out" in message
    assert len(message.encode()) <= 10_000
    assert trace.startswith("Traceback")
    assert trace.endswith("étail\n")
    assert len(trace.encode()) <= 100_000


def test_reports_from_other_threads(runner: Runner, tmp_path: Path) -> None:
    metrics, recorder = run(runner, tmp_path, "reports_from_thread")
    assert metrics == {"errors": []}
    assert recorder.steps == [0, 1, 2]


def test_a_trial_that_has_ended_takes_no_reports(pool: WorkerPool, tmp_path: Path) -> None:
    run(pool.run, tmp_path, "keeps_trial")
    with pytest.raises(TrialFailed, match="has ended"):
        run(pool.run, tmp_path, "keeps_trial", trial=8)


def test_classes(runner: Runner, tmp_path: Path) -> None:
    _, recorder = run(runner, tmp_path, "WithTrial")
    assert [report.metrics["count"] for report in recorder.reports] == [1, 2, 3, 4]
    assert [report.metrics.get("done") for report in recorder.reports] == [None, None, None, True]
    assert run(runner, tmp_path, "WithConfig")[1].steps == [0, 1]
    assert run(runner, tmp_path, "WithNothing", max_steps=3)[1].steps == [0, 1, 2]
    assert run(runner, tmp_path, "KeywordOnly")[1].reports[0].metrics == {"lr": 0.5, "done": True}
    assert run(runner, tmp_path, "instance")[0] == {"loss": 2.0}
    assert run(runner, tmp_path, "bound")[0] == {"loss": 2.0}


def test_classes_continue(runner: Runner, tmp_path: Path) -> None:
    _, first = run(runner, tmp_path, "WithTrial")
    _, second = run(runner, tmp_path, "WithTrial", attempt=2, candidates=tuple(first.candidates[2:]))
    assert [(report.step, report.metrics["count"]) for report in second.reports] == [(2, 3), (3, 4)]
    _, third = run(runner, tmp_path, "WithTrial", attempt=2, candidates=tuple(first.candidates[2:]), max_steps=3)
    assert third.steps == [2]
    _, done = run(runner, tmp_path, "WithTrial", attempt=2, candidates=tuple(first.candidates))
    assert done.steps == []  # it died after its last report


def test_storage_that_fails_is_no_fault_of_the_trial(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recorder = Recorder(make_job(tmp_path, "reports_three", root=str(tmp_path / "file")))
    with pytest.raises(StorageError, match="stage a checkpoint"):
        runner(recorder.job, recorder)


def test_inline_errors(tmp_path: Path) -> None:
    with pytest.raises(TrialFailed) as failed:
        run(run_inline, tmp_path, "raises")
    assert failed.value.kind == "KeyError"
    assert "in raises" in failed.value.traceback
    with pytest.raises(TrialTimedOut):
        run(run_inline, tmp_path, "reports_forever", timeout=0.0)
    assert os.getcwd() != str(tmp_path)


def test_inline_passes_on_what_the_supervision_raises(tmp_path: Path) -> None:
    def refuse(report: Report) -> Decision:
        raise Fenced("epoch 3 took over")

    for function in ("reports_forever", "swallows", "fails_when_stopped"):
        recorder = Recorder(make_job(tmp_path, function), answer=refuse)
        with pytest.raises(Fenced, match="epoch 3"):
            run_inline(recorder.job, recorder)
        assert recorder.steps == [0]


@pytest.mark.parametrize("function", ["swallows", "fails_when_stopped"])
def test_inline_told_to_stop_is_what_counts(tmp_path: Path, function: str) -> None:
    recorder = Recorder(make_job(tmp_path, function), answer=lambda report: Decision.PRUNE)
    assert run_inline(recorder.job, recorder) == Ended(outcome=Outcome.PRUNED)


def test_jobs_are_json(tmp_path: Path) -> None:
    job = make_job(tmp_path, "noop", references={"handle": object()})
    with WorkerPool(1) as pool, pytest.raises(TypeError, match="handle"):
        pool.run(job, Recorder(job))
    assert json.dumps(job.config)
