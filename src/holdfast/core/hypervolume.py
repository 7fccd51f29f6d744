"""The hypervolume: how much of the space of objectives a set of points dominates, up to a reference point. Exact.

Each point is a box between itself and the reference point; what counts is the volume of their union. Two objectives are swept.
Three are swept along the last one over a staircase of the first two. More are sliced along the last one: each slice adds
what its point dominates alone, the box less the volume of its overlaps with the points before it, which has an objective
less (the exclusive hypervolumes of WFG, taken in slices: While, Bradstreet and Barone 2012, "A fast way of calculating exact
hypervolumes", IEEE Transactions on Evolutionary Computation 16(1)).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from holdfast.core.objective import Direction, Objective

Box = tuple[float, ...]
"""How far a point lies before the reference point, by each objective; all of it above 0."""


def hypervolume(points: Iterable[Sequence[float]], reference: Sequence[float], objectives: Sequence[Objective]) -> float:
    """Return the volume that ``points`` dominate up to ``reference``, in the product of the objectives' units.

    A point counts nothing when it is beyond the reference point by any objective, or on it, or when it is not finite. Infinite
    when the volume exceeds the range of floats; ValueError when the reference point is not finite.
    """
    boxes, exponents = _scaled(_boxes(points, reference, objectives))
    return _grown(_volume([box for box in boxes if box is not None]), exponents)


def hypervolumes(points: Iterable[Sequence[float]], reference: Sequence[float], objectives: Sequence[Objective]) -> list[float]:
    """Return the volume of each beginning of ``points``: of the first one, the first two ...; see :func:`hypervolume`.

    With two objectives a point costs what a search in a sorted list does, with more what the volume of the front so far does.
    """
    boxes, exponents = _scaled(_boxes(points, reference, objectives))
    stairs, front = _Staircase(), list[Box]()
    total, found = 0.0, []
    for box in boxes:
        if box is not None and len(box) == 2:
            total += stairs.add(*box)
        elif box is not None and not any(_covers(other, box) for other in front):
            total += _exclusive(box, front)
            front = [other for other in front if not _covers(box, other)]
            front.append(box)
        found.append(_grown(total, exponents))
    return found


class _Staircase:
    """The union of rectangles that lean on the origin, by its corners: from left to right they go down."""

    def __init__(self) -> None:
        self._across: list[float] = []
        self._up: list[float] = []

    def add(self, across: float, up: float) -> float:
        """Add a rectangle; return the area that it alone covers."""
        after = bisect_right(self._across, across)
        place = bisect_left(self._across, across, hi=after)
        if place < len(self._up) and self._up[place] >= up:
            return 0.0
        level = self._up[after] if after < len(self._up) else 0.0
        right, first, area = across, after, 0.0
        while first > 0 and self._up[first - 1] <= up:
            first -= 1
            area += (right - self._across[first]) * (up - level)
            right, level = self._across[first], self._up[first]
        area += (right - (self._across[first - 1] if first else 0.0)) * (up - level)
        self._across[first:after] = [across]
        self._up[first:after] = [up]
        return area


def _boxes(points: Iterable[Sequence[float]], reference: Sequence[float], objectives: Sequence[Objective]) -> list[Box | None]:
    """Return half the box of each point, or None for one that counts nothing: the whole one may exceed the range of floats."""
    if not all(map(math.isfinite, reference)):
        raise ValueError(f"the reference point {list(reference)} is not finite")
    signs = [1.0 if objective.direction is Direction.MIN else -1.0 for objective in objectives]
    found: list[Box | None] = []
    for point in points:
        box = tuple(sign * (0.5 * worst - 0.5 * value) for sign, worst, value in zip(signs, reference, point, strict=True))
        found.append(box if all(0.0 < side < math.inf for side in box) else None)
    return found


def _scaled(boxes: Sequence[Box | None]) -> tuple[list[Box | None], list[int]]:
    """Return boxes whose sides are at most 1, and by which powers of two they were made so: no digit is lost by those."""
    counted = [box for box in boxes if box is not None]
    exponents = [math.frexp(max(sides))[1] for sides in zip(*counted, strict=True)]
    scaled = [
        None if box is None else tuple(math.ldexp(side, -power) for side, power in zip(box, exponents, strict=True))
        for box in boxes
    ]
    return scaled, exponents


def _grown(volume: float, exponents: Sequence[int]) -> float:
    try:
        return math.ldexp(volume, sum(exponents) + len(exponents))  # the boxes were halves
    except OverflowError:
        return math.inf


def _volume(boxes: Sequence[Box]) -> float:
    """Return the volume of the union of boxes."""
    if not boxes:
        return 0.0
    if len(boxes) == 1:
        return math.prod(boxes[0])
    match len(boxes[0]):
        case 1:
            return max(box[0] for box in boxes)
        case 2:
            level, total = 0.0, 0.0
            for across, up in sorted(boxes, reverse=True):
                if up > level:
                    total += across * (up - level)
                    level = up
            return total
        case 3:
            stairs = _Staircase()
            slices = sorted(boxes, key=lambda box: box[2], reverse=True)
            return math.fsum(stairs.add(across, up) * height for across, up, height in slices)
    front: list[Box] = []
    parts = []
    for box in sorted(boxes, key=lambda box: box[-1], reverse=True):
        base = box[:-1]
        if any(_covers(other, base) for other in front):
            continue
        parts.append(_exclusive(base, front) * box[-1])
        front = [other for other in front if not _covers(base, other)]
        front.append(base)
    return math.fsum(parts)


def _exclusive(box: Box, others: Sequence[Box]) -> float:
    """Return what ``box`` covers beyond ``others``: itself less the union of its overlaps with them."""
    overlaps = [tuple(map(min, box, other)) for other in others]
    return max(math.prod(box) - _volume(overlaps), 0.0)


def _covers(outer: Box, inner: Box) -> bool:
    return all(ours >= theirs for ours, theirs in zip(outer, inner, strict=True))
