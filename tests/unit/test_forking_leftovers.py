"""What forks that were cut off leave behind: nobody mistakes it for anything, and it goes by itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from forking_kit import fork, statuses
from store_kit import content, create
from support_forks import story

import holdfast
from holdfast.core import faults
from holdfast.core.errors import ExperimentExists, SpecError
from holdfast.locate import Opened, check_free, open_path
from holdfast.storage.folder import Folder
from holdfast.testing.samples import sample_spec


@pytest.fixture
def original(tmp_path: Path) -> Iterator[Opened]:
    with closing(story(tmp_path / "runs")) as opened:
        yield opened


class Killed(BaseException):
    pass


def killed_at(point: str, original: Opened, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fork and die at a point; return the fork's folder as it is then."""

    def hook(name: str) -> None:
        if name == point:
            raise Killed

    faults.install(hook)
    try:
        monkeypatch.setattr(Folder, "clear", lambda *_, **__: [])  # the dead clean nothing up
        with pytest.raises(Killed):
            fork(original)
    finally:
        faults.install(None)
        monkeypatch.undo()
    return original.folder.path.parent / "fork"


def test_the_mark_of_a_fork_that_is_whole_goes_with_the_next_open(original: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    place = killed_at("fork.identified", original, monkeypatch)
    marker = place / ".fork.json"
    shutil.copytree(place, place.with_name("copy"))
    open_path(place, readonly=True).close()
    assert marker.exists()
    with holdfast.open(place) as forked:
        assert statuses(forked) == ["COMPLETED", "FAILED", *["PENDING"] * 4]
    assert not marker.exists()
    with holdfast.open(place.with_name("copy")) as copy:
        assert copy.id != forked.id
        assert not (copy.path / ".fork.json").exists()  # type: ignore[operator]  # a local folder


def test_a_search_of_its_name_is_told_what_lies_there(original: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    place = killed_at("fork.linked", original, monkeypatch)
    before = content(place)
    spec = sample_spec(name="fork", storage=str(place.parent))
    with pytest.raises(ExperimentExists, match=r"its making was cut off; .* make that fork again"):
        check_free(spec)
    with pytest.raises(ExperimentExists, match="make that fork again"):
        create(place.parent, name="fork")
    assert content(place) == before
    for entry in ("trials", "journal"):
        shutil.rmtree(place / entry)
    (place / "trainable.pkl").unlink(missing_ok=True)
    with closing(create(place.parent, name="fork")) as opened:  # it had got nothing yet
        assert opened.spec.name == "fork"
        assert ".fork.json" not in opened.folder.root.names()


@pytest.mark.parametrize("storage", ["", "  ", "/tmp/\0"])
def test_a_storage_that_is_none_is_refused(original: Opened, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = original.folder.path.parent.with_name("empty")
    empty.mkdir()
    monkeypatch.chdir(empty)
    how: dict[str, Any] = {"storage": storage}
    with pytest.raises(SpecError, match="names no folder"):
        fork(original, **how)
    assert list(empty.iterdir()) == []
