"""Databases of every schema that a program ever wrote: refused, upgraded after a backup, and read as before."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from store_kit import content, differences, unprivileged
from support_scripts import COMMAND, begin_script, run_script

import holdfast.storage.database.migrations as migrations
from holdfast.cli import main
from holdfast.core.errors import Corrupt, DatabaseError, LeaseHeld
from holdfast.core.faults import POINTS
from holdfast.holding import holder, liveness
from holdfast.storage.database import experiments
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.engine import connect, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.storage.database.reads import Reader
from holdfast.storage.database.schema import VERSION
from holdfast.storage.database.upgrading import back_up, inspect, upgrade
from holdfast.testing.lab import TYPED, same

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = sorted(file.stem.removeprefix("schema-") for file in GOLDEN.glob("schema-*.db"))
OLD = [version for version in VERSIONS if version != VERSION]
EVERY_POINT = [name for name in POINTS if name.startswith("upgrade.")]

Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the golden file of the version that the test names, or of the oldest one."""
    version = getattr(request, "param", VERSIONS[0])
    target = tmp_path / "store" / "holdfast.db"
    target.parent.mkdir()
    shutil.copy(GOLDEN / f"schema-{version}.db", target)
    return target


def raw(file: Path) -> Rows:
    """Return every row of every table as SQLite sees it, and leave the file alone."""
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        return {name: [dict(row) for row in connection.execute(f"SELECT * FROM {name} ORDER BY rowid")] for name in names}


def kept(after: Rows, before: Rows) -> Rows:
    """Return the tables and columns of ``after`` that ``before`` has, but for the version."""
    return {
        name: [{column: row[column] for column in before[name][0]} for row in after[name]]
        for name in before
        if name != "alembic_version"
    }


def unversioned(rows: Rows) -> Rows:
    return {name: found for name, found in rows.items() if name != "alembic_version"}


def run(file: Path, *, fault: str | None = None) -> Any:
    environment = {} if fault is None else {"HOLDFAST_FAULT": fault}
    return begin_script(COMMAND, "db", "upgrade", "--json", "--database", f"sqlite:///{file}", **environment)


def backups(file: Path) -> list[Path]:
    return sorted(file.parent.glob(f"{file.name}.backup-*"))


def test_every_schema_has_its_golden_file() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(str(migrations.__file__)).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    revisions = sorted(script.revision for script in ScriptDirectory.from_config(config).walk_revisions())
    assert revisions == VERSIONS
    for version in VERSIONS:
        assert raw(GOLDEN / f"schema-{version}.db")["alembic_version"] == [{"version_num": version}]
        assert (GOLDEN / f"schema-{version}.db").stat().st_size < 300_000


def test_a_golden_file_has_something_in_every_table() -> None:
    for version in VERSIONS:
        assert [name for name, rows in raw(GOLDEN / f"schema-{version}.db").items() if not rows] == []


@pytest.mark.parametrize("readonly", [True, False])
@pytest.mark.parametrize("file", OLD, indirect=True)
def test_an_older_schema_is_refused_with_the_command_to_run(file: Path, readonly: bool) -> None:
    before = content(file.parent)
    with pytest.raises(Corrupt, match=rf"holdfast db upgrade --database sqlite:///{file}") as caught:
        open_database(sqlite_url(file), readonly=readonly)
    assert caught.value.exit_code == 4
    assert content(file.parent) == before


@pytest.mark.parametrize("file", VERSIONS, indirect=True)
def test_every_schema_can_be_looked_at(file: Path) -> None:
    before = content(file.parent)
    found = inspect(sqlite_url(file))
    assert found.schema == raw(file)["alembic_version"][0]["version_num"]
    assert (found.reads, found.file, found.bytes, found.experiments) == (VERSION, file, file.stat().st_size, 2)
    assert content(file.parent) == before


@pytest.mark.parametrize("file", OLD, indirect=True)
def test_an_upgrade_keeps_every_value_and_a_backup(file: Path) -> None:
    file.chmod(0o640)
    before, version = raw(file), raw(file)["alembic_version"][0]["version_num"]
    done = upgrade(sqlite_url(file), liveness=liveness)
    assert (done.before, done.after) == (version, VERSION)
    assert kept(raw(file), before) == unversioned(before)
    assert backups(file) == [done.backup]
    assert done.backup is not None
    assert done.backup.name.startswith(f"holdfast.db.backup-{version}-")
    assert raw(done.backup) == before
    assert done.backup.stat().st_mode & 0o777 == 0o640
    with closing(connect(sqlite_url(file))) as database, database.read() as connection:
        assert differences(connection) == []
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
    assert sorted(path.name for path in file.parent.iterdir()) == sorted(["holdfast.db", done.backup.name])


@pytest.mark.parametrize("file", VERSIONS, indirect=True)
def test_every_schema_reads_as_it_was_written(file: Path) -> None:
    """What the program reads after the upgrade is what the rows said before it."""
    before = raw(file)
    upgrade(sqlite_url(file), liveness=liveness)
    with closing(open_database(sqlite_url(file), readonly=True)) as database:
        records = experiments.every(database)
        assert [record.name for record in records] == [row["name"] for row in before["experiment"]]
        assert [record.spec for record in records] == [json.loads(row["spec"]) for row in before["experiment"]]
        for record, row in zip(records, before["experiment"], strict=True):
            reader = Reader(database, record.id)
            written = [trial for trial in before["trial"] if trial["experiment_id"] == row["id"]]
            bodies = {config["id"]: json.loads(config["body"]) for config in before["config"]}
            found = [(trial.number, trial.status.value, trial.config, trial.seq, trial.metadata) for trial in reader.trials()]
            assert found == [
                (trial["number"], trial["status"], bodies[trial["config_id"]], trial["seq"], json.loads(trial["metadata"]))
                for trial in written
            ]
            owned = {trial["id"] for trial in written}
            attempts = {attempt["id"] for attempt in before["attempt"] if attempt["trial_id"] in owned}
            assert sum(len(each) for each in reader.attempts().values()) == len(attempts)
            paths = [checkpoint["path"] for checkpoint in before["checkpoint"] if checkpoint["attempt_id"] in attempts]
            assert sorted(checkpoint.path for checkpoint in reader.checkpoints()) == sorted(paths)
            reports = [report for report in before["report"] if report["attempt_id"] in attempts and report["step"] >= 0]
            assert sorted(report.seq for report in reader.history()) == sorted(report["seq"] for report in reports)
            measured = [item for item in before["telemetry"] if item["attempt_id"] in attempts]
            assert len(reader.telemetry()) == len(measured)
            assert len(reader.audit()) == sum(item["experiment_id"] == row["id"] for item in before["audit"])
        reader = Reader(database, records[0].id)
        assert same(reader.history()[0].metrics, {**TYPED, "loss": 1.0})
        measured_values = {name: value for _, _, name, value in reader.telemetry(first=0, last=0)}
        assert same(dict(sorted(measured_values.items())), dict(sorted(TYPED.items())))
        assert reader.trials()[0].metrics == {"loss": 0.125, "naïve/精度": 1}
        error = reader.trials()[2].error
        assert error is not None
        assert error.message == "schön\nkaputt"


@pytest.mark.parametrize("file", VERSIONS, indirect=True)
def test_an_upgraded_database_can_be_written(file: Path) -> None:
    upgrade(sqlite_url(file), liveness=liveness)
    with closing(open_database(sqlite_url(file))) as database:
        record = experiments.every(database)[1]
        reader = Reader(database, record.id)
        driver = Driver(database, record.id, 1, seed=7)
        number = driver.propose({"x": 0.5}, state=b"state")
        trial = reader.trial(number)
        assert trial is not None
        AttemptWriter.claim(database, record.id, 1, trial.attempt.id, token="t").telemetry([(7, "cpu", 1.0)])
        seq = reader.seq()
    rows = raw(file)
    assert (rows["telemetry"][-1]["ts"], rows["telemetry"][-1]["seq"]) == (7, seq)
    assert (rows["proposer_state"][-1]["body"], rows["proposer_state"][-1]["seq"]) == (b"state", seq - 2)


def test_a_current_database_is_left_alone(file: Path) -> None:
    upgrade(sqlite_url(file), liveness=liveness)
    before = content(file.parent)
    done = upgrade(sqlite_url(file), liveness=liveness)
    assert (done.before, done.after, done.backup) == (VERSION, VERSION, None)
    assert content(file.parent) == before


def change(file: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(statement, values)
        connection.commit()


def test_a_newer_database_is_refused(file: Path) -> None:
    change(file, "UPDATE alembic_version SET version_num = '9999'")
    before = content(file.parent)
    with pytest.raises(Corrupt, match=r"9999.*update holdfast"):
        upgrade(sqlite_url(file), liveness=liveness)
    assert content(file.parent) == before


def test_a_schema_that_holdfast_never_wrote_is_refused(file: Path) -> None:
    change(file, "UPDATE alembic_version SET version_num = '0000'")
    before = raw(file)
    with pytest.raises(Corrupt, match=r"0000.*as it was, and its backup is"):
        upgrade(sqlite_url(file), liveness=liveness)
    assert raw(file) == before


@pytest.mark.parametrize("kind", ["missing", "empty", "torn", "text"])
def test_what_is_no_good_database_is_refused(file: Path, kind: str) -> None:
    size = file.stat().st_size
    match kind:
        case "missing":
            file.unlink()
        case "text":
            file.write_text("name: x\n" * 100)
        case _:
            os.truncate(file, 0 if kind == "empty" else size // 2)
    before = content(file.parent)
    with pytest.raises(DatabaseError if kind == "missing" else Corrupt):
        upgrade(sqlite_url(file), liveness=liveness)
    assert content(file.parent) == before


def test_a_damaged_database_is_not_upgraded(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        root = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'metric'").fetchone()[0]
        page = connection.execute("PRAGMA page_size").fetchone()[0]
    with file.open("r+b") as stream:
        stream.seek((root - 1) * page + 20)
        stream.write(b"\xff" * 200)
    before = file.read_bytes()
    with pytest.raises(Corrupt, match="damaged"):
        upgrade(sqlite_url(file), liveness=liveness)
    assert backups(file) == []
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone()[0] == VERSIONS[0]
    assert file.read_bytes()[100:] == before[100:]  # the header notes the mode of its log


# Who drives


def hold(file: Path, who: object, *, seconds: float) -> None:
    change(
        file,
        "UPDATE experiment SET holder = ?, lease_expires = (julianday('now') - 2440587.5) * 86400.0 + ? WHERE id = 2",
        json.dumps(who),
        seconds,
    )


@pytest.mark.parametrize("elsewhere", [False, True])
def test_not_while_somebody_drives(file: Path, elsewhere: bool) -> None:
    hold(file, {"hostname": "far", "host": "far/1", "pid": 1, "started": "1"} if elsewhere else holder(), seconds=300)
    before = content(file.parent)
    with pytest.raises(LeaseHeld, match="drives 'süß") as caught:
        upgrade(sqlite_url(file), liveness=liveness)
    assert caught.value.exit_code == 3
    assert content(file.parent) == before


@pytest.mark.parametrize("kind", ["dead", "expired"])
def test_a_holder_that_is_gone_is_not_in_the_way(file: Path, kind: str) -> None:
    if kind == "dead":
        with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
            pass
        hold(file, {**holder(), "pid": ended.pid, "started": "another"}, seconds=300)
    else:
        hold(file, {"hostname": "far", "host": "far/1", "pid": 1, "started": "1"}, seconds=-1)
    assert upgrade(sqlite_url(file), liveness=liveness).after == VERSION


def test_a_lease_that_is_taken_meanwhile_is_seen(file: Path) -> None:
    """Between the first look and the transaction somebody begins to drive: nothing is changed."""
    seen: list[bool] = []

    def judge(other: Any) -> bool:
        seen.append(True)
        if len(seen) == 1:
            hold(file, holder(), seconds=300)  # the dead holder's successor
            return False
        return True

    hold(file, {"hostname": "here", "pid": 1}, seconds=300)
    change(file, "PRAGMA journal_mode=WAL")  # as it is in use: who reads keeps nobody from writing
    with pytest.raises(LeaseHeld):
        upgrade(sqlite_url(file), liveness=judge)
    assert len(seen) == 2
    assert backups(file) == []
    assert raw(file)["alembic_version"] == [{"version_num": VERSIONS[0]}]


# Failures in the middle


@pytest.mark.parametrize("name", EVERY_POINT)
def test_killed_in_the_middle_it_is_old_or_new(file: Path, name: str) -> None:
    before = raw(file)
    died = run(file, fault=name)
    died.communicate()
    assert died.returncode == -signal.SIGKILL
    schema = inspect(sqlite_url(file)).schema
    assert schema == (VERSION if name == "upgrade.committed" else VERSIONS[0])
    (backup,) = backups(file)
    assert raw(backup) == before
    upgrade(sqlite_url(file), liveness=liveness)
    assert kept(raw(file), before) == unversioned(before)
    with closing(open_database(sqlite_url(file))) as database:
        assert len(experiments.every(database)) == 2


LIMITED = """
import resource, sys
from holdfast.core import faults
from holdfast.core.errors import HoldfastError
from holdfast.storage.database.upgrading import upgrade

def full(point):
    if point == sys.argv[2]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))

faults.install(full)
full("")
try:
    upgrade(sys.argv[1], liveness=lambda other: None)
except HoldfastError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("point", "limit"), [("", 70_000), ("upgrade.backed-up", 0), ("upgrade.migrated", 0)], ids=["backup", "migration", "commit"]
)
def test_a_full_disk_leaves_it_as_it_was(file: Path, point: str, limit: int) -> None:
    """Files cannot grow any more: as if the disk had become full at that moment."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    before = raw(file)
    done = run_script(LIMITED, f"sqlite:///{file}", point, limit)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("DatabaseError"), done.stdout
    with closing(sqlite3.connect(file)) as connection:  # whatever log is left belongs to it
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(VERSIONS[0],)]
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert raw(file) == before
    if point:
        (backup,) = backups(file)
        assert f"its backup is {backup}" in done.stdout
        assert raw(backup) == before
    else:
        assert "no backup" in done.stdout
        assert backups(file) == []
    assert upgrade(sqlite_url(file), liveness=liveness).after == VERSION


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, file: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o005 != 0o005:
            try:
                parent.chmod(0o755)
            except PermissionError:
                pytest.skip("others may not look below the temporary folder")
    before = content(file.parent)
    file.chmod(0o444)
    file.parent.chmod(0o555)
    try:
        with unprivileged(), pytest.raises(DatabaseError, match="writable"):
            upgrade(sqlite_url(file), liveness=liveness)
    finally:
        file.parent.chmod(0o755)
    assert content(file.parent) == before


# Others at the same time


@pytest.fixture
def open_log(file: Path) -> Iterator[sqlite3.Connection]:
    """Another process's connection, whose last commit stands in the log only."""
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    connection.execute("UPDATE experiment SET workdir = 'in the log'")
    connection.commit()
    yield connection
    connection.close()


def test_the_backup_holds_what_stands_in_the_log(file: Path, open_log: sqlite3.Connection) -> None:
    done = upgrade(sqlite_url(file), liveness=liveness)
    assert done.backup is not None
    assert {row["workdir"] for row in raw(done.backup)["experiment"]} == {"in the log"}
    assert raw(done.backup)["alembic_version"] == [{"version_num": VERSIONS[0]}]
    assert open_log.execute("SELECT version_num FROM alembic_version").fetchall() == [(VERSION,)]


def test_of_several_at_once_one_upgrades(file: Path) -> None:
    before = raw(file)
    answers = [process.communicate() for process in [run(file) for _ in range(4)]]
    found = [json.loads(out) for out, _ in answers]
    assert sorted(answer["before"] for answer in found) == [VERSIONS[0], *[VERSION] * 3]
    assert len(backups(file)) == 1
    assert kept(raw(file), before) == unversioned(before)


def test_a_backup_never_replaces_another(file: Path) -> None:
    moment = datetime(2026, 3, 1, 12, 30, 59, tzinfo=UTC)
    found = [back_up(file, "0001", moment) for _ in range(3)]
    assert [path.name for path in found] == [f"holdfast.db.backup-0001-20260301T123059Z{end}" for end in ("", "-2", "-3")]
    assert backups(file) == found


# The command


def test_the_command_says_what_it_did(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["db", "show", str(file.parent)]) == 0
    assert f"{VERSIONS[0]} (this program reads {VERSION}; run `holdfast db upgrade`)" in capsys.readouterr().out
    assert main(["list", str(file.parent)]) == 4
    assert main(["db", "upgrade", str(file.parent)]) == 0
    out = capsys.readouterr().out
    assert f"has schema {VERSION} now; it had {VERSIONS[0]}" in out
    assert str(backups(file)[0]) in out
    assert main(["db", "upgrade", str(file.parent)]) == 0
    assert "already; nothing was changed" in capsys.readouterr().out
    assert main(["list", str(file.parent)]) == 0
    assert main(["db", "show", "--json", "--database", f"sqlite:///{file}"]) == 0
    assert '"experiments": 2' in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "code"), [("newer", 4), ("held", 3), ("missing", 4), ("foreign URL", 2)])
def test_a_refusal_has_its_exit_code(file: Path, kind: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    match kind:
        case "newer":
            change(file, "UPDATE alembic_version SET version_num = '9999'")
        case "held":
            hold(file, holder(), seconds=300)
        case "missing":
            file.unlink()
        case _:
            assert main(["db", "upgrade", "--database", "mysql://host/db"]) == code
            return
    before = content(file.parent)
    assert main(["db", "upgrade", str(file.parent)]) == code
    assert capsys.readouterr().err.startswith("holdfast: ")
    assert content(file.parent) == before
