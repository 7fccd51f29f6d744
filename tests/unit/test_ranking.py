"""Which trial is best: feasibility, repeats as one, several objectives made one number, the reference point."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import InvalidInput, SpecError
from holdfast.core.objective import Direction, Objective, feasible, pareto, violation
from holdfast.core.ranking import best_of, candidates, candidates_of, nearest, ranked, reference_point, volume_of
from holdfast.core.scalarisation import SCALARISATIONS, checked_weights, scalarised
from holdfast.core.trial import Trial, TrialStatus
from holdfast.testing.samples import sample_spec, sample_trial

COMPLETED, PRUNED, FAILED = TrialStatus.COMPLETED, TrialStatus.PRUNED, TrialStatus.FAILED
LOSS, GAIN = Objective(name="loss"), Objective(name="gain", direction=Direction.MAX)


def trial(number: int, status: TrialStatus = COMPLETED, *, group: int | None = None, **metrics: Any) -> Trial:
    repeat = 0 if group is None else number - group
    return sample_trial(number, status, metrics=metrics, group=group, repeat=repeat)


# Feasibility


@pytest.mark.parametrize(
    ("metrics", "holds", "far"),
    [
        ({"memory": 16, "acc": 0.9}, True, 0.0),
        ({"memory": 20, "acc": 0.9}, False, 4.0),
        ({"memory": 20.0, "acc": 0.25}, False, 4.25),
        ({"memory": 16}, False, math.inf),
        ({}, False, math.inf),
        ({"memory": math.nan, "acc": 0.9}, False, math.inf),
        ({"memory": -math.inf, "acc": math.inf}, True, 0.0),
        ({"memory": math.inf, "acc": 0.9}, False, math.inf),
        ({"memory": "16", "acc": 0.9}, False, math.inf),
        ({"memory": None, "acc": 0.9}, False, math.inf),
        ({"memory": [1], "acc": 0.9}, False, math.inf),
    ],
)
def test_feasible_metrics_meet_every_condition(metrics: dict[str, Any], holds: bool, far: float) -> None:
    conditions = ("memory <= 16", "acc >= 0.5")
    assert feasible(metrics, conditions) is holds
    assert violation(metrics, conditions) == pytest.approx(far)
    assert feasible(metrics, ())


def test_nan_is_not_feasible_by_a_negation() -> None:
    for text in ("not memory > 16", "memory != 3", "memory <= 16 or acc > 0"):
        assert not feasible({"memory": math.nan, "acc": 1.0}, (text,))
        assert not feasible({"acc": 1.0}, (text,))


def test_an_infeasible_trial_is_never_best() -> None:
    spec = sample_spec(feasible=["memory <= 16"], objectives={"loss": "min", "gain": "max"})
    trials = [
        trial(0, loss=0.0, gain=9.0, memory=17),
        trial(1, loss=2.0, gain=1.0, memory=16),
        trial(2, PRUNED, loss=1.0, gain=0.5, memory=1),
        trial(3, loss=0.0, gain=9.0),
        trial(4, FAILED, loss=0.0, gain=9.0, memory=1),
    ]
    assert [candidate.trial.number for candidate in candidates_of(trials, spec)] == [1, 2]
    best = best_of(trials, spec.goals, spec.feasible)
    assert best is not None
    assert best.number == 2
    assert reference_point(trials, spec) == (2.0, 0.5)  # the infeasible ones were seen, too
    assert nearest(trials[:1] + trials[3:], spec) == (trials[0], 1.0)
    assert nearest([trials[3]], spec) == (trials[3], math.inf)
    assert nearest([trials[4]], spec) is None


def test_the_nearest_of_a_group_is_the_one_that_breaks_most() -> None:
    spec = sample_spec(feasible=["memory <= 16"])
    trials = [trial(number, loss=0.0, memory=memory, group=0) for number, memory in enumerate([1, 30, 20])]
    trials += [trial(number, loss=0.0, memory=memory, group=3) for number, memory in enumerate([18, 1, 18], start=3)]
    assert candidates_of(trials, spec) == []
    assert nearest(trials, spec) == (trials[3], 2.0)


# Repeats


@pytest.mark.parametrize(("how", "best"), [("mean", 6), ("median", 0), ("worst", 6)])
@pytest.mark.parametrize("goal", [LOSS, GAIN])
def test_repeats_are_one_by_their_aggregate(how: str, best: int, goal: Objective) -> None:
    sign = 1.0 if goal is LOSS else -1.0
    losses = [1.0, 1.0, 10.0, 0.0, 9.0, 9.0, 2.0, 2.0, 2.0]
    trials = [trial(number, group=number // 3 * 3, **{goal.name: sign * loss}) for number, loss in enumerate(losses)]
    found = best_of(trials, [goal], how=how)
    assert found is not None
    assert found.number == best
    assert best_of(reversed(trials), [goal], how=how) == found
    alone = [sample_trial(each.number, COMPLETED, metrics=each.metrics) for each in trials]
    lucky = best_of(alone, [goal], how=how)
    assert lucky is not None
    assert lucky.number == 3


def test_members_without_a_value_are_left_out_and_infeasible_ones_take_the_group_along() -> None:
    trials = [
        trial(0, FAILED, group=0, loss=-9.0),
        trial(1, group=0, loss=math.nan),
        trial(2, group=0, loss=1.0),
        trial(3, PRUNED, group=0, loss=3.0),
        trial(4, TrialStatus.RUNNING, group=0, loss=-9.0),
        trial(5, loss=1.9),
        trial(6, loss=1e308, group=6),
        trial(7, loss=1.7e308, group=6),
    ]
    found = {candidate.trial.number: candidate for candidate in candidates(trials, [LOSS])}
    assert found.keys() - {6} == {2, 5}
    assert found[2].values == (2.0,)
    assert [member.number for member in found[2].members] == [2, 3]
    worst = [candidate.trial.number for candidate in candidates(trials, [LOSS], how="worst")]
    assert worst == [5, 6]  # one of group 0 failed
    assert [each.trial.number for each in candidates(trials[1:], [LOSS], how="worst")] == [5, 6]  # and one has no number
    assert [each.trial.number for each in candidates(trials[2:], [LOSS], how="worst")] == [2, 5, 6]
    mixed = [trial(0, group=0, loss=1.0, memory=1), trial(1, group=0, loss=1.0, memory=99)]
    assert candidates(mixed, [LOSS], ["memory <= 16"]) == []


# Several objectives as one number


def test_weights_are_over_the_ranges_seen() -> None:
    trials = [trial(number, loss=loss, gain=gain) for number, (loss, gain) in enumerate([(0.0, 0.0), (4.0, 3e6), (10.0, 4e6)])]
    found, goals = candidates(trials, [LOSS, GAIN]), [LOSS, GAIN]

    def best(weights: dict[str, float], how: str = "sum") -> tuple[int, float]:
        number, candidate = ranked(found, goals, weights, how)[0]
        return candidate.trial.number, pytest.approx(number)  # type: ignore[return-value]  # compared alone

    assert best({"loss": 1}) == (0, 0.0)
    assert best({"gain": 5}) == (2, 0.0)
    assert best({"loss": 1, "gain": 1}) == (1, 0.4 + 0.25)
    assert best({"loss": 3, "gain": 3}) == (1, 0.4 + 0.25)
    assert best({"loss": 1, "gain": 1}, "chebyshev") == (1, 0.4 + 0.05 * 0.65)
    assert [candidate.trial.number for _, candidate in ranked(found, goals)] == [0, 1, 2]


def test_chebyshev_finds_what_a_sum_cannot() -> None:
    points = [(0.0, 1.0), (0.6, 0.6), (1.0, 0.0)]  # the middle one lies behind the line between the others
    both = [LOSS, Objective(name="time")]
    for first in (0.2, 0.5, 0.8):
        sums = scalarised(points, both, [first, 1 - first])
        assert sums[1] > min(sums)
    middle = scalarised(points, both, [1.0, 1.0], "chebyshev")
    assert middle.index(min(middle)) == 1


_weight = st.floats(0.0, 1e6)
_value = st.floats(-1.7e308, 1.7e308)


@given(st.lists(st.tuples(_value, _value), min_size=1, max_size=12), _weight, _weight, st.sampled_from(SCALARISATIONS))
def test_with_weights_above_zero_the_best_is_on_the_front(
    points: list[tuple[float, float]], first: float, second: float, how: str
) -> None:
    weights = checked_weights({"loss": 1e-3 + first, "gain": 1e-3 + second}, [LOSS, GAIN])
    numbers = scalarised(points, [LOSS, GAIN], weights, how)
    assert all(map(math.isfinite, numbers))
    # What lies closer together than the range can tell apart may rank alike; one of those that do is on the front.
    least = {place for place, number in enumerate(numbers) if number == min(numbers)}
    assert least & set(pareto(points, [LOSS, GAIN]))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"size": 1.0}, "'size'"),
        ({"loss": 1.0, "size": 0.0}, "'size'"),
        ({"loss": -1.0}, "-1.0"),
        ({"loss": math.nan}, "nan"),
        ({"loss": math.inf}, "inf"),
        ({"loss": True}, "True"),
        ({"loss": "1"}, "'1'"),
        ({"loss": 0.0, "gain": 0}, "every weight is 0"),
        ({}, "every weight is 0"),
        ([1.0, 2.0], "list"),
    ],
)
def test_what_are_no_weights_is_refused(weights: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match="'loss', 'gain'") as caught:
        ranked([], [LOSS, GAIN], weights)
    assert said in str(caught.value)


def test_an_unknown_scalarisation_is_refused() -> None:
    with pytest.raises(InvalidInput, match="allowed: sum, chebyshev"):
        ranked([], [LOSS, GAIN], {"loss": 1.0}, "product")


# The reference point


def test_the_reference_point_is_the_spec_s_or_the_worst_seen() -> None:
    both = {"loss": "min", "gain": "max"}
    spec = sample_spec(objectives=both)
    trials = [trial(0, loss=1.0, gain=5.0), trial(1, loss=math.inf, gain=2.0), trial(2, FAILED, loss=99.0, gain=-99.0)]
    assert reference_point(trials[2:], spec) is None
    assert reference_point(trials, spec) == (1.0, 2.0)
    assert volume_of(candidates_of(trials, spec), spec.goals, None) == 0.0
    pinned = sample_spec(
        objectives=both, search={"engine": "random", "num_trials": 1, "reference_point": {"gain": 0, "loss": 3}}
    )
    assert reference_point([], pinned) == reference_point(trials, pinned) == (3.0, 0.0)
    assert volume_of(candidates_of(trials, pinned), pinned.goals, (3.0, 0.0)) == 10.0


@pytest.mark.parametrize(
    ("objectives", "point", "said"),
    [
        ({"loss": "min"}, {"loss": 1}, "is for several objectives"),
        ({"loss": "min", "gain": "max"}, {"loss": 1}, "must name exactly the objectives: loss, gain"),
        ({"loss": "min", "gain": "max"}, {}, "gives a value to nothing"),
        ({"loss": "min", "gain": "max"}, {"loss": 1, "gain": 1, "size": 1}, "size"),
        ({"loss": "min", "gain": "max"}, {"loss": 1, "gain": math.nan}, "finite number"),
        ({"loss": "min", "gain": "max"}, {"loss": 1, "gain": "much"}, "must be a number"),
        ({"loss": "min", "gain": "max"}, [1, 2], "reference_point"),
    ],
)
def test_a_bad_reference_point_is_refused(objectives: dict[str, str], point: Any, said: str) -> None:
    with pytest.raises(SpecError, match="reference_point") as caught:
        sample_spec(objectives=objectives, search={"engine": "random", "num_trials": 1, "reference_point": point})
    assert said in str(caught.value)
