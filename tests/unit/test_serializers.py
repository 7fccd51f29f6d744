"""Serializers: every state comes back exactly, whatever disks and threads do meanwhile."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from holdfast.core.errors import CheckpointCorrupt, NotStorable, StorageError
from holdfast.storage.checkpoints import safe
from holdfast.storage.checkpoints.manifest import FileEntry, Manifest, digest_of
from holdfast.storage.checkpoints.serializers import prepare, read_state, write_state


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
        return bool(one == two) and len(one) == len(two)
    if isinstance(one, np.generic):
        return bool(one.dtype == two.dtype and one.tobytes() == two.tobytes())
    if isinstance(one, float):
        return math.copysign(1, one) == math.copysign(1, two) and (one == two or (one != one and two != two))
    if isinstance(one, OrderedDict | Counter) and not same(dict(vars(one)), dict(vars(two))):
        return False
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
LARGE = {
    "a": np.arange(3 << 20, dtype="<f8"),
    "b": b"bytes" * 7,
    "odd": np.arange(1001, dtype=np.uint8),
    "c": np.ones((300, 90)).T,
}
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
        | st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(TEXTS, inner, max_size=3).map(Counter)
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


def test_null_characters_at_the_end_are_kept(tmp_path: Path) -> None:
    for value in (np.str_("a\0"), np.bytes_(b"a\0\0"), "a\0", b"\0"):
        assert same(value, through(value, tmp_path))


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


def test_large_arrays_can_be_mapped_by_what_is_documented(tmp_path: Path) -> None:
    """By docs/checkpoint-format.md alone: buffers in order, each at the next multiple of 64."""
    arrays = [np.arange(100_001, dtype=np.uint8), np.arange(50.0), np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3))]
    write_state({"pad": b"x", "arrays": arrays}, tmp_path, serializer="safe")
    document = json.loads((tmp_path / "state.json").read_bytes())
    offsets, end = [], 0
    for size in document["sizes"]:
        offsets.append(-(-end // 64) * 64)
        end = offsets[-1] + size
    assert (tmp_path / "arrays.bin").stat().st_size == end
    for array, value in zip(arrays, document["state"]["arrays"], strict=True):
        number, dtype, shape, order = value["$array"]
        mapped = np.memmap(tmp_path / "arrays.bin", dtype, "r", offsets[number], tuple(shape), order)
        assert (mapped == array).all()
        assert mapped.flags.aligned


def test_a_state_is_mapped(tmp_path: Path) -> None:
    state = {**LARGE, "more": [np.arange(5), np.zeros((0, 3)), b"", np.array(3.5)]}
    entries = write_state(state, tmp_path, serializer="safe")
    before = (tmp_path / "arrays.bin").read_bytes()
    back: Any = read_state(tmp_path, manifest(entries), mmap=True)
    assert same(state, back)
    assert not back["a"].flags.owndata
    back["a"][:] = 0
    assert (tmp_path / "arrays.bin").read_bytes() == before
    (tmp_path / "arrays.bin").unlink()  # as pruning does
    assert same(state["c"], back["c"])


@pytest.mark.parametrize("mmap", [False, True])
def test_large_states_are_verified_while_they_are_read(mmap: bool, tmp_path: Path) -> None:
    entries = write_state(LARGE, tmp_path, serializer="safe")
    file = tmp_path / "arrays.bin"
    data = bytearray(file.read_bytes())
    for place in (0, 1, len(data) // 3, len(data) // 2 + 7, len(data) - 1):
        data[place] ^= 4
        file.write_bytes(data)
        with pytest.raises(CheckpointCorrupt, match=r"arrays\.bin has the digest"):
            read_state(tmp_path, manifest(entries), mmap=mmap)
        data[place] ^= 4
    file.write_bytes(data)
    assert same(LARGE, read_state(tmp_path, manifest(entries), mmap=mmap))


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = write_state(LARGE, tmp_path, serializer="safe")
    real = os.preadv

    def cut(descriptor: int, buffers: Any, offset: int) -> int:
        if offset >= 1 << 20:
            os.truncate(tmp_path / "arrays.bin", 1 << 20)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(CheckpointCorrupt, match="too short"):
        read_state(tmp_path, manifest(entries))


def test_a_read_error_is_of_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = write_state(LARGE, tmp_path, serializer="safe")
    real = os.preadv

    def fail(descriptor: int, buffers: Any, offset: int) -> int:
        if offset >= 8 << 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match=r"cannot read .*arrays\.bin"):
        read_state(tmp_path, manifest(entries))


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = write_state(LARGE, tmp_path, serializer="safe")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: real(descriptor, [buffers[0][:1_000_003]], at))
    assert same(LARGE, read_state(tmp_path, manifest(entries)))


def test_without_threads_it_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the interpreter is ending."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert same(LARGE, through(LARGE, tmp_path))


def test_a_copy_is_not_changed_any_more(tmp_path: Path) -> None:
    state = {name: value.copy("K") if isinstance(value, np.ndarray) else value for name, value in LARGE.items()}
    prepared = prepare(state, serializer="safe", copy=True)
    for value in state.values():
        if isinstance(value, np.ndarray):
            value[:] = 0
    assert same(LARGE, read_state(tmp_path, manifest(prepared.write(tmp_path))))


def test_attributes_of_an_ordered_dict_come_back(tmp_path: Path) -> None:
    state: Any = OrderedDict([("$b", 1), ("a", [2])])
    state._metadata = OrderedDict([("", {"version": 2})])
    assert same(state, through(state, tmp_path))
    state._hook = print
    with pytest.raises(NotStorable, match=r"^state\._hook: builtin_function_or_method;"):
        through(state, tmp_path)


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


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:1000])))
    state = np.arange(10_000.0)
    assert same(state, through(state, tmp_path))


def test_a_full_disk_while_two_threads_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, room = os.write, [13 << 20]

    def write(descriptor: int, data: Any) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(descriptor, data[: room[0]])
        room[0] -= count
        return count

    before = threading.active_count()
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(StorageError, match=r"cannot write .*arrays\.bin: No space left"):
        write_state(LARGE, tmp_path, serializer="safe")
    assert threading.active_count() == before


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
