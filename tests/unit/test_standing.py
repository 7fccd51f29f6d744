"""Paths and databases that were lost, moved, copied, put back or exchanged: told apart, brought together, or refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_kit import content, create

import holdfast
from holdfast import standing
from holdfast.core.errors import Conflict, Corrupt, ExperimentExists, HoldfastError, InvalidInput, LeaseHeld
from holdfast.core.trial import Outcome
from holdfast.holding import WentOn, check_path
from holdfast.locate import Opened, open_path
from holdfast.standing import Story, Verdict, judge, verdict
from holdfast.storage import journal
from holdfast.storage.database import experiments, requests
from holdfast.storage.database.driver import Driver, Ending
from holdfast.storage.database.engine import connect, sqlite_url
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.database.reads import Reader
from holdfast.storage.folder import Folder
from holdfast.storage.journal import Epoch, JournalWriter
from holdfast.storage.leasing import Claimant, Keeper, take
from holdfast.testing.lab import Lab
from holdfast.transfer import export, take_in

# The rule


def story(*tokens: str, seq: int = 10, touched: int = 10, copied_at: int | None = None) -> Story:
    return Story(epochs=epochs(*tokens), seq=seq, touched=touched, copied_at=copied_at)


def epochs(*tokens: str) -> list[Epoch]:
    return [Epoch(number, token, number) for number, token in enumerate(tokens, 1)]


@pytest.mark.parametrize(
    ("database", "path", "end", "expected"),
    [
        (story("a", "b"), "ab", 10, Verdict.CURRENT),
        (story("a", "b"), "ab", 7, Verdict.CURRENT),
        (story("a", "b"), "ab", 11, Verdict.BEHIND),
        (story("a", "b"), "a", 7, Verdict.CURRENT),
        (story("a", "b"), "", -1, Verdict.CURRENT),
        (story("a"), "ab", 12, Verdict.BEHIND),
        (story(), "a", 3, Verdict.BEHIND),
        (story("a", "b"), "ac", 12, Verdict.DIVERGED),
        (story("a", "b"), "acd", 12, Verdict.DIVERGED),
        (story("a", "b", touched=1), "ac", 12, Verdict.BEHIND),
        (story("a", "b", copied_at=8), "ab", 8, Verdict.CURRENT),
        (story("a", "b", copied_at=8), "ab", 9, Verdict.BEHIND),
        (story("a", "b", copied_at=8), "abc", 9, Verdict.BEHIND),
    ],
)
def test_verdicts(database: Story, path: str, end: int, expected: Verdict) -> None:
    assert judge(database, epochs(*path), end) is expected


@given(st.lists(st.sampled_from("ab"), max_size=4), st.lists(st.sampled_from("ab"), max_size=4), st.integers(-1, 20))
def test_nothing_that_only_the_database_knows_is_given_up(mine: Sequence[str], path: Sequence[str], end: int) -> None:
    verdict = judge(story(*mine), epochs(*path), end)
    if verdict is Verdict.BEHIND:  # the rows are replaced then: each epoch in which a trial changed is the path's, too
        assert list(path[: len(mine)]) == list(mine)


# Real ones


def drive(opened: Opened, *, trials: int = 1, flush: bool = True) -> None:
    """Take the lease, add and end trials, and give the lease back."""
    claimant = Claimant(holder={"hostname": "here", "pid": 1}, liveness=lambda _: False, say=lambda _: None)
    keeper = take(
        opened.database,
        opened.record.id,
        opened.folder,
        claimant,
        action="driven",
        detail={},
        uuid=opened.record.uuid,
        check=lambda: check_path(opened),
    )
    writer = JournalWriter(opened.folder.root, keeper.epoch, Outbox(opened.database, opened.record.id))
    writer.start()
    driver = Driver(opened.database, opened.record.id, keeper.epoch, seed=1)
    lab = Lab(opened.database, opened.record, keeper.epoch)
    for _ in range(trials):
        number = driver.propose({"x": 0.5})
        driver.end(lab.claim(number).attempt, Ending(outcome=Outcome.COMPLETED, metrics={"loss": float(number)}))
    if flush:
        writer.flush()
    keeper.release("completed: done")
    if flush:
        writer.flush()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An experiment with two trials, driven once."""
    with closing(create(tmp_path / "runs")) as opened:
        drive(opened, trials=2)
    return tmp_path / "runs" / "sample"


def database_of(path: Path) -> Path:
    return path.parent / "holdfast.db"


def numbers(path: Path, database: Path | None = None, *, readonly: bool = False) -> list[int]:
    url = None if database is None else str(sqlite_url(database))
    with closing(open_path(path, database=url, readonly=readonly)) as opened:
        return [trial.number for trial in Reader(opened.database, opened.record.id).trials()]


def test_a_lost_database_is_rebuilt_and_that_is_said(path: Path) -> None:
    database_of(path).unlink()
    files = content(path)
    with closing(open_path(path)) as opened:
        assert opened.notes == (f"database {opened.database.label} did not know the experiment: rebuilt from {path}, 2 trials",)
        assert experiments.by_uuid(opened.database, opened.record.uuid) is not None
    assert content(path) == files
    with closing(open_path(path)) as opened:
        assert opened.notes == ()
        drive(opened)
    assert numbers(path) == [0, 1, 2]


@pytest.mark.parametrize("is_lost", [True, False])
def test_of_two_that_bring_a_database_up_to_date_at_once_the_later_one_takes_nothing_away(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    """The first one drives with it by then: its rows and its lease stay."""
    shutil.copy(database_of(path), tmp_path / "old.db")
    with closing(open_path(path)) as opened:
        drive(opened)
    database_of(path).unlink()
    if not is_lost:
        shutil.copy(tmp_path / "old.db", database_of(path))
    told = standing.told

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(standing, "told", told)
        found = told(*arguments)
        with closing(open_path(path)) as first:
            drive(first)
        return found

    monkeypatch.setattr(standing, "told", meanwhile)
    with closing(open_path(path)) as second:
        assert [trial.number for trial in Reader(second.database, second.record.id).trials()] == [0, 1, 2, 3]
        assert [row.action for row in Reader(second.database, second.record.id).audit()].count("rebuilt") == 1
        assert second.notes == ()


def test_who_only_looks_rebuilds_nothing(path: Path) -> None:
    database_of(path).unlink()
    before = content(path.parent)
    assert numbers(path, readonly=True) == [0, 1]
    assert content(path.parent) == before


def test_who_only_looks_is_shown_the_newest_state(path: Path, tmp_path: Path) -> None:
    shutil.copy(database_of(path), tmp_path / "old.db")
    with closing(open_path(path)) as opened:
        drive(opened)
    before = (tmp_path / "old.db").read_bytes()
    assert numbers(path, tmp_path / "old.db", readonly=True) == [0, 1, 2]
    assert (tmp_path / "old.db").read_bytes() == before


def test_a_database_that_stayed_behind_is_brought_up_to_date(path: Path, tmp_path: Path) -> None:
    shutil.copy(database_of(path), tmp_path / "other.db")
    for round_ in range(3):  # each database in turn drives, and is behind the other one then
        place = (tmp_path / "other.db", database_of(path))[round_ % 2]
        with closing(open_path(path, database=str(sqlite_url(place)))) as opened:
            assert len(opened.notes) == (round_ > 0)
            drive(opened)
    assert numbers(path) == numbers(path, tmp_path / "other.db") == [0, 1, 2, 3, 4]


def test_a_database_that_is_driven_while_the_path_is_looked_at_is_not_behind(path: Path) -> None:
    with closing(open_path(path)) as looking, closing(open_path(path)) as driving:
        drive(driving)  # after the record of the one that looks was read, and before its journal is
        assert journal.end(looking.folder.root) > looking.record.seq
        assert verdict(looking.folder, looking.folder.identity(), looking.database, looking.record) is Verdict.CURRENT


def test_a_database_from_a_backup_is_brought_up_to_date(path: Path) -> None:
    with closing(open_path(path)) as opened:
        backup = database_of(path).read_bytes()
        drive(opened)
    for place in path.parent.glob("holdfast.db*"):
        place.unlink()
    database_of(path).write_bytes(backup)
    assert numbers(path) == [0, 1, 2]


def test_an_old_copy_of_the_path_is_completed_from_the_database(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "backup")
    with closing(open_path(path)) as opened:
        drive(opened)
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "backup", path)
    with closing(open_path(path)) as opened:
        assert opened.notes == ()
        drive(opened)
    database_of(path).unlink()
    assert numbers(path) == [0, 1, 2, 3]


def test_those_that_went_separate_ways_are_not_mixed(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "backup")
    with closing(open_path(path)) as opened:
        drive(opened)
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "backup", path)
    with closing(open_path(path, database=str(sqlite_url(tmp_path / "new.db")))) as opened:
        drive(opened, trials=3)
    before = content(path.parent)
    for readonly in (True, False):
        with pytest.raises(Corrupt, match="went separate ways"):
            open_path(path, readonly=readonly)
    assert {name: body for name, body in content(path.parent).items() if not name.endswith(("-shm", "-wal"))} == before
    assert numbers(path, tmp_path / "new.db") == [0, 1, 2, 3, 4]
    assert numbers(path, tmp_path / "third.db") == [0, 1, 2, 3, 4]


def test_a_lease_without_work_is_no_separate_way(path: Path, tmp_path: Path) -> None:
    with closing(open_path(path)) as opened:  # died between the database's lease and the path's
        lease = (path / "lease.json").read_bytes()
        names = set(opened.folder.root.names("journal"))
        drive(opened, trials=0)
        (path / "lease.json").write_bytes(lease)
        for name in set(opened.folder.root.names("journal")) - names:
            opened.folder.root.delete(f"journal/{name}")
    with closing(open_path(path, database=str(sqlite_url(tmp_path / "new.db")))) as opened:
        drive(opened)
    assert numbers(path) == [0, 1, 2]


def test_rows_that_are_a_copy_are_not_driven_once_the_path_tells_more(path: Path, tmp_path: Path) -> None:
    with closing(open_path(path, database=str(sqlite_url(tmp_path / "new.db")))) as copied:
        with closing(open_path(path)) as opened:
            drive(opened)
        with pytest.raises(WentOn):
            drive(copied)
    assert numbers(path, tmp_path / "new.db") == [0, 1, 2]


def test_what_was_asked_for_in_a_rebuilt_database_is_kept(path: Path) -> None:
    database_of(path).unlink()
    with closing(open_path(path)) as opened:
        requests.note(opened.database, opened.record.id, "asked", {})
    with closing(open_path(path)) as opened:
        assert opened.notes == ()
        assert Reader(opened.database, opened.record.id).audit()[-1].action == "asked"
        drive(opened)
    database_of(path).unlink()
    with closing(open_path(path)) as opened:
        assert "asked" in [row.action for row in Reader(opened.database, opened.record.id).audit()]


@pytest.mark.parametrize("what", ["damaged", "gap"])
def test_a_journal_that_cannot_be_read_leaves_no_database_behind(path: Path, what: str) -> None:
    (segment,) = (path / "journal").iterdir()
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(lines[1:]) if what == "gap" else lines[0][:50] + b"x" + lines[0][51:] + b"".join(lines[1:]))
    database_of(path).unlink()
    before = content(path.parent)
    for readonly in (True, False):
        with pytest.raises(Corrupt):
            open_path(path, readonly=readonly)
    assert content(path.parent) == before


def test_a_damaged_journal_is_written_anew_by_the_database_that_drove_last(path: Path, tmp_path: Path) -> None:
    (segment,) = (path / "journal").iterdir()
    body = segment.read_bytes()
    segment.write_bytes(body[:-30] + b"x" + body[-29:])
    with closing(open_path(path)) as opened:
        drive(opened)
    database_of(path).unlink()
    assert numbers(path) == [0, 1, 2]


def test_a_taken_name_is_refused(path: Path, tmp_path: Path) -> None:
    create(tmp_path / "others").close()
    other = str(sqlite_url(tmp_path / "others" / "holdfast.db"))
    with pytest.raises(ExperimentExists, match=r"belongs to .*others/sample"):
        open_path(path, database=other)
    assert numbers(path) == [0, 1]


# Copies


@pytest.mark.parametrize("place", ["runs/copy", "elsewhere/sample"])
def test_a_copy_beside_its_living_original_is_an_experiment_of_its_own(path: Path, tmp_path: Path, place: str) -> None:
    copy = shutil.copytree(path, tmp_path / place)
    original = content(path)
    with closing(open_path(copy)) as opened:
        assert opened.record.uuid != Folder(path).identity().uuid
        assert opened.record.name == copy.name
        assert opened.spec.name == copy.name
        assert opened.folder.identity().ancestors == [Folder(path).identity().uuid]
        drive(opened)
        uuid = opened.record.uuid
    assert content(path) == original
    assert (numbers(copy), numbers(path)) == ([0, 1, 2], [0, 1])
    with closing(open_path(copy)) as opened:
        assert (opened.record.uuid, opened.notes) == (uuid, ())
    database_of(copy).unlink()
    assert numbers(copy) == [0, 1, 2]


def test_who_only_looks_at_a_copy_changes_nothing(path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(path, tmp_path / "elsewhere" / "sample")
    before = content(tmp_path)
    assert numbers(copy, readonly=True) == [0, 1]
    assert content(tmp_path) == before


def test_a_storage_that_was_copied_as_a_whole(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path.parent, tmp_path / "copied")
    copy = tmp_path / "copied" / "sample"
    with closing(open_path(copy)) as opened, closing(open_path(path)) as original:
        assert opened.record.uuid != original.record.uuid
        drive(opened)
        assert len(experiments.every(opened.database)) == 1
    assert (numbers(copy), numbers(path)) == ([0, 1, 2], [0, 1])


def test_a_crash_after_the_copys_new_identity_is_made_good(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(path.parent, tmp_path / "copied")
    copy = tmp_path / "copied" / "sample"

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("holdfast.standing.follow_copy", dies)
        with pytest.raises(KeyboardInterrupt):
            open_path(copy)
    with closing(open_path(copy)) as opened:
        assert len(experiments.every(opened.database)) == 1
    assert numbers(copy) == [0, 1]


def test_a_copy_beside_its_original_in_a_storage_that_was_moved(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, path.with_name("copy"))
    moved = path.parent.rename(tmp_path / "moved")
    uuids = {}
    for name in ("copy", "sample"):
        with closing(open_path(moved / name)) as opened:
            drive(opened)
            uuids[opened.record.uuid] = name
    assert len(uuids) == 2
    assert numbers(moved / "copy") == numbers(moved / "sample") == [0, 1, 2]


def test_the_originals_lease_is_not_the_copys(path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(path, tmp_path / "elsewhere" / "sample")
    lease = Folder(path).lease()
    assert lease is not None
    with Folder(copy).changing_lease() as file:
        file.write(type(lease)(**{**vars(lease), "holder": {"pid": 1}, "expires": 1e12}))
    with closing(open_path(copy)) as opened:
        drive(opened)
    assert numbers(copy) == [0, 1, 2]


# Files to carry


def test_an_export_is_the_experiment_in_another_database(path: Path, tmp_path: Path) -> None:
    file, url = tmp_path / "one experiment.holdfast", str(sqlite_url(tmp_path / "ü" / "other.db"))
    with closing(open_path(path)) as opened:
        assert export(opened, file) == 2
        record, _, trials = take_in(file, url)
        assert (record.uuid, record.name, trials) == (opened.record.uuid, "sample", 2)
    with pytest.raises(Conflict, match="already"):
        take_in(file, url)
    with closing(open_path(path, database=url)) as opened:
        assert opened.notes == ()
        drive(opened)
    assert numbers(path) == [0, 1, 2]  # the first database is behind now


@pytest.mark.parametrize("spoil", ["", "{}", "no export", "torn", "altered", "newer"])
def test_a_bad_export_is_refused_and_leaves_no_database(path: Path, tmp_path: Path, spoil: str) -> None:
    file = tmp_path / "file"
    with closing(open_path(path)) as opened:
        export(opened, file)
    body = file.read_bytes()
    changed = {
        "torn": body[:-20],
        "altered": body.replace(b"COMPLETED", b"CANCELLED"),
        "newer": body.replace(b'"format": 1', b'"format": 2'),
    }
    file.write_bytes(changed.get(spoil, spoil.encode()))
    with pytest.raises(HoldfastError) as refused:
        take_in(file, str(sqlite_url(tmp_path / "other" / "other.db")))
    assert isinstance(refused.value, (Corrupt, InvalidInput))
    assert not (tmp_path / "other").exists()


def test_an_export_may_be_made_while_somebody_drives(path: Path, tmp_path: Path) -> None:
    with closing(open_path(path)) as opened:
        requests.note(opened.database, opened.record.id, "not journaled", {})
        export(opened, tmp_path / "file")
        assert journal.end(opened.folder.root) < Reader(opened.database, opened.record.id).seq()
    url = str(sqlite_url(tmp_path / "other.db"))
    take_in(tmp_path / "file", url)
    with closing(open_path(path, database=url)) as opened:
        assert opened.notes == ()
        assert "not journaled" in [row.action for row in Reader(opened.database, opened.record.id).audit()]


def test_the_file_of_an_unknown_database_is_not_made_by_looking(tmp_path: Path) -> None:
    connect(sqlite_url(tmp_path / "none.db"), readonly=True).close()
    assert not (tmp_path / "none.db").exists()


def test_nothing_is_asked_for_where_nobody_would_hear_it(path: Path, tmp_path: Path) -> None:
    """While the path is driven with one database, a request in another one would be lost."""
    other = str(sqlite_url(tmp_path / "other.db"))
    with holdfast.open(path, database=other) as copy, holdfast.open(path) as experiment:
        copy.new_trial({"x": 0.5})  # nobody drives: it waits in this database
        lease = Folder(path).lease()
        assert lease is not None
        token = claimed(experiment._opened)
        for ask in (copy.stop, lambda: copy.cancel(0), lambda: copy.new_trial({"x": 0.5}), lambda: copy.merge(["sample"])):
            with pytest.raises(LeaseHeld, match=re.escape(str(database_of(path)))):
                ask()
        experiment.new_trial({"x": 0.25})
        token.release("done")
        copy.new_trial({"x": 0.75})


def claimed(opened: Opened) -> Keeper:
    claimant = Claimant(holder={"hostname": "here", "pid": 1}, liveness=lambda _: False, say=lambda _: None)
    return take(opened.database, opened.record.id, opened.folder, claimant, action="driven", detail={}, uuid=opened.record.uuid)
