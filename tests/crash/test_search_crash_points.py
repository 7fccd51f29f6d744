"""A real search dies at each named crash point; restored, it ends as if nothing had happened."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import Ended, Entry, Lab, executed, starts

from holdfast.core.faults import POINTS

SEARCHED = [name for name in POINTS if not name.startswith(("upgrade.", "population.", "fork.", "watch.", "code."))]
"""The points that a search or its restore passes."""

pytestmark = pytest.mark.xdist_group("crash points")  # they share scenarios that run side by side

AT_ONCE = 3
"""Scenarios that run side by side: each waits for its own processes most of the time."""

BEFORE_THE_EXPERIMENT = {"experiment.path-made", "experiment.database-drafted", "experiment.rows-made"}
PASSES = {
    "attempt.claimed": 2,
    "checkpoint.staged": 5,
    "checkpoint.manifest-written": 5,
    "checkpoint.renamed": 5,
    "checkpoint.committed": 5,
    "checkpoint.pruned-row": 2,
    "checkpoint.pruned-renamed": 2,
    "proposal.committed": 2,
    "report.committed": 4,
    "result.returned": 2,
    "result.persisted": 2,
    "trial.completed": 2,
}
"""The pass at which to die, where a later one than the first has more to lose."""

SEARCH = {"engine": "tpe", "num_trials": 3}
STEPS = 4
DIED = 128 + 9


@dataclass
class Story:
    """What a scenario leaves to be judged."""

    died: Ended
    at_death: tuple[dict[int, Any], set[tuple[int, int]]]
    """trials, and (trial, step) of the checkpoints that count, after the crash"""
    log_at_death: list[Entry]
    after: dict[int, Any]
    log: list[Entry]
    trials: list[dict[str, Any]]
    leftovers: list[str]
    alone: dict[int, Any]
    """the trials after a restore from a copy of the dead path, elsewhere and without its database"""
    alone_log: list[Entry]
    alone_said: str


def spec_of(lab: Lab, name: str) -> Path:
    checkpoints = {"save_period": 2} if name == "report.committed" else {}
    failure = {"max_failures": 1} if name == "attempt.failed" else {}
    execution = {"trials_per_run": 1} if name == "search.continued" else {}
    return lab.spec(search=SEARCH, checkpoints=checkpoints, failure=failure, execution=execution)


def play(lab: Lab, name: str) -> Story:
    spec = spec_of(lab, name)
    restore = ("restore", lab.path())
    fault = f"{name}:{PASSES.get(name, 1)}"
    if name == "attempt.failed":
        (lab.folder / "train.py").write_text(FAILS_ONCE.format(rest=(lab.folder / "train.py").read_text()))
    if name.startswith("restore."):
        lab.run("run", spec, fault="checkpoint.renamed:6", code=DIED)
        died = lab.run(*restore, fault=fault, code=None)
    else:
        died = lab.run("run", spec, fault=fault, code=None)
    exists = name not in BEFORE_THE_EXPERIMENT
    state = (lab.outcome(), saved(lab)) if exists else ({}, set())
    log = lab.log()
    if exists:
        shutil.copytree(lab.path(), lab.folder / "alone" / "exp", symlinks=True)
    lab.run(*restore) if exists else lab.run("run", spec)
    left = [str(file) for file in lab.path().rglob("*") if file.name.startswith((".staging", ".trash"))]
    left += [str(file) for file in lab.path().glob("trials/*/checkpoints/*") if not (file / "manifest.json").exists()]
    story = Story(died, state, log, lab.outcome(), lab.log(), lab.trials(), left, {}, [], "")
    if exists:
        (lab.folder / "runs").rename(lab.folder / "gone")
        (lab.folder / "alone").rename(lab.folder / "runs2")
        lab.clear_log()
        story.alone_said = lab.run("restore", lab.folder / "runs2" / "exp").output
        (lab.folder / "runs2").rename(lab.folder / "runs")
        story.alone, story.alone_log = lab.outcome(), lab.log()
    return story


FAILS_ONCE = """\
{rest}

steady = train


def train(trial):
    if trial.number == 1 and not (HERE / "failed").exists():
        (HERE / "failed").touch()
        raise RuntimeError("no luck the first time")
    steady(trial)
"""


def saved(lab: Lab) -> set[tuple[int, int]]:
    return {(trial["number"], one.step) for trial in lab.trials() for one in lab.checkpoints(trial["number"])}


@pytest.fixture(scope="module")
def stories(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server_environment: dict[str, str]
) -> Iterator[dict[str, Future[Story]]]:
    """The scenarios of the tests that were chosen, and the uninterrupted searches that they are compared with."""
    items = [item for item in request.session.items if item.module is request.module]  # type: ignore[attr-defined]
    chosen = {item.callspec.params["name"] for item in items if hasattr(item, "callspec")}  # type: ignore[attr-defined]
    labs: list[Lab] = []
    lock = threading.Lock()

    def lab(name: str) -> Lab:
        with lock:
            labs.append(Lab(tmp_path_factory.mktemp("story") / name, server_environment, steps=STEPS))
            return labs[-1]

    def whole(name: str) -> Any:
        place = lab("whole")
        place.run("run", spec_of(place, name))
        return Story(Ended(0, ""), ({}, set()), [], place.outcome(), place.log(), place.trials(), [], {}, [], "")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {"whole": pool.submit(whole, "")}
        futures |= {name: pool.submit(lambda name=name: play(lab(name), name)) for name in SEARCHED if name in chosen}
        yield futures
        for future in futures.values():
            future.cancel()
    for place in labs:
        place.close()


@pytest.mark.parametrize("name", SEARCHED)
def test_killed_at(name: str, stories: dict[str, Future[Story]]) -> None:
    story, whole = stories[name].result(), stories["whole"].result()
    assert story.died.code == DIED, f"{name} was not passed:\n{story.died.output}"
    assert story.after == whole.after
    for number, (_, _, _, steps) in story.after.items():
        assert [step for step, _ in steps] == list(range(STEPS)), number
    trials, checkpoints = story.at_death
    new = story.log[len(story.log_at_death) :]
    for number, (status, *_) in trials.items():
        if status == "COMPLETED":
            assert not starts(new, number), f"finished trial {number} ran again"
    for number, step in checkpoints:
        assert all(first > step for _, first in starts(new, number)), f"checkpoint {step} of trial {number} was lost"
    for trial in story.trials:
        number = trial["number"]
        again = len(executed(story.log, number)) - STEPS
        assert again <= (2 if name == "report.committed" else 1), f"trial {number} executed {again} steps again"
    assert not story.leftovers


@pytest.mark.parametrize("name", [name for name in SEARCHED if name not in BEFORE_THE_EXPERIMENT])
def test_killed_at_and_restored_from_the_path_alone(name: str, stories: dict[str, Future[Story]]) -> None:
    story, whole = stories[name].result(), stories["whole"].result()
    assert "rebuilt from" in story.alone_said
    assert story.alone == whole.after
    trials, checkpoints = story.at_death
    for number, (status, *_) in trials.items():
        if status == "COMPLETED":
            assert not starts(story.alone_log, number), f"finished trial {number} ran again"
    for number, step in checkpoints:
        assert all(first > step for _, first in starts(story.alone_log, number)), f"checkpoint {step} of {number} was lost"


def test_adopts_a_persisted_result(stories: dict[str, Future[Story]]) -> None:
    if "result.persisted" not in stories:
        pytest.skip("the scenario of result.persisted was not chosen")
    story = stories["result.persisted"].result()
    assert story.at_death[0][1][0] == "RUNNING"
    assert len(starts(story.log, 1)) == 1
    assert story.trials[1]["attempts"] == 1
