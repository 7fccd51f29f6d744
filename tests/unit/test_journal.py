"""The journal: batches of changed rows, read back as they stood; damage, zombies and gaps; rows rebuilt from it."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store_kit import content

from holdfast.core.errors import Corrupt, Fenced, StorageError
from holdfast.core.trial import Outcome
from holdfast.storage import journal
from holdfast.storage.database import merging, rebuild, requests
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.engine import Database, sqlite_url
from holdfast.storage.database.experiments import by_uuid, open_database
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.database.reads import ALL, Reader
from holdfast.storage.folder import Identity
from holdfast.storage.journal import Batch, Contents, JournalWriter
from holdfast.storage.root import LocalRoot
from holdfast.testing.lab import ERROR, FAILED, TYPED, Lab, same
from holdfast.testing.samples import sample_spec


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True)) as database:
        yield database


@pytest.fixture
def lab(database: Database) -> Lab:
    return Lab.new(database, "journaled")


@pytest.fixture
def root(tmp_path: Path) -> LocalRoot:
    return LocalRoot(tmp_path / "exp")


def writer_of(lab: Lab, root: LocalRoot) -> JournalWriter:
    writer = JournalWriter(root, lab.epoch, Outbox(lab.database, lab.id))
    writer.start()
    return writer


def live(lab: Lab, chance: random.Random, step: int) -> None:
    """Do one thing that happens in a search's life."""
    running = [trial for trial in lab.reader.trials() if trial.status == "RUNNING"]
    what = chance.choice(
        ["propose", "report", "report", "save", "telemetry", "end", "fail", "prune", "queue", "audit", "other", "look after"]
    )
    if what == "propose" or not running:
        lab.driver.propose({"x": chance.random()}, state=chance.randbytes(3) if chance.random() < 0.5 else None)
        lab.claim(max(lab.reader.trial_ids()))
        return
    trial = chance.choice(running)
    writer = lab.writer(trial.number)
    match what:
        case "report":
            writer.report(step, {"loss": chance.random(), **(TYPED if step % 5 == 0 else {})})
        case "save":
            lab.save(writer, step, loss=float(step))
        case "telemetry":
            writer.telemetry([(step, "load", chance.random()), (step, "ä", None)])
        case "end":
            lab.end(writer, chance.choice([Outcome.COMPLETED, Outcome.PRUNED, Outcome.LOST, Outcome.PREEMPTED]))
        case "fail":
            writer.fail(replace(FAILED, error=ERROR), max_failures=1)
        case "prune":
            kept, _ = writer.kept()
            writer.forget([item.id for item in kept[:1]])
        case "queue":
            lab.queue(None)
        case "audit":
            lab.driver.audit("noted", {"step": step})
        case "look after":
            look_after(lab, chance)
        case "other":
            requests.request_cancel(lab.database, lab.id, trial.number)


def look_after(lab: Lab, chance: random.Random) -> None:
    """Pin a checkpoint of any trial, or let it go, or set it aside, or remove it."""
    valid = [item for item in lab.reader.checkpoints() if item.status == "valid"]
    if not valid:
        return
    item = chance.choice(valid)
    match chance.randrange(3):
        case 0:
            requests.pin(lab.database, lab.id, item.trial, item.step, attempt=item.attempt, pinned=not item.pinned)
        case 1:
            requests.quarantine(lab.database, lab.id, [(item, "a flipped bit")])
        case _:
            lab.driver.forget({item.id: "superseded"})


def everything(reader: Reader) -> dict[str, Any]:
    """Return all that a reader tells, without what differs between databases."""
    trials = [vars(trial) | {"config_id": 0, "attempt": trial.attempt.number} for trial in reader.trials(first=-ALL)]
    attempts = {
        trial: {number: replace(attempt, id=0) for number, attempt in found.items()}
        for trial, found in reader.attempts().items()
    }
    return {
        "trials": trials,
        "attempts": attempts,
        "history": [vars(row) for row in reader.history()],
        "telemetry": reader.telemetry(),
        "checkpoints": [vars(replace(item, id=0)) for item in reader.checkpoints()],
        "audit": [row for row in reader.audit() if row.action != "rebuilt"],
        "cancelled": reader.cancel_requests(),
        "ended": reader.ended_since(0),
        "seq": reader.seq(),
    }


def identity_of(lab: Lab) -> Identity:
    record = lab.record
    return Identity(
        uuid=record.uuid, name=record.name, location="/elsewhere", spec=record.spec, workdir=record.workdir, seed=record.seed
    )


@pytest.mark.parametrize("seed", range(6))
def test_batches_one_after_the_other_tell_what_the_database_holds(lab: Lab, root: LocalRoot, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    other = Lab.new(lab.database, "another")
    for number in range(3):
        other.end(other.started(x=number / 4), loss=float(number))
    writer = writer_of(lab, root)
    for step in range(120):
        live(lab, chance, step)
        if step in (40, 80):
            spec = sample_spec(name="journaled")
            merging.merge(lab.database, lab.id, spec, lab.record.uuid, ["another"])
            other.end(other.started(x=step / 100), loss=0.5)
        if chance.random() < 0.3:
            writer.flush()
        if chance.random() < 0.05:  # somebody else goes on
            lab.take_over()
            lab.epoch += 1
            writer = writer_of(lab, root)
    writer.flush()
    told, whole = journal.read(root), Contents()
    whole.apply(Outbox(lab.database, lab.id)(-1))
    assert told is not None
    assert told.end == lab.reader.seq() == journal.end(root)
    assert same(_plain(told), _plain(whole))

    assert len(lab.reader.trials(first=-ALL, last=-1)) == 4  # the merged ones are told, too
    with closing(open_database(sqlite_url(tmp_path / "other.db"), create_missing=True)) as empty:
        Lab.new(empty, "in the way of row ids")
        rebuild.rebuild(empty, identity_of(lab), told, epoch=lab.epoch, detail={"journal": told.end})
        record = by_uuid(empty, lab.record.uuid)
        assert record is not None
        assert (record.seq, record.epoch, record.spec, record.seed) == (told.end, lab.epoch, lab.record.spec, lab.record.seed)
        assert same(everything(Reader(empty, record.id)), everything(lab.reader))
        assert rebuild.epochs(empty, record.id) == rebuild.epochs(lab.database, lab.id)
        assert (rebuild.copied_at(empty, record.id), rebuild.copied_at(lab.database, lab.id)) == (told.end, None)
        before = everything(Reader(empty, record.id))
        rebuild.rebuild(empty, identity_of(lab), told, epoch=lab.epoch, detail={"journal": told.end})  # once more, in place
        assert same(everything(Reader(empty, record.id)), before)


def _plain(contents: Contents) -> dict[str, Any]:
    experiment = {name: value for name, value in contents.experiment.items() if name != "active_seconds"}
    return {
        "experiment": experiment,
        "tables": {
            name: {repr(key): row for key, row in sorted(rows.items(), key=repr)} for name, rows in contents.tables.items()
        },
    }


def some(lab: Lab, root: LocalRoot, count: int = 3) -> JournalWriter:
    """Write a journal of one segment with several lines."""
    writer = writer_of(lab, root)
    for step in range(count):
        lab.driver.audit("noted", {"step": step})
        writer.flush()
    return writer


def only_segment(root: LocalRoot) -> Path:
    (name,) = root.names("journal")
    return root.path / "journal" / name


def test_a_line_that_was_cut_off_was_never_acknowledged(lab: Lab, root: LocalRoot) -> None:
    some(lab, root)
    file = only_segment(root)
    intact = file.read_bytes()
    lines = intact.splitlines(keepends=True)
    before = len(b"".join(lines[:-1]))
    ends = [journal.from_line(line, "line").end for line in lines]
    for length in range(before, len(intact)):
        file.write_bytes(intact[:length])
        told = journal.read(root)
        assert told is not None
        assert told.end == ends[-2]
    file.write_bytes(intact[:before] + b"\0" * 40 + b"\n")  # the length survived a power failure, the content did not
    told = journal.read(root)
    assert told is not None
    assert told.end == ends[-2]


def test_any_other_change_is_noticed(lab: Lab, root: LocalRoot) -> None:
    some(lab, root)
    file = only_segment(root)
    intact = file.read_bytes()
    for place in [*range(0, len(intact), 17), len(intact) - 2]:
        changed = bytearray(intact)
        changed[place] ^= 1
        file.write_bytes(bytes(changed))
        with pytest.raises(Corrupt, match="damaged in line"):
            journal.read(root)
    lines = intact.splitlines(keepends=True)
    for without in range(len(lines) - 1):
        file.write_bytes(b"".join(lines[:without] + lines[without + 1 :]))
        with pytest.raises(Corrupt, match="a segment is missing"):
            journal.read(root)


def test_a_lost_segment_is_noticed(lab: Lab, root: LocalRoot) -> None:
    some(lab, root)
    lab.take_over()
    lab.epoch += 1
    some(lab, root)
    lab.take_over()
    lab.epoch += 1
    some(lab, root)
    names = root.names("journal")
    assert len(names) == 3
    for name in names[:-1]:
        content = root.read(f"journal/{name}")
        assert content is not None
        root.delete(f"journal/{name}")
        with pytest.raises(Corrupt, match="a segment is missing"):
            journal.read(root)
        root.write(f"journal/{name}", content)
    assert journal.read(root) is not None


def test_what_an_overtaken_holder_still_writes_does_not_count(lab: Lab, root: LocalRoot) -> None:
    zombie = some(lab, root)
    end = journal.end(root)
    lab.take_over()
    lab.epoch += 1
    writer = writer_of(lab, root)
    zombie._write(Batch(start=end, end=end + 50, rows={"audit": [[end + 1, 1, 0, "written late", "{}"]]}, experiment={}))
    lab.driver.audit("noted", {})
    writer.flush()
    told = journal.read(root)
    assert told is not None
    assert "written late" not in {row["action"] for row in told.tables["audit"].values()}
    assert told.end == lab.reader.seq() == journal.end(root)


def test_a_holder_that_was_taken_over_writes_nothing(lab: Lab, root: LocalRoot) -> None:
    writer = JournalWriter(root, lab.epoch, Outbox(lab.database, lab.id, lab.epoch))
    writer.start()
    before = content(root.path)
    lab.take_over()
    for flush in (writer.flush, writer.try_flush):
        with pytest.raises(Fenced):
            flush()
    assert content(root.path) == before


def test_a_journal_of_many_files_is_written_anew_as_one(lab: Lab, root: LocalRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_MANY_FILES", 3)
    for _ in range(7):
        some(lab, root, count=1)
        lab.take_over()
        lab.epoch += 1
        assert len(root.names("journal")) <= 3
    told, whole = journal.read(root), Contents()
    whole.apply(Outbox(lab.database, lab.id)(-1))
    assert told is not None
    assert told.end < whole.end  # the last lease was taken after the last segment
    writer_of(lab, root)
    told = journal.read(root)
    assert told is not None
    assert same(_plain(told), _plain(whole))


def test_old_segments_that_a_crash_left_beside_the_new_one_are_not_read(lab: Lab, root: LocalRoot) -> None:
    writer = some(lab, root)
    old = {name: root.read(f"journal/{name}") for name in root.names("journal")}
    writer._compact()
    for name, body in old.items():
        assert body is not None
        root.write(f"journal/{name}", body.replace(b"noted", b"wrong"))
    told = journal.read(root)
    assert told is not None
    assert told.end == lab.reader.seq()


def test_a_newer_format_is_refused(lab: Lab, root: LocalRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "FORMAT", 2)
    some(lab, root)
    monkeypatch.undo()
    with pytest.raises(Corrupt, match="format 2, this program reads 1; update holdfast"):
        journal.read(root)


def test_there_is_none_yet(root: LocalRoot) -> None:
    assert journal.read(root) is None
    assert journal.end(root) == -1


FULL = """
import resource, signal, sys
from pathlib import Path
from holdfast.core.errors import StorageError
from holdfast.storage.root import LocalRoot

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
root = LocalRoot(Path(sys.argv[1]))
root.append("file", b"first\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    root.append("file", b"second line\\n")
except StorageError as error:
    print(error)
"""


def test_a_disk_that_takes_half_a_line_keeps_none_of_it(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "free space" in done.stdout
    assert (tmp_path / "file").read_bytes() == b"first\n"
    LocalRoot(tmp_path).append("file", b"third\n")
    assert (tmp_path / "file").read_bytes() == b"first\nthird\n"


def test_a_flush_that_fails_is_done_by_the_next_one(lab: Lab, root: LocalRoot) -> None:
    writer = some(lab, root)
    file = only_segment(root)
    lab.driver.audit("noted", {"late": True})
    aside = file.rename(file.with_name("aside"))
    file.mkdir()
    with pytest.raises(StorageError):
        writer.flush()
    writer.try_flush()
    file.rmdir()
    aside.rename(file)
    writer.try_flush()
    told = journal.read(root)
    assert told is not None
    assert told.end == lab.reader.seq()


def test_end_of_a_waiting_trial_is_told(lab: Lab, root: LocalRoot) -> None:
    writer = writer_of(lab, root)
    lab.driver.propose({"x": 0.5})
    lab.driver.cancel(lab.row(0))
    writer.flush()
    told = journal.read(root)
    assert told is not None
    assert told.tables["trial"][0,]["status"] == "CANCELLED"
    lab.driver.rerun(lab.row(0), restart=False)
    lab.driver.end(lab.claim(0).attempt, Ending(outcome=Outcome.COMPLETED))
    writer.flush()
    told = journal.read(root)
    assert told is not None
    assert told.tables["trial"][0,]["status"] == "COMPLETED"
