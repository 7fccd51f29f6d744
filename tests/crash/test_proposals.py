"""Points, repeats, constraints, auto and engines of one's own in real searches, which are killed and restored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from support import DIED, Lab, MakeLab

from holdfast.report.ranking import show_json

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_engine"
MIXED = {
    "search": {
        "engine": "tpe",
        "num_trials": 10,
        "repeats": 2,
        "points": [{"x": 1.0, "b": 2, "a": "r"}, {"x": 2.0, "b": 3, "a": "t"}],
    },
    "constraints": ["x * b < 12"],
}


def told(lab: Lab, name: str = "exp") -> list[Any]:
    """Return what a crash must not change of the proposals."""
    with lab.open(name) as experiment:
        return [
            (trial.number, trial.config, trial.source, trial.group, trial.repeat, trial.status) for trial in experiment.trials
        ]


def configs(lab: Lab, name: str) -> list[Any]:
    return [trial["config"] for trial in lab.trials(name)]


def test_points_repeats_and_a_constraint_killed_within_a_group(make_lab: MakeLab) -> None:
    labs = {}
    for fault in (None, "proposal.committed:5"):
        lab = labs[fault] = make_lab(f"lab-{fault}", steps=1)
        for number in (1, 4, 5):
            lab.order("fail", number, 0)
        ended = lab.run("run", lab.spec(**MIXED), fault=fault, code=1 if fault is None else DIED)
        if fault is not None:
            assert len(lab.trials()) == int(fault[-1]), ended.output
            lab.run("restore", lab.path(), code=1)
        assert lab.outcome() == labs[None].outcome()
        assert told(lab) == told(labs[None])
    trials = told(labs[None])
    assert [(source, group, repeat) for _, _, source, group, repeat, _ in trials] == [
        ("preset" if number < 4 else "proposed", number - number % 2, number % 2) for number in range(10)
    ]
    assert [config for _, config, *_ in trials[:4:2]] == MIXED["search"]["points"]
    assert all(config["x"] * config["b"] < 12 for _, config, *_ in trials)
    assert [number for number, *_, status in trials if status == "FAILED"] == [1, 4, 5]
    assert all(config != trials[4][1] for number, config, *_ in trials if number > 5)


def test_an_own_engine_goes_on_after_a_crash_and_says_what_it_lacks(lab: Lab) -> None:
    for file in EXAMPLE.iterdir():
        if file.is_file():
            shutil.copy(file, lab.folder)
    spec = lab.folder / "own_engine.yaml"
    lab.run("run", spec, "--set", "name=whole")
    lab.run("run", spec, fault="proposal.committed:5", code=DIED)
    assert configs(lab, "own_engine") == configs(lab, "whole")[:5]

    engine, away = lab.folder / "engine.py", lab.folder / "away.txt"
    engine.rename(away)
    rows = lab.dump()
    ended = lab.light("restore", lab.path("own_engine"))
    assert (ended.code, lab.dump()) == (2, rows)
    assert f"there is no file {engine}" in ended.output

    broken = "        if number == 8:\n            raise RuntimeError('no idea')\n        dice ="
    engine.write_text(away.read_text().replace("        dice =", broken))
    ended = lab.run("restore", lab.path("own_engine"), code=4)
    assert "propose(8) raised RuntimeError: no idea" in ended.output
    assert f'File "{engine}"' in ended.output
    assert len(lab.trials("own_engine")) == 8

    moved = lab.folder / "moved"  # an engine is found where its trainable is now
    moved.mkdir()
    away.rename(moved / "engine.py")
    engine.unlink()
    shutil.copy(EXAMPLE / "train.py", moved)
    lab.run("restore", lab.path("own_engine"), "--trainable", f"{moved}/train.py:train")
    assert configs(lab, "own_engine") == configs(lab, "whole")


def test_auto_is_chosen_once_and_said(lab: Lab) -> None:
    space = {"x": {"type": "int", "low": 0, "high": 2}}
    spec = lab.spec(space=space, search={"engine": "auto", "num_trials": 3}, if_exists="restore")
    words = "auto chose grid: 3 configs are enough to try each of the 3 of the space"
    assert words in lab.light("validate", spec).output
    ended = lab.run("run", spec, fault="proposal.committed:2", code=DIED)
    assert words in ended.output
    lab.spec(space=space, search={"engine": "auto", "num_trials": 2}, if_exists="restore")
    assert words in lab.run("run", spec).output
    lab.spec(space=space, search={"engine": "auto", "num_trials": 9}, if_exists="restore")
    lab.run("run", spec)
    assert [trial["config"] for trial in lab.trials()] == [{"x": 0}, {"x": 1}, {"x": 2}]
    with lab.open() as experiment:
        shown = show_json(experiment)
    assert (shown["engine"], shown["chosen"]) == ("grid", words)
    assert f"engine:  {words}" in lab.light("show", lab.path()).output


def test_a_search_whose_configs_have_all_failed_ends_and_says_so(lab: Lab) -> None:
    for number in range(2):
        lab.order("fail", number, 0)
    space = {"x": {"type": "categorical", "choices": [1, 2]}}
    ended = lab.run("run", lab.spec(space=space, search={"num_trials": 9}), code=1)
    reason = "each of the 2 configs that the space and the constraints allow was tried and failed"
    assert reason in " ".join(ended.output.split())
    assert lab.statuses() == ["FAILED", "FAILED"]
    for number in range(2):
        (lab.folder / "orders" / f"fail-{number}-0").unlink()
    lab.run("restore", lab.path(), "--resume-errored", "--set", "search.num_trials=3")
    assert lab.statuses() == ["COMPLETED"] * 3
