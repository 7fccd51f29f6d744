"""The exact hypervolume: against counting by hand, inclusion and exclusion, and another implementation."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.hypervolume import hypervolume, hypervolumes
from holdfast.core.objective import Direction, Objective, pareto

MIN, MAX = Direction.MIN, Direction.MAX


def goals(*directions: Direction) -> list[Objective]:
    return [Objective(name=str(place), direction=direction) for place, direction in enumerate(directions)]


def by_inclusion(points: list[list[int]], reference: list[int], directions: list[Direction]) -> Fraction:
    """Return the volume of the union of boxes as the alternating sum over all sets of them."""
    signs = [1 if direction is MIN else -1 for direction in directions]
    boxes = [[sign * (worst - value) for sign, worst, value in zip(signs, reference, point, strict=True)] for point in points]
    boxes = [box for box in boxes if min(box) > 0]
    total = 0
    for count in range(1, len(boxes) + 1):
        for chosen in combinations(boxes, count):
            total += (-1) ** (count + 1) * math.prod(map(min, zip(*chosen, strict=True)))
    return Fraction(total)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[Direction]]:
    size = draw(st.integers(1, 5))
    row = st.lists(st.integers(-3, 6), min_size=size, max_size=size)
    directions = draw(st.lists(st.sampled_from(Direction), min_size=size, max_size=size))
    return draw(st.lists(row, max_size=7)), draw(row), directions


@given(cases())
def test_the_volume_is_that_of_inclusion_and_exclusion(case: tuple[list[list[int]], list[int], list[Direction]]) -> None:
    points, reference, directions = case
    objectives = goals(*directions)
    found = hypervolumes(points, reference, objectives)
    assert found == [float(by_inclusion(points[: count + 1], reference, directions)) for count in range(len(points))]
    assert hypervolume(points, reference, objectives) == (found[-1] if found else 0.0)  # whole numbers: exact


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_the_volume_is_optunas(size: int, count: int) -> None:
    hypervolume_module = pytest.importorskip("optuna._hypervolume", reason="Optuna has moved its private hypervolume")
    generator = np.random.default_rng(size * 100 + count)
    points = generator.normal(size=(count, size))
    points = np.concatenate([points, points[: count // 2], np.round(points, 0)])  # with equal ones, and equal coordinates
    reference = points.max(axis=0) + 0.1
    ours = hypervolume(points.tolist(), reference.tolist(), goals(*[MIN] * size))
    assert ours == pytest.approx(hypervolume_module.compute_hypervolume(points, reference), rel=1e-12)
    directions = [MAX if place % 2 else MIN for place in range(size)]
    signs = np.array([-1.0 if direction is MAX else 1.0 for direction in directions])
    mirrored = hypervolume((points * signs).tolist(), (reference * signs).tolist(), goals(*directions))
    assert mirrored == pytest.approx(ours, rel=1e-12)
    in_turn = hypervolumes(points.tolist(), reference.tolist(), goals(*[MIN] * size))
    assert in_turn == sorted(in_turn)
    assert in_turn[-1] == pytest.approx(ours, rel=1e-9)
    front = points[pareto(points.tolist(), goals(*[MIN] * size))]
    assert hypervolume(front.tolist(), reference.tolist(), goals(*[MIN] * size)) == pytest.approx(ours, rel=1e-12)


def test_what_counts_nothing() -> None:
    two = goals(MIN, MAX)
    inside = [[1.0, 2.0]]
    assert hypervolume(inside, [2.0, 0.0], two) == 2.0
    strange: list[Any] = [[2.0, 5.0], [0.0, 0.0], [3.0, 9.0], [0.0, -1.0], [math.nan, 5.0], [-math.inf, 5.0], [0.0, math.inf]]
    for point in strange:
        assert hypervolume([point], [2.0, 0.0], two) == 0.0
        assert hypervolume([*inside, point], [2.0, 0.0], two) == 2.0
        assert hypervolumes([point, *inside, point], [2.0, 0.0], two) == [0.0, 2.0, 2.0]
    assert (hypervolume([], [2.0, 0.0], two), hypervolumes([], [2.0, 0.0], two)) == (0.0, [])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_values_at_the_ends_of_the_range_of_floats(size: int) -> None:
    objectives = goals(*[MIN] * size)
    far = [[-1.7e308] * size, [-1.7e308] * (size - 1) + [1e308]]
    assert hypervolume(far, [1.7e308] * size, objectives) == math.inf
    near = [[1e-160 * (1 + place)] * size for place in range(3)]
    expected = (1e-159 - 1e-160) ** size
    assert hypervolume(near, [1e-159] * size, objectives) == pytest.approx(expected, rel=1e-9, abs=5e-324)
    uneven = [[1.0] * (size - 1) + [1e-300], [0.5] * (size - 1) + [2e-300]]
    assert math.isfinite(hypervolume(uneven, [1e300] * size, objectives)) == (size == 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reference_point_is_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        hypervolume([[0.0, 0.0]], [1.0, bad], goals(MIN, MIN))


@pytest.mark.parametrize(("size", "count"), [(2, 1000), (3, 400), (4, 150)])
def test_a_large_front_is_no_harder(size: int, count: int) -> None:
    generator = np.random.default_rng(0)
    points = np.abs(generator.normal(size=(count, size)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)  # on a sphere, which they fill the more, the more they are
    objectives = goals(*[MAX] * size)
    assert len(pareto(points.tolist(), objectives)) == count
    found = hypervolume(points.tolist(), [0.0] * size, objectives)  # hundredths of a second; over all sets of points, years
    assert 0.0 < found < {2: math.pi / 4, 3: math.pi / 6, 4: math.pi**2 / 32}[size]
