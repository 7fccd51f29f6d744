"""What user code may measure and say, through a whole search and out of every command again."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime

from support import Lab

import holdfast

TRAIN = """
import math


def train(trial):
    trial.telemetry("nan", math.nan, timestamp=1.0)
    trial.report({"note": "caf\\udce9", "list": ["\\udce9"], "loss": [0.5, "0.5 \\udce9", None, True, 0.5][trial.number]})
    if trial.number == 3:
        raise ValueError("caf\\udce9" + "e" * 10**6)
"""


def test_text_that_is_no_unicode_and_objectives_that_are_no_numbers(lab: Lab) -> None:
    (lab.folder / "train.py").write_text(TRAIN)
    lab.run("run", lab.spec(search={"num_trials": 5}), code=1)
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    shown = lab.run("trials", lab.path(), "--json", **strict).output
    assert "\\udce9" in shown
    trials = json.loads(shown)
    assert [trial["status"] for trial in trials] == ["COMPLETED", "FAILED", "FAILED", "FAILED", "COMPLETED"]
    assert trials[0]["metrics"] == {"note": "caf\udce9", "list": ["\udce9"], "loss": 0.5}
    assert "'loss' is '0.5 \\udce9', a str" in trials[1]["error"]
    assert "must be a number" in trials[1]["error"]
    assert "'loss' is None" in trials[2]["error"]
    assert len(trials[3]["error"]) < 11_000
    for command in ("trials", "show", "checkpoints"):
        lab.run(command, lab.path(), **strict)
        json.loads(lab.run(command, lab.path(), "--json", **strict).output)
    with holdfast.open(lab.path()) as experiment:
        ((moment, name, value),) = experiment.load_telemetry(4)
        assert (moment, name, math.isnan(value)) == (datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), "nan", True)
        assert experiment.results_df()["metric.note"].tolist() == ["caf\udce9"] * 5
