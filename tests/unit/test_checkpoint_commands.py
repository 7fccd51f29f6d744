"""Looking at an experiment's checkpoints, verifying, pinning and loading them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from store_kit import content, create, on_terminal, unprivileged
from upkeep_kit import Shop, end, reachable

from holdfast.cli import main
from holdfast.cli.checkpoints import _progress
from holdfast.core.errors import (
    CheckpointCorrupt,
    CheckpointNotFound,
    InvalidInput,
    InvalidStep,
    LeaseHeld,
    NotACheckpoint,
    StorageError,
)
from holdfast.core.retention import policies, surplus
from holdfast.core.trial import Outcome
from holdfast.experiment import Experiment
from holdfast.holding import holder
from holdfast.locate import Opened, open_path
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.database.attempts import Saved
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.journal import JournalWriter
from holdfast.tasks.workers import processes
from holdfast.testing.lab import dump
from holdfast.testing.saving import flip
from holdfast.upkeep import verify


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with closing(create(tmp_path / "runs [x] * ü")) as opened:
        yield opened


@pytest.fixture
def shop(opened: Opened) -> Shop:
    return Shop.of(opened)


def saved(shop: Shop, count: int = 4) -> list[str]:
    writer = shop.lab.started()
    return [shop.save(writer, step) for step in range(count)]


def damage(shop: Shop, path: str, name: str = "state.json") -> None:
    file = shop.path / path / name
    file.write_bytes(flip(file.read_bytes(), 99))


def statuses(shop: Shop) -> list[str]:
    return [item.status.value for item in shop.lab.reader.checkpoints()]


# Verifying


def test_bad_ones_are_found_and_set_aside(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    paths = saved(shop, 6)
    shop.leave("interrupted: SIGKILL")
    path = str(shop.path)
    assert main(["checkpoints", path, "--verify"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "6 of 6 are good"
    damage(shop, paths[5])
    (shop.path / paths[4] / "manifest.json").unlink()
    (shop.path / paths[3]).rename(shop.path / "aside")
    assert main(["checkpoints", path]) == 0  # nobody asked to read them
    assert statuses(shop) == ["valid"] * 6
    capsys.readouterr()
    assert main(["checkpoints", path, "--verify"]) == 1
    out = capsys.readouterr().out
    assert "trial 0 step 5: " in out
    assert "3 of 6 are good; bad ones are marked corrupt" in out
    assert statuses(shop) == ["valid"] * 3 + ["corrupt"] * 3
    reasons = [item.reason for item in shop.lab.reader.checkpoints()]
    assert "there is no checkpoint" in reasons[3]
    assert "has no manifest.json" in reasons[4]
    assert "digest" in reasons[5]
    before = dump(shop.opened.database)
    assert main(["checkpoints", path, "--verify", "--json"]) == 1  # they still are
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == statuses(shop)
    assert set(rows[0]) >= {"trial", "step", "status", "bytes", "metrics", "path"}
    assert dump(shop.opened.database) == before
    assert capsys.readouterr().err == ""
    shop = Shop.of(shop.opened, 2)
    end(shop, shop.lab.writer(0), Outcome.LOST)
    shop.lab.driver.rerun(shop.lab.row(0), restart=False)
    assert shop.lab.attempts(0)[2].parent_step == 2


def test_one_trial_alone(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    paths = saved(shop)
    shop.save(shop.lab.started(), 0, trial=1)
    shop.leave()
    damage(shop, paths[0])
    assert main(["checkpoints", str(shop.path), "--verify", "--trial", "1", "--json"]) == 0
    assert [row["trial"] for row in json.loads(capsys.readouterr().out)] == [1]
    assert main(["checkpoints", str(shop.path), "--trial", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4
    assert main(["checkpoints", str(shop.path), "--trial", "2"]) == 2
    assert "it has the trials 0 to 1" in capsys.readouterr().err
    assert main(["checkpoints", str(shop.path), "--verify"]) == 1


def test_while_somebody_drives_they_are_only_shown(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    paths = saved(shop)
    drive(shop, holder())
    damage(shop, paths[2])
    before = dump(shop.opened.database), content(shop.path)
    assert main(["checkpoints", str(shop.path), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "trial 0 step 2: " in out
    assert "3 of 4 are good; bad ones are not marked: somebody drives the experiment" in out
    assert main(["checkpoints", str(shop.path), "--verify", "--json"]) == 1
    out, err = capsys.readouterr()
    assert [row["status"] for row in json.loads(out)] == ["valid", "valid", "corrupt", "valid"]
    assert err.startswith("holdfast: bad ones are not marked: somebody drives")
    assert (dump(shop.opened.database), content(shop.path)) == before


def test_how_far_it_is_is_said_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    moments = iter([0.0, 0.5, 1.5, 1.6, 2.0, 2.1])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show = _progress(4, "verified", lambda: next(moments))
    for done in range(5):
        show(done)
    assert capsys.readouterr().err.replace("\r\x1b[K", "|") == "|1 of 4 verified|3 of 4 verified|4 of 4 verified|"


def test_where_nothing_can_be_written_they_are_only_shown(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    paths = saved(shop)
    shop.leave()
    damage(shop, paths[2])
    shop.opened.close()
    storage = shop.path.parent
    reachable(storage)
    for place in (storage, *storage.rglob("*")):
        place.chmod(0o555 if place.is_dir() else 0o444)
    before = content(storage)
    with unprivileged():
        assert main(["checkpoints", str(shop.path), "--verify"]) == 1
    assert "3 of 4 are good; bad ones are not marked: " in capsys.readouterr().out
    assert content(storage) == before


def test_a_disk_that_refuses_is_no_damage(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    paths = saved(shop)
    shop.leave()
    shop.opened.close()
    reachable(shop.path.parent)
    for place in (shop.path.parent, *shop.path.parent.rglob("*")):
        place.chmod(0o777 if place.is_dir() else 0o666)
    (shop.path / paths[1] / "state.json").chmod(0)
    with unprivileged():
        assert main(["checkpoints", str(shop.path), "--verify"]) == 4
    assert f"{paths[1]}/state.json: Permission denied" in capsys.readouterr().err
    assert statuses(shop) == ["valid"] * 4


def test_what_is_pruned_meanwhile_is_not_bad(shop: Shop) -> None:
    writer = shop.lab.started()
    paths = [shop.save(writer, step) for step in range(4)]
    rows = shop.lab.reader.checkpoints()

    def prune(done: int) -> None:
        if done == 1:
            writer.forget([rows[1].id])
            shop.store.delete(paths[1])
            (shop.path / paths[2]).rename(shop.path / "aside")

    assert [(item.step, reason[:8]) for item, reason in verify(shop.opened, rows, prune).bad] == [(2, "there is")]


def test_what_is_good_again_counts_again(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    paths = saved(shop)
    shop.leave()
    damage(shop, paths[3])
    (shop.path / paths[2]).rename(shop.path / "aside")
    path = str(shop.path)
    assert main(["checkpoints", path, "--verify"]) == 1
    assert statuses(shop) == ["valid", "valid", "corrupt", "corrupt"]
    capsys.readouterr()
    (shop.path / "aside").rename(shop.path / paths[2])
    assert main(["checkpoints", path, "--verify"]) == 1
    out = capsys.readouterr().out
    assert "3 of 4 are good; 1 that was marked corrupt is good, and counts again" in out
    assert "trial 0 step 2" not in out
    assert statuses(shop) == ["valid", "valid", "valid", "corrupt"]
    assert shop.row(paths[2]).reason == ""
    damage(shop, paths[3])  # the same bit again: it is what it was
    assert main(["checkpoints", path, "--verify", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [row["status"] for row in json.loads(out)] == ["valid"] * 4
    assert err == "holdfast: 1 that was marked corrupt is good, and counts again\n"
    assert statuses(shop) == ["valid"] * 4
    assert main(["checkpoints", path, "--verify"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 of 4 are good"


def test_while_somebody_drives_what_is_good_again_is_only_said(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    paths = saved(shop)
    shop.lab.driver.reject({shop.row(paths[1]).id: "a flipped bit"})
    drive(shop, holder())
    before = dump(shop.opened.database), content(shop.path)
    assert main(["checkpoints", str(shop.path), "--verify"]) == 0
    assert "4 of 4 are good; 1 that is marked corrupt is good; nothing is marked: somebody drives" in capsys.readouterr().out
    assert (dump(shop.opened.database), content(shop.path)) == before


def drive(shop: Shop, who: dict[str, Any]) -> None:
    """Let somebody else hold the lease."""
    Leases(shop.opened.database, shop.opened.record.id).take(seen=1, epoch=2, holder=who, action="restored", detail={})


def killed() -> dict[str, Any]:
    """Return the holder that a process of this host was that has been killed."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        who = {**holder(), "pid": process.pid, "started": processes.identity(process.pid)}
        process.kill()
    return who


def test_a_driver_that_was_killed_here_drives_no_more(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    paths = saved(shop)
    drive(shop, killed())
    assert Experiment(shop.opened).lease.is_held  # for its 30 s
    damage(shop, paths[2])
    assert main(["checkpoints", str(shop.path), "--verify"]) == 1
    assert "bad ones are marked corrupt" in capsys.readouterr().out
    assert statuses(shop) == ["valid", "valid", "corrupt", "valid"]
    assert Experiment(shop.opened).stop(wait=0.0)
    assert main(["stop", str(shop.path)]) == 0
    assert capsys.readouterr().out == "nobody drives sample\n"
    assert [row.action for row in Experiment(shop.opened).audit()][-1] == "quarantined"  # nobody was asked to stop


def test_a_driver_elsewhere_is_believed_in(shop: Shop) -> None:
    drive(shop, {"hostname": "there", "host": "there", "pid": 7, "started": "x"})
    assert not Experiment(shop.opened).stop(wait=0.0)
    assert [row.action for row in Experiment(shop.opened).audit()][-1] == "stop requested"


# The table


MANY = 1200


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of many checkpoints, without their files; one of them is bad, for a reason that is hard to print."""
    with closing(create(tmp_path_factory.mktemp("many"))) as opened:
        shop = Shop.of(opened)
        writer = shop.lab.started()
        for step in range(MANY):
            path = f"trials/000000/checkpoints/step_{step:08d}-a1-00000000"
            writer.report(step, {"loss": 1.0}, saved=Saved(path=path, digest="d", bytes=3 << 20))
        shop.lab.driver.reject({shop.lab.reader.checkpoints()[-1].id: "two\nlines \x1b[31m[bold]"})
        shop.leave()
        return opened.folder.path


def test_a_pipe_gets_every_checkpoint_in_a_line(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(many)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 1 + MANY + 1
    assert lines[0].split() == ["trial", "attempt", "step", "size", "status", "path"]
    assert lines[1].split() == ["0", "1", "0", "3.0", "MiB", "valid", "trials/000000/checkpoints/step_00000000-a1-00000000"]
    assert lines[-2].endswith("/step_00001199-a1-00000000")
    assert lines[-1] == rf"trial 0 step {MANY - 1}: two\nlines \x1b[31m[bold]"
    assert err == ""
    assert main(["checkpoints", str(many), "--limit", "2", "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [MANY - 2, MANY - 1]


@pytest.mark.parametrize(("given", "shown"), [([], 100), (["--all"], MANY), (["--limit", "3"], 3)])
def test_a_terminal_gets_the_last_ones_unless_told_otherwise(many: Path, given: list[str], shown: int) -> None:
    code, text, err = on_terminal(80, "checkpoints", str(many), *given)
    assert code == 0
    steps = [int(line.split()[2]) for line in text.splitlines() if " valid " in line]
    assert steps == list(range(MANY - shown, MANY - 1))
    assert (f"{MANY - shown} earlier checkpoints are not shown" in err) == (shown < MANY)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_narrow_terminal_gets_each_row_in_a_line_and_each_reason_once(shop: Shop, columns: int) -> None:
    paths = saved(shop, 3)
    Experiment(shop.opened).pin(0, 2)
    shop.leave()
    damage(shop, paths[1])
    damage(shop, paths[2])
    for given in (["--verify"], []):
        code, text, _ = on_terminal(columns, "checkpoints", str(shop.path), *given)
        lines = text.splitlines()
        assert code == len(given)
        assert [line.split()[:3] for line in lines[1:4]] == [["0", "1", str(step)] for step in range(3)]
        assert lines[5].startswith(f"trial 0 step 2: {paths[2]}/state.json has the digest ")
        assert text.count("has the digest") == 2
        assert str(shop.path) not in text
        names = [path.rpartition("/")[2] for path in paths]
        assert [line.endswith(name) for line, name in zip(lines[1:4], names, strict=True)] == [columns >= 80] * 3
        assert len(lines) == 6 + len(given)
        assert max(map(len, lines[1:4])) <= columns
        assert [line for line in lines if "corrupt, pinned" in line] == [lines[3]]


# Pins


def test_a_pin_keeps_a_checkpoint_whatever_the_rules_say(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    experiment, writer = Experiment(shop.opened), shop.lab.started()
    paths = [shop.save(writer, step) for step in range(5)]
    path = str(shop.path)
    assert main(["pin", path, "--trial", "0", "--step", "1"]) == 0  # while somebody drives
    assert "is pinned: it is kept until" in capsys.readouterr().out
    kept, _ = writer.kept()
    going = surplus(kept, policies(experiment.spec.checkpoints, experiment.objectives[0]))
    assert [item.step for item in going] == [2]  # of the newest two, the best and the pinned one
    assert main(["checkpoints", path, "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out) if row["pinned"]] == [1]
    assert main(["checkpoints", path]) == 0
    assert "valid, pinned" in capsys.readouterr().out
    JournalWriter(shop.opened.folder.root, 1, Outbox(shop.opened.database, shop.lab.id)).start()
    shop.leave()
    shop.opened.close()
    (shop.path.parent / "holdfast.db").unlink()
    with closing(open_path(shop.path)) as again:
        assert [item.path for item in Experiment(again).checkpoints() if item.pinned] == [paths[1]]
        Experiment(again).unpin(0, 1)
        assert not any(item.pinned for item in Experiment(again).checkpoints())
    assert main(["pin", path, "--trial", "0", "--step", "2"]) == 0
    assert main(["pin", path, "--trial", "0", "--step", "2", "--remove"]) == 0
    assert "left to the rules" in capsys.readouterr().out


def test_what_cannot_be_pinned_is_said(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    saved(shop)
    shop.leave()
    experiment = Experiment(shop.opened)
    before = dump(shop.opened.database)
    wrong: list[tuple[type[Exception], tuple[Any, ...]]] = [
        (InvalidInput, (1, 0)),
        (InvalidInput, (True, 0)),
        (InvalidInput, ("0", 0)),
        (InvalidStep, (0, "0")),
        (InvalidStep, (0, -1)),
        (CheckpointNotFound, (0, 9)),
        (FileNotFoundError, (0, 9)),
        (CheckpointNotFound, (0, 1, 2)),
        (InvalidInput, (0, 1, 2**70)),
        (InvalidInput, (0, 1, True)),
    ]
    for error, given in wrong:
        for work in (experiment.pin, experiment.unpin):
            with pytest.raises(error):
                work(*given)
    for options in (["--trial", "7", "--step", "0"], ["--trial", "0", "--step", "9"], ["--trial", "0", "--step", "-1"]):
        assert main(["pin", str(shop.path), *options]) == 2
    assert "those of the steps 0, 1, 2, 3" in capsys.readouterr().err
    assert dump(shop.opened.database) == before


def test_a_pin_is_refused_where_the_experiment_is_not_driven_with_this_database(shop: Shop, tmp_path: Path) -> None:
    saved(shop)
    JournalWriter(shop.opened.folder.root, 1, Outbox(shop.opened.database, shop.lab.id)).start()
    shop.leave()
    other = f"sqlite:///{tmp_path}/other.db"
    with closing(open_path(shop.path, database=other)) as elsewhere:
        from leasing_kit import take

        take(elsewhere, holder=holder())
        with pytest.raises(LeaseHeld, match=r"other\.db"):
            Experiment(shop.opened).pin(0, 1)
        with pytest.raises(LeaseHeld, match=r"other\.db"):
            Experiment(shop.opened).gc()


# Loading


def test_the_newest_good_one_is_loaded(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    paths = saved(shop)
    experiment = Experiment(shop.opened)
    loaded: Any = experiment.load_checkpoint(0)
    assert (loaded.step, loaded.state["step"], loaded.state["w"][0]) == (3, 3, 3.0)
    assert loaded.path == shop.path / paths[3]
    one: Any = experiment.load_checkpoint(0, 1)
    assert (one.step, one.state["step"]) == (1, 1)
    assert caplog.records == []
    damage(shop, paths[3])
    (shop.path / paths[2] / "manifest.json").write_bytes(b"torn")
    with caplog.at_level(logging.WARNING):
        assert experiment.load_checkpoint(0).step == 1
    assert ["step 3" in record.message and "digest" in record.message for record in caplog.records] == [True, False]
    assert "step 2 is not used" in caplog.records[1].message
    with pytest.raises(CheckpointCorrupt, match="digest"):
        experiment.load_checkpoint(0, strict=True)
    with pytest.raises(CheckpointCorrupt, match="digest"):
        experiment.load_checkpoint(0, 3)  # another step is not what was asked for
    with pytest.raises(NotACheckpoint):
        experiment.load_checkpoint(0, 2)
    for path in paths[:2]:
        damage(shop, path)
    with pytest.raises(CheckpointNotFound, match=r"trial 0 has no good checkpoint; .*state\.json has the digest"):
        experiment.load_checkpoint(0)
    assert statuses(shop) == ["valid"] * 4  # reading marks nothing


def test_only_what_counts_is_loaded(shop: Shop) -> None:
    writer, experiment = shop.lab.started(), Experiment(shop.opened)
    for step in range(3):
        shop.save(writer, step)
    end(shop, writer, Outcome.FAILED)
    shop.lab.driver.rerun(shop.lab.row(0), restart=True)
    with pytest.raises(CheckpointNotFound):
        experiment.load_checkpoint(0)
    shop.save(shop.lab.claim(0), 0)
    assert experiment.load_checkpoint(0).step == 0
    for wrong in ((0, 2), (0, 99)):
        with pytest.raises(CheckpointNotFound):
            experiment.load_checkpoint(*wrong)
    for step in ("foo", True, 2.0, -1):
        with pytest.raises(InvalidStep):
            experiment.load_checkpoint(0, step)  # type: ignore[arg-type]  # what else it is given
    for unknown in (1, -1, True, "0", None):
        with pytest.raises(InvalidInput):
            experiment.load_checkpoint(unknown)  # type: ignore[arg-type]  # what else it is given


@pytest.mark.parametrize("times", [1, 3])
def test_what_is_pruned_under_the_readers_eyes_is_no_error(shop: Shop, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, experiment = shop.lab.started(), Experiment(shop.opened)
    shop.save(writer, 0)
    load, passed = LocalCheckpoints.load, []

    def overtaken(self: LocalCheckpoints, path: str, **named: Any) -> Any:
        if len(passed) < times:
            passed.append(path)
            shop.save(writer, len(passed))
            writer.forget([shop.row(path).id])
            shop.store.delete(path)
        return load(self, path, **named)

    monkeypatch.setattr(LocalCheckpoints, "load", overtaken)
    assert experiment.load_checkpoint(0, strict=True).step == times


def test_a_disk_that_refuses_is_no_reason_to_take_an_older_one(shop: Shop) -> None:
    paths = saved(shop)
    reachable(shop.path.parent)
    for place in (shop.path.parent, *shop.path.parent.rglob("*")):
        place.chmod(0o777 if place.is_dir() else 0o666)
    (shop.path / paths[3] / "state.json").chmod(0)
    with unprivileged(), pytest.raises(StorageError, match="Permission denied"):
        Experiment(shop.opened).load_checkpoint(0)
    assert statuses(shop) == ["valid"] * 4
