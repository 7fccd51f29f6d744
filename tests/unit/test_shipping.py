"""Code of searches whose trials run elsewhere: in the path before the first task, told of in the audit, and gone with time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from forking_kit import fork
from store_kit import content, create

from holdfast.core.errors import SpecError
from holdfast.experiment import Experiment
from holdfast.flows.changing import RestoreRequest
from holdfast.flows.prepare import Origin, prepare_creation, prepare_restore, prepare_search
from holdfast.flows.session import Session, begin
from holdfast.flows.shipping import packed_of, ship
from holdfast.locate import Opened, open_path
from holdfast.report.observer import Observer
from holdfast.storage.code import SHIPPED, release, unpack
from holdfast.testing.samples import sample_spec

TRAIN = "def train(trial):\n    return {'loss': 0.0}\n"


class Heard(Observer):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    (work / "lib").mkdir(parents=True)
    (work / "train.py").write_text(TRAIN)
    (work / "lib" / "net.py").write_text("WIDTH = 3\n")
    return work


def changes_of(work: Path, **execution: Any) -> dict[str, Any]:
    return {"trainable": f"{work}/train.py:train", "execution": {"runner": "dask", "ship": ["lib"], **execution}}


@pytest.fixture
def opened(work: Path) -> Iterator[Opened]:
    with closing(create(work.parent / "runs", **changes_of(work))) as opened:
        yield opened


def told_by(session: Session) -> dict[str, Any]:
    if session.packed is None:
        return {"code": None, "trainable": session.spec.trainable}
    return {"code": session.packed.digest, "trainable": session.packed.trainable}


def drive(path: Path, work: Path) -> tuple[dict[str, Any], list[str]]:
    """Drive an experiment up to the moment at which trials would run; return what workers are told, and what was said."""
    heard = Heard()
    opened = open_path(path)
    session = begin(opened, None, heard, action="restored", detail={})
    session.packed = packed_of(session.spec, str(work))
    ship(session, heard)
    told = told_by(session)
    session.journal.flush()
    session.keeper.release("stopped")
    session.close()
    return told, heard.said


def code_of(path: Path) -> list[str]:
    return sorted(file.stem for file in (path / "code").glob("*.zip"))


def test_the_code_of_a_drive_is_kept_and_told_of(opened: Opened, work: Path, tmp_path: Path) -> None:
    path = opened.folder.path
    told, said = drive(path, work)
    assert said == []
    assert told == {"code": code_of(path)[0], "trainable": "train.py:train"}
    files = unpack(opened.folder, told["code"], tmp_path / "cache")
    assert content(files) == {"train.py": TRAIN.encode(), "lib": None, "lib/net.py": b"WIDTH = 3\n"}
    release(files)
    assert drive(path, work) == (told, [])
    (work / "lib" / "net.py").write_text("WIDTH = 4\n")
    again, said = drive(path, work)
    words = f"{told['code']} was shipped, now {again['code']} is"
    assert said == [f"the code that travels to workers has changed since the last drive: {words}"]
    with Experiment(open_path(path)) as experiment:
        rows = [row for row in experiment.audit() if row.action == SHIPPED]
    assert [row.detail["digest"] for row in rows] == [told["code"], told["code"], again["code"]]
    assert [row.epoch for row in rows] == [1, 2, 3]
    assert rows[0].detail | {"digest": ""} == {
        "digest": "",
        "trainable": "train.py:train",
        "files": 2,
        "bytes": len(TRAIN) + 10,
    }
    (tmp_path / "runs" / "holdfast.db").unlink()  # the path alone tells it, too
    with Experiment(open_path(path)) as experiment:
        assert [row.detail for row in experiment.audit() if row.action == SHIPPED] == [row.detail for row in rows]


def test_code_that_no_recent_drive_had_is_garbage(opened: Opened, work: Path) -> None:
    path = opened.folder.path
    had = []
    for width in range(5):
        (work / "lib" / "net.py").write_text(f"WIDTH = {width}\n")
        had.append(drive(path, work)[0]["code"])
    (path / "code" / "mine.zip").write_text("mine")
    (path / "code" / ".holdfast-draft-0123456789abcdef").write_text("cut off")
    with Experiment(open_path(path)) as experiment:
        for dry_run in (True, False):
            found = experiment.gc(dry_run=dry_run)
            assert {(item.path, item.why) for item in found.removed} == {
                (f"code/{had[0]}.zip", "older code"),
                (f"code/{had[1]}.zip", "older code"),
                ("code/.holdfast-draft-0123456789abcdef", "temporary"),
            }
            assert all(item.bytes > 0 for item in found.removed)
        assert experiment.gc().removed == []
    assert code_of(path) == sorted([*had[2:], "mine"])
    drive(path, work)
    drive(path, work)
    with Experiment(open_path(path)) as experiment:
        experiment.gc()
    assert code_of(path) == sorted([had[4], "mine"])


def test_a_fork_has_the_code_of_its_original(opened: Opened, work: Path) -> None:
    path = opened.folder.path
    told, _ = drive(path, work)
    (path / "code" / "mine.zip").write_text("mine")
    with closing(fork(opened)) as made:
        there = Path(made.path)
        assert code_of(there) == [told["code"]]
        assert made.gc().removed == []
    (work / "train.py").write_text(TRAIN + "\n")
    assert len(drive(there, work)[1]) == 1  # it is the original's that was before
    assert len(code_of(there)) == 2


def test_a_deleted_experiment_leaves_what_is_foreign(opened: Opened, work: Path) -> None:
    path = opened.folder.path
    drive(path, work)
    (path / "code" / "mine.zip").write_text("mine")
    assert opened.folder.delete() == [str(path / "code"), str(path / "code" / "mine.zip")]


@pytest.mark.parametrize("how", ["search", "create"])
def test_what_cannot_travel_is_refused_before_anything_is_written(work: Path, tmp_path: Path, how: str) -> None:
    spec = sample_spec(storage=str(tmp_path / "runs"), **changes_of(work, ship=["nothing"]))
    origin = Origin(workdir=str(work))
    with pytest.raises(SpecError, match="nothing does not exist"):
        prepare_search(spec, Observer(), origin) if how == "search" else prepare_creation(spec, origin)
    assert not (tmp_path / "runs").exists()


def test_a_search_and_its_restore_pack_before_they_begin(work: Path, tmp_path: Path) -> None:
    spec = sample_spec(storage=str(tmp_path / "runs"), **changes_of(work))
    session = prepare_search(spec, Observer(), Origin(workdir=str(work))).session
    assert session is not None
    assert session.packed is not None
    ship(session, Observer())
    path, told = session.opened.folder.path, told_by(session)
    assert code_of(path) == [told["code"]]
    assert session.packed.body == b""
    (path / "code" / f"{told['code']}.zip").unlink()
    session.continued = "continued: 1 trial has begun in this flow run"
    assert session.next_run()
    ship(session, Observer())
    assert (code_of(path), told_by(session)) == ([], told)  # there is nothing in hand to write
    session.keeper.release("interrupted by a test")
    session.close()
    (work / "lib").rename(work / "gone")
    before = content(path)
    with pytest.raises(SpecError, match="lib does not exist"):
        prepare_restore(RestoreRequest(path=path), Observer())
    assert content(path) == before
    (work / "gone").rename(work / "lib")
    session = prepare_restore(RestoreRequest(path=path), Observer()).session
    assert session is not None
    assert session.packed is not None
    assert session.packed.digest == told["code"]
    session.close()


def test_trials_on_this_machine_ship_nothing(work: Path, tmp_path: Path) -> None:
    with closing(create(tmp_path / "runs", **changes_of(work, runner="threads"))) as opened:
        path = opened.folder.path
        assert drive(path, work)[0] == {"code": None, "trainable": f"{work}/train.py:train"}
        assert not (path / "code").exists()


def test_a_callable_needs_no_archive(work: Path, tmp_path: Path) -> None:
    changes = {**changes_of(work, ship=[]), "trainable": "pickle:trainable.pkl:train"}
    with closing(create(tmp_path / "runs", **changes)) as opened:
        (opened.folder.path / "trainable.pkl").write_bytes(b"")
        told, _ = drive(opened.folder.path, work)
        assert (told["code"], told["trainable"]) == (None, "pickle:trainable.pkl:train")
        assert drive(opened.folder.path, work)[1] == []
        assert not (opened.folder.path / "code").exists()


def test_what_searches_write_below_the_working_directory_stays_behind(work: Path, tmp_path: Path) -> None:
    """``ship: [.]`` with the storage in it: else each restore would ship all that the ones before shipped."""
    with closing(create(work / "runs", **changes_of(work, ship=["."]))) as opened:
        path = opened.folder.path
        (work / "runs" / "notes.txt").write_text("mine")
        told, _ = drive(path, work)
        assert drive(path, work) == (told, [])
        files = unpack(opened.folder, told["code"], tmp_path / "cache")
    assert set(content(files)) == {"train.py", "lib", "lib/net.py", "runs", "runs/notes.txt"}
    release(files)
    elsewhere = sample_spec(
        storage=str(tmp_path / "far"), database=f"sqlite:///{work}/lib/rows.db", **changes_of(work, ship=["."])
    )
    before = packed_of(elsewhere, str(work))
    for name in ("rows.db", "rows.db-wal"):
        (work / "lib" / name).write_text("rows")
    assert packed_of(elsewhere, str(work)) == before
