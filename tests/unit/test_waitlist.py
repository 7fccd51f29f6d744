"""The first of the waiting trials is the same as a look at all of them finds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.waitlist import Waitlist

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
STEPS = st.lists(st.tuples(st.sampled_from(["now", "later", "gone", "first"]), st.integers(0, 7)), max_size=60)


@given(STEPS)
def test_it_says_what_a_plain_table_says(steps: list[tuple[str, int]]) -> None:
    line = Waitlist()
    plain: dict[int, datetime | None] = {}
    for what, number in steps:
        if what == "gone":
            line.discard(number)
            plain.pop(number, None)
        elif what != "first":
            plain[number] = None if what == "now" else EPOCH + timedelta(seconds=number)
            line.put(number, plain[number])
        else:
            assert line.first() == min((number for number, start in plain.items() if start is None), default=None)
        assert len(line) == len(plain)
        assert [number in line for number in range(8)] == [number in plain for number in range(8)]
        assert line.timed == {number: start for number, start in plain.items() if start is not None}
    assert line.first() == min((number for number, start in plain.items() if start is None), default=None)


def test_a_long_queue_is_taken_in_order_and_its_line_does_not_grow() -> None:
    line = Waitlist()
    for number in reversed(range(10_000)):
        line.put(number, None)
    taken = []
    while (number := line.first()) is not None:
        line.discard(number)
        taken.append(number)
    assert taken == list(range(10_000))
    assert not line
    assert not line._line
