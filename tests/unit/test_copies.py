"""Local copies of checkpoints on an object store: bounded, shared, and nothing that counts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import small_disk
from support_scripts import begin_script

from holdfast.core.errors import StorageError
from holdfast.storage.checkpoints.cache import Cache
from holdfast.storage.checkpoints.local import Published
from holdfast.storage.checkpoints.remote import RemoteCheckpoints
from holdfast.storage.objects import ObjectRoot
from holdfast.testing.saving import save

STATE = os.urandom(40_000)  # about 64 kB on the disk, with the manifest and the folder
COPY = 68_000


@pytest.fixture
def root() -> ObjectRoot:
    return ObjectRoot(f"memory://copies-{secrets.token_hex(4)}/x", {})


def make(root: ObjectRoot, work: Path, copies: float) -> RemoteCheckpoints:
    """Return a store with room for about so many copies."""
    return RemoteCheckpoints(root, work, int(copies * COPY))


def fetch(store: RemoteCheckpoints, published: Published, step: int, trial: int = 7) -> None:
    store.fetch(published.path, digest=published.digest, trial=trial, attempt=1, step=step)


def copies(work: Path) -> list[str]:
    """Return the paths of the copies that are there, by step."""
    return sorted(str(folder.relative_to(work)) for folder in work.glob("trials/*/checkpoints/step_*"))


def used(work: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in work.rglob("*"))


def test_copies_take_no_more_than_their_limit(root: ObjectRoot, tmp_path: Path) -> None:
    store = make(root, tmp_path, 5)
    for step in range(30):
        published = save(store, STATE, step=step)
        assert published.path in copies(tmp_path), "the newest one stays"
        assert used(tmp_path) <= 5 * COPY
    assert 3 <= len(copies(tmp_path)) <= 5
    assert len(store.scan(7)) == 30
    assert all(store.load(path).state == STATE for path, _, _ in store.scan(7)[:3])


def test_what_was_used_longest_ago_goes_first(root: ObjectRoot, tmp_path: Path) -> None:
    store = make(root, tmp_path, 4.5)
    one, two, three, four = (save(store, STATE, step=step) for step in range(4))
    fetch(store, one, 0)
    five = save(store, STATE, step=4)
    assert set(copies(tmp_path)) == {one.path, four.path, five.path} | ({three.path} & set(copies(tmp_path)))
    assert two.path not in copies(tmp_path)


def test_without_any_room_what_is_in_use_stays(root: ObjectRoot, tmp_path: Path) -> None:
    """The newest copy of each trial that runs, and none of one that was released."""
    store = make(root, tmp_path, 0)
    published = {trial: [save(store, STATE, trial=trial, step=step) for step in range(3)] for trial in (1, 2, 3)}
    assert copies(tmp_path) == sorted(saved[-1].path for saved in published.values())
    fetch(store, published[1][0], 0, trial=1)
    assert set(copies(tmp_path)) >= {published[1][0].path, published[1][2].path}
    store.release(1)
    assert not (tmp_path / "trials" / "000001" / "checkpoints").exists()
    for trial in (2, 3):
        store.release(trial)
    assert copies(tmp_path) == []


HOLDER = """
import sys
from pathlib import Path
from holdfast.storage.checkpoints.cache import Cache
held = Cache(Path(sys.argv[1]), 0).hold(sys.argv[2])
print(held is not None, flush=True)
sys.stdin.read()
"""


def test_what_another_process_uses_is_not_evicted(root: ObjectRoot, tmp_path: Path) -> None:
    published = save(make(root, tmp_path, 9), STATE, step=0)
    process = begin_script(HOLDER, tmp_path, published.path)
    assert process.stdout.readline() == "True\n"
    cache = Cache(tmp_path, 0)
    assert cache.make_room(1) == 0
    assert copies(tmp_path) == [published.path]
    process.kill()
    process.communicate()
    assert cache.make_room(1) > len(STATE), "a process that died uses nothing"
    assert copies(tmp_path) == []


CRASH = """
import os, signal, sys
from pathlib import Path
from holdfast.storage.checkpoints.cache import Cache
folder, held = Cache(Path(sys.argv[1]), 1 << 30).incoming(sys.argv[2])
(folder / "state.json").write_bytes(bytes(100_000))
print(folder.name, flush=True)
sys.stdin.read()
"""


def test_a_copy_that_is_coming_in_is_none_and_a_dead_ones_goes(root: ObjectRoot, tmp_path: Path) -> None:
    store = make(root, tmp_path / "other", 9)
    published = save(store, STATE, step=0)
    process = begin_script(CRASH, tmp_path, published.path)
    coming = (tmp_path / published.path).parent / process.stdout.readline().strip()
    cache = Cache(tmp_path, 0)
    cache.make_room(1)
    assert coming.is_dir(), "its process lives"
    assert cache.hold(published.path) is None
    process.kill()
    process.communicate()
    cache.make_room(1)
    assert not coming.exists()
    fetch(make(root, tmp_path, 9), published, 0)
    assert copies(tmp_path) == [published.path]


def test_experiments_side_by_side_share_the_limit_and_nothing_else_is_touched(root: ObjectRoot, tmp_path: Path) -> None:
    works = [tmp_path / name for name in ("0123456789abcdef", "fedcba9876543210")]
    foreign = tmp_path / "mine" / "trials" / "000001" / "checkpoints" / "step_00000001-a1-0123abcd"
    foreign.mkdir(parents=True)
    (foreign / "state.json").write_bytes(STATE)
    first = make(root, works[0], 3.5)
    for step in range(3):
        save(first, STATE, step=step)
    del first  # the process of that one has ended
    second = make(root, works[1], 3.5)
    for step in range(3):
        save(second, STATE, trial=8, step=step)
    assert used(works[0]) + used(works[1]) <= 3.5 * COPY
    assert len(copies(works[1])) >= 2
    assert (foreign / "state.json").read_bytes() == STATE


def test_a_damaged_copy_is_replaced_and_a_store_without_it_says_so(root: ObjectRoot, tmp_path: Path) -> None:
    store = make(root, tmp_path, 9)
    published = save(store, STATE)
    file = tmp_path / published.path / "state.json"
    good = file.read_bytes()
    for damage in (b"", good[:-1], good[:99] + b"?" + good[100:]):
        file.write_bytes(damage)
        fetch(store, published, 0)
        assert file.read_bytes() == good


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    with small_disk(tmp_path / "small", megabytes=2) as folder:
        yield folder


def test_a_full_disk_evicts_and_goes_on(
    root: ObjectRoot, tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """C13: a copy makes room for one that is needed; a copy that is only convenient is done without."""
    elsewhere = make(root, tmp_path / "elsewhere", 99)
    state = os.urandom(600_000)  # about 800 kB as JSON's base64, or as bytes of its own
    saved = [save(elsewhere, state, step=step) for step in range(6)]
    store = RemoteCheckpoints(root, small)
    for step, published in enumerate(saved):
        fetch(store, published, step)
        assert store._local.load(published.path).state == state
    assert "the disk is full" in caplog.text
    held = Cache(small, 0).hold(saved[-1].path)
    assert held is not None
    (small / "filler").write_bytes(bytes(_free(small)))
    big = save(elsewhere, os.urandom(2_200_000), step=9)
    with pytest.raises(StorageError, match="No space"):
        fetch(store, big, 9)
    assert not [name for name in copies(small) if big.path == name]
    assert not list(small.rglob(".trash-*"))
    held.close()
    store.release(7)


def _free(folder: Path) -> int:
    found: Any = os.statvfs(folder)
    return max(int(found.f_bavail * found.f_frsize) - 8192, 0)
