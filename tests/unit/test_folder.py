"""The experiment's folder: what is torn, newer, missing or foreign; and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from store_kit import content, unprivileged

from holdfast.core.errors import Corrupt, ExperimentNotFound, HoldfastError, StorageError
from holdfast.storage.atomic import is_draft, make_folder, write_file
from holdfast.storage.folder import FORMAT, Folder, Identity, PathLease

IDENTITY = Identity(uuid="u-1", name="é [x]*", location="/somewhere/é", spec={"name": "é"}, workdir="/", seed=2**40)
LEASE = PathLease(epoch=3, holder={"pid": 1, "hostname": "h"}, expires=10.5, renewed=5.25, database="sqlite:///x")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "experiment")
    folder.create(IDENTITY)
    return folder


def test_what_is_written_comes_back(folder: Folder) -> None:
    assert folder.identity() == IDENTITY
    assert folder.lease() is None
    for lease in (LEASE, replace(LEASE, holder=None)):
        with folder.changing_lease() as file:
            file.write(lease)
        assert folder.lease() == lease
    folder.relocate("/new")
    assert folder.identity() == replace(IDENTITY, location="/new")


TORN = {
    "empty": "",
    "cut off": '{"format": 1, "uuid": "u-',
    "no object": "[1, 2]",
    "null": "null",
    "zeros": "\0" * 100,
    "deep": "[" * 100_000,
    "no field": '{"format": 1}',
    "text": "format: 1",
}


@pytest.mark.parametrize("kind", TORN)
def test_torn_files_are_typed_errors_and_stay_as_they_are(folder: Folder, kind: str) -> None:
    for file in ((folder.path / "experiment.json"), (folder.path / "lease.json")):
        file.write_text(TORN[kind])
    before = content(folder.path)
    for read in (folder.identity, folder.lease, folder.delete):
        with pytest.raises(Corrupt, match="damaged"):
            read()
    assert content(folder.path) == before


def test_undecodable_files_are_typed_errors(folder: Folder) -> None:
    for file in ((folder.path / "experiment.json"), (folder.path / "lease.json")):
        file.write_bytes(b"\xff\xfe{}")
    for read in (folder.identity, folder.lease):
        with pytest.raises(Corrupt, match="damaged"):
            read()


OPTIONAL = ["spec_source", "git_commit", "ancestors", "forked_from"]


@pytest.mark.parametrize("name", ["format", *(name for name in Identity.__dataclass_fields__ if name not in OPTIONAL)])
@pytest.mark.parametrize("value", [None, True, 1.5, ["x"]])
def test_altered_fields_are_noticed(folder: Folder, name: str, value: object) -> None:
    body = json.loads((folder.path / "experiment.json").read_text())
    (folder.path / "experiment.json").write_text(json.dumps({**body, name: value}))
    with pytest.raises(Corrupt, match=name):
        folder.identity()


@pytest.mark.parametrize("name", OPTIONAL)
def test_altered_optional_fields_are_noticed_and_missing_ones_are_not(folder: Folder, name: str) -> None:
    body = json.loads((folder.path / "experiment.json").read_text())
    (folder.path / "experiment.json").write_text(json.dumps({key: value for key, value in body.items() if key != name}))
    assert folder.identity() == IDENTITY
    (folder.path / "experiment.json").write_text(json.dumps({**body, name: 1.5}))
    with pytest.raises(Corrupt, match=name):
        folder.identity()


@pytest.mark.parametrize("name", list(PathLease.__dataclass_fields__))
def test_altered_fields_of_the_lease_are_noticed(folder: Folder, name: str) -> None:
    (folder.path / "lease.json").write_text(json.dumps({**vars(LEASE), name: ["x"]}))
    with pytest.raises(Corrupt, match="damaged"):
        folder.lease()


def test_a_newer_format_is_refused(folder: Folder) -> None:
    body = json.loads((folder.path / "experiment.json").read_text())
    (folder.path / "experiment.json").write_text(json.dumps({**body, "format": FORMAT + 1, "more": {}}))
    with pytest.raises(Corrupt, match="update holdfast"):
        folder.identity()
    (folder.path / "experiment.json").write_text(json.dumps({**body, "more": {}}))
    assert folder.identity() == IDENTITY


@pytest.mark.parametrize("kind", ["missing", "empty folder", "below a file"])
def test_what_is_no_experiment_is_said(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "empty folder":
        path.mkdir()
    if kind == "below a file":
        path.touch()
        path = path / "y"
    for read in (Folder(path).identity, Folder(path).delete):
        with pytest.raises(ExperimentNotFound, match=r"no experiment\.json"):
            read()


def test_files_that_cannot_be_read_are_storage_errors(folder: Folder) -> None:
    for file in ((folder.path / "experiment.json"), (folder.path / "lease.json"), folder.path / folder.result_name(0, 1)):
        file.unlink(missing_ok=True)
        file.mkdir(parents=True)
    for read in (folder.identity, folder.lease, lambda: folder.result(0, 1)):
        with pytest.raises(StorageError):
            read()


def result(**changes: object) -> str:
    return json.dumps({"result": json.dumps({"trial": 7, "attempt": 2, "outcome": "completed", **changes})})


@pytest.mark.parametrize("text", [*TORN.values(), '{"result": 3}', '{"result": "["}', result(trial=8), result(attempt=1)])
def test_a_torn_or_foreign_result_is_none(folder: Folder, text: str) -> None:
    file = folder.path / folder.result_name(7, 2)
    assert folder.result(7, 2) is None
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert folder.result(7, 2) is None
    file.write_text(result())
    assert (folder.result(7, 2) or {})["outcome"] == "completed"


@pytest.mark.parametrize("name", ["plain", "[a-z]*?", "with spaces ", "ünï¢ödé ☃", "%41", "'\"$(x)", "a\nb"])
def test_names_of_any_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / "z").mkdir()
    folder = Folder(tmp_path / name)
    folder.create(IDENTITY)
    with folder.changing_lease() as file:
        file.write(LEASE)
    assert (folder.identity(), folder.lease()) == (IDENTITY, LEASE)
    fill(folder)
    assert folder.delete() == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["z"]


def fill(folder: Folder) -> None:
    """Write what holdfast writes."""
    with folder.changing_lease() as file:
        file.write(LEASE)
    for number in (0, 7, 1_234_567):
        (folder.path / folder.result_name(number, 1)).parent.mkdir(parents=True)
        (folder.path / folder.result_name(number, 1)).write_text(result())
        folder.log_file(number, 12).write_text("log")
        for checkpoint in ("step_00000012-a2-3f9c01d2", ".staging-step_00000013-a2-3f9c01d2", ".trash-step_00000011-a1-00aa"):
            part = folder.path / folder.trial_name(number) / "checkpoints" / checkpoint / "deep"
            part.mkdir(parents=True)
            (part / "state").write_text("x")
    (folder.path / "trials" / "000007" / f".holdfast-draft-{0:016x}").touch()
    (folder.path / f".holdfast-draft-{1:016x}").touch()


FOREIGN = (
    "notes.txt",
    "trials/README",
    "trials/7/x",
    "trials/000007/mine.csv",
    "trials/000007/results.json",
    "trials/000007/checkpoints/mine/x",
    "trials/000007/checkpoints/step_0-a1-zz/x",
    "trials/0000070x/x",
    ".tmp-mine",
    "figures/[a].png",
)


def test_delete_leaves_foreign_files(folder: Folder) -> None:
    fill(folder)
    for name in FOREIGN:
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_text("mine")
    left = folder.delete()
    assert {str(Path(path).relative_to(folder.path)) for path in left if Path(path).is_file()} == set(FOREIGN)
    with pytest.raises(ExperimentNotFound):
        folder.identity()


def test_delete_does_not_follow_links(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("x")
    (folder.path / "link").symlink_to(tmp_path / "data")
    (folder.path / "trials" / "000001").mkdir(parents=True)
    (folder.path / "trials" / "000001" / "data").symlink_to(tmp_path / "data")
    folder.delete()
    assert (tmp_path / "data" / "precious").read_text() == "x"
    assert (folder.path / "link").is_symlink()


def test_leftovers_are_told_from_foreign_files(folder: Folder) -> None:
    assert folder.leftovers() == []
    fill(folder)
    (folder.path / ".tmp-mine").touch()
    assert folder.leftovers() == [f".holdfast-draft-{1:016x}", ".lock"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    before = content(tmp_path)
    with pytest.raises(StorageError):
        write_file(tmp_path / "folder", b"new")
    with pytest.raises(StorageError):
        write_file(tmp_path / "none" / "file", b"new")
    with pytest.raises(TypeError):
        write_file(tmp_path / "file", "no bytes")  # type: ignore[arg-type]  # the point
    assert content(tmp_path) == before


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"old")
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from holdfast.storage.atomic import write_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_file(Path(sys.argv[1]), b'x' * 100_000)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "file"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("StorageError")
    assert content(tmp_path) == {"file": b"old"}


def test_files_get_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_drafts_are_known_by_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace_file = os.replace
    monkeypatch.setattr(os, "replace", lambda draft, file: (seen.append(Path(draft).name), replace_file(draft, file)))
    write_file(tmp_path / "file", b"x")
    assert [is_draft(name) for name in [*seen, "file", ".tmp-x"]] == [True, False, False]


def test_folders_that_cannot_be_made_are_storage_errors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a" / "b", tmp_path / ("x" * 300)):
        with pytest.raises(StorageError):
            make_folder(path)
    make_folder(tmp_path / "a" / "b" / "c")
    make_folder(tmp_path / "a" / "b" / "c")
    tmp_path.chmod(0o555)
    try:
        with unprivileged(), pytest.raises(StorageError):
            make_folder(tmp_path / "new")
    finally:
        tmp_path.chmod(0o755)


def test_a_lock_that_was_deleted_while_one_waited_for_it_does_not_count(folder: Folder) -> None:
    program = (
        "import sys; from pathlib import Path; from holdfast.storage.folder import Folder\n"
        "folder = Folder(Path(sys.argv[1]))\n"
        "print('waiting', flush=True)\n"
        "with folder.root.exclusive(): print((folder.path / '.lock').stat().st_ino, flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", program, str(folder.path)]
    with folder.root.exclusive():
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        (folder.path / ".lock").rename(folder.path / "kept, so that its inode is not used again")
    inode = int(process.stdout.readline())
    assert inode == (folder.path / ".lock").stat().st_ino
    process.communicate("\n")


def test_errors_are_ours(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "gone")
    for work in (lambda: folder.root.exclusive().__enter__(), lambda: folder.changing_lease().__enter__()):
        with pytest.raises(HoldfastError):
            work()


def test_a_lock_that_nobody_lets_go_is_said(folder: Folder) -> None:
    with folder.root.exclusive(), pytest.raises(StorageError, match="held by another process"):
        Folder(folder.path).root.exclusive(patience=0.0).__enter__()
    with folder.root.exclusive(patience=0.0):
        pass
