"""What ``gc`` removes of an experiment that nobody drives, what it leaves alone, and who it leaves alone."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from store_kit import content, create, unprivileged
from support_scripts import COMMAND, run_script
from upkeep_kit import Shop, end, reachable, staged_and_trash

from holdfast.cli import main
from holdfast.core.errors import Fenced, LeaseHeld
from holdfast.core.trial import Outcome
from holdfast.experiment import Experiment
from holdfast.holding import holder
from holdfast.locate import Opened, open_path
from holdfast.storage import journal
from holdfast.storage.database import requests
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.engine import Statement
from holdfast.storage.database.experiments import by_uuid
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.journal import JournalWriter
from holdfast.storage.leasing import Claimant, take
from holdfast.tasks.workers import processes
from holdfast.tasks.workers.messages import ProcessIdentity
from holdfast.testing.lab import dump
from holdfast.testing.saving import flip
from holdfast.upkeep import Collected, collect, verify


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with closing(create(tmp_path / "runs [x] * ü")) as opened:
        yield opened


@pytest.fixture
def shop(opened: Opened) -> Shop:
    return Shop.of(opened)


def state(shop: Shop) -> tuple[Any, ...]:
    return dump(shop.opened.database), content(shop.path)


def whys(found: Collected) -> dict[str, str]:
    return {item.path: item.why for item in found.removed}


def drafts(shop: Shop) -> list[str]:
    names = [f"{place}.holdfast-draft-{'0' * 15}{number}" for number, place in enumerate(("", "journal/", "trials/000000/"))]
    for name in names:
        (shop.path / name).parent.mkdir(parents=True, exist_ok=True)
        (shop.path / name).write_text("torn")
    return names


def littered(shop: Shop) -> tuple[dict[str, str], list[str]]:
    """Leave one of everything that can be left; return what is to go with the reasons, and what is to stay."""
    lab, writer = shop.lab, shop.lab.started()
    old = [shop.save(writer, step) for step in range(4)]
    end(shop, writer, Outcome.FAILED)
    lab.driver.rerun(lab.row(0), restart=True)
    writer = lab.claim(0)
    new = [shop.save(writer, step) for step in range(4)]
    writer.forget([shop.row(new[0]).id])  # killed before its files went
    lab.driver.reject({shop.row(new[1]).id: "a flipped bit"})
    requests.pin(lab.database, lab.id, 0, 3, attempt=1)
    late = shop.publish(writer, 7).path  # killed before its row came
    staged, trash = staged_and_trash(shop.store, late)
    end(shop, writer, Outcome.COMPLETED)
    names = drafts(shop)
    goes = {staged: "never published", trash: "half deleted", late: "no row names it", new[0]: "pruned"}
    goes |= dict.fromkeys(old[:3], "superseded") | dict.fromkeys(names, "temporary")
    return goes, [old[3], *new[1:]]


def test_what_dead_attempts_left_goes_and_nothing_else(shop: Shop) -> None:
    goes, stays = littered(shop)
    foreign = shop.foreign()
    shop.leave()
    before = state(shop)
    seen = Experiment(shop.opened).gc(dry_run=True)
    assert state(shop) == before
    assert (whys(seen), seen.dry_run, seen.missing, seen.left) == (goes, True, [], [])
    sizes = {item.path: item.bytes for item in seen.removed}
    for path in goes:
        place = shop.path / path
        assert sizes[path] == sum(file.stat().st_size for file in ([place] if place.is_file() else place.iterdir())) > 0

    done = Experiment(shop.opened).gc()
    assert (whys(done), done.bytes, done.missing, done.left) == (goes, seen.bytes, [], [])
    assert all(file.is_symlink() or file.read_text() == "mine" for file in foreign)
    assert not [path for path in goes if os.path.lexists(shop.path / path)]
    for path in stays:
        row = shop.row(path)
        shop.store.verify(path, digest=row.digest, trial=0, attempt=row.attempt, step=row.step)
    assert [item.status.value for item in shop.lab.reader.checkpoints()] == [
        *["deleted", "deleted", "deleted", "valid", "deleted", "corrupt", "valid", "valid"]
    ]
    before = state(shop)
    again = Experiment(shop.opened).gc()
    assert (again.removed, again.missing) == ([], [])
    assert state(shop) == before  # not even the lease was taken


def test_bad_ones_are_evidence_until_told_otherwise(shop: Shop) -> None:
    writer = shop.lab.started()
    paths = [shop.save(writer, step) for step in range(3)]
    requests.pin(shop.lab.database, shop.lab.id, 0, 1)
    for path in paths[:2]:
        damage(shop, path)
    shop.lab.driver.reject({shop.row(path).id: "a flipped bit" for path in paths[:2]})
    end(shop, writer, Outcome.COMPLETED)
    shop.leave()
    assert collect(shop.opened).removed == []
    assert whys(collect(shop.opened, corrupt=True)) == {paths[0]: "corrupt"}
    assert collect(shop.opened, corrupt=True).removed == []
    rows = [(item.status.value, item.reason) for item in shop.lab.reader.checkpoints()]
    assert rows == [("deleted", "removed by gc: a flipped bit"), ("corrupt", "a flipped bit"), ("valid", "")]


def damage(shop: Shop, path: str) -> None:
    file = shop.path / path / "state.json"
    file.write_bytes(flip(file.read_bytes(), 99))


def test_a_bad_one_that_is_good_again_is_spared(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    writer = shop.lab.started()
    paths = [shop.save(writer, step) for step in range(3)]
    damage(shop, paths[0])
    shop.lab.driver.reject({shop.row(path).id: "a flipped bit" for path in paths[:2]})
    end(shop, writer, Outcome.COMPLETED)
    shop.leave()
    before = state(shop)
    assert main(["gc", str(shop.path), "--corrupt", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"trial 0 step 1: it is good, and would count again: {paths[1]}" in out
    assert "1 would be removed" in out
    assert state(shop) == before
    assert main(["gc", str(shop.path), "--corrupt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["path"] for item in found["removed"]] == [paths[0]]
    assert [(item["step"], item["path"]) for item in found["good"]] == [(1, paths[1])]
    assert [(item.status.value, item.reason) for item in shop.lab.reader.checkpoints()] == [
        ("deleted", "removed by gc: a flipped bit"),
        ("valid", ""),
        ("valid", ""),
    ]
    shop.store.verify(paths[1], digest=shop.row(paths[1]).digest)


def test_what_a_newer_holdfast_wrote_is_no_garbage(shop: Shop) -> None:
    writer = shop.lab.started()
    paths = [shop.save(writer, step) for step in range(3)]
    shop.lab.driver.reject({shop.row(path).id: "torn" for path in paths[:2]})
    damage(shop, paths[0])
    manifest = shop.path / paths[1] / "manifest.json"
    written = shop.store.read_manifest(paths[1])[0]
    manifest.write_bytes(replace(written, format=written.format + 1).to_bytes())
    end(shop, writer, Outcome.COMPLETED)
    shop.leave()
    found = collect(shop.opened, corrupt=True)
    assert ([item.path for item in found.removed], found.left, found.good) == ([paths[0]], [], [])
    assert shop.row(paths[1]).status.value == "corrupt"


def test_a_checkpoint_that_was_put_elsewhere_behind_a_link_is_not_missing(shop: Shop, tmp_path: Path) -> None:
    writer = shop.lab.started()
    paths = [shop.save(writer, step) for step in range(3)]
    (shop.path / paths[2]).rename(tmp_path / "big disk")
    (shop.path / paths[2]).symlink_to(tmp_path / "big disk")
    (shop.path / paths[1]).rename(tmp_path / "gone")
    (shop.path / paths[1]).symlink_to(tmp_path / "nothing")
    end(shop, writer, Outcome.COMPLETED)
    shop.leave()
    found = collect(shop.opened)
    assert (found.removed, found.missing) == ([], [])
    assert [item.status.value for item in shop.lab.reader.checkpoints()] == ["valid"] * 3
    assert [item.step for item, _ in verify(shop.opened, shop.lab.reader.checkpoints()).bad] == [1]


def test_the_old_ones_stay_until_a_restarted_trial_has_one_of_its_own(shop: Shop) -> None:
    writer = shop.lab.started()
    paths = [shop.save(writer, step) for step in range(2)]
    end(shop, writer, Outcome.FAILED)
    shop.lab.driver.rerun(shop.lab.row(0), restart=True)
    shop.leave()
    assert collect(shop.opened).removed == []
    shop = Shop.of(shop.opened, 2)
    new = shop.save(shop.lab.claim(0), 0)
    shop.leave()
    removed = (shop.path / new).rename(shop.path / "aside")
    assert collect(shop.opened, dry_run=True).removed == []  # the new one is missing: it replaces nothing
    removed.rename(shop.path / new)
    assert whys(collect(shop.opened)) == dict.fromkeys(paths, "superseded")


def test_a_checkpoint_whose_files_are_gone_is_said_and_set_aside(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    writer = shop.lab.started()
    paths = [shop.save(writer, step) for step in range(3)]
    end(shop, writer, Outcome.LOST)
    shop.leave()
    (shop.path / paths[2]).rename(shop.path / "aside")
    path = str(shop.path)
    before = state(shop)
    assert main(["gc", path, "--dry-run"]) == 1
    said = capsys.readouterr().out
    assert said == f"trial 0 step 2: its directory is missing: {paths[2]}\nnothing is left to remove\n"
    assert state(shop) == before
    assert main(["gc", path, "--json"]) == 1
    (missing,) = json.loads(capsys.readouterr().out)["missing"]
    assert (missing["trial"], missing["step"], missing["path"]) == (0, 2, paths[2])
    assert (shop.row(paths[2]).status.value, shop.row(paths[2]).reason) == ("corrupt", "its directory is missing")
    assert main(["gc", path]) == 0
    shop.lab.epoch = by_uuid(shop.opened.database, shop.opened.record.uuid).epoch  # type: ignore[union-attr]  # it is there
    shop.lab.driver.rerun(shop.lab.row(0), restart=False)
    assert shop.lab.attempts(0)[2].parent_step == 1


# Who else is there


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_who_drives_is_left_alone(shop: Shop, where: str, dry_run: bool, capsys: pytest.CaptureFixture[str]) -> None:
    littered(shop)
    shop.leave()
    who = holder() if where == "here" else {"hostname": "there", "host": "there", "pid": 7, "started": "x"}
    Leases(shop.opened.database, shop.opened.record.id).take(seen=1, epoch=2, holder=who, action="restored", detail={})
    before = state(shop)
    with pytest.raises(LeaseHeld):
        collect(shop.opened, dry_run=dry_run)
    assert main(["gc", str(shop.path), *(["--dry-run"] if dry_run else [])]) == 3
    said = capsys.readouterr().err
    assert f"process {who['pid']} on {who['hostname']} drives sample; its lease runs" in said
    assert "holdfast stop" in said
    assert state(shop) == before


def test_prefect_is_not_needed(shop: Shop) -> None:
    shop.leave()
    code = (
        "import sys; from holdfast.cli import main; code = main(sys.argv[1:]);"
        " print({'prefect', 'optuna', 'pandas'} & set(sys.modules)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "gc", str(shop.path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "nothing is left to remove\nset()\n"), done.stderr


def test_a_zombie_is_refused_and_what_it_still_publishes_is_swept(shop: Shop) -> None:
    writer = shop.lab.started()
    shop.save(writer, 0)
    staged_and_trash(shop.store, shop.save(writer, 1))
    with shop.opened.database.write() as tx:  # its holder is gone: nobody gave the lease back
        tx.run(Statement(text("UPDATE experiment SET lease_expires = 0")))
    assert len(collect(shop.opened).removed) == 2
    for call in (writer.check, lambda: writer.report(2, {"loss": 1.0}), lambda: writer.forget([1])):
        with pytest.raises(Fenced):
            call()
    late = shop.publish(writer, 2).path  # it had looked at the fence before
    assert whys(collect(shop.opened)) == {late: "no row names it"}
    assert shop.lab.trial(0).status.value == "RUNNING"  # what becomes of it is for a restore to say
    assert [item.status.value for item in shop.lab.reader.checkpoints()] == ["valid", "valid"]


def test_a_worker_that_a_dead_driver_left_is_ended_first(shop: Shop) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) as worker:
        process = ProcessIdentity(host=processes.same_host(), pid=worker.pid, started=str(processes.identity(worker.pid)))
        attempt = shop.lab.trial(shop.lab.driver.propose({"x": 0.5})).attempt.id
        writer = AttemptWriter.claim(shop.opened.database, shop.lab.id, 1, attempt, token="t", process=process)
        staged_and_trash(shop.store, shop.save(writer, 0))
        shop.leave()
        assert worker.poll() is None
        assert len(collect(shop.opened, dry_run=True).removed) == 2
        assert worker.poll() is None
        assert len(collect(shop.opened).removed) == 2
        assert worker.wait(20) == -9


def test_it_leaves_no_trace_in_what_the_experiment_says_of_itself(shop: Shop) -> None:
    goes, _ = littered(shop)
    shop.leave("stopped on request")
    before = by_uuid(shop.opened.database, shop.opened.record.uuid)
    status = Experiment(shop.opened).status
    assert len(collect(shop.opened).removed) == len(goes)
    after = by_uuid(shop.opened.database, shop.opened.record.uuid)
    assert before is not None
    assert after is not None
    assert (after.ended, after.active_seconds, after.epoch) == (before.ended, before.active_seconds, before.epoch + 1)
    assert Experiment(shop.opened).status == status == "stopped"
    assert not Experiment(shop.opened).lease.is_held
    assert [row.action for row in Experiment(shop.opened).audit()][-2:] == ["collecting", "collected"]


def test_while_it_runs_nobody_drives(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    littered(shop)
    shop.leave()
    asked: list[str] = []
    sweep = type(shop.store).sweep

    def swept(self: Any, trial: int, keep: Any) -> list[str]:
        with closing(open_path(shop.path)) as other:

            def never(_: float) -> None:
                raise AssertionError("a holder that is alive is not waited for")

            claimant = Claimant(holder=holder(), liveness=lambda _: True, say=print, pause=never)
            with pytest.raises(LeaseHeld, match="drives the experiment"):
                take(other.database, other.record.id, other.folder, claimant, action="restored", detail={})
        asked.append("refused")
        return list(sweep(self, trial, keep))

    monkeypatch.setattr(type(shop.store), "sweep", swept)
    assert collect(shop.opened).left == []
    assert asked == ["refused"]


def test_a_pin_in_the_last_moment_counts(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    goes, _ = littered(shop)
    shop.leave()
    chosen = next(path for path, why in goes.items() if why == "superseded")
    flush, row = JournalWriter.start, shop.row(chosen)

    def start(self: JournalWriter) -> None:
        flush(self)
        requests.pin(shop.lab.database, shop.lab.id, 0, row.step, attempt=1)

    monkeypatch.setattr(JournalWriter, "start", start)
    assert chosen not in whys(collect(shop.opened))
    shop.store.verify(chosen, digest=row.digest)
    assert (shop.row(chosen).status.value, shop.row(chosen).pinned) == ("valid", True)


# What a crash, a lost database and a stubborn disk make of it


def journaled(shop: Shop) -> None:
    """Write what the rows say into the path, as a driver does."""
    JournalWriter(shop.opened.folder.root, shop.lab.epoch, Outbox(shop.opened.database, shop.lab.id)).start()


def test_what_it_decided_survives_the_loss_of_the_database(shop: Shop) -> None:
    littered(shop)
    journaled(shop)
    shop.leave()
    collect(shop.opened)
    expected = [(item.path, item.status.value, item.pinned) for item in shop.lab.reader.checkpoints()]
    shop.opened.close()
    (shop.path.parent / "holdfast.db").unlink()
    with closing(open_path(shop.path)) as again:
        assert [(item.path, item.status.value, item.pinned) for item in Experiment(again).checkpoints()] == expected
        assert collect(again).removed == []
        for _ in range(2):  # by the same handle, whose rows were rebuilt when it was opened
            (shop.path / "trials/000000/checkpoints/.trash-step_00000009-a1-00aa").mkdir()
            assert len(collect(again).removed) == 1


def test_checkpoints_that_only_the_path_knows_are_no_garbage(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.lab.driver.propose({"x": 0.5})
    journaled(shop)
    writer = shop.lab.claim(0)
    paths = [shop.save(writer, step) for step in range(2)]  # published, and not journaled yet
    shop.leave()
    shop.opened.close()
    (shop.path.parent / "holdfast.db").unlink()
    assert main(["gc", str(shop.path), "--dry-run"]) == 0
    assert not (shop.path.parent / "holdfast.db").exists()
    assert main(["gc", str(shop.path)]) == 0
    assert capsys.readouterr().out == "nothing is left to remove\n" * 2
    with closing(open_path(shop.path)) as again:
        assert [(item.path, item.status.value) for item in Experiment(again).checkpoints()] == [
            (path, "valid") for path in paths
        ]


@pytest.mark.parametrize("fault", ["lease.database-taken", "journal.behind", "journal.written", "checkpoint.pruned-renamed"])
def test_killed_in_the_middle_it_goes_on_the_next_time(shop: Shop, fault: str) -> None:
    goes, stays = littered(shop)
    shop.leave()
    journaled(shop)
    shop.opened.close()
    done = run_script(COMMAND, "gc", shop.path, HOLDFAST_FAULT=fault)
    assert done.returncode == -9, done.stderr
    assert run_script(COMMAND, "gc", shop.path).returncode == 0
    assert not [path for path in goes if os.path.lexists(shop.path / path)]
    for path in stays:
        shop.store.verify(path, digest=shop.row(path).digest)
    assert collect(shop.opened).removed == []
    assert Experiment(shop.opened).status == "stopped"


def test_segments_that_a_compaction_left_go(shop: Shop) -> None:
    root = shop.opened.folder.root
    journaled(shop)
    shop.lab.driver.propose({"x": 0.5})
    old = {f"journal/{name}": root.read(f"journal/{name}") or b"" for name in root.names("journal")}
    writer = JournalWriter(root, 1, Outbox(shop.opened.database, shop.lab.id))
    writer._most_files = 0
    writer.start()
    for name, body in old.items():  # killed before they were deleted
        root.write(name, body)
    shop.leave()
    told = journal.read(root)
    assert whys(collect(shop.opened)) == dict.fromkeys(old, "compacted")
    after = journal.read(root)
    assert told is not None
    assert after is not None
    assert after.tables["trial"].keys() == told.tables["trial"].keys()


def test_what_cannot_be_removed_is_said(
    shop: Shop, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    goes, _ = littered(shop)
    shop.leave()
    stubborn = next(path for path, why in goes.items() if why == "half deleted")
    for place in (shop.path.parent, *shop.path.parent.rglob("*")):
        place.chmod(0o777 if place.is_dir() else 0o666)
    (shop.path / stubborn).chmod(0o555)
    shop.opened.close()
    reachable(shop.path.parent)
    with caplog.at_level(logging.WARNING), unprivileged():
        code = main(["gc", str(shop.path), "--json"])
    (shop.path / stubborn).chmod(0o755)
    found = json.loads(capsys.readouterr().out)
    assert ([item["path"] for item in found["left"]], code) == ([stubborn], 4)
    assert len(found["removed"]) == len(goes) - 1
    assert whys(collect(shop.opened)) == {stubborn: "half deleted"}


def test_the_words(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    goes, _ = littered(shop)
    shop.leave()
    assert main(["gc", str(shop.path), "--dry-run"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[-1] for line in lines) == sorted(goes)
    assert last.startswith(f"{len(goes)} would be removed, ")
    assert last.endswith(" KiB")
    assert main(["gc", str(shop.path), "--json", "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dry_run"] is True
    assert {item["path"]: item["why"] for item in found["removed"]} == goes
    assert found["bytes"] == sum(item["bytes"] for item in found["removed"])
    assert main(["gc", str(shop.path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{len(goes)} removed, ")
    assert main(["gc", str(shop.path)]) == 0
    assert capsys.readouterr().out == "nothing is left to remove\n"
