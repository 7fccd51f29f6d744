"""One more checkpoint before a deadline: which report it is, that it is told beforehand, and that it comes once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from workers_kit import Recorder, make_job

from holdfast.core.deadline import RECENT, Deadline
from holdfast.core.errors import StorageError
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.tasks.workers.inline import run_inline
from holdfast.tasks.workers.messages import Decision, Report, job_frame, job_from
from holdfast.tasks.workers.pool import WorkerPool

TRAINABLES = Path(__file__).with_name("workers_saves.py")


class Clock:
    """Shows the times that it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def reports(moments: Iterable[float], moment: float | None) -> list[int]:
    """Return the places of those reports, made at the given times, that are due for the deadline's sake."""
    clock = Clock()
    deadline = Deadline(moment, clock)
    found = []
    for place, clock.now in enumerate(moments):
        if deadline.reported(place):
            found.append(place)
            deadline.met()
    return found


class TestDeadline:
    @pytest.mark.parametrize(
        ("moments", "moment", "expected"),
        [
            ([10, 20, 30, 40, 50], 45, [3]),  # the one at 50 would be late
            ([10, 20, 30, 40, 50], 40, [2]),  # exactly then is late, too
            ([10, 20, 30, 40, 50], None, []),
            ([10, 20, 30, 40, 50], 1000, []),
            ([10, 20, 30, 40, 50], 0, []),  # past from the start: there is no last report to wait for
            ([10, 20, 30, 40, 50], -5, []),
            ([10, 20, 30, 40, 50], 0.001, [0]),
            ([5, 35, 36, 37, 38, 39, 40], 70, [6]),  # the longest pause was 30
            ([1, 2, 3, 100, 101], 50, [3]),  # late, since nothing foretold it
            ([40], 50, [0]),  # nothing but the time since the start is known
        ],
    )
    def test_the_last_report_in_time_is_saved(self, moments: list[float], moment: float | None, expected: list[int]) -> None:
        assert reports(moments, moment) == expected

    def test_a_long_pause_is_forgotten_after_a_while(self) -> None:
        clock = Clock()
        deadline = Deadline(202.0, clock)
        due = []
        for place in range(50):
            clock.now = 100.0 + place
            if deadline.reported(place):  # and is never saved
                due.append(place)
        assert due == list(range(2, RECENT + 1))

    def test_what_was_told_holds_until_the_report(self) -> None:
        clock = Clock()
        deadline = Deadline(20.0, clock)
        clock.now = 9.0
        assert not deadline.due(0)
        clock.now = 30.0
        assert not deadline.due(0)
        assert not deadline.reported(0)
        assert deadline.due(1)
        assert deadline.due(5)
        clock.now = 31.0
        assert deadline.reported(1)
        assert deadline.due(2)  # it was not said that the step was saved
        deadline.met()
        assert not deadline.due(2)
        assert not deadline.reported(3)

    def test_a_save_that_came_to_nothing_gives_it_back(self) -> None:
        clock = Clock()
        deadline = Deadline(20.0, clock)
        clock.now = 19.0
        assert deadline.reported(0)
        deadline.met()
        assert not deadline.due(1)
        deadline.missed()
        assert deadline.reported(1)
        late = Deadline(10.0, clock)
        late.missed()
        assert not late.due(0)


def run(
    root: Path, clock: Callable[[], float], pause: Callable[[], None] = lambda: None, **changes: Any
) -> tuple[Any, Recorder]:
    given = {"trainable": f"{TRAINABLES}:ticking", "save_period": 1000, "root": str(root / "experiment"), **changes}
    recorder = Recorder(make_job(root, "", **given))

    def answer(report: Report) -> Decision:
        pause()
        return Decision.CONTINUE

    recorder.answer = answer
    return run_inline(recorder.job, recorder, clock=clock).metrics, recorder


class TestTrial:
    """With a clock that goes on by ten seconds after each report."""

    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def run(self, root: Path, **changes: Any) -> tuple[Any, list[int]]:
        clock = Clock()

        def pause() -> None:
            clock.now += 10.0

        metrics, recorder = run(root, clock, pause, **changes)
        return metrics, [one.step for one in reversed(recorder.candidates)]

    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize("asks", [False, True])
    def test_one_more_step_is_saved_and_told(self, tmp_path: Path, asynchronous: bool, asks: bool) -> None:
        metrics, saved = self.run(tmp_path, config={"steps": 9, "asks": asks}, save_by=45.0, asynchronous=asynchronous)
        assert saved == [0, 4]
        assert not asks or metrics == {"told": [step in (0, 4) for step in range(9)]}

    def test_a_step_that_is_due_anyway_counts(self, tmp_path: Path) -> None:
        assert self.run(tmp_path, config={"steps": 9}, save_by=45.0, save_period=4)[1] == [0, 4, 8]

    def test_a_report_without_a_state_leaves_it_to_the_next(self, tmp_path: Path) -> None:
        assert self.run(tmp_path, config={"steps": 9, "bare": [4, 5]}, save_by=45.0)[1] == [0, 6]

    def test_nothing_is_saved_where_nothing_is_to_be(self, tmp_path: Path) -> None:
        metrics, saved = self.run(tmp_path, config={"steps": 9}, save_by=45.0, saves=False)
        assert (metrics, saved) == ({"told": [False] * 9}, [])

    def test_a_save_that_fails_is_made_up_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stage = LocalCheckpoints.stage

        def refuse(store: LocalCheckpoints, trial: int, attempt: int, step: int) -> Path:
            if step == 4:
                raise StorageError(28, "no space left")
            return stage(store, trial, attempt, step)

        monkeypatch.setattr(LocalCheckpoints, "stage", refuse)
        trainable = f"{TRAINABLES}:ticking_on"
        assert self.run(tmp_path, config={"steps": 9}, save_by=45.0, trainable=trainable)[1] == [0, 5]

    def test_one_in_the_background_is_made_up_for(self, tmp_path: Path) -> None:
        """The error is raised by the report after it, in place of a save; the one after that is the one that is saved."""
        trainable, config = f"{TRAINABLES}:ticking_in_vain", {"steps": 9, "fails": 4}
        assert self.run(tmp_path, config=config, save_by=45.0, trainable=trainable, asynchronous=True)[1] == [0, 6]


@pytest.mark.parametrize(
    ("left", "leaps", "saved"),
    [(3600.0, True, [1]), (3600.0, False, []), (-1.0, True, []), (-1.0, False, []), (None, True, [])],
)
def test_in_a_process_the_clock_is_its_own(tmp_path: Path, left: float | None, leaps: bool, saved: list[int]) -> None:
    save_by = None if left is None else time.monotonic() + left
    job = make_job(
        tmp_path,
        "",
        trainable=f"{TRAINABLES}:ticking",
        config={"steps": 4, "bare": [0], "leaps": leaps},
        save_period=1000,
        save_by=save_by,
    )
    recorder = Recorder(job)
    with WorkerPool(1) as pool:
        pool.run(job, recorder)
    assert [one.step for one in recorder.candidates] == saved


def test_a_moment_travels_as_seconds_left(tmp_path: Path) -> None:
    job = make_job(tmp_path, "", save_by=time.monotonic() + 100)
    frame = job_frame(job)
    assert 0 < frame["save_by"] <= 100
    assert job.save_by is not None
    received = job_from(frame).save_by
    assert received is not None
    assert received >= job.save_by
    assert job_from(job_frame(make_job(tmp_path, ""))).save_by is None
