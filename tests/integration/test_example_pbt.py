"""The example of population based training runs as it stands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import Lab

import holdfast

pytest.importorskip("sklearn", reason="scikit-learn, whose digits the example learns, is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "pbt"


def test_members_go_on_from_better_ones(lab: Lab) -> None:
    shutil.copytree(EXAMPLE, lab.folder / "pbt")
    lab.run("run", lab.folder / "pbt" / "pbt.yaml")
    with holdfast.open(lab.folder / "pbt" / "runs" / "pbt") as experiment:
        best = experiment.best_trial()
        assert best is not None
        assert best.metrics["accuracy"] > 0.9
        rows = experiment.lineage()
        assert [row.generation for row in rows] == [0, 1, 2]
        values = {(row.trial, row.step): row.metrics["loss"] for row in experiment.history() if row.canonical}
        for row in rows:  # it left its own weights for better ones
            assert values[row.trial, row.from_step] > values[row.from_trial, row.from_step]
            assert values[row.trial, row.from_step + 1] < values[row.trial, row.from_step]
        frame = experiment.lineage_df()
        assert list(frame.columns) == ["generation", "trial", "attempt", "from_trial", "from_step", "changes"]
        assert len(frame) == 3
