"""``holdfast checkpoints`` over a store of its own, and what such a store saves when the time runs out."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast import CheckpointStore
from holdfast.cli import main
from holdfast.core.errors import StorageError
from holdfast.testing.saving import flip


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main([*arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_listing_and_verifying(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(tmp_path / "mine [1] ü")
    for step in range(3):
        store.save(step, step, {"loss": 1.0 / (step + 1)})
    code, out, _ = run(capsys, "checkpoints", str(store.path), "--json", "--verify")
    rows = json.loads(out)
    assert code == 0
    assert [(row["trial"], row["step"], row["status"], row["metrics"]["loss"]) for row in rows] == [
        (0, 0, "valid", 1.0),
        (0, 1, "valid", 0.5),
        (0, 2, "valid", 1 / 3),
    ]
    file = Path(str(store.latest_path())) / "state.json"
    file.write_bytes(flip(file.read_bytes(), 5))
    code, out, _ = run(capsys, "checkpoints", str(store.path))
    assert (code, out.count("valid")) == (0, 3)
    code, out, _ = run(capsys, "checkpoints", str(store.path), "--verify")
    assert code == 1
    assert "step 2: " in out
    assert "digest" in out
    assert "2 of 3 are good" in out
    assert CheckpointStore(str(store.path)).load() == 1
    file.write_bytes(flip(file.read_bytes(), 5))
    assert run(capsys, "checkpoints", str(store.path), "--verify")[0] == 0
    assert CheckpointStore(str(store.path)).load() == 2


@pytest.mark.parametrize("arguments", [["--trial", "0"]])
def test_what_a_store_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    CheckpointStore(tmp_path).save(0, 0)
    code, _, errors = run(capsys, "checkpoints", str(tmp_path), *arguments)
    assert code == 2
    assert "no trials" in errors


def test_a_folder_that_is_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(capsys, "checkpoints", str(tmp_path))
    assert code == 2
    assert str(tmp_path) in errors
    assert os.listdir(tmp_path) == []


class Clock:
    """Shows the times that it is told to, in place of the store's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("holdfast.storage.checkpoints.store.time", SimpleNamespace(monotonic=lambda: self.now))


def test_one_more_step_is_saved_before_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    store = CheckpointStore(tmp_path, {"save_period": 100, "save_before": "00:01:00"})
    off = CheckpointStore(tmp_path, {"mode": "none", "save_before": 60})
    saved = []
    for step in range(3, 13):
        clock.now += 9.0
        told = store.should_save(step)
        assert told == (store.save(step, step) is not None)
        assert off.save(step, step) is None
        saved += [step] * told
    assert saved == [8]  # at 54 of 60 seconds: the next one would come at 63
    assert store.save(100, 100) is not None
    assert CheckpointStore(tmp_path).steps() == [8, 100]


def test_a_moment_that_is_past_from_the_start_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    store = CheckpointStore(tmp_path, {"save_period": 100, "save_before": 1e-20})  # too little to count
    clock.now += 9.0
    assert not store.should_save(3)
    assert store.save(3, 3) is None


def test_a_save_in_the_background_that_fails_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    store = CheckpointStore(tmp_path, {"save_period": 100, "save_before": 60, "asynchronous": True})
    store.save(0, 0)
    store.flush()
    clock.now += 55.0
    real = os.write

    def full(descriptor: int, data: Any) -> int:
        if threading.current_thread().name == "holdfast-checkpoint":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        assert store.save(3, 3) is not None
        with pytest.raises(StorageError, match="No space left"):
            store.flush()
    assert store.should_save(4)
    assert store.save(4, 4) is not None
    assert store.save(5, 5) is None
    assert store.steps() == [0, 4]
