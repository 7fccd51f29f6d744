"""Checkpoints that every version of the format left behind are loaded; those of a newer one are refused, never passed over."""

from __future__ import annotations

import errno
import importlib.util
import math
import os
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from workers_kit import make_job

from holdfast.core.errors import Corrupt, NewerFormat
from holdfast.core.values import dumps
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.checkpoints.manifest import FORMAT, MANIFEST, digest_of
from holdfast.storage.checkpoints.serializers import read_state

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = sorted(int(folder.name) for folder in (GOLDEN / "checkpoints").iterdir())


def made() -> ModuleType:
    found = importlib.util.spec_from_file_location("make_checkpoints", GOLDEN / "make_checkpoints.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


MADE = made()


def same(one: Any, two: Any) -> bool:
    """Tell whether both are the same, to the bit and to the order of keys."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return (
            list(map(repr, one)) == list(map(repr, two))
            and all(same(one[key], two[key]) for key in one)
            and attributes(one, two)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, np.ndarray | np.generic) and not isinstance(one, np.str_ | np.bytes_):
        layout = (one.dtype, one.shape, one.flags.c_contiguous, one.flags.f_contiguous)
        return (
            layout == (two.dtype, two.shape, two.flags.c_contiguous, two.flags.f_contiguous) and one.tobytes() == two.tobytes()
        )
    if isinstance(one, float):
        return math.copysign(1, one) == math.copysign(1, two) and one == two
    if hasattr(one, "data_ptr"):
        return bool(one.dtype == two.dtype and one.shape == two.shape and (one == two).all())
    return bool(one == two)


def attributes(one: Any, two: Any) -> bool:
    return not isinstance(one, OrderedDict) or same(dict(vars(one)), dict(vars(two)))


def golden(version: int, folder: Path) -> LocalCheckpoints:
    shutil.copytree(GOLDEN / "checkpoints" / str(version), folder / "root")
    return LocalCheckpoints(folder / "root")


def expected(step: int) -> Any:
    if step == 5:
        return MADE.tensors(pytest.importorskip("torch", reason="torch is not installed"))
    return {0: MADE.plain, 1: MADE.large, 3: lambda: {"pair": (1, {2})}, 4: MADE.dicts}[step]()


def test_there_is_a_golden_folder_of_every_version() -> None:
    assert [*range(1, FORMAT + 1)] == VERSIONS


@pytest.mark.parametrize(("version", "step"), [(1, step) for step in range(4)] + [(2, step) for step in range(6)])
def test_every_version_is_loaded(version: int, step: int, tmp_path: Path) -> None:
    store = golden(version, tmp_path)
    found = store.scan(MADE.TRIAL)
    assert [manifest.step for _, manifest, _ in found] == list(range(4 if version == 1 else 6))
    path, manifest, digest = found[step]
    assert (manifest.format, manifest.metrics, manifest.attempt) == (version, MADE.METRICS, MADE.ATTEMPT)
    assert (manifest.info, manifest.run_config) == ((MADE.INFO, MADE.RUN_CONFIG) if version > 1 else ({}, None))
    assert store.verify(path, digest=digest) == manifest
    if step == 2:
        state = store.load(path).state
        assert isinstance(state, Path)
        assert {name: (state / name).read_bytes() for name in MADE.FILES} == MADE.FILES
        return
    assert same(expected(step), store.load(path, digest=digest).state)
    assert same(expected(step), read_state(store.root / path, manifest, mmap=True))


def newer(file: Path) -> None:
    """Make a manifest what a newer holdfast would have written, with a valid checksum."""
    body = re.sub(rb'"format":\d+', b'"format":%d' % (FORMAT + 1), file.read_bytes().partition(b'"manifest":')[2][:-2])
    file.write_bytes(b'{"checksum":"%s","manifest":%s}\n' % (digest_of(body).encode(), body))


def test_a_newer_format_is_neither_damage_nor_absent(tmp_path: Path) -> None:
    store = golden(FORMAT, tmp_path)
    paths = [path for path, _, _ in store.scan(MADE.TRIAL)]
    newest = store.root / paths[-1]
    newer(newest / MANIFEST)
    before = {file.name: file.read_bytes() for file in newest.iterdir()}
    for call in (store.load, store.verify, store.read_manifest):
        with pytest.raises(NewerFormat, match=rf"step_00000005.*format {FORMAT + 1}.*update holdfast") as caught:
            call(paths[-1])
        assert not isinstance(caught.value, Corrupt)
        assert caught.value.exit_code == 4
    with pytest.raises(NewerFormat, match="update holdfast"):
        store.scan(MADE.TRIAL)
    assert store.sweep(MADE.TRIAL, paths[:-1]) == []
    assert {file.name: file.read_bytes() for file in newest.iterdir()} == before


def test_an_attempt_does_not_continue_from_an_older_one_instead(tmp_path: Path) -> None:
    from holdfast.tasks.workers.attempt import choose
    from holdfast.tasks.workers.messages import Candidate

    store = golden(FORMAT, tmp_path)
    found = [item for item in store.scan(MADE.TRIAL) if item[1].step < 2]
    candidates = tuple(
        Candidate(path=path, digest=digest, attempt=made.attempt, step=made.step) for path, made, digest in reversed(found)
    )
    job = make_job(tmp_path, "unused", trial=MADE.TRIAL, root=str(store.root), candidates=candidates)
    assert choose(job, store).place == 0
    newer(store.root / candidates[0].path / MANIFEST)
    with pytest.raises(NewerFormat, match="update holdfast"):
        choose(job, store)


def test_a_newer_state_is_not_damage(tmp_path: Path) -> None:
    from holdfast.storage.checkpoints.files import Sink
    from holdfast.testing.saving import manifest_of

    with Sink(tmp_path, "state.json") as sink:
        sink.write(dumps({"format": 99, "anything": []}).encode())
    with pytest.raises(NewerFormat, match=r"state\.json has format 99.*update holdfast"):
        read_state(tmp_path, manifest_of([sink.entry()]))


def test_what_cannot_be_read_now_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a newer holdfast's."""
    store = golden(FORMAT, tmp_path)
    path = store.scan(MADE.TRIAL)[0][0]
    real = os.open

    def refuse(name: Any, *rest: Any, **named: Any) -> int:
        if str(name) == str(store.root / path / MANIFEST):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(name, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert path not in store.sweep(MADE.TRIAL, [])
    assert (store.root / path / "state.json").exists()
