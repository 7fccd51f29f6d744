"""Stopping rules as pure functions: against worked examples, and decision by decision against Optuna's pruners."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.history import History
from holdfast.core.objective import Direction, Objective
from holdfast.core.stopping import Hyperband, Rules, make, percentile_of
from holdfast.core.stopping_section import StoppingSection

LOSS = Objective(name="loss")
ACCURACY = Objective(name="accuracy", direction=Direction.MAX)
NAN, INF = math.nan, math.inf

Reports = list[tuple[int, int, float]]
"""trial, step, value in the order of their commits"""


def rules(rule: str, *objectives: Objective, **options: Any) -> Rules:
    return make(StoppingSection(rule=rule, **options), objectives or (LOSS,))  # type: ignore[arg-type]


def decisions(chosen: Rules, reports: Reports, metric: str = "loss") -> list[bool]:
    """Return whether each report ends its trial; a trial that was ended reports nothing more."""
    history = History(chosen.metrics)
    ended: set[int] = set()
    found = []
    for trial, step, value in reports:
        if trial in ended:
            continue
        history.add(trial, step, {metric: value})
        reason = chosen.decide(history, trial, step)
        if reason is not None:
            ended.add(trial)
        found.append(reason is not None)
    return found


class Optunas:
    """The same reports told to a study of Optuna's."""

    def __init__(self, pruner: optuna.pruners.BasePruner, direction: str = "minimize") -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(study_name="hyperband", pruner=pruner, direction=direction)
        self.trials: dict[int, optuna.Trial] = {}

    def decisions(self, reports: Reports) -> list[bool]:
        for _ in range(1 + max((trial for trial, _, _ in reports), default=-1)):
            trial = self.study.ask()
            self.trials[trial.number] = trial
        ended: set[int] = set()
        found = []
        for number, step, value in reports:
            if number in ended:
                continue
            trial = self.trials[number]
            trial.report(value, step)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pruned = trial.should_prune()
            if pruned:
                ended.add(number)
            found.append(pruned)
        return found


class AllTrials:
    """A study whose running trials count as complete ones, all but the one that is decided about."""

    def __init__(self, study: optuna.Study, own: int) -> None:
        self._study, self._own = study, own
        self.direction = study.direction

    def get_trials(self, **_: Any) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.number != self._own]


class OfAllTrials(optuna.pruners.PercentilePruner):
    """Optuna's own rule, but over all trials that have reported the step."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return super().prune(AllTrials(study, trial.number), trial)  # type: ignore[arg-type]


@st.composite
def interleaved(draw: st.DrawFn, *, most: int = 27, sparse: bool = False, values: Any = None) -> Reports:
    """Return reports of several trials in some order, each trial's steps rising."""
    values = st.integers(-20, 20).map(float) if values is None else values
    trials = draw(st.integers(1, 9))
    order = draw(st.lists(st.integers(0, trials - 1), min_size=1, max_size=80))
    steps = dict.fromkeys(range(trials), -1)
    reports = []
    for trial in order:
        steps[trial] += draw(st.integers(1, 4)) if sparse else 1
        if steps[trial] < most:
            reports.append((trial, steps[trial], draw(values)))
    return reports


def one_more(reports: Reports) -> Reports:
    """Return the reports with steps from 1: Optuna takes the number of the step for the number of steps done."""
    return [(trial, step + 1, value) for trial, step, value in reports]


DIRECTIONS = pytest.mark.parametrize("goal", [LOSS, Objective(name="loss", direction=Direction.MAX)], ids=["min", "max"])


def sense(goal: Objective) -> str:
    return "minimize" if goal.direction is Direction.MIN else "maximize"


class TestAgainstOptuna:
    @DIRECTIONS
    @settings(max_examples=60, deadline=None)
    @given(reports=interleaved(), least=st.integers(1, 3), factor=st.integers(2, 4))
    def test_asha(self, goal: Objective, reports: Reports, least: int, factor: int) -> None:
        theirs = Optunas(optuna.pruners.SuccessiveHalvingPruner(least, factor, 0), sense(goal))
        ours = rules("asha", goal, min_steps=least, reduction_factor=factor)
        assert decisions(ours, reports) == theirs.decisions(one_more(reports))

    @DIRECTIONS
    @settings(max_examples=60, deadline=None)
    @given(reports=interleaved(most=26), least=st.integers(1, 3), factor=st.integers(2, 4))
    def test_hyperband(self, goal: Objective, reports: Reports, least: int, factor: int) -> None:
        """Of a study by the name that our checksum begins with; the last step, max_steps, is no rung of ours."""
        theirs = Optunas(optuna.pruners.HyperbandPruner(least, 27, factor), sense(goal))
        ours = rules("hyperband", goal, min_steps=least, reduction_factor=factor, max_steps=27)
        assert decisions(ours, reports) == theirs.decisions(one_more(reports))

    @DIRECTIONS
    @settings(max_examples=60, deadline=None)
    @given(
        reports=interleaved(sparse=True),
        percentile=st.sampled_from([10.0, 25.0, 50.0, 75.0]),
        startup=st.integers(1, 4),
        interval=st.integers(1, 3),
        times=st.integers(1, 3),
    )
    def test_percentile(
        self, goal: Objective, reports: Reports, percentile: float, startup: int, interval: int, times: int
    ) -> None:
        """Where min_steps is a multiple of the interval: Optuna counts intervals from its warm-up."""
        least = interval * times
        pruner = OfAllTrials(percentile, 0, least - 1, interval, n_min_trials=startup)
        expected = Optunas(pruner, sense(goal)).decisions(reports)
        options = {"min_steps": least, "startup_trials": startup, "interval": interval}
        ours = rules("percentile", goal, percentile=percentile, **options)
        assert decisions(ours, reports) == expected
        if percentile == 50.0:
            assert decisions(rules("median", goal, **options), reports) == expected

    @DIRECTIONS
    @settings(max_examples=60, deadline=None)
    @given(
        reports=interleaved(sparse=True, values=st.integers(-20, 20).map(float) | st.just(NAN)),
        lower=st.integers(-15, 0),
        upper=st.integers(0, 15),
        interval=st.integers(1, 3),
        times=st.integers(1, 3),
    )
    def test_threshold(self, goal: Objective, reports: Reports, lower: int, upper: int, interval: int, times: int) -> None:
        pruner = optuna.pruners.ThresholdPruner(lower, upper, interval * times - 1, interval)
        ours = rules("threshold", goal, lower=lower, upper=upper, min_steps=interval * times, interval=interval)
        assert decisions(ours, reports) == Optunas(pruner, sense(goal)).decisions(reports)

    @DIRECTIONS
    @settings(max_examples=60, deadline=None)
    @given(order=st.permutations(range(15)), patience=st.integers(1, 6))
    def test_patience(self, goal: Objective, order: list[int], patience: int) -> None:
        """Where no two values are equal and min_delta is 0."""
        reports = [(0, step, float(value)) for step, value in enumerate(order)]
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
            theirs = Optunas(optuna.pruners.PatientPruner(None, patience - 1), sense(goal))
        assert decisions(rules("patience", goal, patience=patience), reports) == theirs.decisions(reports)

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.sampled_from([1.0, 10.0, 25.0, 33.3, 50.0, 90.0]))
    def test_percentiles(self, values: list[float], percentile: float) -> None:
        assert percentile_of(sorted(values), percentile) == np.percentile(values, percentile)


class TestAsha:
    def test_one_of_three_goes_on_from_each_rung(self) -> None:
        values = [0.5, 0.4, 0.6, 0.4, 0.3, 0.45]
        assert decisions(rules("asha"), [(trial, 0, value) for trial, value in enumerate(values)]) == [
            *(False, False, True, False, False, True)
        ]

    def test_the_reason_says_it_all(self) -> None:
        history = History(["loss"])
        for trial, value in enumerate([0.1, 0.2, 0.3]):
            history.add(trial, 2, {"loss": value})
        reason = rules("asha", min_steps=3).decide(history, 2, 2)
        assert (
            reason == "stopped by asha after step 2: loss 0.3 is not among the best 1 of 3 at 3 steps, the last of which is 0.1"
        )

    def test_sparse_steps_are_judged_by_the_first_report_beyond_the_rung(self) -> None:
        chosen = rules("asha", min_steps=4, reduction_factor=2)
        # The rung of 4 steps: trial 0 comes to it with step 5 (1.0), trial 1 with step 3 (2.0) and is judged only there.
        reports = [(0, 1, 9.0), (0, 5, 1.0), (0, 6, 9.0), (1, 3, 2.0)]
        assert decisions(chosen, reports) == [False, False, False, True]

    def test_several_rungs_at_once(self) -> None:
        chosen = rules("asha", reduction_factor=2)
        assert decisions(chosen, [(0, 0, 5.0), (0, 1, 1.0), (1, 7, 2.0)]) == [False, False, True]

    def test_max_steps_is_no_rung(self) -> None:
        reports = [(0, 8, 1.0), (1, 8, 2.0)]
        assert decisions(rules("asha", min_steps=3), reports) == [False, True]
        assert decisions(rules("asha", min_steps=3, max_steps=9), reports) == [False, True]
        reports = [(0, 2, 1.0), (1, 2, 1.0), (0, 8, 1.0), (1, 8, 2.0)]
        assert decisions(rules("asha", min_steps=3), reports) == [False, False, False, True]
        assert decisions(rules("asha", min_steps=3, max_steps=9), reports) == [False] * 4

    def test_nan_and_infinity(self) -> None:
        assert decisions(rules("asha"), [(0, 0, NAN), (1, 0, INF), (2, 0, 1.0), (3, 0, NAN)]) == [True, False, False, True]


class TestHyperband:
    def test_brackets_are_weighted_and_only_compared_within(self) -> None:
        chosen = rules("hyperband", reduction_factor=3, max_steps=27)
        (rule,) = chosen.rules
        assert isinstance(rule, Hyperband)
        brackets = [rule.bracket(trial) for trial in range(4900)]
        counts = [brackets.count(bracket) for bracket in range(4)]
        assert [round(count / 100) for count in counts] == [27, 12, 6, 4]
        first, second = (brackets.index(bracket) for bracket in (0, 1))
        again = brackets.index(0, first + 1)
        assert decisions(chosen, [(first, 0, 1.0), (second, 0, 9.0), (again, 0, 9.0)]) == [False, False, True]

    @pytest.mark.parametrize(("most", "factor", "count"), [(2, 3, 1), (3, 3, 2), (243, 3, 6), (1000, 10, 4)])
    def test_how_many_brackets(self, most: int, factor: int, count: int) -> None:
        (rule,) = rules("hyperband", max_steps=most, reduction_factor=factor).rules
        assert {rule.bracket(trial) for trial in range(20 * factor**count)} == set(range(count))  # type: ignore[attr-defined]


class TestMedian:
    def test_others_that_run_count_and_their_number_matters(self) -> None:
        reports = [(trial, 0, float(trial)) for trial in range(6)]
        assert decisions(rules("median", startup_trials=2), reports) == [False, False, True, True, True, True]
        assert decisions(rules("median", startup_trials=5), reports) == [False, False, False, False, False, True]

    def test_the_best_so_far_counts(self) -> None:
        reports = [(0, 0, 2.0), (0, 1, 2.0), (1, 0, 1.0), (1, 1, 9.0)]
        assert decisions(rules("median", startup_trials=1), reports) == [False] * 4

    def test_nan_is_worst(self) -> None:
        chosen = rules("median", startup_trials=1)
        assert decisions(chosen, [(0, 0, NAN), (1, 0, 5.0)]) == [False, False]
        assert decisions(chosen, [(0, 0, 5.0), (1, 0, NAN)]) == [False, True]
        assert decisions(chosen, [(0, 0, INF), (1, 0, NAN)]) == [False, True]

    def test_between_a_number_and_infinity(self) -> None:
        assert percentile_of([1.0, INF], 50.0) == INF
        assert percentile_of([-INF, 1.0], 50.0) == 1.0
        assert percentile_of([-INF, INF], 50.0) == INF
        assert percentile_of([1.0, 2.0, INF], 50.0) == 2.0


class TestPatience:
    def test_equal_values_and_small_steps_are_no_better(self) -> None:
        chosen = rules("patience", patience=2, min_delta=0.1)
        assert decisions(chosen, [(0, step, value) for step, value in enumerate([1.0, 0.95, 0.91])]) == [False, False, True]
        creeping = [1.0, 0.95, 0.89, 0.85, 0.78]
        assert decisions(chosen, [(0, step, value) for step, value in enumerate(creeping)]) == [False] * 5

    def test_steps_count_and_not_reports(self) -> None:
        assert decisions(rules("patience", patience=5), [(0, 0, 1.0), (0, 4, 1.0), (0, 9, 1.0)]) == [False, False, True]

    def test_nan_is_no_better_and_min_steps_come_first(self) -> None:
        chosen = rules("patience", patience=2, min_steps=5)
        values = [NAN, NAN, NAN, NAN, 1.0, NAN, NAN]
        assert decisions(chosen, [(0, step, value) for step, value in enumerate(values)]) == [False] * 6 + [True]


class TestRules:
    def test_the_metric_and_its_direction(self) -> None:
        for options, direction in (
            ({}, Direction.MAX),
            ({"metric": "loss"}, Direction.MIN),
            ({"metric": "other"}, Direction.MAX),
            ({"metric": "other", "higher_is_better": False}, Direction.MIN),
            ({"higher_is_better": False}, Direction.MIN),
        ):
            (rule,) = rules("patience", ACCURACY, LOSS, **options).rules
            assert rule.goal == Objective(name=options.get("metric", "accuracy"), direction=direction)  # type: ignore[arg-type]

    def test_reports_without_the_metric_are_not_decided_about(self) -> None:
        chosen = rules("threshold", upper=1.0)
        history = History(chosen.metrics)
        history.add(0, 0, {"loss": 5.0})
        assert chosen.decide(history, 0, 0) is not None
        for step, value in enumerate([None, "5", True, [5.0]], start=1):
            history.add(0, step, {"loss": value, "other": 5.0})
            assert chosen.decide(history, 0, step) is None
        history.add(0, 9, {"loss": 10**400})
        assert chosen.decide(history, 0, 9) is not None

    def test_the_first_rule_that_ends_a_trial_counts(self) -> None:
        chosen = make(
            StoppingSection.model_validate(
                {"rule": "patience", "patience": 3, "also": [{"rule": "threshold", "metric": "size", "upper": 10}]}
            ),
            (LOSS,),
        )
        assert chosen.metrics == ("loss", "size")
        history = History(chosen.metrics)
        history.add(0, 0, {"loss": 1.0, "size": 11})
        assert "threshold" in str(chosen.decide(history, 0, 0))
        history.add(1, 0, {"loss": 1.0})
        history.add(1, 3, {"loss": 1.0, "size": 11})
        assert "patience" in str(chosen.decide(history, 1, 3))

    def test_none(self) -> None:
        assert not rules("none")
        assert rules("none").decide(History(), 0, 0) is None


class TestHistory:
    def test_what_was_not_committed_leaves_no_trace(self) -> None:
        history = History(["loss", "size"])
        history.add(0, 0, {"loss": 1.0, "size": 3})
        before = history.contents()
        history.add(0, 1, {"loss": 2.0})
        history.add(1, 0, {"size": 2.0})
        history.withdraw(0, 1)
        history.withdraw(1, 0)
        assert history.contents() == before
        assert dict(history.at("loss", 1)) == {}
        history.forget(0)
        assert history.contents() == {"loss": {}, "size": {}}
        assert list(history.trials("loss")) == []
