"""Forks: what comes along, what stays, and that neither experiment ever touches the other one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from forking_kit import fork, plan, rows, statuses
from sqlalchemy import text
from store_kit import content, create
from support_forks import SPACE, searched, story
from upkeep_kit import Shop

import holdfast
from holdfast.cli import main
from holdfast.core.errors import ExperimentExists, HoldfastError, InvalidInput, SpecError
from holdfast.core.population import Change
from holdfast.core.resume import Action
from holdfast.core.trial import Outcome
from holdfast.experiment import Experiment
from holdfast.locate import Opened
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.engine import Statement
from holdfast.storage.database.leases import Leases
from holdfast.upkeep import collect, verify


@pytest.fixture
def original(tmp_path: Path) -> Iterator[Opened]:
    with closing(story(tmp_path / "runs [x] ü")) as opened:
        yield opened


def test_everything_comes_along_and_the_original_stays_as_it_is(original: Opened) -> None:
    before, was = content(original.folder.path), Experiment(original)
    with fork(original) as forked:
        assert content(original.folder.path) == before
        assert forked.path == original.folder.path.parent / "fork"
        assert forked.name == forked.spec.name == "fork"
        assert forked.id != was.id
        assert forked._opened.folder.identity().ancestors == [was.id]
        assert rows(forked) == rows(was)
        assert statuses(was) == ["COMPLETED", "FAILED", "RUNNING", "PENDING", "PENDING", "PENDING"]
        assert statuses(forked) == ["COMPLETED", "FAILED", "PENDING", "PENDING", "PENDING", "PENDING"]
        assert forked._reader.states() == was._reader.states()
        assert forked.status == "interrupted"
        told = forked.audit()[-2:]
        assert [row.action for row in told] == ["forked", "rebuilt"]
        assert told[0].detail["from"] == was.id
        assert (told[0].detail["trial"], told[0].detail["location"]) == (6, str(original.folder.path))
        assert {trial: step for trial, (_, step) in plan(forked._opened).items()} == {
            0: None,
            1: None,
            2: 1,
            3: 0,
            4: None,
            5: None,
        }
        assert plan(forked._opened)[0] == (Action.KEEP, None)
        assert not verify(forked._opened, forked.checkpoints()).bad
        assert forked.load_checkpoint(2).state["step"] == 1
        assert forked.load_checkpoint(0, 1).step == 1
        after = content(forked._opened.folder.path)
        assert {n: after[n] for n in after if n.startswith("trials")} == {
            n: before[n] for n in before if n.startswith("trials")
        }
        assert not (forked._opened.folder.path / "foreign.txt").exists()
        assert (forked._opened.folder.path / "trials/000000/log-a1.txt").read_text() == "trial 0 says\n"


def test_nothing_of_the_originals_processes_comes_along(original: Opened) -> None:
    columns = "host = 'here', pid = 4, pid_started = '5', flow_run_id = 'f', task_run_id = 't'"
    with original.database.write() as tx:
        tx.run(Statement(text(f"UPDATE attempt SET {columns} WHERE claimed_by IS NOT NULL")))
    Driver(original.database, original.record.id, 1, seed=1).audit("driving", {"flow_run_id": "f"})
    with fork(original) as forked:
        reader = forked._reader
        for of_trial in reader.attempts().values():
            for attempt in of_trial.values():
                found = (attempt.host, attempt.pid, attempt.pid_started, attempt.flow_run_id, attempt.task_run_id)
                assert found == (None,) * 5
        assert "driving" not in {row.action for row in forked.audit()}
        assert reader.cancel_requests() == set()
        assert not reader.stop_requested()
        assert not forked.lease.is_held
        assert forked._opened.folder.lease() is None
        assert reader.attempts()[2][1].outcome is Outcome.LOST
        assert not [t for t in forked.trials if t.status == "RUNNING"]


def test_a_decided_end_and_a_persisted_result_are_left_to_the_restore(tmp_path: Path) -> None:
    with closing(create(tmp_path)) as opened:
        shop = Shop.of(opened)
        for number in range(3):
            shop.lab.driver.propose({"x": number / 10})
        writers = [shop.lab.claim(number) for number in range(3)]
        writers[0].report(0, {"loss": 1.0}, decision="prune")
        result = {"trial": 1, "attempt": 1, "outcome": "completed", "metrics": {"loss": 0.5}}
        opened.folder.root.write(opened.folder.result_name(1, 1), json.dumps({"result": json.dumps(result)}).encode())
        writers[2].report(0, {"loss": 1.0})
        with fork(opened) as forked:
            assert statuses(forked) == ["RUNNING", "RUNNING", "PENDING"]
            assert plan(forked._opened) == {0: ("adopt", None), 1: ("adopt", None), 2: ("resume", None)}


@pytest.mark.parametrize("at", [0, 1, 2, 3, 6])
def test_trials_below_the_cut_come_along(original: Opened, at: int) -> None:
    was = Experiment(original)
    with fork(original, at_trial=at) as forked:
        assert [trial.number for trial in forked.trials] == list(range(at))
        assert rows(forked)[0] == rows(was)[0][:at]
        assert [row.trial for row in forked.history()] == [row.trial for row in was.history() if row.trial < at]
        assert {c.trial for c in forked.checkpoints()} == {c.trial for c in was.checkpoints() if c.trial < at}
        assert set(forked._reader.states()) == {n for n in was._reader.states() if n < at}
        assert {int(name) for name in forked._opened.folder.root.names("trials")} == set(range(min(at, 4)))
        assert forked._opened.folder.identity().uuid == forked.id
        searched(forked._opened, at + 2)
        assert len(forked.trials) == at + 2


@pytest.mark.parametrize("at", [-1, 7, True, 1.5, "3"])
def test_a_cut_that_is_none_is_refused_and_nothing_written(original: Opened, at: Any) -> None:
    before = content(original.folder.path.parent)
    with pytest.raises(InvalidInput, match="from 0 to 6"):
        fork(original, at_trial=at)
    assert content(original.folder.path.parent) == before


ENGINES = {
    "random": {},
    "tpe": {"n_startup_trials": 3},
    "cmaes": {"popsize": 4},
    "sobol": {},
    "grid": {},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fork_goes_on_exactly_as_the_original_did(tmp_path: Path, engine: str) -> None:
    space = {name: p for name, p in SPACE.items() if engine != "grid" or name != "x"}
    search = {"engine": engine, "num_trials": 12, "seed": 1, "options": ENGINES[engine]}
    with closing(create(tmp_path, "exp", space=space, search=search)) as opened:
        searched(opened, 12)
        expected = [(t.number, t.config, t.seed, t.metrics, t.status) for t in Experiment(opened).trials]
        for at in (0, 3, 7, 12):
            with fork(opened, f"fork-{at}", at_trial=at) as forked:
                searched(forked._opened, 12)
                assert [(t.number, t.config, t.seed, t.metrics, t.status) for t in forked.trials] == expected
        if engine == "grid":
            return
        with fork(opened, "other", at_trial=7, changes={"search.seed": 2}) as forked:
            assert forked.spec.search.seed == forked._opened.record.seed == 2
            searched(forked._opened, 12)
            configs = [t.config for t in forked.trials]
            assert configs[:7] == [config for _, config, *_ in expected[:7]]
            assert all(mine != theirs for mine, (_, theirs, *_) in zip(configs[7:], expected[7:], strict=True))


def test_a_fork_of_a_fork_without_its_ancestors(original: Opened) -> None:
    with fork(original, "ünï çode", at_trial=3) as first, first.fork("second [*]", at_trial=2) as second:
        assert second._opened.folder.identity().ancestors == [first.id, original.record.uuid]
        for path in (original.folder.path, first.path):
            shutil.rmtree(path)
        original.folder.path.parent.joinpath("holdfast.db").unlink()
        with holdfast.open(second.path) as again:
            assert again.id == second.id
            assert statuses(again) == ["COMPLETED", "FAILED"]
            assert not verify(again._opened, again.checkpoints()).bad


@pytest.mark.parametrize("first", ["original", "fork"])
def test_deleting_one_leaves_the_other_whole(original: Opened, first: str) -> None:
    with fork(original) as forked:
        before = {name: content(original.folder.path.parent / name) for name in (original.record.name, "fork")}
        gone, stays = (original.folder.path, forked.path) if first == "original" else (forked.path, original.folder.path)
        Leases(original.database, original.record.id).release(epoch=1, active=0.0, ended=None)
        assert main(["delete", str(gone), "--yes"]) == 0
        assert content(Path(stays)) == before[Path(stays).name]
        with holdfast.open(stays) as left:
            assert not verify(left._opened, left.checkpoints()).bad
            assert left.load_checkpoint(2).state["step"] == 1


def test_gc_pruning_and_driving_in_one_leave_the_other_as_it_was(original: Opened) -> None:
    with fork(original) as forked:
        mine, theirs = content(original.folder.path), None
        collect(forked._opened, corrupt=True)
        searched(forked._opened, 8)
        store = Shop(forked._opened, None).store  # type: ignore[arg-type]
        store.delete(forked.checkpoints()[0].path)
        forked.unpin(0, 1)
        assert content(original.folder.path) == mine
        theirs = content(Path(forked.path))
        Experiment(original).unpin(0, 1)
        for checkpoint in Experiment(original).checkpoints():
            Shop(original, None).store.delete(checkpoint.path)  # type: ignore[arg-type]
        assert content(Path(forked.path)) == theirs


@pytest.mark.parametrize(
    ("name", "how", "error", "words"),
    [
        ("exp", {}, InvalidInput, "the original itself"),
        ("taken", {}, ExperimentExists, "holdfast restore"),
        ("foreign", {}, ExperimentExists, "is no experiment"),
        ("a/b", {}, SpecError, "a name becomes a folder"),
        ("", {}, SpecError, "not empty"),
        ("x", {"changes": {"search.engine": "tpe"}}, SpecError, "search.seed, description"),
        ("x", {"changes": {"search.num_trials": -1}}, SpecError, "num_trials"),
        ("x", {"changes": {"search.seed": None}}, SpecError, "needs a number"),
        ("x", {"storage": "exp/trials"}, InvalidInput, "within the experiment"),
        ("x", {"database": "nonsense://"}, HoldfastError, "nonsense"),
        ("gone", {}, ExperimentExists, "holdfast delete"),
    ],
)
def test_refused_forks_write_nothing(
    original: Opened, name: str, how: dict[str, Any], error: type[HoldfastError], words: str
) -> None:
    storage = original.folder.path.parent
    create(storage, "taken").close()
    create(storage, "gone").close()
    shutil.rmtree(storage / "gone")
    (storage / "foreign").mkdir()
    (storage / "foreign" / "notes.txt").write_text("mine")
    if "storage" in how:
        how = {"storage": str(storage / how["storage"])}
    before = content(storage)
    with pytest.raises(error, match=words):
        fork(original, name, **how)
    before.pop("holdfast.db-shm", None)
    after = content(storage)
    after.pop("holdfast.db-shm", None)
    assert after == before


def test_a_population_is_forked_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    population = {"interval": 1, "parameters": ["x"]}
    search = {"engine": "random", "num_trials": 4, "seed": 1}
    with closing(create(tmp_path, population=population, search=search)) as opened:
        with pytest.raises(InvalidInput, match="a population"):
            fork(opened, at_trial=1)
        shop = Shop.of(opened)
        for number in range(2):
            shop.save(shop.lab.claim(shop.lab.driver.propose({"x": number / 10})), 0, trial=number)
        change = Change(trial=1, donor=0, step=0, config={"x": 0.7})
        for number in range(2):
            shop.lab.end(shop.lab.writer(number), Outcome.PREEMPTED)
        shop.lab.driver.evolve(0, [change])
        shop.lab.claim(0)
        with fork(opened) as forked:
            assert statuses(forked) == ["RUNNING", "PENDING"], "a restore lets it wait, and knows what was lent"
            assert [row.from_trial for row in forked.lineage()] == [0]
            assert plan(forked._opened) == {0: ("resume", 0), 1: ("resume", 0)}
            assert forked._reader.attempts()[1][2].donor == (0, 1)


def test_repeats_that_are_cut_are_proposed_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    search = {"engine": "random", "num_trials": 6, "seed": 1, "repeats": 3}
    with closing(create(tmp_path, "exp", search=search)) as opened:
        searched(opened, 6)
        expected = [(t.config, t.group, t.repeat) for t in Experiment(opened).trials]
        with fork(opened, at_trial=4) as forked:
            assert "trial 4 cuts the repeats of trial 3: 2 are left out" in caplog.text
            searched(forked._opened, 6)
            assert [(t.config, t.group, t.repeat) for t in forked.trials] == expected


def test_merged_trials_come_along(tmp_path: Path) -> None:
    with closing(story(tmp_path, "source")) as source, closing(create(tmp_path, "exp")) as opened:
        del source
        Experiment(opened).merge(["source"])
        with fork(opened, at_trial=0) as forked:
            assert forked.load().origins == Experiment(opened).load().origins != []


def test_changes_are_made_and_noted(original: Opened) -> None:
    changes = {"search.num_trials": 40, "search.seed": 5, "description": "again", "failure.max_failures": 2}
    with fork(original, changes=changes) as forked:
        assert (forked.spec.search.num_trials, forked.spec.search.seed) == (40, 5)
        assert (forked.description, forked.spec.failure.max_failures) == ("again", 2)
        told = next(row for row in forked.audit() if row.action == "forked").detail["changes"]
        assert told == {
            "search.num_trials": [20, 40],
            "search.seed": [1, 5],
            "description": ["", "again"],
            "failure.max_failures": [0, 2],
        }
        database = Path(str(original.database.file))
    database.unlink()
    with holdfast.open(forked.path) as again:
        assert (again.spec.search.num_trials, again._opened.record.seed, again.description) == (40, 5, "again")


# Damage, and an original that goes on
