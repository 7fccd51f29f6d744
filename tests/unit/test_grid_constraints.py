import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast
from holdfast.core.errors import SpecError
from holdfast.core.expression import Expression
from holdfast.core.space import Space
from holdfast.core.values import dumps
from holdfast.engines.factory import make_proposer
from holdfast.engines.grid import GridProposer
from holdfast.testing.proposers import rebuilt
from holdfast.testing.samples import sample_spec, sample_trial

SPACE = {
    "opt": {"type": "choice", "options": {"sgd": {"momentum": {"type": "int", "low": 0, "high": 4}}, "adam": {}}},
    "layers": {"type": "int", "low": 1, "high": 4},
    "free": {"type": "categorical", "choices": ["x", "y"]},
    "width": {"type": "int", "low": 10, "high": 40, "step": 10},
    "drop": {"type": "float", "low": 0.0, "high": 0.4, "step": 0.2, "when": "layers >= 2 and opt == 'sgd'"},
    "last": {"type": "constant", "value": 3},
}


def listed(grid):
    return [grid.propose(number) for number in range(grid.points)]


def allowed(space, constraints):
    expressions = [Expression(text) for text in constraints]
    return [
        point
        for point in listed(GridProposer(space))
        if all(expression.holds(point) for expression in expressions if expression.applies(point))
    ]


@pytest.mark.parametrize(
    "constraints",
    [
        ["layers * width < 100"],
        ["layers * width < 100", "width > 10 * layers"],
        ["opt.sgd.momentum < layers"],
        ["drop * width < 5"],
        ["free == 'x' or width == 20"],
        ["last + layers < 6", "opt != 'adam'"],
        ["1 / (layers - 1) < 1"],
    ],
)
def test_points_that_break_a_constraint_are_left_out(constraints):
    space = Space.model_validate(SPACE)
    grid, expected = GridProposer(space, 2, constraints=constraints), allowed(space, constraints)
    assert 0 < len(expected) < GridProposer(space).points
    assert (grid.points, grid.size) == (len(expected), 2 * len(expected))
    assert listed(grid) == expected
    assert grid.propose(grid.points) == expected[0]


def test_a_grid_without_constraints_counts_conditions_that_are_expressions():
    space = Space.model_validate(SPACE)
    points = listed(GridProposer(space))
    assert len({dumps(point) for point in points}) == len(points) == 2 * 4 * (5 * (1 + 3 * 3) + 4)
    assert all(("drop" in point) == (point["layers"] >= 2 and point["opt"] == "sgd") for point in points)


sides = st.sampled_from(["layers", "width / 10", "opt.sgd.momentum", "drop * 10", "2", "3"])
constraint = st.tuples(sides, st.sampled_from(["<", "<=", "==", "!=", ">"]), sides).map(" ".join)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(constraint.filter(lambda text: Expression(text).names), min_size=1, max_size=3), st.permutations(list(SPACE)[:4])
)
def test_any_constraints_leave_what_a_filter_leaves(constraints, order):
    space = Space.model_validate({name: SPACE[name] for name in [*order, "drop", "last"]})
    expected = allowed(space, constraints)
    if not expected:
        with pytest.raises(SpecError, match="no point of the grid"):
            GridProposer(space, constraints=constraints)
        return
    assert listed(GridProposer(space, constraints=constraints)) == expected


def test_only_what_constraints_name_is_gone_through():
    wide = {f"p{place}": {"type": "int", "low": 1, "high": 200} for place in range(20)}
    grid = GridProposer(Space.model_validate(wide), constraints=["p3 + p17 <= 3"])
    assert grid.size == 3 * 200**18
    last = grid.propose(grid.size - 1)
    assert (last.pop("p3"), last.pop("p17"), set(last.values())) == (2, 1, {200})


def test_a_grid_that_cannot_be_counted_is_refused():
    wide = {name: {"type": "int", "low": 1, "high": 10**6} for name in "ab"}
    for space, constraints in (
        (wide, ["a < b"]),
        ({**wide, "c": {"type": "int", "low": 1, "high": 2, "when": "a < b"}}, []),
    ):
        with pytest.raises(SpecError, match=r"more than 1,000,000 combinations .* use larger steps"):
            GridProposer(Space.model_validate(space), constraints=constraints)


@pytest.mark.parametrize(
    ("conditions", "constraints", "size"),
    [
        ({}, [], 2**1500),
        (dict.fromkeys(range(1, 1500), "p0 > 0"), [], 1 + 2**1499),
        ({place: f"p{place - 1} > 0" for place in range(1, 1500)}, [], 1501),
        ({}, [f"p{place} <= p{place + 1}" for place in range(1499)], 1501),
    ],
    ids=["free", "on the first", "one on the other", "constrained"],
)
def test_there_may_be_more_parameters_than_levels_of_calls(conditions, constraints, size):
    parameters = {f"p{place}": {"type": "int", "low": 0, "high": 1} for place in range(1500)}
    for place, when in conditions.items():
        parameters[f"p{place}"]["when"] = when
    grid = GridProposer(Space.model_validate(parameters), constraints=constraints)
    assert grid.size == size
    assert grid.propose(0)["p0"] == 0
    assert grid.propose(size - 1)["p0"] == 1


def test_an_empty_grid_is_refused_with_its_constraints():
    with pytest.raises(SpecError, match=r"no point of the grid meets the constraints \(layers > 9\)"):
        GridProposer(Space.model_validate(SPACE), constraints=["layers > 9"])


def test_a_spec_hands_its_constraints_on_and_queued_trials_take_no_point_away():
    spec = sample_spec(space=SPACE, search={"engine": "grid", "seed": 1}, constraints=["layers * width < 50", "free == 'y'"])
    expected = allowed(spec.space, spec.constraints)
    trials, found = {}, []
    for number in itertools.count():
        grid = rebuilt(lambda: make_proposer(spec, 1), trials)
        if len(found) == grid.size:
            break
        queued = number % 3 == 1
        config = {"opt": "adam", "layers": 4, "free": "x", "width": 40, "last": 3} if queued else grid.propose(number)
        found += [] if queued else [config]
        trials[number] = sample_trial(number, config=config, source="queued" if queued else "proposed")
    assert found == expected


def test_a_point_of_a_constrained_grid_costs_little():
    space = {"a": {"type": "int", "low": 1, "high": 300}, "b": {"type": "int", "low": 1, "high": 300}}
    grid = GridProposer(Space.model_validate(space), constraints=["a * b < 20000"])
    start = time.process_time()
    for number in range(0, grid.size, grid.size // 100):
        grid.propose(number)
    assert time.process_time() - start < 5  # 50 ms a point; it takes one


def test_nothing_is_created_for_a_grid_without_points(tmp_path):
    data = {
        "name": "exp",
        "trainable": f"{tmp_path / 'missing.py'}:train",
        "storage": str(tmp_path / "runs"),
        "objectives": {"loss": "min"},
        "space": SPACE,
        "search": {"engine": "grid"},
        "constraints": ["layers > 9"],
    }
    with pytest.raises(SpecError, match="no point of the grid meets the constraints"):
        holdfast.create(data)
    assert not list(tmp_path.rglob("*.json"))
