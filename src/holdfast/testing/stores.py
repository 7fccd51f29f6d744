"""The contract of ``holdfast.CheckpointStore``, executable: subclass :class:`CheckpointStoreContract` and give one fixture."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from holdfast.core.errors import (
    CheckpointConflict,
    CheckpointNotFound,
    Fenced,
    HoldfastError,
    InvalidInput,
    InvalidStep,
    NotACheckpoint,
    NotStorable,
    SpecError,
)
from holdfast.storage.checkpoints.store import CheckpointStore
from holdfast.testing.keeping import KeepingContract, Opens


class Settings(BaseModel):
    """A run's config, as a pydantic model."""

    lr: float = 0.5


@dataclasses.dataclass
class Options:
    """A run's config, as a dataclass."""

    layers: tuple[int, ...] = (1, 2)


class CheckpointStoreContract(KeepingContract):
    """What every store of its own must do, wherever it is. Give a fixture ``opens``."""

    def test_an_empty_store(self, opens: Opens) -> None:
        store = opens()
        assert (store.steps(), store.history(), store.checkpoints()) == ([], [], [])
        assert (store.latest_path(), store.best_path(), store.training_info(), store.run_config()) == (None,) * 4
        assert (store.verify(), store.prune()) == ({}, [])
        for which in ("latest", "last", "best", "first", 3):
            with pytest.raises(CheckpointNotFound, match="none at all"):
                store.load(which)
        assert self.root(store).names() == []

    def test_states_come_back_by_step_and_by_word(self, opens: Opens) -> None:
        store = opens(metric_name="acc", higher_is_better=True)
        for step, acc in ((0, 0.1), (5, 0.9), (10, 0.3)):
            saved = store.save(step, {"step": step, "pair": (1, b"x")}, {"acc": acc})
            assert saved is not None
            assert (saved.step, saved.metrics) == (step, {"acc": acc})
            assert saved.load() == {"step": step, "pair": (1, b"x")}
        for reader in (store, opens(metric_name="acc", higher_is_better=True)):
            assert reader.steps() == [0, 5, 10]
            assert [reader.load(which)["step"] for which in ("first", "last", "latest", "best", 5)] == [0, 10, 10, 5, 5]
            assert [step for step, _, _ in reader.history()] == [0, 5, 10]
            assert reader.latest_path() == reader.history()[-1][1]
            assert reader.best_path() == reader.history()[1][1]
            assert reader.training_info() == {"acc": 0.3}
            for place in (5, "best", reader.best_path()):
                assert reader.training_info(place) == {"acc": 0.9}

    @pytest.mark.parametrize("which", ["foo", "5", "", True, 2.0, -1, None])
    def test_what_is_no_step_and_no_word_is_refused(self, opens: Opens, which: Any) -> None:
        store = opens()
        store.save(0, 1)
        with pytest.raises(InvalidStep) as refused:
            store.load(which)
        assert isinstance(refused.value, ValueError)

    @pytest.mark.parametrize("step", [True, 2.0, -1, "last", "1", None])
    def test_what_is_no_step_cannot_be_saved(self, opens: Opens, step: Any) -> None:
        store = opens()
        for call in (lambda: store.save(step, 1), lambda: store.stage(step, {})):
            with pytest.raises(InvalidStep):
                call()
        assert self.root(store).names() == []

    def test_a_missing_step_names_those_that_are_there(self, opens: Opens) -> None:
        store = opens()
        store.save(4, 1)
        with pytest.raises(CheckpointNotFound, match=r"of step 5.*of the steps 4") as missing:
            store.load(5)
        assert isinstance(missing.value, FileNotFoundError)

    def test_staged_files_are_published_whole(self, opens: Opens) -> None:
        store = opens()
        staged = store.stage(3, {"loss": 0.5, "seen": {"batches": [1, 2]}}, {"lr": 0.1})
        (staged / "sub").mkdir()
        (staged / "sub" / "weights [1] ü").write_bytes(b"w" * 100_000)
        assert store.steps() == []
        assert opens().latest_path() is None
        saved = store.finalize(staged)
        assert (saved.step, saved.bytes, saved.metrics) == (3, 100_000, {"loss": 0.5})
        assert not staged.exists()
        reader = opens()
        folder = reader.load(3)
        assert (folder / "sub" / "weights [1] ü").read_bytes() == b"w" * 100_000
        assert reader.training_info(3) == {"loss": 0.5, "seen": {"batches": [1, 2]}}
        assert reader.run_config() == {"lr": 0.1}
        with pytest.raises(InvalidInput, match="not staged by this store"):
            store.finalize(staged)

    def test_as_a_context_manager(self, opens: Opens) -> None:
        store = opens()
        with store.stage(1, {"loss": 1}) as folder:
            (folder / "a").write_text("a")
        assert store.steps() == [1]
        staged = store.stage(2, {})
        (staged / "a").write_text("b")
        with pytest.raises(ZeroDivisionError), staged:
            _fail()
        assert not staged.exists()
        assert store.steps() == [1]
        with store.stage(2, {}) as folder:
            (folder / "a").write_text("c")
        assert (store.load(2) / "a").read_text() == "c"

    @pytest.mark.parametrize(
        ("given", "stored"),
        [({"a": None}, {"a": None}), (Settings(), {"lr": 0.5}), (Options(), {"layers": [1, 2]}), (None, None)],
    )
    def test_a_run_config_of_any_kind(self, opens: Opens, given: Any, stored: Any) -> None:
        store = opens()
        store.save(0, 1, run_config=given)
        assert opens().run_config() == stored

    def test_what_cannot_be_stored_changes_nothing(self, opens: Opens) -> None:
        store = opens()
        store.save(0, 1)
        before = sorted(self.root(store).names())
        with pytest.raises(NotStorable, match=r'state\["a"\]\[1\]'):
            store.save(1, {"a": [1, object()]})
        with pytest.raises(NotStorable, match="metrics"):
            store.save(1, 1, {"loss": object()})
        with pytest.raises(NotStorable, match="training_info"):
            store.stage(1, {"loss": {1, 2}})
        with pytest.raises(NotStorable, match="run_config"):
            store.save(1, 1, run_config=7)
        assert sorted(self.root(store).names()) == before
        assert store.steps() == [0]
        store.save(1, 2)
        assert store.load() == 2

    def test_steps_rise_and_are_saved_once(self, opens: Opens) -> None:
        store = opens()
        store.save(3, "three")
        store.save(5, "five")
        for again in (store, opens()):
            with pytest.raises(CheckpointConflict, match="step 5"):
                again.save(5, "other")
            with pytest.raises(InvalidStep, match="rewind"):
                again.save(4, "four")
        assert [store.load(step) for step in store.steps()] == ["three", "five"]

    def test_two_writers_of_one_step(self, opens: Opens) -> None:
        one, two = opens(), opens()
        staged = [store.stage(5, {}) for store in (one, two)]
        won, errors = [], []
        for store, folder, text in zip((one, two), staged, ("one", "two"), strict=True):
            try:
                (folder / "who").write_text(text)
                store.finalize(folder)
                won.append(text)
            except (HoldfastError, FileNotFoundError) as error:
                errors.append(error)
        assert len(won) == 1
        assert len(errors) == 1
        assert (opens().load(5) / "who").read_text() == won[0]

    def test_the_writer_that_was_taken_over_from_can_do_nothing(self, opens: Opens) -> None:
        old = opens(keep_last=1)
        old.save(0, "old")
        staged = old.stage(1, {})
        new = opens(keep_last=3)
        new.save(1, "new")
        with pytest.raises(Fenced, match="took over"):
            old.save(2, "late")
        with pytest.raises(Fenced):
            old.prune()
        with pytest.raises(HoldfastError):
            old.finalize(staged)
        assert new.steps() == opens().steps() == [0, 1]
        assert (new.load(0), new.load(1)) == ("old", "new")
        new.save(2, "goes on")
        assert old.steps() == [0, 1, 2]  # it may still read

    def test_who_was_taken_over_from_may_not_go_back(self, opens: Opens) -> None:
        old = opens()
        old.save(0, 0)
        opens().save(1, 1)
        with pytest.raises(Fenced):
            old.rewind(0)
        assert opens().steps() == [0, 1]

    def test_going_back_to_what_is_gone_gives_nothing_up(self, opens: Opens) -> None:
        live, other = opens(keep_last=2), opens()
        for step in range(4):
            live.save(step, step)
        with pytest.raises(CheckpointNotFound):
            other.rewind(1)
        assert other.steps() == opens().steps() == [2, 3]

    @pytest.mark.parametrize("value", [10**5000, -(10**2000), [[[]]]], ids=["huge", "low", "holds itself"])
    def test_metrics_of_odd_sizes(self, opens: Opens, value: Any) -> None:
        store = opens()
        if isinstance(value, list):
            value.append(value)
        with pytest.raises(NotStorable, match=r"loss|metrics"):
            store.save(0, 0, {"loss": value})
        assert self.root(store).names() == []

    def test_going_back(self, opens: Opens) -> None:
        store = opens()
        for step in range(5):
            store.save(step, f"first {step}")
        store.rewind(2)
        assert store.steps() == opens().steps() == [0, 1, 2]
        assert store.load() == "first 2"
        store.save(3, "second 3")
        store.save(6, "second 6")
        assert opens().steps() == [0, 1, 2, 3, 6]
        assert opens().load(3) == "second 3"
        with pytest.raises(CheckpointNotFound):
            store.rewind(4)
        other = opens()
        other.rewind(1)
        assert other.steps() == [0, 1]
        assert len([name for name in self.root(store).names() if name.startswith("step_")]) == 5  # until the next save
        other.save(2, "third 2")
        assert len([name for name in self.root(store).names() if name.startswith("step_")]) == 3

    @pytest.mark.parametrize("missing", ["x", "step_00000001-a1-0123abcd"])
    def test_info_of_a_path_that_is_none(self, opens: Opens, missing: str) -> None:
        store = opens()
        store.save(0, 0)
        with pytest.raises((CheckpointNotFound, NotACheckpoint)):
            store.training_info(f"{store.path}/{missing}")

    @pytest.mark.parametrize(
        "config", [{"mode": "some"}, {"mode": "last", "save_period": 2}, {"keep_lasr": 1}, {"keep_last": 0}, [1]]
    )
    def test_a_config_that_makes_no_sense(self, opens: Opens, config: Any) -> None:
        with pytest.raises(SpecError) as refused:
            CheckpointStore(opens().path, config)
        assert isinstance(refused.value, ValueError)

    def test_the_place_may_stand_in_the_config(self, opens: Opens) -> None:
        place = str(opens().path)
        with pytest.raises(SpecError, match="no path"):
            CheckpointStore(config={"keep_last": 1})
        with pytest.raises(SpecError, match="give one of them"):
            CheckpointStore("elsewhere", {"directory": place})
        if "://" not in place:
            assert str(CheckpointStore(config={"directory": place}).path) == place

    def test_background_saves_hold_what_they_were_given(self, opens: Opens) -> None:
        store = opens(asynchronous=True)
        weights = np.zeros(40_000)
        state: dict[str, Any] = {"w": weights, "log": [1]}
        for step in range(4):
            store.save(step, state)
            weights += 1
            state["log"].append(step)
        for step in range(4):
            loaded = store.load(step)
            assert (loaded["w"] == step).all()
            assert loaded["log"] == [1, *range(step)]
        with store.stage(9, {}) as folder:
            (folder / "a").write_bytes(b"a")
        store.flush()
        assert opens().steps() == [0, 1, 2, 3, 9]

    def test_an_error_in_the_background_is_raised_once(self, opens: Opens) -> None:
        store = opens(asynchronous=True)
        for step, again in ((0, store.flush), (1, lambda: store.save(2, 2)), (3, store.steps)):
            with store.stage(step, {}) as folder:
                os.mkfifo(folder / "pipe")  # which no checkpoint can hold, as is found out when it is digested
            with pytest.raises(NotStorable, match="pipe"):
                again()
        store.flush()
        assert store.steps() == []
        store.save(3, "again")
        store.close()
        assert opens().load() == "again"
        assert not [name for name in self.root(store).names() if name.startswith(".staging")]

    def test_functions_are_called_only_when_they_are_needed(self, opens: Opens) -> None:
        store = opens(save_period=2)
        calls: list[int] = []
        for step in range(4):
            store.save(step, functools.partial(_count, calls, step))
        assert calls == [0, 2]
        assert store.load() == 2


def _count(calls: list[int], step: int) -> int:
    calls.append(step)
    return len(calls)


def _fail() -> None:
    raise ZeroDivisionError
