"""A population that is killed anywhere, restored, moved to another number of slots or to its path alone, ends the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import DIED, Lab, MakeLab, executed

MEMBERS, INTERVAL, STEPS = 4, 2, 8


def population(lab: Lab, *, max_concurrent: int = 1, **changes: Any) -> Path:
    settings = {
        "population": {"interval": INTERVAL},
        "stopping": {"max_steps": STEPS},
        "search": {"engine": "random", "num_trials": MEMBERS, "max_concurrent": max_concurrent},
        "checkpoints": {"keep_last": 1, "keep_top_k": None},
    }
    return lab.spec(**{**settings, **changes})


def lineage(lab: Lab) -> list[tuple[Any, ...]]:
    """Return who went on from whom, without numbers of attempts, of which a crash makes more."""
    with lab.open() as experiment:
        return [(row.generation, row.trial, row.from_trial, row.from_step, row.changes) for row in experiment.lineage()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, server_environment: dict[str, str]) -> Iterator[Lab]:
    """A population that ran uninterrupted, one member at a time."""
    lab = Lab(tmp_path_factory.mktemp("whole") / "lab", server_environment, steps=STEPS)
    lab.run("run", population(lab))
    yield lab
    lab.close()


def test_an_uninterrupted_population(whole: Lab) -> None:
    lab = whole
    assert lab.statuses() == ["COMPLETED"] * MEMBERS
    changed = lineage(lab)
    assert [row[0] for row in changed] == [0, 1, 2]  # after the last steps nobody goes on
    with lab.open() as experiment:
        trials = {trial.number: trial for trial in experiment.trials}
        attempts = experiment._reader.attempts()
        for generation, number, donor, step, changes in changed:
            assert step == (generation + 1) * INTERVAL - 1
            assert number != donor
            assert changes
        last = {number: generation for generation, number, *_ in changed}
        assert all((trials[number].first is not None) == (number in last) for number in trials)
        exploits = [each for of_trial in attempts.values() for each in of_trial.values() if each.reason == "exploit"]
        assert len(exploits) == len(changed)
        assert all(each.note.startswith(f"goes on from trial {each.donor and each.donor[0]} at step") for each in exploits)
        lent = [one for one in experiment.checkpoints() if one.lent]
        assert lent == []
        kept = [one for one in experiment.checkpoints() if one.status == "valid"]
        assert len(kept) <= 2 * MEMBERS
    for number in range(MEMBERS):
        assert [step for step, _ in lab.outcome()[number][3]] == list(range(STEPS))
        assert executed(lab.log(), number) == list(range(STEPS))
    shown = lab.light("show", lab.path()).output
    assert f"trial {changed[0][1]} goes on from trial {changed[0][2]} at step 1: " in shown


def test_how_many_run_at_once_changes_nothing(whole: Lab, lab: Lab, make_lab: MakeLab) -> None:
    other = make_lab("other", steps=STEPS)
    other.run("run", population(other, max_concurrent=3))
    assert other.outcome() == whole.outcome()
    assert lineage(other) == lineage(whole)


KILLS = [
    "proposal.committed:2",
    "checkpoint.committed:3",
    "population.gathered:1",
    "population.evolved:1",
    "attempt.claimed:3",
    "checkpoint.renamed:4",
    "population.evolved:1",
    "attempt.claimed:1",
    "population.gathered:1",
    "restore.reconciled:1",
    "trial.completed:1",
]
"""Where it dies, one after the other, each time in the process that restores it."""


def test_killed_again_and_again(whole: Lab, make_lab: MakeLab) -> None:
    lab = make_lab("killed", steps=STEPS)
    lab.run("run", population(lab), fault=KILLS[0], code=DIED)
    for place, fault in enumerate(KILLS[1:]):
        slots = 1 + place % 2
        ended = lab.run("restore", lab.path(), "--set", f"search.max_concurrent={slots}", fault=fault, code=None)
        assert ended.code == DIED, (fault, ended.output)
    lab.run("restore", lab.path())
    assert lab.outcome() == whole.outcome()
    assert lineage(lab) == lineage(whole)


@pytest.mark.parametrize("fault", ["population.gathered:2", "population.evolved:2", "attempt.claimed:12"])
def test_the_path_alone_is_enough(whole: Lab, make_lab: MakeLab, fault: str) -> None:
    lab = make_lab("alone", steps=STEPS)
    lab.run("run", population(lab), fault=fault, code=DIED)
    lab.database.unlink()
    for suffix in ("-wal", "-shm"):
        Path(f"{lab.database}{suffix}").unlink(missing_ok=True)
    lab.run("restore", lab.path())
    assert lab.outcome() == whole.outcome()
    assert lineage(lab) == lineage(whole)
