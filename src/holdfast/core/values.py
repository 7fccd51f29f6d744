"""Typed values: what a metric or a parameter may be, and how it is written so that it comes back the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, cast

from holdfast.core.errors import NotStorable

Scalar = float | int | bool | str | None
Json = Any
"""A JSON value; floats may be NaN or infinite."""
Metrics = dict[str, Json]
Config = dict[str, Scalar]

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TAG = "$float"
_BIG = 1 << 4096  # longer ints exceed the interpreter's limit for decimal digits


def plain(value: object, where: str = "value") -> Json:
    """Return ``value`` as plain JSON values, unwrapping numpy scalars.

    Raises NotStorable, naming the path inside the value, for anything else (sets, arrays, objects, non-string keys).
    """
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        if not -_BIG < value < _BIG:  # type: ignore[operator]  # an int
            raise NotStorable(f"{where} is an int of more than 4,096 bits; store it as a string")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise NotStorable(f"{where} has the key {key!r}; keys must be strings")
            if key == _TAG:
                raise NotStorable(f"{where} has the key {_TAG!r}, which is reserved; choose another name")
        return {str(key): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, (bool, int, float, str)):
        base = next(base for base in (bool, int, float, str) if isinstance(value, base))
        return base(value)
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0 and type(content := item()) is not kind:
        return plain(content, where)
    raise NotStorable(
        f"{where} is a {kind.__module__}.{kind.__qualname__}; "
        "allowed are float, int, bool, str, None, and lists and dicts of them"
    )


def plain_metrics(metrics: object, where: str = "metrics") -> Metrics:
    """Return ``metrics`` as a dict of plain values; NotStorable unless it is a mapping with string keys."""
    if not isinstance(metrics, Mapping):
        raise NotStorable(f'{where} must be a dict such as {{"loss": 0.1}}, not {type(metrics).__name__}')
    try:
        return cast(Metrics, plain(metrics, where))
    except RecursionError:
        raise NotStorable(f"{where} is nested too deeply, or holds itself") from None


def tagged(value: Json) -> Json:
    """Return ``value`` with non-finite floats as ``{"$float": "NaN"}``; :func:`loads` undoes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: tagged(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tagged(item) for item in value]
    return value


def untagged(value: Json) -> Json:
    """Undo :func:`tagged`."""
    if isinstance(value, dict):
        if len(value) == 1 and value.get(_TAG) in _NON_FINITE:
            return _NON_FINITE[value[_TAG]]
        return {key: untagged(item) for key, item in value.items()}
    if isinstance(value, list):
        return [untagged(item) for item in value]
    return value


def dumps(value: Json) -> str:
    """Write a plain value as canonical JSON: sorted keys, no spaces, non-finite floats as ``{"$float": "NaN"}``."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError:  # only a non-finite float pays for the second walk
        return json.dumps(tagged(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def dumps_ordered(value: Json) -> str:
    """Write a plain value as JSON that keeps the order of keys, where order means something (a space, objectives)."""
    return json.dumps(tagged(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def loads(text: str | bytes) -> Json:
    """Read what :func:`dumps` wrote."""
    value = json.loads(text)
    marker = b'"$float"' if isinstance(text, bytes) else '"$float"'
    return untagged(value) if marker in text else value  # type: ignore[operator]  # bytes with bytes, str with str


def strict(value: Json) -> Json:
    """Return ``value`` with non-finite floats as the strings NaN, Infinity, -Infinity, for readers of strict JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


LONGEST_MESSAGE, LONGEST_TRACE = 10_000, 100_000
"""Bytes that are kept of an error's message and traceback."""


def shortened(text: str, limit: int) -> str:
    """Return ``text`` in at most ``limit`` bytes of UTF-8: a longer one keeps its head and twice as much of its tail."""
    if len(text) <= limit // 10:  # an escaped surrogate has six bytes, so nothing has more than that
        return text
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= limit:
        return text
    note = f"\n[... {len(data) - limit} or more bytes left out ...]\n"
    room = max(limit - len(note), 0)
    head, tail = data[: room // 3], data[len(data) - (room - room // 3) :]
    return head.decode("utf-8", "ignore") + note + tail.decode("utf-8", "ignore")


def digest(text: str) -> str:
    """Return the first 32 hex digits of the SHA-256 of ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


MetricRow = tuple[str, float | None, str | None]
"""(kind, number, text): how one typed value stands in the database."""


def to_row(value: Json) -> MetricRow:
    """Split a plain value into (kind, number, text); kinds are float, int, bool, str, null and json.

    Non-finite floats and integers beyond 53 bits stand in the text column too, because SQLite turns NaN into NULL and
    a float column rounds large integers.
    """
    if value is None:
        return ("null", None, None)
    if isinstance(value, bool):
        return ("bool", float(value), None)
    if isinstance(value, int):
        return ("int", float(value), None) if abs(value) <= 2**53 else ("int", None, str(value))
    if isinstance(value, float):
        return ("float", value, None) if math.isfinite(value) else ("float", None, repr(value))
    if isinstance(value, str):
        return ("str", None, value)
    return ("json", None, dumps(value))


def from_row(kind: str, number: float | None, text: str | None) -> Json:
    """Return the value that :func:`to_row` split."""
    match kind:
        case "float":
            return float(cast(str, text)) if number is None else number
        case "int":
            return int(cast(str, text)) if number is None else int(number)
        case "bool":
            return bool(number)
        case "str":
            return text
        case "json":
            return loads(cast(str, text))
        case _:
            return None
