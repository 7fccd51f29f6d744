"""The manifest: exact round trips, and everything that is not one refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import InvalidInput, NewerFormat, NotACheckpoint
from holdfast.core.values import dumps
from holdfast.storage.checkpoints.manifest import FileEntry, Manifest, digest_of

VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters())
MANIFEST = Manifest(
    experiment="6e3ff0a2-0c51-4f57-a8fd-4d4bb1a9ab1c",
    trial=7,
    attempt=2,
    step=12,
    writer="3f9c",
    created="2026-01-01T00:00:00+00:00",
    serializer="safe",
    metrics={"loss": 0.5},
    files=(FileEntry(name="state.json", size=3, digest="0" * 32),),
)


@settings(max_examples=60, deadline=None)
@given(metrics=st.dictionaries(st.text(min_size=1), VALUES), writer=st.text(), step=st.integers(0))
def test_round_trip(metrics: dict[str, Any], writer: str, step: int) -> None:
    manifest = replace(MANIFEST, metrics=metrics, writer=writer, step=step)
    data = manifest.to_bytes()
    assert Manifest.parse(data) == manifest
    assert Manifest.parse(data).to_bytes() == data


def test_every_flipped_bit_and_every_cut_is_noticed() -> None:
    data = MANIFEST.to_bytes()
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(NotACheckpoint):
            Manifest.parse(bytes(changed))
    for end in range(len(data)):
        with pytest.raises(NotACheckpoint):
            Manifest.parse(data[:end])


def wrapped(values: object) -> bytes:
    body = dumps(values).encode()
    return b'{"checksum":"%s","manifest":%s}\n' % (digest_of(body).encode(), body)


def changed(**values: object) -> bytes:
    body: dict[str, object] = {
        "experiment": "e",
        "trial": 0,
        "attempt": 1,
        "step": 0,
        "writer": "w",
        "created": "c",
        "serializer": "safe",
        "metrics": {},
        "files": [],
        "format": 1,
    }
    return wrapped(body | values)


def test_a_newer_format_says_so() -> None:
    assert Manifest.parse(changed()).trial == 0
    with pytest.raises(NewerFormat, match=r"format 3.*update holdfast"):
        Manifest.parse(changed(format=3, info={}))


@pytest.mark.parametrize(
    "values",
    [
        {"trial": "1"},
        {"step": -1},
        {"step": True},
        {"metrics": []},
        {"serializer": "pickle"},
        {"format": None},
        {"files": [1]},
        {"files": [{"name": "a", "size": 1, "digest": "x"}]},
        {"files": [{"name": "a", "size": -1, "digest": "0" * 32}]},
    ],
)
def test_nonsense_with_a_valid_checksum_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(NotACheckpoint, match="no sense"):
        Manifest.parse(changed(**values))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", wrapped([]), wrapped(None), b"\x00" * 100])
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(NotACheckpoint):
        Manifest.parse(data)


BAD_NAMES = ["", "/etc/passwd", "../x", "a/../x", "a//b", "a/", ".", "a/.", "..\\x", "a\0", "manifest.json", "\udcff"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    entry = FileEntry(name=name, size=0, digest="0" * 32)
    with pytest.raises(InvalidInput, match="file name"):
        replace(MANIFEST, files=(entry,))
    if name.isascii():
        with pytest.raises(NotACheckpoint, match="file name"):
            Manifest.parse(changed(files=[{"name": name, "size": 0, "digest": "0" * 32}]))


def test_a_repeated_name_is_refused() -> None:
    with pytest.raises(InvalidInput, match="twice"):
        replace(MANIFEST, files=MANIFEST.files * 2)


def test_size_is_of_all_files() -> None:
    assert replace(MANIFEST, files=(*MANIFEST.files, FileEntry(name="b", size=4, digest="0" * 32))).size == 7
