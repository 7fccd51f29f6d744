"""The handle on a stored experiment: lists, tables, the best trial, and the status that is derived."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from store_kit import create

from holdfast.core.errors import Conflict, InvalidInput
from holdfast.core.objective import Objective
from holdfast.core.ranking import best_of
from holdfast.core.trial import Outcome, TrialStatus
from holdfast.experiment import Experiment
from holdfast.locate import Opened
from holdfast.report.frames import results_df
from holdfast.result import result_of
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.leases import Leases
from holdfast.testing.lab import FAILED, Lab
from holdfast.testing.samples import sample_spec, sample_trial

COMPLETED, PRUNED, CANCELLED = TrialStatus.COMPLETED, TrialStatus.PRUNED, TrialStatus.CANCELLED


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with closing(create(tmp_path / "runs", description="what for")) as opened:
        yield opened


def driven(opened: Opened, epoch: int = 1) -> Lab:
    Leases(opened.database, opened.record.id).take(seen=epoch - 1, epoch=epoch, holder={"pid": 1}, action="x", detail={})
    return Lab(opened.database, opened.record, epoch)


def test_it_says_what_it_is(opened: Opened) -> None:
    with Experiment(opened) as experiment:
        assert experiment.name == "sample"
        assert experiment.description == "what for"
        assert experiment.id == opened.record.uuid
        assert experiment.path == opened.folder.path
        assert experiment.objectives == (Objective(name="loss"),)
        assert list(experiment.space.parameters) == ["x"]
        assert experiment.spec_source is None
        assert [row.action for row in experiment.audit()] == ["created"]
    assert experiment.counts() == {}  # closed, it opens what it needs


def test_a_new_one_is_empty(opened: Opened) -> None:
    experiment = Experiment(opened)
    assert list(experiment.load()) == [[], [], [], []]
    assert experiment.pending_trials(datetime.now(UTC), running=True) == []
    assert experiment.best_trial() is None
    assert (experiment.trials, experiment.history(), experiment.checkpoints()) == ([], [], [])


def test_load_gives_four_lists(opened: Opened) -> None:
    lab = driven(opened)
    writers = [lab.started(place / 8) for place in range(6)]
    lab.end(writers[0], loss=1.0)
    lab.end(writers[1], Outcome.PRUNED, loss=2.0)
    lab.driver.end(writers[2].attempt, FAILED)
    lab.driver.end(writers[3].attempt, Ending(outcome=Outcome.TIMED_OUT))
    lab.end(writers[4], Outcome.CANCELLED, loss=0.0)
    lab.driver.skip([lab.row(lab.driver.propose({"x": 1.0}))])
    loaded = Experiment(opened).load()
    ids, configs, scores, statuses = loaded
    assert ids == [0, 1, 2, 3]
    assert configs == [{"x": place / 8} for place in range(4)]
    assert scores == [{"loss": 1.0}, {"loss": 2.0}, None, None]
    assert statuses == [COMPLETED, PRUNED, TrialStatus.FAILED, TrialStatus.TIMED_OUT]
    assert loaded.origins == [None] * 4
    assert Experiment(opened).load(last_trial_id=1).ids == [2, 3]


def test_pending_trials_are_due_inclusively(opened: Opened) -> None:
    lab, experiment = driven(opened), Experiment(opened)
    now, hour = datetime.now(UTC), timedelta(hours=1)
    for hours in (0, 0, 1, 2):
        lab.queue(now + hours * hour)
    lab.driver.propose({"x": 0.5})  # has no start: due at any time

    def due(moment: datetime, *, running: bool = False) -> list[int]:
        return [trial.number for trial in experiment.pending_trials(moment, running=running)]

    assert due(now - hour) == [4]
    assert due(now + timedelta(minutes=1)) == [0, 1, 4]
    assert due((now + hour).astimezone(timezone(-5 * hour))) == [0, 1, 2, 4]
    assert due(now + 3 * hour) == [0, 1, 2, 3, 4]
    lab.claim(1)
    assert due(now + 3 * hour) == [0, 2, 3, 4]
    assert due(now + 3 * hour, running=True) == [0, 1, 2, 3, 4]
    with pytest.raises(InvalidInput, match="time zone"):
        due(datetime(2026, 1, 1))


def test_what_is_not_there_is_said(opened: Opened) -> None:
    experiment = Experiment(opened)
    unknown: Any
    for unknown in (0, -1, 2**70, True, "0", None, 1.0):
        for work in (experiment.trial, experiment.load_telemetry, experiment.load_config):
            with pytest.raises(InvalidInput, match=r"no (trial|config)"):
                work(unknown)
    for number in (0, -1):
        with pytest.raises(InvalidInput, match="no trial"):
            experiment.cancel(number)


# Tables


def test_results_have_a_column_each_in_a_fixed_order() -> None:
    spec = sample_spec(
        space={
            "kind": {"type": "categorical", "choices": ["a", "b"]},
            "n": {"type": "int", "low": 0, "high": 9, "when": {"kind": "a"}},
            "x": {"type": "float", "low": 0, "high": 1},
        },
        objectives={"loss": "min", "size": "max"},
    )
    trials = [
        sample_trial(0, COMPLETED, config={"kind": "b", "x": 0.5}, metrics={"z": 1, "loss": 1.0, "a": True}),
        sample_trial(
            1, COMPLETED, config={"kind": "a", "n": 3, "x": 0.25}, metrics={"loss": math.nan, "a": False, "m": "text"}
        ),
    ]
    table = results_df(trials, spec)
    assert list(table.columns) == [
        *["trial", "status", "group", "repeat", "config.kind", "config.n", "config.x", "metric.loss", "metric.size"],
        *["metric.a", "metric.m", "metric.z", "step", "attempts", "error", "pareto", "hypervolume"],
    ]
    assert table["trial"].dtype == "int64"
    assert table["metric.loss"].dtype == "float64"
    assert [type(value) for value in table["metric.a"].tolist()] == [bool, bool]
    assert table["config.n"].tolist()[1] == 3
    assert table["config.n"].dtype == "Int64"  # a gap does not make floats of ints
    assert list(results_df([], spec).columns) == [column for column in table.columns if column[-2:] not in (".a", ".m", ".z")]


@pytest.mark.parametrize("space", [{}, {"x": {"type": "float", "low": 0.0, "high": 1.0}}], ids=["empty", "one"])
def test_results_of_an_experiment(tmp_path: Path, space: dict[str, Any]) -> None:
    with closing(create(tmp_path / "runs", space=space)) as opened:
        lab, experiment = driven(opened), Experiment(opened)
        configs = [f"config.{name}" for name in space]
        expected = ["trial", "status", "group", "repeat", *configs, "metric.loss", "step", "attempts", "error"]
        assert list(experiment.results_df().columns) == expected
        assert len(experiment.results_df()) == 0
        first = lab.claim(lab.driver.propose({"x": 0.5} if space else {}))
        first.report(4, {"loss": 2.0})
        lab.driver.end(first.attempt, FAILED)
        second = lab.claim(lab.driver.propose({"x": 0.5} if space else {}))
        lab.end(second, loss=1, extra=2**70)
        table = experiment.results_df()
        assert list(table.columns) == [*expected[:-3], "metric.extra", *expected[-3:]]
        assert table["status"].tolist() == ["FAILED", "COMPLETED"]
        assert table["error"].tolist() == ["bad", None]
        assert table["metric.loss"].tolist() == [2.0, 1.0]
        assert table["metric.extra"].tolist() == [None, 2**70]
        assert table["step"].tolist()[0] == 4
        result = result_of(opened, "done")
        pd.testing.assert_frame_equal(result.results_df(), table)
        assert [trial.number for trial in result.errors] == [0]
        assert (result.failed, result.best and result.best.number) == (False, 1)


def test_history_has_a_row_each(opened: Opened) -> None:
    lab, experiment = driven(opened), Experiment(opened)
    fixed = ["trial", "attempt", "step", "reported", "canonical", "metric.loss"]
    assert list(experiment.history_df().columns) == fixed
    writer = lab.started()
    lab.save(writer, 0, loss=1.0)
    writer.report(1, {"loss": 0.5, "acc": 1})
    lab.driver.end(writer.attempt, Ending(outcome=Outcome.LOST))
    lab.claim(0).report(1, {"loss": 0.25})
    table = experiment.history_df()
    assert list(table.columns) == [*fixed, "metric.acc"]
    assert table[["attempt", "step", "canonical"]].to_numpy().tolist() == [[1, 0, True], [1, 1, False], [2, 1, True]]
    assert table["metric.loss"].tolist() == [1.0, 0.5, 0.25]
    assert str(table["reported"].dt.tz) == "UTC"


# The best


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([], None),
        ([math.nan, math.inf, -math.inf], None),
        ([math.nan, 3.0, math.nan, 2.0], 3),
        ([2.0, 1.0, 1.0], 1),
        ([True, "1", None, 5], 3),
        ([-math.inf, 0.0, -0.0], 1),
        ([10**400, 2.0], 1),
    ],
)
def test_the_best_is_finite_and_the_earliest(values: list[Any], best: int | None) -> None:
    trials = [sample_trial(number, COMPLETED, metrics={"loss": value}) for number, value in enumerate(values)]
    found = best_of(trials, [Objective(name="loss")])
    assert (found and found.number) == best


def test_only_scored_trials_are_best() -> None:
    numbers = {status: number for number, status in enumerate(TrialStatus)}
    trials = [sample_trial(number, status, metrics={"loss": float(number)}) for status, number in numbers.items()]
    worst_first = [Objective(name="loss"), Objective(name="size")]
    found = best_of(trials, worst_first[:1])
    assert found is not None
    assert found.status is COMPLETED
    assert best_of(trials, worst_first) is None  # no trial has every objective


# The status


def status_after(opened: Opened, lab: Lab, ended: str | None) -> str:
    if ended is not None:
        Leases(opened.database, opened.record.id).release(epoch=lab.epoch, active=0.0, ended=ended)
    return Experiment(opened).status


def test_a_held_lease_is_running(opened: Opened) -> None:
    assert Experiment(opened).status == "interrupted"  # created, and never driven
    lab = driven(opened)
    assert status_after(opened, lab, None) == "running"


@pytest.mark.parametrize(
    ("outcomes", "ended", "status"),
    [
        ([Outcome.COMPLETED, None], "interrupted: SIGTERM", "interrupted"),
        ([Outcome.COMPLETED], "interrupted: SIGTERM", "interrupted"),
        ([Outcome.COMPLETED, None], "stopped on request", "stopped"),
        ([Outcome.COMPLETED, None], "every trial of the budget was proposed", "interrupted"),
        ([Outcome.COMPLETED, Outcome.FAILED], "every trial of the budget was proposed", "completed"),
        ([Outcome.COMPLETED, Outcome.CANCELLED], "the target 0 is reached", "completed"),
        ([Outcome.FAILED, Outcome.TIMED_OUT], "every trial of the budget was proposed", "failed"),
        ([], "nothing is left to do", "completed"),
    ],
)
def test_a_released_lease_leaves_a_status(opened: Opened, outcomes: list[Outcome | None], ended: str, status: str) -> None:
    lab = driven(opened)
    for outcome in outcomes:
        number = lab.driver.propose({"x": 0.5})
        if outcome is not None:
            lab.end(lab.claim(number), outcome)
    assert status_after(opened, lab, ended) == status


def test_a_lease_that_ran_out_is_interrupted(opened: Opened) -> None:
    from sqlalchemy import text

    from holdfast.storage.database.engine import Statement

    lab = driven(opened)
    lab.end(lab.started(), loss=1.0)
    with opened.database.write() as tx:
        tx.run(Statement(text("UPDATE experiment SET lease_expires = 0")))
    assert Experiment(opened).status == "interrupted"
    driven(opened, epoch=2)
    assert Experiment(opened).status == "running"


# Requests


def test_stopping_what_nobody_drives_is_done(opened: Opened) -> None:
    assert Experiment(opened).stop()
    lab = driven(opened)
    assert not Experiment(opened).stop()
    assert lab.reader.stop_requested()


def test_cancelling_is_a_request(opened: Opened) -> None:
    lab, experiment = driven(opened), Experiment(opened)
    writer = lab.started()
    experiment.cancel(0)
    assert lab.reader.cancel_requests() == {0}
    assert experiment.trial(0).status is TrialStatus.RUNNING
    lab.end(writer, Outcome.CANCELLED)
    assert experiment.trial(0).status is CANCELLED
    with pytest.raises(Conflict, match="CANCELLED"):
        experiment.cancel(0)
    assert [row.action for row in experiment.audit()] == ["created", "x", "cancel requested"]
