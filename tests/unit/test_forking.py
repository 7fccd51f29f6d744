"""Forks: what comes along, what stays, and that neither experiment ever touches the other one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from store_kit import content, create
from support_forks import SPACE, searched, story
from upkeep_kit import Shop

import holdfast
from holdfast.cli import main
from holdfast.core import faults
from holdfast.core.errors import ExperimentExists, ExperimentNotFound, HoldfastError, InvalidInput, SpecError, StorageError
from holdfast.core.population import Change
from holdfast.core.resume import Action, ResumePolicy
from holdfast.core.trial import Outcome
from holdfast.experiment import Experiment
from holdfast.flows import reconcile
from holdfast.locate import Opened
from holdfast.storage import inheriting
from holdfast.storage.database import rebuild
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.engine import Statement, Transaction
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.database.reads import Reader
from holdfast.storage.folder import Folder
from holdfast.storage.journal import Contents
from holdfast.testing.lab import Lab
from holdfast.testing.saving import flip
from holdfast.upkeep import collect, verify


@pytest.fixture
def original(tmp_path: Path) -> Iterator[Opened]:
    with closing(story(tmp_path / "runs [x] ü")) as opened:
        yield opened


def fork(opened: Opened, name: str = "fork", **how: Any) -> Experiment:
    return holdfast.fork(opened.folder.path, name, **how)


def statuses(experiment: Experiment) -> list[str]:
    return [trial.status.value for trial in experiment.trials]


def rows(experiment: Experiment) -> list[Any]:
    """Return what a fork must not change of trials, history and checkpoints."""
    trials = [
        (t.number, t.config, t.seed, t.metrics, t.step, t.error, t.ended_seq, t.source, t.group, t.state)
        for t in experiment.trials
    ]
    return [
        trials,
        experiment.history(),
        experiment.telemetry(),
        [(c.path, c.digest, c.status, c.pinned) for c in experiment.checkpoints()],
    ]


def plan(opened: Opened) -> dict[int, tuple[str, int | None]]:
    survey = reconcile.Survey(Reader(opened.database, opened.record.id), opened.folder, ResumePolicy(), opened.spec)
    return {planned.trial: (planned.action.value, planned.step) for planned in survey.plan()}


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


def test_bad_checkpoints_come_along_marked(original: Opened, caplog: pytest.LogCaptureFixture) -> None:
    by = {(c.trial, c.step): c.path for c in Experiment(original).checkpoints()}
    root = original.folder.path
    with (root / by[2, 1] / "manifest.json").open("ab") as stream:
        stream.write(b"x")
    shutil.rmtree(root / by[3, 0])
    with fork(original) as forked:
        found = {(c.trial, c.step): (c.status.value, c.reason) for c in forked.checkpoints()}
        assert found[2, 1] == ("corrupt", "its manifest is another one")
        assert found[3, 0][0] == "corrupt"
        assert "missing" in found[3, 0][1]
        assert "is damaged in the original" in caplog.text
        assert "is missing in the original" in caplog.text
        assert plan(forked._opened)[2] == ("resume", 0)
        assert plan(forked._opened)[3] == ("resume", None)
    with fork(original, "copied", storage=str(root.parent / "elsewhere")) as forked:
        assert statuses(forked)[2] == "PENDING"


def test_where_links_are_refused_files_are_copied_and_checked(
    original: Opened, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    bad = next(c.path for c in Experiment(original).checkpoints() if (c.trial, c.step) == (0, 0))
    file = next(file for file in (original.folder.path / bad).iterdir() if file.name != "manifest.json")
    file.write_bytes(flip(file.read_bytes(), 99))
    with fork(original) as forked:
        states = {(c.trial, c.step): c.status.value for c in forked.checkpoints()}
        assert states.pop((0, 0)) == "corrupt"
        assert set(states.values()) == {"valid"}
        assert "is not what its manifest says" in caplog.text
        assert not verify(forked._opened, forked.checkpoints()).bad
    linked = [file for file in Path(forked.path).rglob("*") if file.is_file() and file.stat().st_nlink > 1]
    assert linked == []


def test_files_are_linked_and_a_log_that_grows_is_not(original: Opened) -> None:
    with fork(original) as forked:
        root = Path(forked.path)
        for checkpoint in forked.checkpoints():
            assert all(file.stat().st_nlink == 2 for file in (root / checkpoint.path).iterdir())
        assert (root / "trials/000000/log-a1.txt").stat().st_nlink == 2
        with (original.folder.path / "trials/000002/log-a1.txt").open("a") as log:
            log.write("more\n")
        assert (root / "trials/000002/log-a1.txt").read_text() == "trial 2 says\n"


@pytest.mark.parametrize("how_often", [1, 99])
def test_what_is_pruned_meanwhile_makes_a_new_look_necessary(
    original: Opened, monkeypatch: pytest.MonkeyPatch, how_often: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest checkpoint moves on between the look at the rows and the files, as a live search does it."""
    shop = Shop(original, Lab(original.database, original.record))
    writer = shop.lab.writer(2)
    looks = 0
    take = inheriting.Staged.take

    def taken(self: inheriting.Staged, contents: Any) -> None:
        nonlocal looks
        if looks < how_often:
            old = max((c for c in shop.lab.reader.checkpoints() if c.trial == 2), key=lambda c: c.step)
            shop.save(writer, looks + 2, trial=2)
            shop.lab.driver.forget({old.id: "pruned"})
            shop.store.delete(old.path)
        looks += 1
        take(self, contents)

    monkeypatch.setattr(inheriting.Staged, "take", taken)
    with fork(original) as forked:
        assert looks == (2 if how_often == 1 else 5)
        assert ("was pruned meanwhile" in caplog.text) == (how_often > 1)
        assert not verify(forked._opened, [c for c in forked.checkpoints() if c.status == "valid"]).bad
        valid = [c.step for c in forked.checkpoints() if c.trial == 2 and c.status == "valid"]
        assert valid
        assert plan(forked._opened)[2] == ("resume", max(valid))
        folders = {p.name for p in (Path(forked.path) / "trials/000002/checkpoints").iterdir()}
        assert folders == {c.path.rpartition("/")[2] for c in forked.checkpoints() if c.trial == 2 and c.status == "valid"}
        assert collect(forked._opened, dry_run=True).removed == []


def test_a_full_disk_leaves_nothing(original: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = original.folder.path.parent
    before = content(storage)

    def full(*_: object, **__: object) -> None:
        raise StorageError(f"{storage}: No space left on device; free space")

    monkeypatch.setattr("holdfast.storage.journal.JournalWriter.start", full)
    with pytest.raises(StorageError, match="No space"):
        fork(original)
    after = content(storage)
    assert {n for n in after if not n.startswith("holdfast.db-")} == {n for n in before if not n.startswith("holdfast.db-")}


@pytest.mark.parametrize("point", ["journal.compacted", "fork.linked"])
def test_a_fork_that_was_cut_off_is_none_and_is_made_anew(
    original: Opened, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(BaseException):
        pass

    def hook(name: str) -> None:
        if name == point:
            raise Cut

    storage = original.folder.path.parent
    faults.install(hook)
    try:
        monkeypatch.setattr(Folder, "clear", lambda *_, **__: [])  # a power failure cleans nothing up
        with pytest.raises(Cut):
            fork(original, at_trial=4)
    finally:
        faults.install(None)
        monkeypatch.undo()
    assert (storage / "fork" / "trials").is_dir()
    with pytest.raises(ExperimentNotFound):
        holdfast.open(storage / "fork")
    (storage / "fork" / "notes.txt").write_text("mine")
    with pytest.raises(ExperimentExists, match="not holdfast's"):
        fork(original, at_trial=1)
    assert (storage / "fork" / "notes.txt").read_text() == "mine"
    (storage / "fork" / "notes.txt").unlink()
    with fork(original, at_trial=1) as forked:
        assert statuses(forked) == ["COMPLETED"]
        assert forked._opened.folder.root.names("trials") == ["000000"]
        assert ".fork.json" not in forked._opened.folder.root.names()


def test_a_copy_that_nobody_opened_is_forked_as_its_path_tells(original: Opened) -> None:
    copy = original.folder.path.parent / "copy"
    shutil.copytree(original.folder.path, copy)
    before = content(copy)
    shutil.rmtree(original.folder.path / "trials/000000/checkpoints")
    with holdfast.fork(copy, "fork") as forked:
        assert content(copy) == before
        assert not verify(forked._opened, forked.checkpoints()).bad
        assert len(forked.trials) == 6


def test_a_fork_in_a_storage_that_was_moved_takes_nothing_of_the_original(original: Opened) -> None:
    """The original's row still says where it was: a copy along with its storage would take it over."""
    old = original.folder.path.parent
    original.close()
    new = old.rename(old.with_name("moved"))
    with holdfast.fork(new / "exp", "fork") as forked, holdfast.open(new / "exp") as was:
        assert forked.id != was.id == original.record.uuid
        assert len(forked.trials) == len(was.trials) == 6
    (new / "holdfast.db").unlink()
    shutil.copytree(new / "fork", new / "fork copy")
    with holdfast.open(new / "fork copy") as copy:
        assert copy.id != forked.id
        assert len(copy.trials) == 6


def test_another_storage_gets_a_database_of_its_own(original: Opened, tmp_path: Path) -> None:
    before = content(original.folder.path)
    with Experiment(original).fork("fork", storage=str(tmp_path / "else")) as forked:
        assert forked._opened.database.file == tmp_path / "else" / "holdfast.db"
        assert rows(forked) == rows(Experiment(original))
    assert content(original.folder.path) == before
    assert {path.name for path in original.folder.path.parent.iterdir()} >= {"exp", "holdfast.db"}


def test_the_command(original: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(original.folder.path)
    assert main(["fork", path, "--name", "one", "--at-trial", "2", "--set", "search.num_trials=30", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["trials"]) == ("one", {"COMPLETED": 1, "FAILED": 1})
    assert main(["fork", path, "--name", "two"]) == 0
    assert "holdfast restore" in capsys.readouterr().out
    assert main(["fork", path, "--name", "two"]) == 2
    assert "the name 'two' is taken" in capsys.readouterr().err
    assert main(["show", str(original.folder.path.parent / "one")]) == 0
    assert f"forked:  from exp ({original.record.uuid}) at trial 2" in capsys.readouterr().out
    assert main(["show", str(original.folder.path.parent / "one"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ancestors"] == [original.record.uuid]


def test_a_thousand_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the database does not grow with the trials, but for one statement a config."""
    with closing(create(tmp_path, search={"engine": "random", "num_trials": 1000, "seed": 1})) as opened:
        shop = Shop.of(opened)
        writer = shop.lab.claim(shop.lab.driver.propose({"x": 0.5}))
        path = shop.save(writer, 0)
        shop.lab.end(writer, loss=1.0)
        contents = Contents()
        contents.apply(Outbox(opened.database, opened.record.id)(-1))
        for table in ("trial", "attempt", "report", "checkpoint"):
            rows = contents.tables[table]
            for (_, *rest), row in list(rows.items()):
                for number in range(1, 1000):
                    place = {"path": path.replace("000000", f"{number:06d}", 1)} if table == "checkpoint" else {}
                    rows[number, *rest] = {**row, ("number" if table == "trial" else "trial"): number, **place}
        for number in range(1, 1000):
            shutil.copytree(opened.folder.path / path, opened.folder.path / path.replace("000000", f"{number:06d}", 1))
        rebuild.rebuild(opened.database, opened.folder.identity(), contents, epoch=1, detail={"journal": -1})
        asked: list[object] = []
        run, many = Transaction.run, Transaction.many
        monkeypatch.setattr(Transaction, "run", lambda self, *a, **k: asked.append(a) or run(self, *a, **k))
        monkeypatch.setattr(Transaction, "many", lambda self, *a, **k: asked.append(a) or many(self, *a, **k))
        with fork(opened) as forked:
            monkeypatch.undo()
            assert len(asked) < 100
            assert len(forked.trials) == len(forked.checkpoints()) == 1000
            assert all((Path(forked.path) / c.path / "manifest.json").stat().st_nlink == 2 for c in forked.checkpoints())
