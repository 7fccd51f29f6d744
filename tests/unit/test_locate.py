"""Creating and opening experiments: what a crash leaves, what is taken, what was moved or copied."""

from __future__ import annotations

import shutil
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import text
from store_kit import content, create, creation, unprivileged
from support_scripts import run_script

from holdfast import locate
from holdfast.core.errors import Corrupt, DatabaseError, ExperimentExists, ExperimentNotFound, SpecError, StorageError
from holdfast.core.faults import POINTS
from holdfast.locate import find, open_path
from holdfast.storage.database import experiments
from holdfast.storage.database.engine import Statement, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.storage.database.leases import Leases
from holdfast.storage.folder import Folder
from holdfast.testing.racing import Racers
from holdfast.testing.samples import sample_spec


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The folder of an experiment, closed."""
    with closing(create(tmp_path / "runs")) as opened:
        return opened.folder.path


@pytest.fixture(autouse=True)
def own_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOLDFAST_DATABASE_URL", raising=False)
    locate.settings.cache_clear()


def uuid_in(path: Path) -> str:
    with closing(open_path(path, readonly=True)) as opened:
        return opened.record.uuid


def test_what_is_created_can_be_opened(tmp_path: Path) -> None:
    with closing(create(tmp_path / "a b" / "%41" / "runs", "ünï [x]* 1", description="d")) as made:
        for target in (made.folder.path, str(made.folder.path)):
            with closing(find(target)) as opened:
                assert opened.record == made.record
                assert opened.spec == made.spec
                assert opened.spec.description == "d"
        assert made.record.location == str(made.folder.path)
        assert made.record.epoch == 0


DIE = """
import sys
from holdfast import locate
from holdfast.testing import faults
from holdfast.testing.samples import sample_spec
faults.install(sys.argv[2])
locate.create(sample_spec(storage=sys.argv[1]), seed=1, workdir=".", pickled=b"x")
"""


@pytest.mark.parametrize("point", [name for name in POINTS if name.startswith("experiment.")])
def test_what_a_crash_leaves_is_taken_over(tmp_path: Path, point: str) -> None:
    done = run_script(DIE, tmp_path / "runs", point)
    assert done.returncode == -9, done.stderr
    with pytest.raises(ExperimentNotFound):
        open_path(tmp_path / "runs" / "sample")
    with closing(create(tmp_path / "runs")) as made:
        uuid = made.record.uuid
        assert len(experiments.every(made.database)) == 1
    assert not [entry for entry in (tmp_path / "runs").iterdir() if entry.name.startswith(".holdfast-db-")]
    assert uuid_in(tmp_path / "runs" / "sample") == uuid


@pytest.mark.parametrize("left", [".lock", "trainable.pkl", ".probe", f".holdfast-draft-{7:016x}"])
def test_what_a_crash_leaves_in_the_folder_is_taken_over(tmp_path: Path, left: str) -> None:
    (tmp_path / "runs" / "sample").mkdir(parents=True)
    (tmp_path / "runs" / "sample" / left).touch()
    create(tmp_path / "runs").close()
    uuid_in(tmp_path / "runs" / "sample")


def test_a_taken_folder_is_refused_with_the_restore_command(path: Path) -> None:
    before = content(path.parent)
    with pytest.raises(ExperimentExists, match=f"holdfast restore {path}"):
        create(path.parent)
    assert content(path.parent) == before


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
def test_a_folder_that_is_something_else_is_refused(tmp_path: Path, kind: str) -> None:
    taken = tmp_path / "runs" / "sample"
    taken.parent.mkdir()
    if kind == "file":
        taken.touch()
    elif kind == "folder":
        taken.mkdir()
        (taken / "thesis.tex").touch()
    else:
        taken.symlink_to(tmp_path / "nowhere")
    before = content(tmp_path)
    with pytest.raises((ExperimentExists, SpecError)):
        create(tmp_path / "runs")
    assert content(tmp_path) == before


def test_a_name_that_is_taken_by_a_row_is_refused(path: Path, tmp_path: Path) -> None:
    url = str(sqlite_url(path.parent / "holdfast.db"))
    with closing(open_database(url)) as database:
        before = experiments.every(database)
        with pytest.raises(ExperimentExists, match=f"holdfast restore {path}"):
            create(tmp_path / "other", database=url)
        assert not (tmp_path / "other").exists()
        shutil.rmtree(path)  # never driven, and gone: still somebody's, whose storage may lie on another host
        with pytest.raises(ExperimentExists):
            create(tmp_path / "other", database=url)
        assert experiments.every(database) == before


def test_a_driven_experiment_whose_folder_is_gone_keeps_its_name(path: Path) -> None:
    with closing(open_path(path)) as opened:
        Leases(opened.database, opened.record.id).take(seen=0, epoch=1, holder={}, action="started", detail={})
    shutil.rmtree(path)
    with pytest.raises(ExperimentExists, match="taken"):
        create(path.parent)
    assert not path.exists()


def test_of_many_processes_one_creates_it(tmp_path: Path) -> None:
    with Racers(4) as racers:
        for place in range(5):
            answers = racers.race(creation, [{"storage": str(tmp_path / "runs"), "name": f"n{place}"}] * 4)
            made = [answer for answer in answers if not answer.startswith("ExperimentExists")]
            assert len(made) == 1, answers
            assert uuid_in(tmp_path / "runs" / f"n{place}") == made[0]


@pytest.mark.parametrize("below", ["", "deeper", "a/b/c"])
def test_a_storage_below_a_file_is_refused_and_nothing_is_made(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match="is no folder"):
        create(tmp_path / "file" / below)
    assert content(tmp_path) == {"file": b""}


def test_a_storage_that_cannot_be_written_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:-1]):
        if parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(0o755)
    (tmp_path / "mine").mkdir(mode=0o555)
    with unprivileged(), pytest.raises(SpecError, match="cannot be written"):
        create(tmp_path / "mine" / "runs")
    assert content(tmp_path) == {"mine": None}
    for name in ("x" * 300, "y/" + "x" * 300):
        with pytest.raises(SpecError, match="storage"):
            create(tmp_path / name)
    assert content(tmp_path) == {"mine": None}


@pytest.mark.parametrize(
    "database", ["nonsense", "mysql://h/d", "postgresql+asyncpg://h/d", "sqlite://", "sqlite+aiosqlite:////tmp/x.db"]
)
def test_a_bad_database_url_is_refused_and_nothing_is_made(tmp_path: Path, database: str) -> None:
    with pytest.raises(SpecError, match="database"):
        create(tmp_path / "deep" / "er" / "runs", database=database)
    assert content(tmp_path) == {}


def test_a_bad_database_file_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("something else " * 100)
    for url, kind in (("file", Corrupt), ("file/below.db", DatabaseError)):
        with pytest.raises(kind):
            create(tmp_path / "deep" / "runs", database=f"sqlite:///{tmp_path / url}")
    assert list(content(tmp_path)) == ["file"]


def test_the_environment_may_name_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_DATABASE_URL", f"sqlite:///{tmp_path / 'shared.db'}")
    locate.settings.cache_clear()
    create(tmp_path / "runs").close()
    uuid_in(tmp_path / "runs" / "sample")
    assert not (tmp_path / "runs" / "holdfast.db").exists()
    monkeypatch.undo()
    locate.settings.cache_clear()
    with closing(open_path(tmp_path / "runs" / "sample")) as opened:
        assert opened.database.file == tmp_path / "runs" / "holdfast.db"
        assert "did not know the experiment: rebuilt" in opened.notes[0]


# Opening


def break_row(path: Path) -> None:
    with closing(open_path(path)) as opened, opened.database.write() as tx:
        tx.run(Statement(text("UPDATE experiment SET spec = '{\"name\": 3}'")))


def lose_row(path: Path) -> None:
    """Forget an experiment that had trials, of which no journal was kept."""
    with closing(open_path(path)) as opened:
        experiments.delete(opened.database, opened.record.id)
    (path / "trials" / "000000").mkdir(parents=True)


def lose_database(path: Path) -> None:
    (path.parent / "holdfast.db").unlink()
    (path / "trials" / "000000").mkdir(parents=True)


BAD = {
    "no folder": (shutil.rmtree, ExperimentNotFound, "no experiment.json"),
    "no experiment.json": (lambda path: (path / "experiment.json").unlink(), ExperimentNotFound, "no experiment.json"),
    "torn": (lambda path: (path / "experiment.json").write_text('{"format"'), Corrupt, "damaged"),
    "no database": (lose_database, DatabaseError, "missing"),
    "empty database": (lambda path: (path.parent / "holdfast.db").write_bytes(b""), Corrupt, "empty"),
    "no row": (lose_row, Corrupt, "does not know .* no journal to rebuild it from"),
    "bad row": (break_row, Corrupt, "damaged"),
}


@pytest.mark.parametrize("readonly", [True, False])
@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_opened_is_a_typed_error_and_stays_as_it_is(path: Path, kind: str, readonly: bool) -> None:
    spoil, expected, words = BAD[kind]
    spoil(path)
    before = content(path.parent)
    with pytest.raises(expected, match=words):
        open_path(path, readonly=readonly)
    assert content(path.parent) == before


@pytest.mark.parametrize("target", ["", ".", "nowhere", "nul\0", "s3://bucket/x", "x" * 5000])
def test_targets_that_are_no_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ExperimentNotFound, SpecError, StorageError)):
        find(target)
    assert content(tmp_path) == {}


def test_an_experiment_is_found_by_name_or_uuid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(sqlite_url(path.parent / "holdfast.db"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample").mkdir()  # of the same name, and no experiment
    uuid = uuid_in(path)
    for target in ("sample", uuid, str(path)):
        with closing(find(target, database=url)) as opened:
            assert opened.record.uuid == uuid
    with pytest.raises(ExperimentNotFound, match="other"):
        find("other", database=url)


def test_a_storage_may_be_copied_as_a_whole(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path.parent, tmp_path / "copy")
    with closing(open_path(tmp_path / "copy" / "sample")) as copied, closing(open_path(path)) as original:
        Leases(copied.database, copied.record.id).take(seen=0, epoch=1, holder={}, action="x", detail={})
        assert Leases(original.database, original.record.id).look().epoch == 0
        assert copied.spec.storage == str(tmp_path / "copy")
        assert copied.record.uuid != original.record.uuid


def test_an_experiment_may_be_moved(path: Path, tmp_path: Path) -> None:
    moved = path.parent.rename(tmp_path / "moved") / "sample"
    uuid_in(moved)
    renamed = moved.rename(moved.with_name("renamed"))
    uuid_in(renamed)
    link = tmp_path / "link"
    link.symlink_to(renamed.parent)
    uuid_in(link / "renamed")


def test_a_link_to_an_experiment_is_no_copy(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    uuid_in(link)


# Small things


def test_a_password_is_not_shown(path: Path) -> None:
    with closing(open_path(path)) as opened:
        spec = opened.spec.model_copy(update={"database": "postgresql://u:s3cr3t@h/d"})
        shown = locate.Opened(folder=opened.folder, database=opened.database, record=opened.record, spec=spec)
        assert "s3cr3t" not in repr(shown)
        assert "s3cr3t" not in str(spec.stored())


def test_names_may_hold_a_date_and_the_next_free_one_is_found(tmp_path: Path) -> None:
    assert locate.dated("n-{date}", datetime(2026, 2, 3)) == "n-2026-02-03"
    for expected in ("sample", "sample-2", "sample-3"):
        name = locate.free_name(sample_spec(storage=str(tmp_path)))
        assert name == expected
        create(tmp_path, name).close()
    assert sorted(record.name for record in records(tmp_path)) == ["sample", "sample-2", "sample-3"]


def records(storage: Path) -> list[experiments.Record]:
    with closing(open_database(sqlite_url(storage / "holdfast.db"))) as database:
        return experiments.every(database)


def test_the_code_is_identified_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    spec = sample_spec(trainable=f"{file}:train")
    assert locate.code_digest(spec) is None
    file.write_bytes(b"\xff")
    assert locate.code_digest(spec) is None
    file.write_text("def train(trial): ...")
    first = locate.code_digest(spec)
    file.write_text("def train(trial): pass")
    assert first != locate.code_digest(spec) is not None
    assert locate.code_digest(sample_spec(trainable="package.module:train")) is None


def test_the_commit_of_what_is_no_work_tree_is_none(tmp_path: Path) -> None:
    assert locate.git_commit(tmp_path) is None
    assert locate.git_commit(tmp_path / "gone") is None


def test_deleting_frees_the_name(path: Path) -> None:
    with closing(open_path(path)) as opened:
        assert Folder(path).delete() == []
        experiments.delete(opened.database, opened.record.id)
    create(path.parent).close()
    uuid_in(path)
