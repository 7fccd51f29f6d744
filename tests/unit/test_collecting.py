"""The garbage of whole storages: one experiment that is broken stops no other, and one that is driven is not touched."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store_kit import content, create
from upkeep_kit import Shop, end, staged_and_trash

from holdfast.core.errors import SpecError
from holdfast.flows.abandoned import Places
from holdfast.flows.collecting import BROKEN, CLEAN, COLLECTED, DRIVEN, WOULD, Found, collect_all, is_trouble, summary
from holdfast.holding import holder
from holdfast.storage.database.leases import Leases
from holdfast.testing.saving import flip


def shop(storage: Path, name: str, *, littered: bool = True, driven: bool = False) -> tuple[Path, list[str], str]:
    """Make an experiment; return its folder, what is left over in it, and a good checkpoint."""
    with closing(create(storage, name)) as opened:
        made = Shop.of(opened)
        writer = made.lab.started()
        kept = made.save(writer, 0)
        left = staged_and_trash(made.store, kept) if littered else []
        if driven:
            leases = Leases(opened.database, opened.record.id)
            leases.take(seen=1, epoch=2, holder=holder(), action="started", detail={})
        else:
            end(made, writer)
            made.leave()
        return made.path, left, kept


def every(storage: Path, **how: Any) -> dict[str, Found]:
    return {one.name: one for one in collect_all(Places(storages=(str(storage),)), str, **how)}


def test_each_is_collected_and_none_stands_in_anothers_way(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shops = {name: shop(runs, name) for name in ("a", "z")}
    clean, _, _ = shop(runs, "clean", littered=False)
    driven, _, _ = shop(runs, "driven", driven=True)
    broken, _, _ = shop(runs, "broken")
    (broken / "experiment.json").write_text("{")
    folders = [folder for folder, _, _ in shops.values()] + [clean, driven, broken]
    before = [content(folder) for folder in folders]
    seen = every(runs, dry_run=True)
    assert [content(folder) for folder in folders] == before
    assert {name: one.outcome for name, one in seen.items()} == {
        "a": WOULD,
        "broken": BROKEN,
        "clean": CLEAN,
        "driven": DRIVEN,
        "z": WOULD,
    }
    done = every(runs)
    assert {name: one.outcome for name, one in done.items()} == {
        name: COLLECTED if one.outcome == WOULD else one.outcome for name, one in seen.items()
    }
    for name, (folder, left, kept) in shops.items():
        assert not [path for path in left if (folder / path).exists()]
        assert (folder / kept / "manifest.json").exists()
        assert (done[name].removed, done[name].bytes) == (seen[name].removed, seen[name].bytes)
        assert done[name].removed == len(left)
    assert [content(folder) for folder in (clean, driven, broken)] == before[2:]
    assert [name for name, one in done.items() if is_trouble(one)] == ["broken"]
    assert {name: one.outcome for name, one in every(runs).items() if name in shops} == {"a": CLEAN, "z": CLEAN}
    told = summary(list(done.values()), dry_run=False)
    assert told["counts"] == {COLLECTED: 2, CLEAN: 1, DRIVEN: 1, BROKEN: 1}
    assert told["bytes"] == sum(one.bytes for one in done.values()) > 0


def test_damaged_checkpoints_are_found_where_they_are_read(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    folder, _, kept = shop(runs, "digits", littered=False)
    damaged = next(file for file in (folder / kept).iterdir() if file.name != "manifest.json")
    damaged.write_bytes(flip(damaged.read_bytes(), 100))
    assert every(runs)["digits"].corrupt == 0
    before = content(folder)
    seen = every(runs, verified=True, dry_run=True)["digits"]
    assert (seen.corrupt, is_trouble(seen)) == (1, True)
    assert content(folder) == before
    assert every(runs, verified=True)["digits"].corrupt == 1
    assert every(runs, verified=True)["digits"].corrupt == 0  # it is marked, and nothing continues from it
    assert "1 checkpoint damaged or gone" in replace(seen, removed=0).line


def test_a_storage_that_is_not_there_is_told_and_the_next_one_looked_at(tmp_path: Path) -> None:
    shop(tmp_path / "runs", "a")
    places = Places(storages=(str(tmp_path / "nowhere"), str(tmp_path / "runs")))
    found = list(collect_all(places, str))
    assert [one.outcome for one in found] == [BROKEN, COLLECTED]
    assert "does not exist" in found[0].line
    with pytest.raises(SpecError, match="name at least one"):
        Places(storages=())
