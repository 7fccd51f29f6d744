"""Shipped code over every kind of path: kept once, unpacked once for a host, never torn, never out of its folder."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3
from support_scripts import begin_script, run_script

from holdfast.core.errors import Corrupt, StorageError
from holdfast.storage import code
from holdfast.storage.code import file_name, keep, pack, release, unnamed, unpack
from holdfast.storage.folder import Folder
from holdfast.storage.packing import Digest, Entry, Packed

pytestmark = pytest.mark.timeout(900)  # some wait for several processes, each with patience

Place = tuple[str, Mapping[str, Any]]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return str(tmp_path / "experiment"), {}
    s3: S3 = request.getfixturevalue("s3")
    return f"{s3.bucket('code')}/{tmp_path.name}", s3.options


@pytest.fixture
def folder(place: Place, tmp_path: Path) -> Folder:
    return Folder.at(place[0], options=place[1], work=tmp_path / "stand-in")


def packed_of(tmp_path: Path, text: str = "def train(trial): ...\n") -> Packed:
    work = tmp_path / "work"
    (work / "lib").mkdir(parents=True, exist_ok=True)
    (work / "train.py").write_text(text)
    (work / "lib" / "größe.py").write_text("SIZE = 1\n")
    return pack(work, ["lib"], "train.py:train")


def names_in(cache: Path) -> list[str]:
    """Return what is in the cache but locks."""
    return sorted(name for name in os.listdir(cache / "code") if not name.startswith(".lock-"))


def test_code_is_kept_once_and_unpacked(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_of(tmp_path)
    digest = packed.digest or ""
    assert unnamed(folder.root, []) == []
    keep(folder, packed)
    body = folder.root.read(file_name(digest))
    files = unpack(folder, digest, tmp_path / "cache")
    assert (files / "train.py").read_text() == "def train(trial): ...\n"
    assert (files / "lib" / "größe.py").read_text() == "SIZE = 1\n"
    release(files)
    monkeypatch.setattr(folder.root, "write", None)
    monkeypatch.setattr(folder.root, "upload", None, raising=False)
    keep(folder, packed)  # it is there: nothing is written
    keep(folder, pack(tmp_path, [], "package.module:train"))
    assert folder.root.read(file_name(digest)) == body
    folder.root.delete(file_name(digest))
    assert unpack(folder, digest, tmp_path / "cache") == files  # it is here: nothing is fetched
    release(files)


def test_an_archive_that_is_not_what_its_digest_says_is_not_kept(folder: Folder, tmp_path: Path) -> None:
    packed, other = packed_of(tmp_path), packed_of(tmp_path, "raise SystemExit\n")
    for there in (None, b"damaged"):
        if there is not None:
            folder.root.write(file_name(packed.digest or ""), there)
        for body in (b"", packed.body[:-1], other.body):
            with pytest.raises(Corrupt, match="not what its digest says"):
                keep(folder, replace(packed, body=body))
        assert folder.root.read(file_name(packed.digest or "")) == there
    keep(folder, packed)
    keep(folder, replace(packed, body=b""))  # it is there
    assert folder.root.read(file_name(packed.digest or "")) == packed.body


def test_a_damaged_archive_is_named_and_written_anew(folder: Folder, tmp_path: Path) -> None:
    packed = packed_of(tmp_path)
    other = packed_of(tmp_path, "raise SystemExit\n")
    digest, name = packed.digest or "", file_name(packed.digest or "")
    with pytest.raises(Corrupt, match=rf"{digest}\.zip is missing"):
        unpack(folder, digest, tmp_path / "cache")
    torn = [packed.body[:length] for length in (0, 1, 30, len(packed.body) // 2, len(packed.body) - 1)]
    flipped = [bytearray(packed.body) for _ in range(0, len(packed.body), 7)]
    for index, body in enumerate(flipped):
        body[index * 7] ^= 0x10
    for index, body in enumerate((*torn, b"\0" * 500, other.body, *map(bytes, flipped))):
        folder.root.write(name, body, durable=False)
        harmless = code._digest(body) == digest  # a bit of what means nothing, such as a time
        with nullcontext() if harmless else pytest.raises(Corrupt, match=rf"{digest}\.zip is damaged"):
            release(unpack(folder, digest, tmp_path / f"cache-{index}"))
        assert names_in(tmp_path / f"cache-{index}") == ([digest] if harmless else [])
    folder.root.write(name, other.body)
    keep(folder, packed)
    release(unpack(folder, digest, tmp_path / "cache"))
    with pytest.raises(Corrupt, match="no shipped code"):
        unpack(folder, "../../experiment", tmp_path / "cache")


def test_only_code_is_taken_for_code(folder: Folder, tmp_path: Path) -> None:
    first, second = packed_of(tmp_path), packed_of(tmp_path, "2\n")
    keep(folder, first)
    keep(folder, second)
    foreign = ["code/readme.txt", f"code/{'0' * 31}.zip", f"code/{'0' * 32}.zip.old"]
    for name in foreign:
        folder.root.write(name, b"mine")
    assert unnamed(folder.root, [str(first.digest)]) == [file_name(str(second.digest))]
    assert unnamed(folder.root, [str(first.digest), str(second.digest)]) == []
    left = folder.clear()
    assert all(folder.root.read(name) == b"mine" for name in foreign)
    assert all(any(line.endswith(name) for line in left) or not folder.is_local for name in foreign)
    assert unnamed(folder.root, []) == []
    for name in foreign:
        folder.root.delete(name)
    keep(folder, first)
    assert folder.clear() == []
    assert folder.root.names() == []


def test_processes_at_once_unpack_once(folder: Folder, place: Place, tmp_path: Path) -> None:
    packed = packed_of(tmp_path)
    keep(folder, packed)
    program = (
        "import sys, json, os\n"
        "from pathlib import Path\n"
        "from holdfast.storage import code\n"
        "from holdfast.storage.folder import Folder\n"
        "folder = Folder.at(sys.argv[1], options=json.loads(sys.argv[2]), work=Path(sys.argv[3]) / 'stand-in')\n"
        "fetched = []\n"
        "content = code._content\n"
        "code._content = lambda *given: fetched.append(1) or content(*given)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "files = code.unpack(folder, sys.argv[4], Path(sys.argv[3]) / 'cache')\n"
        "print(len(fetched), (files / 'train.py').read_text().strip(), flush=True)\n"
        "sys.stdin.readline()\n"
    )
    others = [begin_script(program, place[0], json.dumps(dict(place[1])), tmp_path, packed.digest) for _ in range(3)]
    for other in others:
        assert other.stdout.readline() == "ready\n"
    for other in others:
        other.stdin.write("\n")
        other.stdin.flush()
    said = [other.stdout.readline().split(" ", 1) for other in others]
    assert sorted(count for count, _ in said) == ["0", "0", "1"]
    assert {text for _, text in said} == {"def train(trial): ...\n"}
    assert not code._evict(tmp_path / "cache" / "code", 0)  # they use it
    for other in others:
        other.stdin.write("\n")
        other.communicate()
    assert code._evict(tmp_path / "cache" / "code", 0)
    assert names_in(tmp_path / "cache") == []


@pytest.mark.parametrize("point", ["code.unpacked", "code.kept"])
def test_a_process_that_dies_leaves_nothing_that_counts(tmp_path: Path, point: str) -> None:
    folder = Folder(tmp_path / "experiment")
    packed = packed_of(tmp_path)
    digest = packed.digest or ""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from holdfast.storage import code\n"
        "from holdfast.storage.folder import Folder\n"
        "from holdfast.testing import faults\n"
        "faults.install(sys.argv[3])\n"
        "folder, place = Folder(Path(sys.argv[1])), Path(sys.argv[2])\n"
        "packed = code.pack(place / 'work', ['lib'], 'train.py:train')\n"
        "code.keep(folder, packed)\n"
        "code.unpack(folder, packed.digest, place / 'cache')\n"
        "print('alive')\n"
    )
    died = run_script(program, folder.path, tmp_path, point)
    assert died.stdout == ""
    assert folder.root.names("code") == [f"{digest}.zip"]
    if point == "code.unpacked":
        assert [name.startswith(".incoming-") for name in names_in(tmp_path / "cache")] == [True]
    keep(folder, packed)
    release(unpack(folder, digest, tmp_path / "cache"))
    assert names_in(tmp_path / "cache") == [digest]  # and what was cut off is gone


def changed(file: Path) -> None:
    file.chmod(0o644)
    file.write_text("broken")


DAMAGES = {
    "a changed file": lambda files: changed(files / "train.py"),
    "a missing file": lambda files: (files / "train.py").unlink(),
    "another mode": lambda files: (files / "train.py").chmod(0o755),
    "a link": lambda files: [(files / "train.py").rename(files / "moved"), (files / "train.py").symlink_to("moved")],
    "no list": lambda files: (files.parent / "names.json").unlink(),
    "a torn list": lambda files: (files.parent / "names.json").write_text('["train'),
    "another list": lambda files: (files.parent / "names.json").write_text('["../../../../etc/passwd", 3]'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_made_anew(tmp_path: Path, damage: str) -> None:
    folder, packed = Folder(tmp_path / "experiment"), packed_of(tmp_path)
    digest = packed.digest or ""
    keep(folder, packed)
    files = unpack(folder, digest, tmp_path / "cache")
    (files / "output.txt").write_text("what a trial writes harms nothing")
    assert unpack(folder, digest, tmp_path / "cache") == files
    assert (files / "output.txt").exists()
    DAMAGES[damage](files)
    assert unpack(folder, digest, tmp_path / "cache") == files
    assert (files / "train.py").read_text() == "def train(trial): ...\n"
    assert not (files / "output.txt").exists()
    for _ in range(3):
        release(files)
    assert names_in(tmp_path / "cache") == [digest]


def archive(*entries: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, content in entries:
            made.writestr(name, content)
    return buffer.getvalue()


EVIL = ["../evil", "/tmp/evil", "a/../../evil", "..", "./evil", "a//b", "evil/.."]


@pytest.mark.parametrize("name", EVIL)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """Also where the digest is right: whoever writes the path makes it so."""
    hashed = Digest()
    hashed.add(Entry(name, False, b"evil"))
    folder = Folder(tmp_path / "experiment")
    folder.root.write(file_name(str(hashed)), archive((name, b"evil")))
    with pytest.raises(Corrupt, match="the name"):
        unpack(folder, str(hashed), tmp_path / "cache")
    assert not list(tmp_path.rglob("evil"))
    assert names_in(tmp_path / "cache") == []


def test_an_archive_is_never_more_than_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, packed = Folder(tmp_path / "experiment"), packed_of(tmp_path)
    keep(folder, packed)
    monkeypatch.setattr(code, "LARGEST", 20)
    with pytest.raises(Corrupt, match="MiB"):
        unpack(folder, packed.digest or "", tmp_path / "cache")


def test_the_least_recently_used_copies_make_room(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "experiment", cache_bytes=0)
    packed = [packed_of(tmp_path, f"# {index}\n") for index in range(4)]
    digests = [one.digest or "" for one in packed]
    for one in packed:
        keep(folder, one)
    cache = tmp_path / "cache"
    used = [unpack(folder, digest, cache) for digest in digests[:3]]
    assert names_in(cache) == sorted(digests[:3])  # all of them are in use
    assert unpack(folder, digests[1], cache) == used[1]
    release(used[0])
    release(used[1])
    release(used[2])
    last = unpack(folder, digests[3], cache)
    assert names_in(cache) == sorted([digests[1], digests[3]])  # of the second there are two uses
    release(used[1])
    release(last)
    (cache / "code" / "foreign").mkdir()
    roomy = Folder(tmp_path / "experiment", cache_bytes=1 << 30)
    release(unpack(roomy, digests[0], cache))
    assert names_in(cache) == sorted([digests[0], digests[1], digests[3], "foreign"])
    oldest, middle, newest = sorted([digests[0], digests[1], digests[3]], reverse=True)  # not the order of names
    for second, digest in enumerate((oldest, middle, newest)):
        os.utime(cache / "code" / digest, (second, second))
    size = code.size_on_disk(cache / "code" / newest)
    assert code._evict(cache / "code", 2 * size + size // 2)
    assert names_in(cache) == sorted([middle, newest, "foreign"])
    release(unpack(roomy, middle, cache))  # what is used becomes the last to go
    assert code._evict(cache / "code", size + size // 2)
    assert names_in(cache) == sorted([middle, "foreign"])
    assert code._evict(cache / "code", 1)
    assert names_in(cache) == ["foreign"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    folder, packed = Folder(tmp_path / "experiment"), packed_of(tmp_path)
    keep(folder, packed)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        unpack(folder, packed.digest or "", tmp_path / "file")
