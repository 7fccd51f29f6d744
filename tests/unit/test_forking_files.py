"""Forks: their files, what goes wrong while they are made, where they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from forking_kit import fork, plan, rows, statuses
from store_kit import content, create
from support_forks import story
from upkeep_kit import Shop

import holdfast
from holdfast.cli import main
from holdfast.core import faults
from holdfast.core.errors import ExperimentExists, ExperimentNotFound, StorageError
from holdfast.experiment import Experiment
from holdfast.locate import Opened
from holdfast.storage import inheriting
from holdfast.storage.database import rebuild
from holdfast.storage.database.engine import Transaction
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.folder import Folder
from holdfast.storage.journal import Contents
from holdfast.testing.lab import Lab
from holdfast.testing.saving import flip
from holdfast.upkeep import collect, verify


@pytest.fixture
def original(tmp_path: Path) -> Iterator[Opened]:
    with closing(story(tmp_path / "runs [x] ü")) as opened:
        yield opened


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
