"""The handle as a store: loading by number and by completion, the queue, merged experiments, repeats, what is best."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_kit import create

from holdfast.core.errors import InvalidConfig, InvalidInput, SpecError
from holdfast.core.objective import Direction, Objective, pareto
from holdfast.core.trial import Outcome, TrialStatus
from holdfast.experiment import Experiment
from holdfast.locate import Opened
from holdfast.report.frames import results_df
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.engine import Transaction
from holdfast.storage.database.leases import Leases
from holdfast.testing.lab import FAILED, Lab, dump, same
from holdfast.testing.samples import sample_spec, sample_trial

COMPLETED, FAILED_STATUS = TrialStatus.COMPLETED, TrialStatus.FAILED
FLOAT: dict[str, Any] = {"type": "float", "low": 0.0, "high": 1.0}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with closing(create(tmp_path / "runs")) as opened:
        yield opened


def driven(opened: Opened) -> Lab:
    Leases(opened.database, opened.record.id).take(seen=0, epoch=1, holder={"pid": 1}, action="x", detail={})
    return Lab(opened.database, opened.record, 1)


# Loading


def test_what_ends_late_is_never_missed(opened: Opened) -> None:
    lab, experiment = driven(opened), Experiment(opened)
    writers = [lab.started(place / 8) for place in range(5)]
    nothing = experiment.load_since()
    assert (list(nothing), nothing.cursor) == ([[], [], [], []], 0)
    lab.end(writers[2], loss=2.0)
    first = experiment.load_since(nothing.cursor)
    assert (first.ids, first.scores, first.statuses) == ([2], [{"loss": 2.0}], [COMPLETED])
    lab.end(writers[1], loss=1.0)
    lab.end(writers[4], Outcome.CANCELLED)
    lab.driver.end(writers[0].attempt, FAILED)
    second = experiment.load_since(first.cursor)
    assert (second.ids, second.configs) == ([1, 0], [{"x": 1 / 8}, {"x": 0.0}])
    assert (second.scores, second.statuses) == ([{"loss": 1.0}, None], [COMPLETED, FAILED_STATUS])
    again = experiment.load_since(second.cursor)
    assert (again.ids, again.cursor) == ([], second.cursor)
    assert experiment.load_since().ids == [2, 1, 0]
    lab.driver.rerun(lab.row(0), restart=True)
    assert experiment.load_since(second.cursor).ids == []
    lab.end(lab.claim(0), loss=0.5)
    assert experiment.load_since(second.cursor).ids == [0]


@pytest.mark.parametrize("cursor", [-1, True, "0", None, 1.5, 2**70])
def test_a_cursor_that_is_none_is_refused(opened: Opened, cursor: Any) -> None:
    with pytest.raises(InvalidInput, match="cursor"):
        Experiment(opened).load_since(cursor)
    if cursor != -1:
        with pytest.raises(InvalidInput, match="last_trial_id"):
            Experiment(opened).load(cursor)
    with pytest.raises(InvalidInput, match="last_trial_id"):
        Experiment(opened).load(-2)


def test_loading_takes_as_many_statements_however_many_trials(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, experiment = driven(opened), Experiment(opened)
    executed = 0
    run = Transaction.run

    def counting(self: Transaction, *arguments: Any, **values: Any) -> Any:
        nonlocal executed
        executed += 1
        return run(self, *arguments, **values)

    monkeypatch.setattr(Transaction, "run", counting)
    now = datetime.now(UTC)
    reads = {
        "load": experiment.load,
        "load_since": experiment.load_since,
        "pending": lambda: experiment.pending_trials(now, running=True),
        "find": lambda: experiment.find("COMPLETED"),
        "best": lambda: experiment.best_trial(scope="best"),
        "pareto": experiment.pareto_front,
        "telemetry": experiment.telemetry_df,
    }
    counts = []
    for target in (4, 100):
        while len(experiment.trials) < target:
            writer = lab.started()
            writer.report(0, {"loss": 1.0})
            writer.telemetry([(1, "cpu", 1.0)])
            lab.end(writer, loss=2.0)
        found = {}
        for name, read in reads.items():
            executed = 0
            read()
            found[name] = executed
        counts.append(found)
    assert counts[0] == counts[1]
    assert max(counts[0].values()) <= 8


def test_trials_are_found_by_status(opened: Opened) -> None:
    lab, experiment = driven(opened), Experiment(opened)
    lab.end(lab.started(0.1), loss=1.0)
    lab.driver.end(lab.started(0.2).attempt, FAILED)
    lab.started(0.3)
    lab.driver.propose({"x": 0.4})
    assert [trial.number for trial in experiment.find("COMPLETED")] == [0]
    assert [trial.number for trial in experiment.find(TrialStatus.FAILED)] == [1]
    assert [trial.number for trial in experiment.find(["PENDING", TrialStatus.RUNNING])] == [2, 3]
    assert [trial.number for trial in experiment.find(TrialStatus)] == [0, 1, 2, 3]
    assert experiment.find([]) == []
    for bad in ("completed", ["PENDING", "DONE"]):
        with pytest.raises(InvalidInput, match="allowed: PENDING, RUNNING"):
            experiment.find(bad)


def test_telemetry_of_all_trials_at_once(opened: Opened) -> None:
    lab, experiment = driven(opened), Experiment(opened)
    assert list(experiment.telemetry_df().columns) == ["trial", "time", "name", "value"]
    for place in range(2):
        lab.started(place / 4).telemetry([(2_000_000, "cpu", place), (1_000_000, "gpu", "idle"), (1_000_000, "cpu", None)])
    moments = [datetime(1970, 1, 1, 0, 0, second, tzinfo=UTC) for second in (1, 1, 2)]
    rows = [("cpu", None), ("gpu", "idle")]
    expected = [(n, m, *row) for n in range(2) for m, row in zip(moments, [*rows, ("cpu", n)], strict=True)]
    assert experiment.telemetry() == expected
    assert experiment.load_telemetry(1) == [row[1:] for row in expected if row[0] == 1]
    table = experiment.telemetry_df()
    assert table["value"].tolist() == [None, "idle", 0, None, "idle", 1]
    assert str(table["time"].dt.tz) == "UTC"
    lab.started()
    assert experiment.load_telemetry(2) == []


# The queue


@pytest.mark.parametrize("zone", [-12, 0, 14])
def test_a_new_trial_is_pending_in_every_time_zone(opened: Opened, zone: int) -> None:
    experiment = Experiment(opened)
    start = datetime.now(timezone(timedelta(hours=zone)))
    trial = experiment.new_trial({"x": 1}, start, {"why": "baseline"})
    assert (trial.number, trial.status, trial.source) == (0, TrialStatus.PENDING, "queued")
    assert trial.ts_start == start
    assert trial.ts_start is not None
    assert trial.ts_start.utcoffset() == timedelta(0)
    assert same(trial.config, {"x": 1.0})
    assert trial.metadata == {"why": "baseline"}
    assert experiment.pending_trials(start, running=False) == [trial]
    assert experiment.pending_trials(start - timedelta(microseconds=1), running=True) == []


def test_repeats_come_back_as_a_list(opened: Opened) -> None:
    experiment = Experiment(opened)
    trials = experiment.enqueue({"x": np.float64(0.5)}, repeats=3, metadata=[("a", 1), ("b", [True])])
    assert [(trial.number, trial.group, trial.repeat, trial.metadata) for trial in trials] == [
        (number, 0, number, {"a": 1, "b": [True]}) for number in range(3)
    ]
    assert trials == experiment.trials


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "NaN": ({"x": math.nan}, {}, "x = nan is no finite number"),
    "infinite": ({"x": -math.inf}, {}, "finite"),
    "beyond floats": ({"x": 10**400}, {}, "finite"),
    "outside": ({"x": 1.5}, {}, "outside"),
    "text": ({"x": "0.5"}, {}, "finite"),
    "truth value": ({"x": True}, {}, "finite"),
    "missing": ({}, {}, "lacks 'x'"),
    "unknown": ({"x": 0.5, "y": 1}, {}, "'y'"),
    "keys of two kinds": ({"x": 0.5, 3: 1, "y": 2}, {}, "3"),
    "object": ({"x": object()}, {}, "object"),
    "set": ({"x": {0.5}}, {}, "set"),
    "no mapping": ([("x", 0.5)], {}, "list"),
    "nothing": (None, {}, "NoneType"),
    "naive": ({"x": 0.5}, {"ts_start": datetime(2026, 1, 1)}, "time zone"),
    "no time": ({"x": 0.5}, {"ts_start": "2026-01-01T00:00:00Z"}, "str"),
    "no such date": ({"x": 0.5}, {"ts_start": datetime.max.replace(tzinfo=timezone(-timedelta(hours=1)))}, "9999"),
    "no repeats": ({"x": 0.5}, {"repeats": 0}, "repeats"),
    "too many repeats": ({"x": 0.5}, {"repeats": 10**9}, "repeats is 1000000000; .* to 10000"),
    "half a repeat": ({"x": 0.5}, {"repeats": 1.5}, "repeats"),
    "true repeats": ({"x": 0.5}, {"repeats": True}, "repeats"),
    "metadata twice": ({"x": 0.5}, {"metadata": [("a", "1"), ("b", "2"), ("a", "3")]}, "'a' twice"),
    "metadata key": ({"x": 0.5}, {"metadata": {1: "a"}}, "key 1"),
    "metadata value": ({"x": 0.5}, {"metadata": {"a": object()}}, "object"),
    "metadata text": ({"x": 0.5}, {"metadata": "a=b"}, "pairs"),
    "metadata surrogate": ({"x": 0.5}, {"metadata": {"a": "caf\udce9"}}, "Unicode"),
    "metadata key surrogate": ({"x": 0.5}, {"metadata": {"caf\udce9": "a"}}, "key"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_leaves_nothing(opened: Opened, case: str) -> None:
    config, options, message = BAD[case]
    before = dump(opened.database)
    with pytest.raises(InvalidConfig if not options else InvalidInput, match=message):
        Experiment(opened).enqueue(config, **options)
    assert dump(opened.database) == before


# Merging


def source_of(tmp_path: Path, name: str, space: dict[str, Any], configs: list[dict[str, Any]]) -> None:
    with closing(create(tmp_path / "runs", name, space=space)) as opened:
        lab = driven(opened)
        for place, config in enumerate(configs):
            lab.end(lab.claim(lab.driver.propose(config)), loss=float(place))


SPACE: dict[str, Any] = {
    "act": {"type": "categorical", "choices": ["relu", "tanh"], "default": "tanh"},
    "beta": {**FLOAT, "when": {"act": "relu"}},
    "fixed": {"type": "constant", "value": 3},
    "n": {"type": "int", "low": 1, "high": 9, "default": 4},
    "x": FLOAT,
}


def test_merged_trials_follow_the_own_ones_with_defaults_filled_in(tmp_path: Path) -> None:
    source_of(tmp_path, "old", {"x": {"type": "int", "low": 0, "high": 1}}, [{"x": 0}, {"x": 1}])
    act = {key: SPACE[key] for key in ("act",)}
    relu = {"act": "relu", "x": 0.5}
    source_of(tmp_path, "older", {**act, "x": FLOAT}, [relu, {"act": "tanh", "x": 0.25}])
    with closing(create(tmp_path / "runs", "new", space=SPACE)) as opened:
        lab, experiment = driven(opened), Experiment(opened)
        own = {"act": "relu", "beta": 0.1, "fixed": 3, "n": 1, "x": 0.0}
        lab.end(lab.claim(lab.driver.propose(own)), loss=9.0)
        assert experiment.merge(["old", "older"]) == {"old": 2, "older": 2}
        loaded = experiment.load()
        assert loaded.ids == [0, 0, 1, 1]
        assert loaded.left_out == 1  # relu needs beta, and beta has no default
        filled = {"act": "tanh", "fixed": 3, "n": 4}
        expected = [own, {**filled, "x": 0.0}, {**filled, "x": 1.0}, {**filled, "x": 0.25}]
        for found, wanted in zip(loaded.configs, expected, strict=True):
            assert same(dict(sorted(found.items())), dict(sorted(wanted.items())))
            assert opened.spec.space.validate_config(found) == found
        assert loaded.scores == [{"loss": 9.0}, {"loss": 0.0}, {"loss": 1.0}, {"loss": 1.0}]
        assert loaded.origins[0] is None
        names = [origin.partition("@")[0] for origin in loaded.origins if origin]
        assert names == ["old#0", "old#1", "older#1"]
        assert (experiment.load(0).ids, experiment.load_since().ids) == ([], [0])
        best = experiment.best_trial()
        assert best is not None
        assert (best.number, len(experiment.trials), experiment.counts()) == (0, 1, {COMPLETED: 1})
        assert len(experiment.results_df()) == len(experiment.pareto_front()) == 1
        with pytest.raises(InvalidInput):
            experiment.trial(-1)


def test_a_merge_is_refused_before_anything_is_created(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(InvalidInput, match="no experiment 'old'"):
        create(runs, "new", merge=["old"])
    assert not runs.exists()
    source_of(tmp_path, "old", {"x": FLOAT, "y": FLOAT}, [{"x": 0.5, "y": 0.5}])
    for merge, error in ((["old", "older"], InvalidInput), (["old"], SpecError)):
        with pytest.raises(error):
            create(runs, "new", merge=merge)
        assert not (runs / "new").exists()


def test_a_spec_merges_when_it_is_created(tmp_path: Path) -> None:
    source_of(tmp_path, "old", {"x": FLOAT}, [{"x": 0.5}, {"x": 0.25}])
    with closing(create(tmp_path / "runs", "new", merge=["old"])) as opened:
        experiment = Experiment(opened)
        assert experiment.load().ids == [0, 1]
        assert experiment.spec.merge == ("old",)
        assert opened.record.spec["merge"] == ["old"]
        assert [row.action for row in experiment.audit()] == ["created", "merged"]
        assert experiment.merge(["old"]) == {"old": 0}


@pytest.mark.parametrize("merge", [["a", "a"], [""], "a", [1]])
def test_a_spec_names_what_it_merges_once(merge: Any) -> None:
    with pytest.raises(SpecError, match="merge"):
        sample_spec(merge=merge)


# Repeats


def test_a_group_is_one_row_of_aggregates() -> None:
    trials = [sample_trial(0, COMPLETED, config={"x": 0.5}, metrics={"loss": 5.0})]
    losses = [1.0, 2.0, 6.0, math.nan]
    trials += [
        sample_trial(1 + place, COMPLETED, config={"x": 0.25}, metrics={"loss": loss, "note": "a"}, group=1, repeat=place)
        for place, loss in enumerate(losses)
    ]
    trials.append(sample_trial(5, FAILED_STATUS, config={"x": 0.25}, metrics={"loss": 100.0}, group=1, repeat=4))
    trials.append(sample_trial(6, config={"x": 0.25}, group=1, repeat=5))
    spec = sample_spec()
    wanted = {"mean": 3.0, "median": 2.0, "min": 1.0, "max": 6.0, "std": math.sqrt(7.0)}
    for aggregate, value in wanted.items():
        table = results_df(trials, spec, aggregate=aggregate)
        assert list(table.columns) == ["group", "trials", "scored", "errored", "config.x", "metric.loss"]
        assert table[["group", "trials", "scored", "errored"]].to_numpy().tolist() == [[0, 1, 1, 0], [1, 6, 4, 1]]
        assert table["config.x"].tolist() == [0.5, 0.25]
        assert table["metric.loss"].tolist() == pytest.approx([0.0 if aggregate == "std" else 5.0, value])
    table = results_df(trials, spec)
    assert table["group"].tolist() == [0] + [1] * 6
    assert table["repeat"].tolist() == [0, 0, 1, 2, 3, 4, 5]
    with pytest.raises(InvalidInput, match="allowed: mean, median"):
        results_df(trials, spec, aggregate="sum")
    assert list(results_df([], spec, aggregate="mean").columns) == list(results_df(trials, spec, aggregate="mean").columns)


@pytest.mark.parametrize("aggregate", ["mean", "median", "min", "max", "std"])
def test_aggregates_of_strange_numbers_harm_nothing(aggregate: str) -> None:
    values = [math.inf, -math.inf, 10**400, 1, True, None]
    trials = [
        sample_trial(place, COMPLETED, config={}, metrics={"loss": value}, group=0, repeat=place)
        for place, value in enumerate(values)
    ]
    assert len(results_df(trials, sample_spec(space={}), aggregate=aggregate)) == 1


# What is best


def test_the_best_by_scope(opened: Opened) -> None:
    lab, experiment = driven(opened), Experiment(opened)
    reports = {0: [3.0, 0.5, 4.0], 1: [2.0, 2.0, 1.0], 2: [math.nan, -math.inf, 5.0]}
    for number, losses in reports.items():
        writer = lab.started(number / 4)
        for step, loss in enumerate(losses):
            writer.report(step, {"loss": loss})
        lab.end(writer)
    failed = lab.started(0.9)
    failed.report(0, {"loss": -100.0})
    lab.driver.end(failed.attempt, FAILED)
    found = {scope: experiment.best_trial(scope) for scope in ("last", "best")}
    assert {scope: trial and trial.number for scope, trial in found.items()} == {"last": 1, "best": 0}
    with pytest.raises(InvalidInput, match="allowed: last, best"):
        experiment.best_trial("all")


def test_superseded_reports_are_never_best(opened: Opened) -> None:
    lab, experiment = driven(opened), Experiment(opened)
    writer = lab.started()
    lab.save(writer, 0, loss=3.0)
    writer.report(1, {"loss": -1.0})
    lab.driver.end(writer.attempt, Ending(outcome=Outcome.LOST))
    again = lab.claim(0)
    again.report(1, {"loss": 2.0})
    lab.end(again)
    lab.end(lab.started(0.1), loss=0.0)
    best = experiment.best_trial("best")
    assert best is not None
    assert best.number == 1


def test_the_pareto_front(tmp_path: Path) -> None:
    with closing(create(tmp_path / "runs", objectives={"loss": "min", "acc": "max"})) as opened:
        lab, experiment = driven(opened), Experiment(opened)
        assert experiment.pareto_front() == []
        points: list[tuple[Any, Any]] = [(2, 2), (1, 1), (2, 2), (3, 2), (math.nan, 9), (0, None), (1, 0.5), (-math.inf, 5)]
        for loss, acc in points:
            lab.end(lab.started(), loss=loss, acc=acc)
        failed = lab.started()
        failed.report(0, {"loss": 0.0, "acc": 10.0})
        lab.driver.end(failed.attempt, FAILED)
        assert [trial.number for trial in experiment.pareto_front()] == [0, 1, 2]


def test_the_front_is_what_brute_force_finds() -> None:
    generator = np.random.default_rng(1)
    for size in range(1, 5):
        goals = [Objective(name=str(place), direction=Direction.MIN if place % 2 else Direction.MAX) for place in range(size)]
        points = generator.integers(0, 6, (60, size)).astype(float).tolist()
        signs = [1 if goal.direction is Direction.MIN else -1 for goal in goals]
        costs = np.array(points) * signs
        expected = [
            place
            for place, cost in enumerate(costs)
            if not any((other <= cost).all() and (other < cost).any() for other in costs)
        ]
        assert pareto(points, goals) == expected
    assert pareto([], [Objective(name="a")]) == []
