"""Serializers: what they refuse, and by what path; what is nonsense although its digests are right."""

from __future__ import annotations

import dataclasses
import enum
import json
import threading
from collections import defaultdict
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from holdfast.core.errors import CheckpointCorrupt, InvalidInput, NotStorable
from holdfast.storage.checkpoints import safe
from holdfast.storage.checkpoints.files import Sink
from holdfast.storage.checkpoints.serializers import prepare, read_state, write_state
from holdfast.testing.saving import manifest_of


class Odd:
    def __reduce__(self) -> Any:
        raise RuntimeError("not today")


class Named(dict[str, int]):
    pass


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


class Wrapped:
    def __init__(self, inner: object) -> None:
        self.inner = inner


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"model": Odd()}, r'^state\["model"\]: .*test_serializers_refusals.Odd;'),
        ({"a": [1, (2, {3: {1, 2}})]}, r'^state\["a"\]\[1\]\[1\]\[3\]: set;'),
        ({"o": defaultdict(int)}, r'^state\["o"\]: collections.defaultdict;'),
        ([Named(a=1)], r"^state\[0\]: .*Named;"),
        ({"f": lambda: 1}, r'^state\["f"\]: function;'),
        (np.array([object()]), r"^state: numpy array of dtype object;"),
        ({"s": np.zeros(2, dtype=[("a", float)])}, r'^state\["s"\]: numpy array of dtype .*a'),
        (np.ma.masked_array([1], [True]), r"^state: numpy.ma.MaskedArray;"),
        (np.random.default_rng(0), r"^state: numpy.random.Generator;"),
        ({frozenset(): 1}, r"^state\[frozenset\]: frozenset;"),
        ({"path": Path("/")}, r'^state\["path"\]: pathlib.PosixPath;'),
        ({"a": {"b": [0, [Settings()]]}}, r'^state\["a"\]\["b"\]\[1\]\[0\]: .*test_serializers_refusals.Settings;'),
        ({"level": Level.LOW}, r'^state\["level"\]: .*test_serializers_refusals.Level;'),
        ({1: {None: {b"k": {True: Text("x")}}}}, r"^state\[1\]\[None\]\[b'k'\]\[True\]: .*test_serializers_refusals.Text;"),
        ({(1, 2): {1}}, r"^state\[tuple\]: set;"),
        ({"t": pd.DataFrame({"a": [1]})}, r'^state\["t"\]: pandas.*DataFrame \(numpy.asarray of it may be\);'),
        ({"t": [pd.Timestamp(0)]}, r'^state\["t"\]\[0\]: pandas.*Timestamp;'),
        ({"g": (i for i in ())}, r'^state\["g"\]: generator;'),
        ({"c": Settings}, r'^state\["c"\]: type;'),
        (np.rec.array([(1, 2.0)]), r"^state: numpy.*recarray;"),
        (bytearray(b"x"), r"^state: bytearray;"),
    ],
)
def test_what_cannot_be_stored_is_named(state: object, where: str, tmp_path: Path) -> None:
    with pytest.raises(NotStorable, match=where) as caught:
        write_state(state, tmp_path, serializer="safe")
    assert "checkpoints.serializer: cloudpickle" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_named_with_the_setting_that_stores_it(tmp_path: Path) -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    model = linear.LogisticRegression().fit([[0.0], [1.0]], [0, 1])
    with pytest.raises(NotStorable) as caught:
        write_state({"model": model}, tmp_path, serializer="safe")
    assert str(caught.value).startswith('state["model"]: sklearn.linear_model.LogisticRegression; ')
    assert str(caught.value).endswith("With checkpoints.serializer: cloudpickle it can be stored")
    write_state({"model": model}, tmp_path, serializer="cloudpickle")


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"model": Wrapped([1, {"lock": threading.Lock()}])}, r'^state\["model"\]\.inner\[1\]\["lock"\]: _thread.lock cannot'),
        ({"a": 1, "b": Wrapped(Odd())}, r'^state\["b"\]\.inner: .*Odd cannot be pickled: not today'),
        ([(i for i in ())], r"^state\[0\]: generator cannot"),
        (Odd(), r"^state: .*Odd cannot be pickled: not today"),
    ],
)
def test_what_cannot_be_pickled_is_named(state: object, where: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(NotStorable, match=where):
        write_state(state, tmp_path / "a", serializer="cloudpickle")
    with pytest.raises(NotStorable, match=where):
        prepare(state, serializer="cloudpickle", copy=True)


def test_the_public_name_of_a_class() -> None:
    assert safe.class_name(Future()) == "concurrent.futures.Future"  # it lives in concurrent.futures._base


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(NotStorable, match="holds itself"):
        write_state(state, tmp_path, serializer="safe")


def test_a_damaged_pickle_is_not_executed(tmp_path: Path) -> None:
    entries = write_state(print, tmp_path, serializer="cloudpickle")
    (tmp_path / "state.pkl").write_bytes(b"\x00" * entries[0].size)
    with pytest.raises(CheckpointCorrupt, match="digest"):
        read_state(tmp_path, manifest_of(entries, serializer="cloudpickle"))


def test_a_pickle_whose_code_is_gone_says_where(tmp_path: Path) -> None:
    with Sink(tmp_path, "state.pkl") as sink:
        sink.write(b"cno_such_module\nthing\n.")
    with pytest.raises(ModuleNotFoundError) as caught:
        read_state(tmp_path, manifest_of([sink.entry()], serializer="cloudpickle"))
    assert "state.pkl" in caught.value.__notes__[0]


def test_an_unknown_serializer(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="safe and cloudpickle"):
        write_state(1, tmp_path, serializer="pickle")


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"format": 0, "state": 1, "inline": []},
        {"format": True, "state": 1, "inline": []},
        {"format": 1, "state": 1},
        {"format": 1, "state": {"$unknown": 1}, "inline": []},
        {"format": 1, "state": {"$bytes": 0}, "inline": []},
        {"format": 1, "state": {"$array": [0, "|O", [1], "C"]}, "inline": ["AAAAAAAAAAA="]},
        {"format": 1, "state": {"$array": [0, "<f8", [2], "C"]}, "inline": ["AAAAAAAAAAA="]},
        {"format": 1, "state": {"$array": [0, "<f8", [-1], "C"]}, "inline": ["AAAAAAAAAAA="]},
        {"format": 1, "state": {"$array": [0, "<f8,<f8", [1], "C"]}, "inline": [""]},
        {"format": 1, "state": {"$scalar": ["|O", "AAAAAAAAAAA="]}, "inline": []},
    ],
)
def test_nonsense_with_valid_digests_is_refused(document: object, tmp_path: Path) -> None:
    with Sink(tmp_path, "state.json") as sink:
        sink.write(json.dumps(document).encode())
    with pytest.raises(CheckpointCorrupt, match=r"state\.json"):
        read_state(tmp_path, manifest_of([sink.entry()]))


@pytest.mark.parametrize("sizes", [[80_000, 8], [80_000], [8, 80_000]])
def test_sizes_that_do_not_fit_are_refused(sizes: list[int], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    entries = write_state(np.zeros(10_000), tmp_path / "a", serializer="safe")
    state = {"$array": [0, "<f8", [10_000], "C"]} if len(sizes) > 1 else {"$array": [1, "<f8", [1], "C"]}
    with Sink(tmp_path, "state.json") as sink:
        sink.write(json.dumps({"format": 1, "state": [state, {"$bytes": 1}], "sizes": sizes}).encode())
    (tmp_path / "a" / "arrays.bin").rename(tmp_path / "arrays.bin")
    (tmp_path / "a" / "state.json").unlink()
    (tmp_path / "a").rmdir()
    with pytest.raises(CheckpointCorrupt):
        read_state(tmp_path, manifest_of([entries[0], sink.entry()]))
