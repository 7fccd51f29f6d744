"""Searches whose trials are stopped by rules, killed in the middle, with real processes."""

from __future__ import annotations

from typing import Any

from support import DIED, Lab, MakeLab, executed, starts

import holdfast
from holdfast.core.history import History
from holdfast.core.stopping import make
from holdfast.core.stopping_section import StoppingSection

ASHA = {"rule": "asha", "reduction_factor": 2}


def check_decisions(lab: Lab, stopping: dict[str, Any]) -> list[tuple[int, int]]:
    """Decide anew about the stored reports, in their order, and return (trial, step) of those that end their trial.

    AssertionError when that is not what was stored, and what became of the trials.
    """
    with lab.open() as experiment:
        rows = sorted((row for row in experiment.history() if row.canonical), key=lambda row: row.seq)
        rules = make(StoppingSection.model_validate(stopping), experiment.objectives)
        history = History(rules.metrics)
        ended = {}
        for row in rows:
            history.add(row.trial, row.step, row.metrics)
            reason = rules.decide(history, row.trial, row.step)
            assert row.decision == ("continue" if reason is None else "prune"), (row, reason)
            if reason is not None:
                ended[row.trial] = (row.step, reason)
        for trial in experiment.trials:
            pruned = trial.number in ended
            assert trial.status == ("PRUNED" if pruned else "COMPLETED")
            if pruned:
                step, reason = ended[trial.number]
                assert trial.step == step
                assert reason in trial.attempt.note
                assert trial.metrics
        return [(number, step) for number, (step, _) in sorted(ended.items())]


def test_reports_from_before_the_crash_decide_afterwards(make_lab: MakeLab) -> None:
    lab = make_lab(steps=4)
    spec = lab.spec(search={"num_trials": 7}, stopping=ASHA)
    lab.run("run", spec, fault="checkpoint.committed:11", code=DIED)
    before = len(lab.log())
    lab.run("restore", lab.path())
    pruned = check_decisions(lab, ASHA)
    assert any(len(executed(lab.log()[before:], number)) > 0 for number, _ in pruned)  # decided after the crash
    assert all(executed(lab.log(), number) == list(range(step + 1)) for number, step in pruned)


def test_what_was_decided_before_the_crash_is_carried_out(make_lab: MakeLab) -> None:
    """Killed when the decision is committed and nobody has been told; so also where the path alone is left."""
    lab = make_lab(steps=3)
    stopping = {"rule": "threshold", "upper": -1.0, "min_steps": 2}
    lab.run("run", lab.spec(search={"num_trials": 2}, stopping=stopping), fault="checkpoint.committed:2", code=DIED)
    assert lab.statuses() == ["RUNNING"]
    aside = lab.folder / "aside"
    aside.mkdir()
    files = [*lab.database.parent.glob("holdfast.db*")]
    for file in files:
        file.rename(aside / file.name)
    (planned,) = lab.json("restore", lab.path(), "--plan")
    assert (planned["action"], planned["reason"]) == ("adopt", "it was told to end (pruned) before")
    for file in files:
        (aside / file.name).rename(file)
    lab.run("restore", lab.path())
    assert starts(lab.log(), 0) == [(1, 0)]
    assert lab.statuses() == ["PRUNED"] * 2
    assert check_decisions(lab, stopping) == [(0, 1), (1, 1)]
    with holdfast.open(lab.path()) as experiment:
        assert experiment.trials[0].attempt.note.endswith("is above -1; decided before a crash")
        best = experiment.best_trial()
        assert best is not None
        assert best.status == "PRUNED"
    assert "stopped by threshold after step 1" in lab.light("trials", lab.path()).output
