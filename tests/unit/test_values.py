import json
import math
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import NotStorable
from holdfast.core.values import digest, dumps, from_row, loads, plain, plain_metrics, shortened, strict, to_row

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text().filter(lambda key: key != "$float")
nested = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))


def same(left, right):
    """Equal with types, and NaN equal to itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return (left != left and right != right) or (left == right and math.copysign(1, left) == math.copysign(1, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@given(nested)
def test_json_round_trip(value):
    assert same(loads(dumps(value)), value)
    assert same(loads(dumps(value).encode()), value)


@given(nested)
def test_row_round_trip(value):
    kind, number, text = to_row(value)
    assert number is None or (isinstance(number, float) and math.isfinite(number))
    assert same(from_row(kind, number, text), value)


@given(nested)
def test_strict_values_are_strict_json(value):
    json.loads(json.dumps(strict(value), allow_nan=False))


@given(st.dictionaries(st.text(), scalars))
def test_text_does_not_depend_on_key_order(value):
    backwards = dict(reversed(value.items()))
    assert dumps(value) == dumps(backwards)
    assert digest(dumps(value)) == digest(dumps(backwards))


@given(nested)
def test_plain_leaves_plain_values_alone(value):
    assert same(plain(value), value)


def test_the_mark_of_non_finite_floats_is_no_name_for_a_users_value():
    with pytest.raises(NotStorable, match=r"metrics\['inner'\] has the key '\$float', which is reserved"):
        plain({"inner": {"$float": "NaN"}}, "metrics")


def test_numpy_scalars_and_subclasses_become_plain():
    class Loss(float):
        pass

    scalars = {"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)}
    found = plain({**scalars, "d": (1, Loss(2.0)), "e": OrderedDict(x=np.array(1))})
    assert same(found, {"a": 0.5, "b": 3, "c": True, "d": [1, 2.0], "e": {"x": 1}})


@pytest.mark.parametrize(
    ("value", "where"),
    [({"a": [1, {2}]}, r"metrics\['a'\]\[1\]"), ({"a": np.zeros(2)}, r"metrics\['a'\]"), ({1: 2}, "key 1"), ([1], "list")],
)
def test_what_cannot_be_stored_is_named(value, where):
    with pytest.raises(NotStorable, match=where):
        plain_metrics(value)


@pytest.mark.parametrize("text", ["", "short", "é" * 50, "x" * 100])
def test_a_short_text_stays_as_it_is(text):
    assert shortened(text, 100) == text


@given(st.text(alphabet=st.characters(), min_size=0, max_size=400), st.integers(60, 200))
def test_a_long_text_keeps_head_and_tail(text, limit):
    short = shortened(text, limit)
    size = len(text.encode("utf-8", "backslashreplace"))
    assert len(short.encode("utf-8", "backslashreplace")) <= max(limit, 0) or short == text
    if size <= limit:
        assert short == text
    else:
        assert "bytes left out" in short
        assert short[0] == text[0] or text[0] > "\ud7ff"


def test_tuples_travel_as_lists():
    assert same(loads(dumps({"rows": [(1.0, "a", math.nan)]})), {"rows": [[1.0, "a", math.nan]]})
