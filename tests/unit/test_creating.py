"""Creating without running, validating, and deleting what is only half there."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from store_kit import create, driven_by

import holdfast
from holdfast.cli import main
from holdfast.core.errors import ExperimentExists, ExperimentNotFound, SpecError, TrainableError
from holdfast.locate import open_path
from holdfast.storage.database import experiments
from holdfast.storage.database.engine import sqlite_url
from holdfast.storage.database.experiments import open_database

TRAIN = "def train(trial):\n    return {'loss': trial.config['x']}\n"


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "train.py").write_text(TRAIN)
    return {
        "name": "exp",
        "trainable": f"{tmp_path / 'train.py'}:train",
        "storage": str(tmp_path / "runs"),
        "objectives": {"loss": "min"},
        "space": {"x": {"type": "float", "low": 0, "high": 1}},
        "search": {"engine": "random", "num_trials": 2, "seed": 1},
    }


def test_creating_fills_in_the_date(data: dict[str, Any]) -> None:
    days = {datetime.now().astimezone().strftime("%Y-%m-%d")}
    with holdfast.create({**data, "name": "exp-{date}"}) as experiment:
        days.add(datetime.now().astimezone().strftime("%Y-%m-%d"))
        assert experiment.name in {f"exp-{day}" for day in days}
        assert experiment.path.name == experiment.name


def test_creating_does_what_if_exists_says(data: dict[str, Any]) -> None:
    with holdfast.create(data) as first:
        with pytest.raises(ExperimentExists):
            holdfast.create(data)
        with holdfast.create({**data, "if_exists": "new"}) as second:
            assert second.name == "exp-2"
        with holdfast.create({**data, "if_exists": "restore"}) as again:
            assert again.id == first.id
        for changes in ({"space": {}}, {"objectives": {"loss": "max"}}, {"search": {**data["search"], "num_trials": 3}}):
            with pytest.raises(SpecError, match=r"differ|num_trials"):
                holdfast.create({**data, "if_exists": "restore", **changes})
        assert first.spec.search.num_trials == 2


@pytest.mark.parametrize("trainable", ["absent.py:train", "train.py:fit", "no_such_module:train"])
def test_creating_looks_at_the_trainable(data: dict[str, Any], tmp_path: Path, trainable: str) -> None:
    with pytest.raises(TrainableError):
        holdfast.create({**data, "trainable": str(tmp_path / trainable) if ".py" in trainable else trainable})
    assert not (tmp_path / "runs").exists()


def test_creating_keeps_a_callable(data: dict[str, Any]) -> None:
    with holdfast.create({**data, "trainable": lambda trial: {"loss": 1.0}}) as experiment:
        assert (experiment.path / "trainable.pkl").exists()


def write(tmp_path: Path, data: dict[str, Any]) -> str:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return str(file)


def test_validating_looks_at_the_name_with_its_date(
    data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    today = datetime.now().astimezone()
    names = [f"exp-{day:%Y-%m-%d}" for day in (today, today.fromtimestamp(today.timestamp() + 86400).astimezone())]
    for name in names:  # it may be midnight
        create(tmp_path / "runs", name).close()
    assert main(["validate", write(tmp_path, {**data, "name": "exp-{date}"})]) == 2
    assert "is taken" in capsys.readouterr().err


def test_validating_looks_at_what_is_merged(data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", write(tmp_path, {**data, "merge": ["old"]})]) == 2
    assert "no experiment 'old'" in capsys.readouterr().err
    create(tmp_path / "runs", "old").close()
    assert main(["validate", write(tmp_path, {**data, "merge": ["old"]}), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merge"] == ["old"]


# A folder that was removed by hand


@pytest.fixture
def gone(tmp_path: Path) -> Path:
    """The path of an experiment that was driven, and whose folder is gone."""
    with closing(create(tmp_path / "runs")) as opened:
        driven_by(opened)
    shutil.rmtree(tmp_path / "runs" / "sample")
    return tmp_path / "runs" / "sample"


def names(database: Path) -> list[str]:
    with closing(open_database(sqlite_url(database))) as opened:
        return [record.name for record in experiments.every(opened)]


def test_a_name_whose_folder_is_gone_can_be_freed(gone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExperimentExists, match=rf"{gone}, which is not there.*`holdfast delete {gone}`"):
        create(gone.parent)
    assert not gone.exists()
    assert main(["delete", str(gone), "--yes"]) == 0
    assert "was gone" in capsys.readouterr().out
    assert names(gone.parent / "holdfast.db") == []
    create(gone.parent).close()


@pytest.mark.parametrize("by", ["name", "uuid"])
def test_it_is_found_by_name_in_the_database_that_is_named(gone: Path, tmp_path: Path, by: str) -> None:
    url = f"sqlite:///{gone.parent / 'holdfast.db'}"
    with closing(open_database(url)) as opened:
        record = experiments.every(opened)[0]
    with pytest.raises(ExperimentExists, match=r"which is not there.*holdfast delete"):
        create(tmp_path / "other", database=url)
    assert main(["delete", record.name if by == "name" else record.uuid, "--database", url, "--yes"]) == 0
    assert names(gone.parent / "holdfast.db") == []


def test_deleting_touches_nothing_else(gone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(gone.parent, "other").close()
    for target in ("nobody", str(tmp_path / "nowhere" / "sample"), str(gone.parent / "absent")):
        assert main(["delete", target, "--yes"]) == 2
        assert "is no experiment" in capsys.readouterr().err
    assert main(["delete", "nobody", "--database", f"sqlite:///{gone.parent / 'holdfast.db'}", "--yes"]) == 2
    assert main(["delete", str(gone)]) == 2  # nobody is there to answer
    assert "--yes" in capsys.readouterr().err
    assert names(gone.parent / "holdfast.db") == ["sample", "other"]
    assert main(["delete", str(gone), "--yes"]) == 0
    assert names(gone.parent / "holdfast.db") == ["other"]
    open_path(gone.parent / "other").close()
    with pytest.raises(ExperimentNotFound):
        open_path(gone)


def test_what_is_driven_is_not_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(create(tmp_path / "runs")) as opened:
        driven_by(opened, release=False)
    shutil.rmtree(tmp_path / "runs" / "sample")
    assert main(["delete", str(tmp_path / "runs" / "sample"), "--yes"]) == 3
    assert "driven" in capsys.readouterr().err
    assert names(tmp_path / "runs" / "holdfast.db") == ["sample"]
