"""Serializers: every state comes back exactly or is refused by the path inside it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from holdfast.core.errors import CheckpointCorrupt, InvalidInput, NotStorable, StorageError
from holdfast.storage.checkpoints import safe
from holdfast.storage.checkpoints.files import Sink
from holdfast.storage.checkpoints.manifest import FileEntry, Manifest, digest_of
from holdfast.storage.checkpoints.serializers import (
    read_state,
    write_state,
)


def manifest(entries: list[FileEntry], serializer: Any = "safe") -> Manifest:
    return Manifest(
        experiment="e", trial=0, attempt=1, step=0, writer="w", created="c", serializer=serializer, files=tuple(entries)
    )


def through(state: object, folder: Path, serializer: str = "safe") -> Any:
    folder = folder / f"{len(os.listdir(folder)):05d}"
    folder.mkdir()
    entries = write_state(state, folder, serializer=serializer)
    assert sorted(entry.name for entry in entries) == sorted(os.listdir(folder))
    for entry in entries:
        data = (folder / entry.name).read_bytes()
        assert (entry.size, entry.digest) == (len(data), digest_of(data))
    return read_state(folder, manifest(entries, serializer))


def same(one: Any, two: Any) -> bool:
    """Tell whether both are the same to the bit: classes, order of keys, signs of zeros, memory layout."""
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray):
        layout = (one.dtype, one.shape, one.flags.c_contiguous, one.flags.f_contiguous)
        return layout == (two.dtype, two.shape, two.flags.c_contiguous, two.flags.f_contiguous) and (
            one.tobytes() == two.tobytes() and bool(two.flags.writeable)
        )
    if isinstance(one, (np.str_, np.bytes_)):
        return bool(one == two)
    if isinstance(one, np.generic):
        return bool(one.dtype == two.dtype and one.tobytes() == two.tobytes())
    if isinstance(one, float):
        return math.copysign(1, one) == math.copysign(1, two) and (one == two or (one != one and two != two))
    if isinstance(one, dict):
        return len(one) == len(two) and all(same(a, b) and same(one[a], two[b]) for a, b in zip(one, two, strict=True))
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


DTYPES = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="?")
    | hnp.unsigned_integer_dtypes(endianness="?")
    | hnp.floating_dtypes(endianness="?")
    | hnp.complex_number_dtypes(endianness="?")
    | hnp.datetime64_dtypes(endianness="?")
    | hnp.timedelta64_dtypes(endianness="?")
    | hnp.unicode_string_dtypes(endianness="?")
    | hnp.byte_string_dtypes()
)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
ANY_TEXT = st.text(st.characters(), max_size=5)
TEXTS = ANY_TEXT | st.sampled_from(["$dict", "$tuple", "$array", "$", "\ud83d\ude00", "\udcff", "a\0"])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from([math.nan, math.inf, -math.inf, -0.0])
    | st.complex_numbers(allow_nan=False)
    | TEXTS
    | st.binary(max_size=20)
    | ARRAYS
    | ARRAYS.map(np.asfortranarray)
    | st.floats(width=32).map(np.float32)
    | st.integers(0, 255).map(np.uint8)
    | ANY_TEXT.map(np.str_)
    | st.binary(max_size=5).map(np.bytes_)
)
KEYS = TEXTS | st.integers() | st.booleans() | st.none() | st.binary(max_size=3) | st.tuples(st.integers(), TEXTS)
STATES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXTS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(state=STATES, packed=st.booleans())
def test_every_state_comes_back(state: object, packed: bool, tmp_path: Path) -> None:
    if packed:
        state = {"padding": b"x" * 70_001, "state": state, "more": np.zeros(3)}
    assert same(state, through(state, tmp_path))


@pytest.mark.parametrize(
    "array",
    [
        np.array(3.5),
        np.zeros((0, 3)),
        np.zeros((2, 0), order="F"),
        np.arange(6.0).reshape(2, 3).T,
        np.arange(20)[::3],
        np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
        np.array([1, 2], dtype=">i4"),
        np.array([True, False]),
        np.array(["a", "üü"]),
        np.array([b"a\0b", b""]),
        np.array(["2026-01-01", "NaT"], dtype="datetime64[ns]"),
        np.array([np.nan, -np.nan, np.inf]),
        np.array([1 + 2j], dtype=np.complex64),
        np.array([np.float16(1.5)]),
        np.array([1.5], dtype=np.longdouble),
        np.zeros(3, dtype="V5"),
        np.empty((), dtype="<U0"),
        np.broadcast_to(np.float32(1), (3, 4)),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
@pytest.mark.parametrize("filler", [0, 20_000])
def test_arrays(array: Any, filler: int, tmp_path: Path) -> None:
    state = [np.arange(float(filler)), array, b"\x01" * 5, array]
    back = through(state, tmp_path)
    for index in (1, 3):
        assert back[index].dtype == array.dtype
        assert back[index].shape == array.shape
        assert back[index].tobytes() == array.tobytes()
        assert back[index].flags.writeable


def test_a_memory_map_comes_back_as_an_array(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    mapped = np.memmap(tmp_path / "in" / "m", dtype=np.float32, mode="w+", shape=(3, 2))
    back = through(mapped, tmp_path)
    assert type(back) is np.ndarray
    assert back.shape == (3, 2)


def test_huge_integers(tmp_path: Path) -> None:
    state = [2**4096, -(2**4096), 10**5000, {-(10**5000): 2**4096 - 1}]
    assert through(state, tmp_path) == state
    with pytest.raises(NotStorable, match=r"^state\[int\]: set;"):
        through({10**5000: set()}, tmp_path)


def test_a_small_state_is_one_file_and_a_large_one_two(tmp_path: Path) -> None:
    for name, size, names in (("s", 1000, ["state.json"]), ("l", 100_000, ["arrays.bin", "state.json"])):
        (tmp_path / name).mkdir()
        entries = write_state({"w": np.arange(size, dtype=np.uint8), "v": np.ones(3)}, tmp_path / name, serializer="safe")
        assert [entry.name for entry in entries] == names


def test_large_arrays_can_be_mapped(tmp_path: Path) -> None:
    first, second = np.arange(100_001, dtype=np.uint8), np.arange(50.0)
    write_state([first, second], tmp_path, serializer="safe")
    offset = -(-100_001 // 64) * 64
    assert (np.memmap(tmp_path / "arrays.bin", dtype=float, mode="r", offset=offset) == second).all()


class Odd:
    def __reduce__(self) -> Any:
        raise RuntimeError("not today")


class Named(dict[str, int]):
    pass


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"model": Odd()}, r'^state\["model"\]: .*test_serializers.Odd;'),
        ({"a": [1, (2, {3: {1, 2}})]}, r'^state\["a"\]\[1\]\[1\]\[3\]: set;'),
        ({"o": OrderedDict()}, r'^state\["o"\]: collections.OrderedDict;'),
        ([Named(a=1)], r"^state\[0\]: .*Named;"),
        ({"f": lambda: 1}, r'^state\["f"\]: function;'),
        (np.array([object()]), r"^state: numpy array of dtype object;"),
        ({"s": np.zeros(2, dtype=[("a", float)])}, r'^state\["s"\]: numpy array of dtype .*a'),
        (np.ma.masked_array([1], [True]), r"^state: numpy.ma.MaskedArray;"),
        (np.random.default_rng(0), r"^state: numpy.random.Generator;"),
        ({frozenset(): 1}, r"^state\[frozenset\]: frozenset;"),
        ({"path": Path("/")}, r'^state\["path"\]: pathlib.PosixPath;'),
    ],
)
def test_what_cannot_be_stored_is_named(state: object, where: str, tmp_path: Path) -> None:
    with pytest.raises(NotStorable, match=where) as caught:
        write_state(state, tmp_path, serializer="safe")
    assert "checkpoints.serializer: cloudpickle" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_public_name_of_a_class() -> None:
    assert safe.class_name(Future()) == "concurrent.futures.Future"  # it lives in concurrent.futures._base


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(NotStorable, match="holds itself"):
        write_state(state, tmp_path, serializer="safe")


def test_deep_states_within_the_limit_come_back(tmp_path: Path) -> None:
    state: Any = 1
    for _ in range(safe.MAX_DEPTH):
        state = {0: (state,)} if _ % 2 else {"$": state}
        if _ >= safe.MAX_DEPTH // 2:
            break
    assert through(state, tmp_path) == state


def test_cloudpickle(tmp_path: Path) -> None:
    state = {"f": lambda value: value + 1, "w": np.arange(100_000.0)}
    back = through(state, tmp_path, "cloudpickle")
    assert back["f"](1) == 2
    assert (back["w"] == state["w"]).all()
    with pytest.raises(NotStorable, match="cannot be pickled: not today"):
        through(Odd(), tmp_path, "cloudpickle")


def test_a_damaged_pickle_is_not_executed(tmp_path: Path) -> None:
    entries = write_state(print, tmp_path, serializer="cloudpickle")
    (tmp_path / "state.pkl").write_bytes(b"\x00" * entries[0].size)
    with pytest.raises(CheckpointCorrupt, match="digest"):
        read_state(tmp_path, manifest(entries, "cloudpickle"))


def test_a_pickle_whose_code_is_gone_says_where(tmp_path: Path) -> None:
    with Sink(tmp_path, "state.pkl") as sink:
        sink.write(b"cno_such_module\nthing\n.")
    with pytest.raises(ModuleNotFoundError) as caught:
        read_state(tmp_path, manifest([sink.entry()], "cloudpickle"))
    assert "state.pkl" in caught.value.__notes__[0]


def test_an_unknown_serializer(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="safe and cloudpickle"):
        write_state(1, tmp_path, serializer="pickle")


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"format": 2, "state": 1, "inline": []},
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
        read_state(tmp_path, manifest([sink.entry()]))


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
        read_state(tmp_path, manifest([entries[0], sink.entry()]))


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:1000])))
    state = np.arange(10_000.0)
    assert same(state, through(state, tmp_path))


def test_a_file_that_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(b"mine")
    with pytest.raises(StorageError, match=r"state\.json"):
        write_state(1, tmp_path, serializer="safe")
    assert (tmp_path / "state.json").read_bytes() == b"mine"


def test_importing_is_light() -> None:
    code = (
        "import sys, holdfast.storage.checkpoints.local;"
        "print(*{'numpy', 'cloudpickle', 'sqlalchemy', 'prefect', 'pandas', 'fsspec'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
