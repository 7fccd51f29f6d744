"""A population that is killed anywhere, restored, moved to another number of slots or to its path alone, ends the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3
from support import DIED, Lab, MakeLab, executed

pytestmark = pytest.mark.xdist_group("population")  # they compare with one uninterrupted run

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


def test_how_many_run_at_once_and_when_files_are_written_changes_nothing(whole: Lab, make_lab: MakeLab) -> None:
    lab = make_lab("other", steps=STEPS)
    lab.run("run", population(lab, max_concurrent=3, checkpoints={"keep_last": 1, "asynchronous": True, "save_period": 3}))
    assert lab.outcome() == whole.outcome()
    assert lineage(lab) == lineage(whole)


KILLS = [
    "checkpoint.committed:3",
    "population.gathered:1",
    "population.evolved:1",
    "attempt.claimed:3",
    "checkpoint.renamed:3",
]
"""Where it dies, one after the other, each time in the process that restores it."""

ALONE = {2}
"""After which of these deaths the database is lost, too."""


def test_killed_again_and_again(whole: Lab, make_lab: MakeLab) -> None:
    lab = make_lab("killed", steps=STEPS)
    for place, fault in enumerate(KILLS):
        slots = f"search.max_concurrent={1 + place % 2}"
        call = ("restore", lab.path(), "--set", slots) if place else ("run", population(lab))
        ended = lab.run(*call, fault=fault, code=None)
        assert ended.code == DIED, (fault, ended.output)
        if place in ALONE:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{lab.database}{suffix}").unlink(missing_ok=True)
    lab.run("restore", lab.path())
    assert lab.outcome() == whole.outcome()
    assert lineage(lab) == lineage(whole)


def test_a_bad_checkpoint_of_another_member_is_not_gone_on_from(make_lab: MakeLab) -> None:
    lab = make_lab("bad", steps=STEPS)
    lab.run("run", population(lab), fault="population.evolved:1", code=DIED)
    ((_, number, donor, step, _),) = lineage(lab)
    with lab.open() as experiment:
        explored = experiment.trial(number).config
    (lent,) = [one for one in lab.checkpoints(donor) if one.lent]
    file = next(file for file in (lab.path() / lent.path).iterdir() if file.name != "manifest.json")
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    said = lab.light("restore", lab.path(), "--plan").output
    assert " waiting; from the checkpoint at step 1" in " ".join(said.split())
    assert f"the checkpoint of trial {donor} at step {step} is not used" in " ".join(said.split())
    lab.run("restore", lab.path())
    assert lab.statuses() == ["COMPLETED"] * MEMBERS
    with lab.open() as experiment:
        second = experiment._reader.attempts()[number][2]
        assert (second.donor, second.parent, second.parent_step) == (None, 1, step)
        assert f"the checkpoint of trial {donor} at step {step} is not used" in second.note
        if experiment.lineage()[1:] == [row for row in experiment.lineage()[1:] if row.trial != number]:
            assert experiment.trial(number).config == explored
    assert executed(lab.log(), number) == list(range(STEPS))


def test_who_fails_leaves_and_may_come_back(make_lab: MakeLab) -> None:
    lab = make_lab("failing", steps=STEPS)
    order = lab.order("fail", 0, 3)
    lab.run("run", population(lab, max_concurrent=2), code=1)  # one failed
    assert lab.statuses() == ["FAILED", *["COMPLETED"] * (MEMBERS - 1)]
    before = lineage(lab)
    assert [row[0] for row in before] == [0, 1, 2]
    assert all(0 not in row[1:3] for row in before[1:])
    order.unlink()
    lab.run("restore", lab.path(), "--resume-errored")
    assert lab.statuses() == ["COMPLETED"] * MEMBERS
    assert lineage(lab) == before  # what was decided without it stands
    assert [step for step, _ in lab.outcome()[0][3]] == list(range(STEPS))


def test_on_an_object_store(whole: Lab, s3: S3, tmp_path: Path, server_environment: dict[str, str]) -> None:
    folders = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_DATA_HOME": str(tmp_path / "lab" / "data")}
    environment = {**server_environment, **folders, **s3.environment}
    lab = Lab(tmp_path / "lab", environment, steps=STEPS, storage=s3.bucket("population") + "/runs", options=s3.options)
    try:
        lab.run("run", population(lab, max_concurrent=2), fault="population.evolved:2", code=DIED)
        lab.run("restore", lab.path())
        assert lab.outcome() == whole.outcome()
        assert lineage(lab) == lineage(whole)
        with lab.open() as experiment:
            assert {one.status.value for one in experiment.checkpoints()} == {"valid", "deleted"}
    finally:
        lab.close()
