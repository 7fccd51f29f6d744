"""Pins and prunings that only the path tells of: they outlive the database."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from store_kit import content, create
from upkeep_kit import Shop, end

from holdfast.core.errors import CheckpointNotFound, StorageError
from holdfast.core.trial import Outcome
from holdfast.experiment import Experiment
from holdfast.locate import Opened, open_path
from holdfast.storage.checkpoints.pins import marker
from holdfast.storage.database import requests
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.journal import JournalWriter
from holdfast.storage.root import LocalRoot
from holdfast.upkeep import collect


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with closing(create(tmp_path / "runs [x] * ü")) as opened:
        yield opened


@pytest.fixture
def shop(opened: Opened) -> Shop:
    return Shop.of(opened)


def journaled(shop: Shop) -> None:
    JournalWriter(shop.opened.folder.root, shop.lab.epoch, Outbox(shop.opened.database, shop.lab.id)).start()


def lose_database(shop: Shop) -> None:
    shop.opened.close()
    (shop.path.parent / "holdfast.db").unlink()


def markers(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob(".pin-*"))


@pytest.mark.parametrize("ended", [Outcome.COMPLETED, Outcome.LOST])
@pytest.mark.parametrize("told", ["before", "in between", "never"])
def test_a_pin_outlives_the_database(shop: Shop, told: str, ended: Outcome) -> None:
    """Whether the journal tells of the checkpoint or not, and whether its trial has ended or not."""
    shop.lab.driver.propose({"x": 0.5})
    journaled(shop)
    writer = shop.lab.claim(0)
    paths = [shop.save(writer, step) for step in range(3)]
    if ended is Outcome.COMPLETED:
        end(shop, writer, ended)
        journaled(shop)
    elif told == "in between":
        journaled(shop)
    if told == "before":
        Experiment(shop.opened).pin(0, 1)
        journaled(shop)
    shop.leave()
    if told != "before":
        Experiment(shop.opened).pin(0, 1)
    assert markers(shop.path) == [marker(paths[1])]
    lose_database(shop)
    for _ in range(2):
        with closing(open_path(shop.path)) as again:
            assert [item.path for item in Experiment(again).checkpoints() if item.pinned] == [paths[1]]
    with closing(open_path(shop.path)) as again:
        Experiment(again).unpin(0, 1)
        assert markers(shop.path) == []


def test_a_moved_and_a_copied_path_keep_their_pins(shop: Shop, tmp_path: Path) -> None:
    shop.lab.driver.propose({"x": 0.5})
    journaled(shop)
    writer = shop.lab.claim(0)
    paths = [shop.save(writer, step) for step in range(3)]
    shop.leave()
    Experiment(shop.opened).pin(0, 2)
    shop.opened.close()
    for name in ("copied", "moved"):
        place = tmp_path / name / shop.path.name
        place.parent.mkdir()
        (shutil.copytree if name == "copied" else shutil.move)(shop.path, place)
        with closing(open_path(place)) as there:
            assert [item.path for item in Experiment(there).checkpoints() if item.pinned] == [paths[2]]


def test_the_marker_is_there_before_the_row_says_so(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [shop.save(writer, step) for writer in [shop.lab.started()] for step in range(2)]
    seen = []
    ask = requests.pin

    def asked(*given: object, pinned: bool = True, **named: object) -> int:
        seen.append(markers(shop.path))
        code = ask(*given, pinned=pinned, **named)  # type: ignore[arg-type]  # as they came
        seen.append(markers(shop.path))
        return code

    monkeypatch.setattr(requests, "pin", asked)
    experiment = Experiment(shop.opened)
    experiment.pin(0, 0)
    experiment.unpin(0, 0)
    assert seen == [[marker(paths[0])]] * 4
    assert markers(shop.path) == []


def test_what_cannot_be_made_durable_is_not_pinned(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = shop.lab.started()
    path = shop.save(writer, 0)

    def refuse(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(LocalRoot, "write", refuse)
        with pytest.raises(StorageError):
            Experiment(shop.opened).pin(0, 0)
    assert not shop.row(path).pinned
    before = content(shop.path)
    with pytest.raises(CheckpointNotFound):
        Experiment(shop.opened).pin(0, 7)
    chosen = requests.to_pin(shop.opened.database, shop.lab.id, 0, 0)
    writer.forget([chosen.id])  # pruned between the look and the pin
    with monkeypatch.context() as stale:
        stale.setattr(requests, "to_pin", lambda *_, **__: chosen)
        with pytest.raises(CheckpointNotFound):
            Experiment(shop.opened).pin(0, 0)
    assert content(shop.path) == before


def test_markers_of_what_is_gone_are_garbage(shop: Shop) -> None:
    writer = shop.lab.started()
    paths = [shop.save(writer, step) for step in range(3)]
    Experiment(shop.opened).pin(0, 1)
    gone = ["trials/000000/checkpoints/.pin-step_00000009-a1-00aa", marker(paths[0])]
    foreign = "trials/000000/checkpoints/.pin-mine"
    writer.forget([shop.row(paths[0]).id])
    shop.store.delete(paths[0])
    for name in [*gone, foreign]:
        (shop.path / name).touch()
    end(shop, writer, Outcome.COMPLETED)
    shop.leave()
    found = collect(shop.opened)
    assert {item.path: item.why for item in found.removed} == dict.fromkeys(gone, "pins what is gone")
    assert markers(shop.path) == sorted([foreign, marker(paths[1])])
    assert collect(shop.opened).removed == []
    (shop.path / foreign).unlink()
    assert shop.opened.folder.delete() == []


# Prunings that the journal does not tell of


def test_what_was_pruned_after_the_journal_was_written_is_not_lost(shop: Shop) -> None:
    shop.lab.driver.propose({"x": 0.5})
    writer = shop.lab.claim(0)
    paths = [shop.save(writer, step) for step in range(3)]
    journaled(shop)
    paths += [shop.save(writer, step) for step in range(3, 5)]
    for path in paths[:2]:
        writer.forget([shop.row(path).id])
        shop.store.delete(path)
    shop.leave()
    lose_database(shop)
    with closing(open_path(shop.path)) as again:
        rows = [(item.status.value, item.reason) for item in Experiment(again).checkpoints()]
        assert rows == [("deleted", "pruned before the journal told")] * 2 + [("valid", "")] * 3
        found = collect(again)
        assert (found.removed, found.missing) == ([], [])


def test_what_nothing_newer_replaces_is_lost(shop: Shop) -> None:
    """The newest one, one that was pinned, and all where the newer one is torn."""
    writers = [shop.lab.claim(shop.lab.driver.propose({"x": 0.5})) for _ in range(3)]
    paths = [[shop.save(writer, step, trial=trial) for step in range(2)] for trial, writer in enumerate(writers)]
    journaled(shop)
    shop.leave()
    Experiment(shop.opened).pin(1, 0)
    for path in (paths[0][1], paths[1][0], paths[2][0]):
        shutil.rmtree(shop.path / path)
    os.truncate(shop.path / paths[2][1] / "manifest.json", 5)
    lose_database(shop)
    with closing(open_path(shop.path)) as again:
        assert [item.status.value for item in Experiment(again).checkpoints()] == ["valid"] * 6
        assert [(item.trial, item.step) for item, _ in collect(again, dry_run=True).missing] == [(0, 1), (1, 0), (2, 0)]


def test_what_an_attempt_left_that_another_began_anew_is_not_lost(shop: Shop) -> None:
    writer = shop.lab.started()
    old = shop.save(writer, 0)
    end(shop, writer, Outcome.FAILED)
    shop.lab.driver.rerun(shop.lab.row(0), restart=True)
    journaled(shop)
    shop.save(shop.lab.claim(0), 0)
    shop.store.delete(old)
    shop.leave()
    lose_database(shop)
    with closing(open_path(shop.path)) as again:
        assert [item.status.value for item in Experiment(again).checkpoints()] == ["deleted", "valid"]
