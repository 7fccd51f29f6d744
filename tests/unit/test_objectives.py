"""What users see of several objectives, conditions on metrics and repeats: the handle, the frames, the command line."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from store_kit import create

from holdfast.cli import main
from holdfast.core.errors import InvalidInput
from holdfast.core.hypervolume import hypervolume
from holdfast.core.trial import Outcome, Trial, TrialStatus
from holdfast.experiment import Experiment
from holdfast.locate import Opened
from holdfast.report.frames import groups_df, results_df
from holdfast.report.progress import Progress
from holdfast.report.ranking import FRONT, Ranking
from holdfast.report.tables import note_lines, trial_lines, trials_table
from holdfast.result import result_of
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.leases import Leases
from holdfast.testing.lab import FAILED, Lab
from holdfast.testing.samples import sample_spec, sample_trial

COMPLETED, PRUNED = TrialStatus.COMPLETED, TrialStatus.PRUNED
BOTH = {"loss": "min", "gain": "max"}
Point = dict[str, Any]


def search(**changes: Any) -> dict[str, Any]:
    return {"engine": "random", "num_trials": 20, "seed": 1, **changes}


def driven(opened: Opened) -> Lab:
    Leases(opened.database, opened.record.id).take(seen=0, epoch=1, holder={"pid": 1}, action="x", detail={})
    return Lab(opened.database, opened.record, 1)


def filled(folder: Path, points: list[Point], *, group: int | None = None, **changes: Any) -> Opened:
    """Create an experiment whose trials have these metrics, ``group`` of them for each config; nobody drives it."""
    opened = create(folder, **changes)
    lab = driven(opened)
    for number, metrics in enumerate(points):
        first = None if group is None else number // group * group
        place = {} if first is None else {"group": first, "repeat": number - first}
        writer = lab.claim(lab.driver.propose({"x": (number if first is None else first) / 256}, **place))
        writer.report(3, {"loss": 1e6})
        lab.end(writer, **metrics)
    Leases(opened.database, opened.record.id).release(epoch=1, active=0.0, ended="done")
    return opened


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main([*arguments])
    except SystemExit as ended:  # how argparse refuses
        code = int(str(ended.code))
    said = capsys.readouterr()
    return code, said.out, said.err


def shown(capsys: pytest.CaptureFixture[str], opened: Opened, *arguments: str) -> str:
    code, out, err = run(capsys, "show", str(opened.folder.path), *arguments)
    assert (code, err) == (0, "")
    return out


def drawn(trials: list[Trial], spec: Any, width: int) -> list[str]:
    """Return what a terminal of a width shows of a ranking."""
    console = Console(file=StringIO(), width=width, color_system=None, highlight=False)
    for part in Ranking(trials, spec).parts():
        console.print(part, markup=False, soft_wrap=isinstance(part, str))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO


# The handle


def test_a_front_its_volume_and_where_it_ends(tmp_path: Path) -> None:
    points = [
        {"loss": 1.0, "gain": 1.0},
        {"loss": 2.0, "gain": 3.0},
        {"loss": 4.0, "gain": 2.0},
        {"loss": 0.0, "gain": math.nan},
    ]
    with closing(filled(tmp_path, points, objectives=BOTH)) as opened:
        experiment = Experiment(opened)
        assert [trial.number for trial in experiment.pareto_front()] == [0, 1]
        assert experiment.reference_point() == {"loss": 4.0, "gain": 1.0}
        assert experiment.hypervolume() == 4.0  # trial 0 is on the edge: only trial 1 counts
        assert [trial.number for trial in result_of(opened, "done").pareto_front()] == [0, 1]
    with closing(create(tmp_path / "empty", objectives=BOTH)) as opened:
        experiment = Experiment(opened)
        assert (experiment.pareto_front(), experiment.reference_point(), experiment.hypervolume()) == ([], None, 0.0)


def test_the_best_by_weights(tmp_path: Path) -> None:
    points = [{"loss": 0.0, "gain": 0.0}, {"loss": 4.0, "gain": 3.0}, {"loss": 10.0, "gain": 4.0}]
    with closing(filled(tmp_path, points, objectives=BOTH)) as opened:
        experiment = Experiment(opened)
        found = {
            name: experiment.best_trial(weights=weights, scalarisation=how)
            for name, weights, how in [
                ("loss", {"loss": 1.0}, "sum"),
                ("both", {"loss": 1.0, "gain": 1.0}, "chebyshev"),
                ("gain", {"loss": 0.1, "gain": 1.0}, "sum"),
            ]
        }
        assert {name: trial and trial.number for name, trial in found.items()} == {"loss": 0, "both": 1, "gain": 2}
        with pytest.raises(InvalidInput, match="scope last"):
            experiment.best_trial("best", weights={"loss": 1.0})
        for bad in ({"size": 1.0}, {"loss": -1.0}, {"loss": 0.0}):
            with pytest.raises(InvalidInput, match="'loss', 'gain'"):
                experiment.best_trial(weights=bad)
        with pytest.raises(InvalidInput, match="sum, chebyshev"):
            experiment.best_trial(weights={"loss": 1.0}, scalarisation="min")


def test_an_infeasible_trial_is_best_for_nobody(tmp_path: Path) -> None:
    points = [{"loss": 0.0, "memory": 20}, {"loss": 2.0, "memory": 1}, {"loss": 1.0}]
    with closing(filled(tmp_path, points, feasible=["memory <= 16"])) as opened:
        experiment, result = Experiment(opened), result_of(opened, "done")
        for best in (
            experiment.best_trial(),
            experiment.best_trial("best"),
            result.best,
            experiment.best_trial(weights={"loss": 1}),
        ):
            assert best is not None
            assert best.number == 1
        assert [trial.number for trial in experiment.pareto_front()] == [1]
        assert experiment.load().ids == [0, 1, 2]
        assert experiment.results_df()["feasible"].tolist() == [False, True, False]


def test_repeats_are_one_config(tmp_path: Path) -> None:
    losses = [0.0, 8.0, 8.0, 3.0, 3.0, 3.0, 2.0, 2.0, 11.0]
    points = [{"loss": loss, "gain": 0.0} for loss in losses]
    changes: dict[str, Any] = {"objectives": BOTH}
    for how, best in (("mean", 3), ("median", 6), ("worst", 3)):
        changes["search"] = search(repeats=3, aggregate=how)
        with closing(filled(tmp_path, points, group=3, name=how, **changes)) as opened:
            experiment = Experiment(opened)
            for found in (experiment.best_trial(), experiment.best_trial("best"), result_of(opened, "done").best):
                assert found is not None
                assert found.number == best
            assert [trial.number for trial in experiment.pareto_front()] == [best]
            table = experiment.results_df()
            assert table.loc[table["pareto"], "trial"].tolist() == [best]
            assert table["group"].tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6]
            assert table["repeat"].tolist() == [0, 1, 2] * 3


# Frames


def points_of(count: int) -> list[Trial]:
    generator = np.random.default_rng(1)
    return [
        sample_trial(number, COMPLETED, config={"x": 0.5}, metrics={"loss": float(loss), "gain": float(gain)})
        for number, (loss, gain) in enumerate(generator.normal(size=(count, 2)))
    ]


def test_the_hypervolume_grows_in_the_order_of_the_ends(tmp_path: Path) -> None:
    with closing(create(tmp_path, objectives=BOTH, search=search(reference_point={"loss": 4, "gain": 0}))) as opened:
        lab = driven(opened)
        writers = [lab.started() for _ in range(6)]
        lab.end(writers[2], loss=3.0, gain=1.0)  # 1
        lab.driver.end(writers[0].attempt, FAILED)
        lab.end(writers[4], Outcome.PRUNED, loss=2.0, gain=2.0)  # 4
        lab.end(writers[1], Outcome.CANCELLED, loss=0.0, gain=9.0)
        lab.end(writers[3], loss=9.0, gain=9.0)  # beyond the reference point
        table = Experiment(opened).results_df()
        expected = [1.0, 4.0, 1.0, 4.0, 4.0, math.nan]
        assert table["hypervolume"].to_numpy() == pytest.approx(expected, nan_ok=True)
        assert table["pareto"].tolist() == [False, False, False, True, True, False]
        assert table["pareto"].dtype == "bool"
        assert table.attrs["reference_point"] == {"loss": 4.0, "gain": 0.0}
        pd.testing.assert_frame_equal(result_of(opened, "done").results_df(), table)
        assert result_of(opened, "done").ended == (2, 0, 4, 1, 3)


def test_the_column_is_what_each_beginning_has() -> None:
    spec = sample_spec(objectives=BOTH, feasible=["gain < 1.5"])
    trials = points_of(60)
    order = [number * 7 % 60 for number in range(60)]
    table = results_df(trials, spec, ended=order)
    point = list(table.attrs["reference_point"].values())
    assert point == [max(t.metrics["loss"] for t in trials), min(t.metrics["gain"] for t in trials)]
    for place, number in enumerate(order):
        seen = [trials[other].metrics for other in order[: place + 1] if trials[other].metrics["gain"] < 1.5]
        expected = hypervolume([(metrics["loss"], metrics["gain"]) for metrics in seen], point, spec.goals)
        assert table["hypervolume"][number] == pytest.approx(expected, rel=1e-12)


def test_a_group_joins_when_its_last_member_has_ended() -> None:
    spec = sample_spec(objectives=BOTH, search=search(repeats=2, reference_point={"loss": 10, "gain": 0}))
    losses = [9.0, 8.0, 5.0, 7.0]
    trials = [
        sample_trial(number, COMPLETED, metrics={"loss": loss, "gain": 1.0}, group=number // 2 * 2, repeat=number % 2)
        for number, loss in enumerate(losses)
    ]
    table = results_df(trials, spec, ended=[2, 1, 0, 3])
    assert table["hypervolume"].tolist() == [1.5, 0.0, 0.0, 4.0]


def test_ten_thousand_trials_and_none() -> None:
    spec = sample_spec(objectives=BOTH)
    table = results_df(points_of(10_000), spec)
    assert table["hypervolume"].is_monotonic_increasing
    assert table["pareto"].sum() == len(Ranking(points_of(10_000), spec).json()["pareto"])
    empty = results_df([], spec)
    assert [*empty.columns][-2:] == ["pareto", "hypervolume"]
    assert empty.attrs["reference_point"] is None


def test_one_objective_has_no_front() -> None:
    trials = [sample_trial(0, COMPLETED, metrics={"loss": 1.0})]
    assert not {"feasible", "pareto", "hypervolume"} & {*results_df(trials, sample_spec()).columns}
    assert results_df(trials, sample_spec()).attrs == {}


def test_a_group_has_every_aggregate() -> None:
    spec = sample_spec(objectives=BOTH)
    values = [(1.0, 5.0), (2.0, 7.0), (6.0, 3.0), (math.nan, math.nan)]
    trials = [
        sample_trial(number, COMPLETED, config={"x": 0.5}, metrics={"loss": loss, "gain": gain}, group=0, repeat=number)
        for number, (loss, gain) in enumerate(values)
    ]
    trials.append(sample_trial(4, TrialStatus.FAILED, config={"x": 1.0}, metrics={"loss": 0.0}))
    table = groups_df(trials, spec)
    numbers = [f"metric.{name}.{how}" for name in BOTH for how in ("mean", "median", "std", "worst")]
    assert [*table.columns] == ["group", "trials", "scored", "errored", "config.x", *numbers]
    found = table.loc[0, numbers].tolist()
    assert found == pytest.approx([3.0, 2.0, math.sqrt(7.0), 6.0, 5.0, 5.0, 2.0, 3.0])
    assert table[["group", "trials", "scored", "errored"]].to_numpy().tolist() == [[0, 4, 4, 0], [4, 1, 0, 1]]
    assert table.loc[1, numbers].isna().all()
    assert [*groups_df([], spec).columns] == [*table.columns]


# The command line


def test_show_has_the_front_and_json_has_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [{"größe [b] 損失": number / 8, "gain": number * number} for number in range(FRONT + 5)]
    objectives = {"größe [b] 損失": "min", "gain": "max"}
    with closing(filled(tmp_path, points, objectives=objectives)) as opened:
        out = shown(capsys, opened)
        assert f"front:   {FRONT + 5} trials" in out
        assert "größe [b] 損失 3, gain 0 (the worst values seen)" in out
        assert "5 more trials are on the front" in out
        rows = [line for line in out.splitlines() if " COMPLETED " in line]
        assert [int(row.split()[0]) for row in rows] == [*range(FRONT)]
        assert rows[2].split() == ["2", "COMPLETED", "0.25", "4", "3", "x=0.0078125"]
        found = json.loads(shown(capsys, opened, "--json"))
        first = ["name", "id", "status", "path", "epoch", "trials", "best"]
        assert {*found} >= {*first, "pareto", "reference_point", "reference_point_from", "hypervolume"}
        assert [trial["number"] for trial in found["pareto"]] == [*range(FRONT + 5)]
        assert found["pareto"][2]["values"] == {"größe [b] 損失": 0.25, "gain": 4.0}
        assert found["pareto"][2]["config"] == {"x": 0.0078125}
        assert found["best"]["number"] == 0
        assert found["reference_point"] == {"größe [b] 損失": 3.0, "gain": 0.0}
        assert found["hypervolume"] == Experiment(opened).hypervolume() > 0


def test_show_of_no_trial_and_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(filled(tmp_path, [], objectives=BOTH)) as opened:
        out = shown(capsys, opened)
        assert ["trials:", "none"] in [line.split() for line in out.splitlines()]
        assert "front" not in out
        found = json.loads(shown(capsys, opened, "--json"))
        assert (found["best"], found["pareto"], found["reference_point"], found["hypervolume"]) == (None, [], None, 0.0)
    point = {"loss": 4, "gain": 0}
    one = filled(tmp_path, [{"loss": 1.0, "gain": 2.0}], name="one", objectives=BOTH, search=search(reference_point=point))
    with closing(one) as opened:
        out = shown(capsys, opened)
        assert "front:   1 trial that" in out
        assert "volume:  6, the hypervolume up to loss 4, gain 0 (search.reference_point)" in out


def test_one_objective_keeps_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(filled(tmp_path, [{"loss": 2.0}, {"loss": 1.0}])) as opened:
        out = shown(capsys, opened)
        assert [line.split()[:3] for line in out.splitlines()[-2:]] == [["1", "COMPLETED", "1"], ["0", "COMPLETED", "2"]]
        found = json.loads(shown(capsys, opened, "--json"))
        assert {*found} >= {"name", "id", "status", "path", "epoch", "trials", "best"}
        assert not {*found} & {"pareto", "reference_point", "hypervolume", "least_infeasible"}
        assert found["best"]["number"] == 1


def test_show_says_why_nothing_is_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points: list[Point] = [{"loss": 0.0, "memory": 20}, {"loss": 2.0, "memory": 18.5}, {"loss": 2.0}]
    with closing(filled(tmp_path, points, feasible=["memory <= 16", "loss < 1"])) as opened:
        out = shown(capsys, opened)
        assert "no trial is feasible (memory <= 16 and loss < 1); trial 1 comes nearest: its violations sum up to 3.5" in out
        found = json.loads(shown(capsys, opened, "--json"))
        assert (found["best"], found["least_infeasible"]) == (None, {"number": 1, "violation": 3.5})
    with closing(filled(tmp_path, points[2:], name="lacking", feasible=["memory <= 16"])) as opened:
        assert "trial 0 comes nearest: it has no memory" in shown(capsys, opened)
        assert json.loads(shown(capsys, opened, "--json"))["least_infeasible"]["violation"] == "Infinity"


def test_show_says_that_no_trial_has_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(filled(tmp_path, [{"loss": math.nan, "gain": 1.0}, {"loss": 1.0}], objectives=BOTH)) as opened:
        assert "best:    none, no trial has ended with a finite value of loss and gain" in shown(capsys, opened)
    with closing(filled(tmp_path, [], name="nothing", objectives=BOTH)) as opened:
        assert "best:" not in shown(capsys, opened)


def test_repeats_whose_sum_exceeds_the_range_of_floats_have_a_mean() -> None:
    spec = sample_spec(objectives=BOTH, search=search(repeats=2))
    points = ((1e308, 1.0), (1.7e308, 2.0))
    trials = [
        sample_trial(repeat, COMPLETED, metrics={"loss": loss, "gain": gain}, group=0, repeat=repeat)
        for repeat, (loss, gain) in enumerate(points)
    ]
    assert Ranking(trials, spec).json()["pareto"][0]["values"] == {"loss": 1.35e308, "gain": 1.5}


@pytest.mark.parametrize(("width", "lacks"), [(80, {"attempts"}), (64, {"attempts", "group"}), (120, set())])
def test_a_narrow_table_of_trials_leaves_room_for_configs(width: int, lacks: set[str]) -> None:
    config = {"x": 0.25, "optimizer": "sgd", "optimizer.sgd.momentum": 0.5}
    note = "stopped by asha after step 1: loss 2 is not among the best 1 of 4 at 2 steps, the last of which is 1"
    trials = [sample_trial(number, COMPLETED, config=config, metrics={"loss": 1.5}, group=number) for number in range(3)]
    pruned = sample_trial(3, PRUNED, config=config, metrics={"loss": 2.0}, group=3)
    trials.append(replace(pruned, attempt=replace(pruned.attempt, note=note)))
    console = Console(file=StringIO(), width=width, color_system=None, highlight=False)
    console.print(trials_table(trials, sample_spec().goals, width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO
    header = ["trial", "status", "group", "repeat", "loss", "step", "attempts", "config"]
    assert lines[0].split() == [name for name in header if name not in lacks]
    assert max(map(len, map(str.rstrip, lines))) <= width
    assert any("optimizer.sgd.momentum=0.5" in line for line in lines)
    assert "asha" not in "".join(lines)
    assert [*note_lines(trials)] == [f"trial 3: {note}"]
    assert note in [*trial_lines(trials, sample_spec().goals)][-1]


def test_a_feasible_group_that_is_spoiled_is_not_called_infeasible() -> None:
    spec = sample_spec(feasible=["memory <= 16"], search=search(repeats=2, aggregate="worst"))
    trials = [
        sample_trial(0, COMPLETED, metrics={"loss": 1.0, "memory": 1}, group=0),
        sample_trial(1, TrialStatus.FAILED, group=0, repeat=1),
    ]
    assert Ranking(trials, spec).json() == {"best": None}
    assert [*Ranking(trials, spec).parts()] == []


def test_show_by_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [{"loss": 0.0, "gain, net": 0.0}, {"loss": 4.0, "gain, net": 3.0}, {"loss": 10.0, "gain, net": 4.0}]
    with closing(filled(tmp_path, points, objectives={"loss": "min", "gain, net": "max"})) as opened:
        both = '{"loss": 1, "gain, net": 1}'
        out = shown(capsys, opened, "--weights", both, "--scalarisation", "chebyshev")
        assert "best:    trial 1, by the weights loss 1, gain, net 1 (chebyshev)" in out
        assert json.loads(shown(capsys, opened, "--json", "--weights", both))["best"]["number"] == 1
        assert json.loads(shown(capsys, opened, "--json", "--weights", "loss=0.5"))["best"]["number"] == 0
        assert json.loads(shown(capsys, opened, "--json"))["best"]["number"] == 0
        path = str(opened.folder.path)
        for bad in (
            "size=1",
            "loss=-1",
            "loss=0",
            "loss=nan",
            "loss=inf",
            "loss",
            "loss=x",
            "",
            "loss=1,loss=2",
            '{"loss": "1"}',
            "{",
        ):
            for more in ([], ["--json"]):
                code, out, err = run(capsys, "show", path, "--weights", bad, *more)
                assert (code, out) == (2, ""), bad
                assert "loss" in err
        for flags in (["--scalarisation", "sum"], ["--weights", "loss=1", "--scalarisation", "best"]):
            assert run(capsys, "show", path, *flags)[0] == 2


def test_tables_have_places_among_repeats_and_each_objective(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [{"loss": float(number), "gain": 1.0} for number in range(4)]
    with closing(filled(tmp_path, points, group=2, objectives=BOTH, search=search(repeats=2))) as opened:
        out = shown(capsys, opened)
        assert "of trials with one config the mean is shown" in out
        assert out.splitlines()[-1].split() == ["0", "COMPLETED", "0.5", "1", "2", "3", "x=0"]
        code, out, _ = run(capsys, "trials", str(opened.folder.path))
        assert code == 0
        header, *rows = [line.split() for line in out.splitlines()]
        assert header == ["trial", "status", "group", "repeat", "loss", "gain", "step", "attempts", "config"]
        assert rows[3] == ["3", "COMPLETED", "2", "1", "3", "1", "3", "1", "x=0.0078125"]


def test_a_pruned_trial_is_shown_with_its_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(create(tmp_path, objectives=BOTH)) as opened:
        lab = driven(opened)
        writer = lab.started()
        writer.report(17, {"loss": 1.0, "gain": 2.0})
        lab.driver.end(writer.attempt, Ending(outcome=Outcome.PRUNED))
        Leases(opened.database, opened.record.id).release(epoch=1, active=0.0, ended="done")
        assert shown(capsys, opened).splitlines()[-1].split() == ["0", "PRUNED", "1", "2", "17", "x=0.5"]
        _, out, _ = run(capsys, "trials", str(opened.folder.path))
        assert out.splitlines()[-1].split() == ["0", "PRUNED", "1", "2", "17", "1", "x=0.5"]


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_fits_its_terminal_with_every_number_whole(width: int) -> None:
    names = [f"an_objective_with_a_long_name_{place}" for place in range(5)]
    spec = sample_spec(objectives=dict.fromkeys(names, "min"))
    values = [-1.25e-300, 1234.5, 0.001, 7.0, 1e9]
    trials = [sample_trial(0, COMPLETED, config={"x": 0.123456789}, metrics=dict(zip(names, values, strict=True)))]
    lines = drawn(trials, spec, width)[2:]
    assert max(map(len, lines)) <= width
    row = next(line.split() for line in lines if "COMPLETED" in line)
    assert row[2:7] == ["-1.25e-300", "1234.5", "0.001", "7", "1e+09"]


# The display of a running search


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_takes_feasible_trials_and_repeats_alone(tmp_path: Path, terminal: bool) -> None:
    text = StringIO()
    with closing(create(tmp_path, feasible=["memory <= 16"])) as opened:
        progress = Progress(Console(file=text, width=200, force_terminal=terminal, color_system=None))
        progress.opened(opened, restored=False)

        def best(number: int, status: TrialStatus, group: int | None = None, **metrics: Any) -> str | None:
            progress.trial(sample_trial(number, status, metrics=metrics, group=group, config={"x": 0.5}))
            return progress._best()

        assert best(0, COMPLETED, loss=0.0, memory=20) is None
        assert best(1, COMPLETED, loss=2.0, memory=1) == "best loss 2 (trial 1)"
        assert best(2, COMPLETED, 2, loss=1.0, memory=1) == "best loss 1 (trial 2)"
        assert best(3, PRUNED, 2, loss=9.0, memory=1) == "best loss 2 (trial 1)"
        assert best(1, TrialStatus.PENDING) == "best loss 5 (trial 2)"  # it runs once more
        progress.close()


def test_the_summary_has_the_front_or_says_why_there_is_none(tmp_path: Path) -> None:
    for name, changes, said in (
        ("front", {"objectives": BOTH}, "front:   1 trial that no other one dominates"),
        ("none", {"feasible": ["loss < 0"]}, "best:    none, no trial is feasible (loss < 0); trial 0 comes nearest"),
    ):
        text = StringIO()
        with closing(filled(tmp_path, [{"loss": 1.0, "gain": 1.0}], name=name, **changes)) as opened:
            progress = Progress(Console(file=text, width=200))
            progress.opened(opened, restored=False)
            progress.ended(result_of(opened, "done"))
        assert said in text.getvalue()
