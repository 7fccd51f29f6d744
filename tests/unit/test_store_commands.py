"""``holdfast checkpoints`` over a store of its own, and what such a store saves when the time runs out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from holdfast import CheckpointStore
from holdfast.cli import main
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


def test_one_more_step_is_saved_before_the_time_is_up(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, {"save_period": 100, "save_before": 1e-9})
    assert store.should_save(3)
    assert [store.save(step, step) is not None for step in range(3, 6)] == [True, False, False]
    assert store.save(100, 100) is not None
    assert CheckpointStore(tmp_path).steps() == [3, 100]
    patient = CheckpointStore(tmp_path, {"save_period": 100, "save_before": "10:00:00"})
    assert not patient.should_save(103)
    off = CheckpointStore(tmp_path, {"mode": "none", "save_before": 1e-9})
    assert off.save(104, 104) is None
