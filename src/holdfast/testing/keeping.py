"""What a store of its own keeps, and how it takes damage: a part of the contract in :mod:`holdfast.testing.stores`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.core.errors import (
    CheckpointCorrupt,
    CheckpointNotFound,
    NewerFormat,
)
from holdfast.storage.checkpoints.manifest import MANIFEST, Manifest
from holdfast.storage.checkpoints.store import CheckpointStore
from holdfast.storage.root import Root, open_root
from holdfast.testing.saving import flip

Opens = Callable[..., CheckpointStore]


class KeepingContract:
    """Give a fixture ``opens``."""

    @pytest.fixture
    def opens(self) -> Any:
        """Return a function that opens the same, at first empty, store with a config: ``opens(keep_last=2)``."""
        raise NotImplementedError("the subclass gives the store")

    def root(self, store: CheckpointStore) -> Root:
        """Return the raw files of ``store``, for a test that damages them."""
        return open_root(str(store.path))

    def damage(self, store: CheckpointStore, step: int) -> None:
        """Flip one bit of a checkpoint's state."""
        path = next(each.path for each in store.checkpoints() if each.step == step)
        root, name = self.root(store), f"{Path(str(path)).name}/state.json"
        data = root.read(name)
        assert data is not None
        root.write(name, flip(data, 77))

    def test_a_pin_of_what_was_given_up_can_be_taken_away(self, opens: Opens) -> None:
        store = opens()
        for step in range(3):
            store.save(step, step)
        store.pin(2)
        store.rewind(0)
        store.save(1, "again")
        assert len([name for name in self.root(store).names() if name.startswith("step_")]) == 3
        store.unpin(2)
        store.prune()
        assert len([name for name in self.root(store).names() if name.startswith("step_")]) == 2

    @pytest.mark.parametrize(
        ("mode", "period", "steps"),
        [
            ("all", 1, list(range(12))),
            ("last", 1, [11]),
            ("gap", 5, [0, 5, 10]),
            ("gap_overwrite", 5, [10]),
            ("gap_and_last", 5, [0, 5, 10, 11]),
            ("none", 1, []),
        ],
    )
    def test_modes(self, opens: Opens, mode: str, period: int, steps: list[int]) -> None:
        store = opens(mode=mode, save_period=period)
        saved = [step for step in range(12) if store.save(step, step) is not None]
        assert saved == [step for step in range(12) if store.should_save(step)]
        assert store.steps() == opens().steps() == steps
        assert [store.load(step) for step in steps] == steps

    def test_what_the_rules_keep(self, opens: Opens) -> None:
        config = {"keep_last": 2, "keep_top_k": 2, "keep_every": 10, "metric_name": "acc", "higher_is_better": True}
        values = [0.1, 0.9, math.nan, 0.9, math.inf, None, "high", True, 0.8, 0.2, 0.1, 0.2, 0.1, 0.3]
        store = opens(**config)
        for step, value in enumerate(values):
            store.save(step, step, {} if value is None else {"acc": value})
            if step == 6:
                store = opens(**config)  # a restart changes nothing
        assert store.steps() == [0, 1, 3, 10, 12, 13]
        assert store.load("best") == 3  # of equal ones the newest
        assert opens(**config).load("best") == 3

    def test_pins(self, opens: Opens) -> None:
        store = opens(keep_last=1)
        store.save(0, 0)
        opens().pin(0)
        for step in range(1, 4):
            store.save(step, step)
        assert store.steps() == [0, 3]
        opens().unpin(0)
        assert store.prune() == [0]
        assert opens().steps() == [3]
        assert not [name for name in self.root(store).names() if name.startswith(".pin-")]
        for call in (store.pin, store.unpin):
            with pytest.raises(CheckpointNotFound):
                call(0)

    def test_the_last_that_was_read_back_is_kept(self, opens: Opens) -> None:
        store = opens()
        for step in range(4):
            store.save(step, step)
        store = opens(keep_last=1)
        assert store.load(1) == 1
        for step in range(4, 7):
            store.save(step, step)
        assert store.steps() == [1, 6]
        assert store.verify() == {}
        store.save(7, 7)
        assert store.steps() == [6, 7]

    def test_pruning_even_the_latest(self, opens: Opens) -> None:
        store = opens()
        for step, loss in enumerate((0.5, 0.1, 0.9)):
            store.save(step, step, {"loss": loss})
        picky = opens(keep_top_k=1, metric_name="loss")
        assert picky.prune() == [0]
        assert picky.prune(exclude_latest=False) == [2]
        assert picky.steps() == [1]
        assert opens(keep_top_k=1, metric_name="absent").prune(exclude_latest=False) == []
        assert store.steps() == [1]

    def test_a_damaged_one_is_passed_over_by_word_and_refused_by_step(
        self, opens: Opens, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = opens()
        for step in range(4):
            store.save(step, step)
        self.damage(store, 3)
        with pytest.raises(CheckpointCorrupt, match="digest"):
            opens().load("latest", strict=True)
        self.damage(store, 2)
        reader = opens()
        with caplog.at_level(logging.WARNING):
            assert reader.load("latest") == 1
        assert "step 2 is not used" in caplog.text
        assert opens().steps() == [0, 1]
        with pytest.raises(CheckpointCorrupt, match=r"step 3.*digest"):
            reader.load(3)
        self.damage(store, 0)
        with pytest.raises(CheckpointCorrupt, match="digest"):
            reader.load(0)

    def test_bad_ones_are_found_and_heal(self, opens: Opens) -> None:
        store = opens()
        for step in range(3):
            store.save(step, step)
        self.damage(store, 1)
        found = opens().verify()
        assert list(found) == [1]
        assert "digest" in found[1]
        assert list(opens().verify(1)) == [1]
        assert opens().verify(0) == {}
        assert opens().steps() == [0, 2]
        data = self.root(store)
        name = next(name for name in data.names() if name.startswith("step_00000001-"))
        content = data.read(f"{name}/state.json")
        assert content is not None
        data.write(f"{name}/state.json", flip(content, 77))
        assert opens().verify() == {}
        assert opens().steps() == [0, 1, 2]
        with pytest.raises(CheckpointNotFound):
            opens().verify(9)

    def test_a_step_that_was_found_bad_is_saved_again(self, opens: Opens) -> None:
        for step in range(0, 12, 2):  # often enough to tell luck from order
            store = opens()
            store.save(step, "good")
            self.damage(store, step)
            assert list(store.verify()) == [step]
            store.save(step, "again")
            assert opens().load() == "again"
            assert store.steps()[-1] == step
            store.save(step + 1, "next")
            assert (opens().load(step), opens().load()) == ("again", "next")

    def test_what_others_found_bad_counts_no_more_for_the_writer(self, opens: Opens) -> None:
        store = opens(keep_last=2)
        for step in range(4):
            store.save(step, step)
        self.damage(opens(), 3)
        assert opens().load() == 2
        store.save(4, 4)
        assert store.steps() == [2, 4]
        assert store.prune(corrupt=True) == [3]
        assert opens().steps() == [2, 4]

    def test_a_torn_manifest_is_no_secret(self, opens: Opens, caplog: pytest.LogCaptureFixture) -> None:
        store = opens()
        for step in range(2):
            store.save(step, step)
        name = f"{Path(str(store.latest_path())).name}/{MANIFEST}"
        data = self.root(store).read(name)
        assert data is not None
        self.root(store).write(name, flip(data, len(data) * 4))
        assert opens().steps() == [0]
        with caplog.at_level(logging.WARNING):
            assert opens().load() == 0
        assert "step 1 is not used" in caplog.text
        for call in (functools.partial(opens().load, strict=True), functools.partial(opens().load, 1)):
            with pytest.raises(CheckpointCorrupt, match="altered"):
                call()
        assert list(opens().verify()) == [1]
        assert [row.status.value for row in opens().rows()] == ["valid", "corrupt"]

    def test_the_newest_that_was_read_back_is_kept(self, opens: Opens) -> None:
        store = opens(keep_last=2)
        for step in (0, 1):
            store.save(step, step)
        assert [store.load(which) for which in ("latest", "first")] == [1, 0]
        for step in (2, 3):
            store.save(step, step)
        assert store.steps() == [1, 2, 3]

    def test_nothing_good_is_left(self, opens: Opens) -> None:
        store = opens()
        for step in range(2):
            store.save(step, step)
            self.damage(store, step)
        with pytest.raises(CheckpointCorrupt, match=r"step 0.*step 1"):
            opens().load()
        assert store.save(2, "goes on") is not None
        assert opens().load() == "goes on"

    def test_a_folder_without_a_manifest_does_not_exist(self, opens: Opens) -> None:
        store = opens()
        store.save(0, 0)
        root = self.root(store)
        root.write("step_00000009-a1-0123abcd/state.json", b"{}")
        root.write("step_00000008-a1-0123abcd/manifest.json", b"torn")
        assert opens().steps() == [0]
        assert opens().load() == 0
        store.save(1, 1)
        assert opens().load("latest") == 1

    def test_what_a_newer_holdfast_wrote_is_neither_passed_over_nor_deleted(self, opens: Opens) -> None:
        store = opens()
        for step in range(2):
            store.save(step, step)
        root = self.root(store)
        name = f"{Path(str(store.latest_path())).name}/{MANIFEST}"
        data = root.read(name)
        assert data is not None
        newer = dataclasses.replace(Manifest.parse(data), format=99).to_bytes()
        root.write(name, newer)
        late = opens(keep_last=1)
        for call in (late.load, late.steps, late.prune, lambda: late.load(1), lambda: late.save(2, 2)):
            with pytest.raises(NewerFormat, match="update holdfast"):
                call()
        assert root.read(name) == newer
        root.write(name, data)
        assert opens().load() == 1

    def test_foreign_files_survive(self, opens: Opens) -> None:
        store = opens(keep_last=1)
        store.save(0, 0)
        root = self.root(store)
        foreign = ["notes [*] ü.txt", "step_7/x", "step_00000007/weights", ".hidden", "step_00000001-a1-xyzw/x"]
        for name in foreign:
            root.write(name, b"mine")
        for step in range(1, 4):
            store.save(step, step)
        store.rewind(3)
        store.save(4, 4)
        assert [root.read(name) for name in foreign] == [b"mine"] * len(foreign)
        assert opens().steps() == [4]
