"""What ``gc``, verification and loading make of an experiment on an object store."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3

from holdfast import locate
from holdfast.core.errors import CheckpointCorrupt, LeaseHeld, StorageError
from holdfast.core.trial import Outcome
from holdfast.experiment import Experiment
from holdfast.holding import holder
from holdfast.locate import Opened
from holdfast.settings import settings
from holdfast.storage.checkpoints import pins
from holdfast.storage.checkpoints.ports import checkpoints_in
from holdfast.storage.checkpoints.serializers import write_state
from holdfast.storage.database import requests
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.journal import JournalWriter
from holdfast.storage.objects import ObjectRoot
from holdfast.testing.lab import Lab, dump
from holdfast.testing.samples import sample_spec
from holdfast.testing.saving import flip, manifest_of
from holdfast.upkeep import collect, verify


@pytest.fixture
def opened(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    monkeypatch.setattr(settings(), "cache_folder", tmp_path / "cache")
    spec = sample_spec(
        storage=s3.bucket("upkeep") + "/runs [x] ü", storage_options=s3.options, database=f"sqlite:///{tmp_path}/holdfast.db"
    )
    with closing(locate.create(spec, seed=1, workdir=".")) as opened:
        Leases(opened.database, opened.record.id).take(seen=0, epoch=1, holder={"pid": 1}, action="started", detail={})
        yield opened


@pytest.fixture
def lab(opened: Opened) -> Lab:
    return Lab(opened.database, opened.record)


def publish(opened: Opened, writer: AttemptWriter, step: int, *, row: bool = True, trial: int = 0) -> str:
    store: Any = checkpoints_in(opened.folder)
    staged = store.stage(trial, writer.number, step)
    files = write_state({"step": step}, staged, serializer="safe")
    manifest = replace(manifest_of(files, trial=trial, attempt=writer.number, step=step), experiment=opened.record.uuid)
    published = store.publish(staged, manifest)
    if row:
        saved = Saved(path=published.path, digest=published.digest, bytes=published.bytes)
        writer.report(step, {"loss": float(step)}, saved=saved)
    return str(published.path)


def root_of(opened: Opened) -> ObjectRoot:
    assert isinstance(opened.folder.root, ObjectRoot)
    return opened.folder.root


def objects(opened: Opened) -> dict[str, int]:
    return {name: size for name, size in root_of(opened).files("").items() if name != "lease.json"}


def mirrored(opened: Opened) -> list[str]:
    return sorted(str(file.relative_to(opened.folder.path)) for file in opened.folder.path.rglob("*") if file.is_file())


def test_what_dead_attempts_left_goes_and_nothing_else(opened: Opened, lab: Lab) -> None:
    writer, root = lab.started(), root_of(opened)
    kept = [publish(opened, writer, step) for step in range(3)]
    pruned, late = publish(opened, writer, 3), publish(opened, writer, 4, row=False)
    writer.forget([item.id for item in lab.reader.checkpoints() if item.path == pruned])
    torn = "trials/000000/checkpoints/step_00000009-a1-00aa"
    root.write(f"{torn}/state.json", b"123")  # its manifest never came
    foreign = [
        "trials/000000/checkpoints/step_[1]/x",
        "trials/000000/checkpoints/notes *.txt",
        "trials/mine ü/x",
        "journal/x y",
    ]
    for name in foreign:
        root.write(name, b"mine")
    lab.driver.end(writer.attempt, Ending(outcome=Outcome.COMPLETED))
    assert mirrored(opened)
    Leases(opened.database, opened.record.id).release(epoch=1, active=0.0, ended="stopped on request")
    before = objects(opened), mirrored(opened), dump(opened.database), root.read("lease.json")
    seen = collect(opened, dry_run=True)
    assert (objects(opened), mirrored(opened), dump(opened.database), root.read("lease.json")) == before
    remote = {item.path: (item.why, item.bytes) for item in seen.removed if item.why != "local copy"}
    sizes = {path: sum(root.files(path).values()) for path in (pruned, late)}
    expected = {pruned: ("pruned", sizes[pruned]), late: ("no row names it", sizes[late]), torn: ("no row names it", 3)}
    assert remote == expected
    copies = [item.path for item in seen.removed if item.why == "local copy"]
    assert sorted(copies) == sorted(str(opened.folder.path / path) for path in [*kept, pruned, late])
    done = collect(opened)
    assert (done.removed, done.left, done.missing) == (seen.removed, [], [])
    left = objects(opened)
    assert all(left[name] == 4 for name in foreign)
    assert {name.rpartition("/")[0] for name in left if "/step_000" in name} == set(kept)
    assert not opened.folder.path.exists()
    store = checkpoints_in(opened.folder)
    for path in kept:
        store.verify(path)
    assert Experiment(opened).status == "stopped"
    assert collect(opened).removed == []
    root.delete_folder(kept[2])
    assert [item.step for item, _ in collect(opened).missing] == [2]
    Leases(opened.database, opened.record.id).take(seen=3, epoch=4, holder=holder(), action="restored", detail={})
    with pytest.raises(LeaseHeld):
        collect(opened)


def test_bad_ones_are_found_and_the_one_before_is_loaded(opened: Opened, lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    writer, root = lab.started(), root_of(opened)
    paths = [publish(opened, writer, step) for step in range(4)]
    name = f"{paths[3]}/state.json"
    root.write(name, flip(root.read(name) or b"", 9))
    root.delete(f"{paths[2]}/manifest.json")
    bad = verify(opened, lab.reader.checkpoints()).bad
    assert [item.step for item, _ in bad] == [2, 3]
    with caplog.at_level(logging.WARNING):
        loaded: Any = Experiment(opened).load_checkpoint(0)
    assert (loaded.step, loaded.state) == (1, {"step": 1})
    assert len(caplog.records) == 2
    with pytest.raises(CheckpointCorrupt):
        Experiment(opened).load_checkpoint(0, strict=True)
    assert requests.quarantine(opened.database, opened.record.id, bad) == 2
    assert Experiment(opened).load_checkpoint(0, strict=True).step == 1
    root.write(name, flip(root.read(name) or b"", 9))
    found = verify(opened, lab.reader.checkpoints())
    assert ([item.step for item in found.good], [item.step for item, _ in found.bad]) == ([3], [])
    assert requests.acquit(opened.database, opened.record.id, found.good) == 1
    assert Experiment(opened).load_checkpoint(0, strict=True).step == 3


def test_a_pin_is_in_the_path(opened: Opened, lab: Lab) -> None:
    writer, root = lab.started(), root_of(opened)
    paths = [publish(opened, writer, step) for step in range(2)]
    Experiment(opened).pin(0, 1)
    assert pins.pinned(root, 0) == {paths[1]}
    Experiment(opened).unpin(0, 1)
    assert pins.pinned(root, 0) == set()
    Experiment(opened).pin(0, 0)
    root.write("trials/000000/checkpoints/.pin-step_00000009-a1-00aa", b"")
    Leases(opened.database, opened.record.id).release(epoch=1, active=0.0, ended="stopped on request")
    found = [item.path for item in collect(opened).removed if item.why == "pins what is gone"]
    assert found == ["trials/000000/checkpoints/.pin-step_00000009-a1-00aa"]
    assert pins.pinned(root, 0) == {paths[0]}
    opened.folder.delete()
    assert pins.pinned(root, 0) == set()


def test_pins_outlive_the_database(opened: Opened, lab: Lab, tmp_path: Path) -> None:
    for trial in range(4):
        writer = lab.started(trial / 4)
        publish(opened, writer, 0, trial=trial)
        lab.end(writer)
    JournalWriter(opened.folder.root, 1, Outbox(opened.database, opened.record.id)).start()
    for trial in (1, 3):  # after the journal was written: their markers are all that the path has of it
        Experiment(opened).pin(trial, 0)
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"
    with closing(locate.open_path(opened.folder.location, database=elsewhere, options=opened.spec.storage_options)) as again:
        assert [item.pinned for item in Experiment(again).checkpoints()] == [False, True, False, True]


def test_only_what_has_no_manifest_is_missing(opened: Opened, lab: Lab) -> None:
    writer, root = lab.started(), root_of(opened)
    paths = [publish(opened, writer, step) for step in range(4)]
    root.delete(f"{paths[1]}/manifest.json")
    root.delete(f"{paths[2]}/state.json")
    root.delete_folder(paths[3])
    Leases(opened.database, opened.record.id).release(epoch=1, active=0.0, ended="stopped on request")
    assert [item.step for item, _ in collect(opened, dry_run=True).missing] == [1, 3]


def test_a_store_that_does_not_answer_is_no_damage(opened: Opened, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(opened, lab.started(), 0)
    rows = lab.reader.checkpoints()

    def silent(*_: Any) -> Any:
        raise StorageError("it does not answer")

    monkeypatch.setattr(ObjectRoot, "part", silent)
    with pytest.raises(StorageError):
        verify(opened, rows)
    with pytest.raises(StorageError):
        Experiment(opened).load_checkpoint(0)
    assert [item.status.value for item in lab.reader.checkpoints()] == ["valid"]
