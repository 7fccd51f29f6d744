"""What is shipped: which files, under which names, and what is refused; the archive is the same for the same content."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_kit import content, unprivileged

from holdfast.core.errors import SpecError
from holdfast.storage import code, packing
from holdfast.storage.code import pack, release, unpack
from holdfast.storage.folder import Folder
from holdfast.storage.packing import Packed


def unpacked(packed: Packed, place: Path) -> Path:
    """Bring packed code to a host, by way of an experiment's path."""
    assert packed.digest is not None
    folder = Folder(place / "experiment")
    code.keep(folder, packed)
    files = unpack(folder, packed.digest, place / "cache")
    release(files)
    return files


@pytest.fixture
def work(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    (work / "models" / "deep").mkdir(parents=True)
    (work / "train.py").write_text("def train(trial): ...\n")
    (work / "models" / "net.py").write_text("WIDTH = 3\n")
    (work / "models" / "deep" / "run.sh").write_text("#!/bin/sh\n")
    (work / "models" / "deep" / "run.sh").chmod(0o700)
    (work / "ä 漢 [x]*.txt").write_bytes(b"\0\xff")
    (work / ("long" * 60)).write_text("l")
    return work


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..") and not packing._is_left_out(name) and len(name.encode()) < 200
)
TREES = st.recursive(st.binary(max_size=64), lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=12)


def write(place: Path, tree: bytes | dict[str, object]) -> None:
    if isinstance(tree, bytes):
        place.write_bytes(tree)
        return
    place.mkdir()
    for name, inner in tree.items():
        write(place / name, inner)  # type: ignore[arg-type]  # recursive


@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=4))
def test_what_is_packed_comes_out_as_it_was(tree: dict[str, object]) -> None:
    with TemporaryDirectory() as name:
        place = Path(name)
        write(place / "work", tree)
        packed = pack(place / "work", sorted(tree), "package.module:train")
        assert pack(place / "work", [*sorted(tree, reverse=True), *tree], "package.module:train") == packed
        assert content(unpacked(packed, place)) == content(place / "work")
        assert packed.bytes == sum(len(found) for found in content(place / "work").values() if found is not None)


def test_the_whole_working_directory_with_modes(work: Path, tmp_path: Path) -> None:
    files = unpacked(pack(work, ["."], "train.py:train"), tmp_path)
    assert content(files) == content(work)
    for file in work.rglob("*"):
        if file.is_file():
            mode = (files / file.relative_to(work)).stat().st_mode & 0o777
            assert mode == (0o555 if file.name == "run.sh" else 0o444)


def test_the_digest_is_of_names_modes_and_contents(work: Path) -> None:
    def digest() -> str | None:
        return pack(work, ["models", "models/"], "train.py:train").digest

    before = digest()
    os.utime(work / "train.py", (1, 1))
    (work / "models" / "net.py").touch()
    assert digest() == before
    seen = {before}
    for change in (
        lambda: (work / "train.py").write_text("def train(trial): pass\n"),
        lambda: (work / "models" / "net.py").chmod(0o755),
        lambda: (work / "models" / "net.py").rename(work / "models" / "nets.py"),
        (work / "models" / "empty").mkdir,
    ):
        change()
        assert digest() not in seen
        seen.add(digest())


def test_what_can_be_made_again_stays_behind(work: Path, tmp_path: Path) -> None:
    expected = content(work)
    for name in ("__pycache__/a.pyc", ".git/HEAD", ".venv/bin/python", "models/__pycache__/b", "models/old.pyc"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("x")
    assert content(unpacked(pack(work, ["."], "train.py:train"), tmp_path)) == expected
    for name in (".git", "models/__pycache__", "models/old.pyc"):
        with pytest.raises(SpecError, match="never shipped"):
            pack(work, [name], "train.py:train")


@pytest.mark.parametrize("link", [False, True], ids=["plain", "by a link"])
def test_the_trainables_own_file(work: Path, tmp_path: Path, link: bool) -> None:
    given = work
    if link:
        given = tmp_path / "linked"
        given.symlink_to(work)
    inside = given / "models" / "net.py"
    for trainable in (f"{inside}:train", "models/net.py:train", f"{given}/../{given.name}/models/net.py:train"):
        packed = pack(given, [], trainable)
        assert packed.trainable == "models/net.py:train"
        assert (packed.files, packed.bytes) == (1, len("WIDTH = 3\n"))
    assert content(unpacked(packed, tmp_path)) == {"models": None, "models/net.py": b"WIDTH = 3\n"}
    outside = tmp_path / "elsewhere" / "other.py"
    outside.parent.mkdir()
    outside.write_text("1")
    packed = pack(given, ["train.py"], f"{outside}:train")
    assert packed.trainable == "other.py:train"
    assert set(content(unpacked(packed, tmp_path))) == {"other.py", "train.py"}
    outside.rename(outside.parent / "train.py")
    with pytest.raises(SpecError, match="the same name"):
        pack(given, ["train.py"], f"{outside.parent}/train.py:train")
    with pytest.raises(SpecError, match=r"missing\.py does not exist"):
        pack(given, [], "missing.py:train")


@pytest.mark.parametrize("trainable", ["package.module:train", "pickle:trainable.pkl:train", "pickle:/a/b.py:train"])
def test_modules_and_callables_travel_otherwise(work: Path, trainable: str) -> None:
    packed = pack(work, [], trainable)
    assert (packed.digest, packed.body, packed.trainable) == (None, b"", trainable)
    assert pack(work, ["models"], trainable).files == 2


def test_links_become_what_they_point_to(work: Path, tmp_path: Path) -> None:
    (work / "links").mkdir()
    (work / "links" / "file.py").symlink_to("../train.py")
    (work / "links" / "folder").symlink_to(work / "models")
    files = unpacked(pack(work, ["links"], "package.module:train"), tmp_path)
    assert not any(entry.is_symlink() for entry in files.rglob("*"))
    assert (files / "links" / "file.py").read_bytes() == (work / "train.py").read_bytes()
    assert content(files / "links" / "folder") == content(work / "models")


def _socket(work: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        before = os.getcwd()
        os.chdir(work)  # a socket's path is short
        try:
            made.bind("bad")
        finally:
            os.chdir(before)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda work: None, "does not exist"),
    "a link to nothing": (lambda work: (work / "bad").symlink_to("nothing"), "link to nothing"),
    "a link to itself": (lambda work: (work / "bad").symlink_to("bad"), "cannot be read"),
    "a link out of it": (lambda work: (work / "bad").symlink_to("/etc/hostname"), "not below the working directory"),
    "a link above it": (lambda work: (work / "bad").symlink_to(".."), "not below the working directory"),
    "a folder that holds itself": (
        lambda work: [(work / "bad").mkdir(), (work / "bad" / "again").symlink_to("../bad")],
        "a folder that holds it",
    ),
    "a socket": (_socket, "is a socket"),
    "a pipe": (lambda work: os.mkfifo(work / "bad"), "is a pipe"),
    "a pipe below": (lambda work: [(work / "bad").mkdir(), os.mkfifo(work / "bad" / "pipe")], "is a pipe"),
    "no Unicode": (
        lambda work: [(work / "bad").mkdir(), (work / "bad" / os.fsdecode(b"\xff")).write_text("")],
        "no Unicode text",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_travel_is_refused(work: Path, kind: str) -> None:
    make, words = BAD[kind]
    make(work)
    before = os.listdir(work)
    with pytest.raises(SpecError, match=words) as caught:
        pack(work, ["models", "bad"], "train.py:train")
    assert "bad" in str(caught.value)
    assert os.listdir(work) == before


def test_what_may_not_be_read_is_refused(work: Path) -> None:
    for parent in [work, *work.parents]:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(0o755)
    for path in (work / "train.py", work / "models"):
        path.chmod(0)
        try:
            with unprivileged(), pytest.raises(SpecError, match=r"cannot be read: Permission denied"):
                pack(work, [path.name], "package.module:train")
        finally:
            path.chmod(0o755)


def test_too_much_is_refused_with_the_largest_named(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(8):
        with (work / "models" / f"data-{index}").open("wb") as file:
            file.truncate(32 << 20)  # sparse
    (work / "models" / "data-8").write_bytes(b"x")
    with pytest.raises(SpecError, match="256 MiB are allowed") as caught:
        pack(work, ["models"], "train.py:train")
    assert str(caught.value).count("(32.0 MiB)") == 5
    monkeypatch.setattr(packing, "_check_size", lambda found: None)  # as if it grew after the look at it
    monkeypatch.setattr(packing, "LARGEST", 30)
    with pytest.raises(SpecError, match="what is shipped has"):
        pack(work, ["models/data-8", "models/net.py", "ä 漢 [x]*.txt"], "train.py:train")


def test_a_file_that_changes_is_packed_whole_or_refused(work: Path) -> None:
    stop = threading.Event()
    file = work / "models" / "net.py"

    def grow() -> None:
        with file.open("ab", buffering=0) as stream:
            while not stop.is_set() and stream.tell() < 1 << 20:
                stream.write(b"0123456789\n")

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        for _ in range(20):
            refused = None
            try:
                packed = pack(work, ["models"], "package.module:train")
            except SpecError as error:
                refused = str(error)
            assert "net.py changes while it is packed" in refused if refused else code._digest(packed.body) == packed.digest
    finally:
        stop.set()
        writer.join()
