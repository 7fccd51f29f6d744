"""The contract of a checkpoint store, executable: subclass :class:`CheckpointContract` and give one fixture."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.core.errors import (
    CheckpointCorrupt,
    CheckpointNotFound,
    Corrupt,
    InvalidInput,
    InvalidStep,
    NewerFormat,
    NotACheckpoint,
)
from holdfast.storage.checkpoints.local import Published
from holdfast.storage.checkpoints.manifest import FORMAT, MANIFEST, digest_of
from holdfast.storage.checkpoints.serializers import hash_directory, write_state
from holdfast.testing.saving import Checkpoints, Files, flip, manifest_of, save


class CheckpointContract:
    """What every store of checkpoints must do. Give a fixture ``checkpoints``; override :meth:`files` for remote stores."""

    flips = 60
    """How many bits of each file are flipped, one at a time; a slow store may take fewer."""

    @pytest.fixture
    def checkpoints(self) -> Any:
        """Return an empty store."""
        raise NotImplementedError("the subclass gives the store")

    def files(self, store: Any) -> Files:
        """Return access to the raw files of ``store``."""
        return Files(store)

    def test_a_checkpoint_comes_back(self, checkpoints: Checkpoints) -> None:
        published = save(checkpoints, {"epoch": 3, "pair": (1, b"\x00")}, attempt=2, step=12)
        loaded = checkpoints.load(published.path, digest=published.digest, trial=7, attempt=2, step=12)
        assert loaded.state == {"epoch": 3, "pair": (1, b"\x00")}
        assert (loaded.step, loaded.metrics) == (12, {"loss": float("inf"), "name": "ü", "step": 12})
        files = self.files(checkpoints)
        assert published.bytes == sum(len(files.read(published.path, name)) for name in files.names(published.path))

    def test_a_manifest_is_its_own_proof(self, checkpoints: Checkpoints) -> None:
        published = save(checkpoints, [1])
        manifest, digest = checkpoints.read_manifest(published.path)
        assert digest == published.digest
        assert checkpoints.verify(published.path, digest=digest) == manifest
        assert checkpoints.scan(7) == [(published.path, manifest, digest)]

    def test_paths_are_relative_and_name_the_step(self, checkpoints: Checkpoints) -> None:
        published = save(checkpoints, 1, trial=1234567, attempt=3, step=123456789)
        assert published.path.startswith("trials/1234567/checkpoints/step_123456789-a3-")

    def test_a_folder_of_the_users_comes_back(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        source = tmp_path / "mine [1] *"
        (source / "deep" / "er").mkdir(parents=True)
        (source / "weights ü.bin").write_bytes(bytes(range(256)) * 9000)
        (source / "deep" / "er" / "empty").touch()
        published = save(checkpoints, source, step=1)
        state = checkpoints.load(published.path).state
        assert isinstance(state, Path)
        assert (state / "weights ü.bin").read_bytes() == (source / "weights ü.bin").read_bytes()
        assert (state / "deep" / "er" / "empty").read_bytes() == b""

    def test_files_written_in_place(self, checkpoints: Checkpoints) -> None:
        staged = checkpoints.stage(7, 1, 4)
        (staged / "sub").mkdir()
        (staged / "sub" / "model.bin").write_bytes(b"model")
        published = checkpoints.publish(staged, manifest_of(hash_directory(staged), step=4, serializer="directory"))
        state = checkpoints.load(published.path).state
        assert isinstance(state, Path)
        assert (state / "sub" / "model.bin").read_bytes() == b"model"

    def test_staged_is_not_there(self, checkpoints: Checkpoints) -> None:
        staged = checkpoints.stage(7, 1, 0)
        write_state(1, staged, serializer="safe")
        assert checkpoints.scan(7) == []
        checkpoints.discard(staged)
        checkpoints.discard(staged)
        assert not staged.exists()

    @pytest.mark.parametrize("step", [-1, True, 2.0, "1", None])
    def test_a_step_is_a_whole_number(self, checkpoints: Checkpoints, step: Any) -> None:
        with pytest.raises(InvalidStep):
            checkpoints.stage(7, 1, step)

    def test_publishing_takes_only_what_was_staged_for_it(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        staged = checkpoints.stage(7, 1, 0)
        with pytest.raises(InvalidInput, match="step 1"):
            checkpoints.publish(staged, manifest_of([], step=1))
        with pytest.raises(InvalidInput, match="no staged"):
            checkpoints.publish(tmp_path, manifest_of([]))
        with pytest.raises(InvalidInput, match="no staged"):
            checkpoints.discard(tmp_path)
        assert tmp_path.exists()

    def test_publishing_twice_leaves_the_first(self, checkpoints: Checkpoints) -> None:
        staged = checkpoints.stage(7, 1, 0)
        manifest = manifest_of(write_state(1, staged, serializer="safe"))
        published = checkpoints.publish(staged, manifest)
        with pytest.raises(OSError, match=r"publish|create"):
            checkpoints.publish(staged, manifest)
        assert checkpoints.load(published.path).state == 1

    def test_two_writers_of_one_step_do_not_mix(self, checkpoints: Checkpoints) -> None:
        one, two = checkpoints.stage(7, 1, 5), checkpoints.stage(7, 1, 5)
        entries = write_state("one", one, serializer="safe"), write_state("two", two, serializer="safe")
        second = checkpoints.publish(two, manifest_of(entries[1], step=5))
        first = checkpoints.publish(one, manifest_of(entries[0], step=5))
        assert first.path != second.path
        assert [checkpoints.load(published.path).state for published in (first, second)] == ["one", "two"]

    def test_a_missing_one(self, checkpoints: Checkpoints) -> None:
        with pytest.raises(CheckpointNotFound):
            checkpoints.load("trials/000007/checkpoints/step_00000000-a1-0123abcd")
        assert checkpoints.scan(99) == []
        assert checkpoints.sweep(99, []) == []

    @pytest.mark.parametrize(
        "path", ["", "/etc", "../x", "trials/000007", "trials/000007/checkpoints/.trash-step_00000000-a1-0123"]
    )
    def test_foreign_paths_are_refused(self, checkpoints: Checkpoints, path: str) -> None:
        for call in (checkpoints.load, checkpoints.delete, checkpoints.verify, checkpoints.read_manifest):
            with pytest.raises(InvalidInput):
                call(path)

    def test_a_torn_or_missing_manifest_is_no_checkpoint(self, checkpoints: Checkpoints) -> None:
        published, good = save(checkpoints, 1), save(checkpoints, 2, step=1)
        files = self.files(checkpoints)
        data = files.read(published.path, MANIFEST)
        for torn in (b"", data[:-1], data[: len(data) // 2], b"{}", b"\xff\x00", data + b" "):
            files.write(published.path, MANIFEST, torn)
            with pytest.raises(NotACheckpoint):
                checkpoints.load(published.path)
            assert [path for path, _, _ in checkpoints.scan(7)] == [good.path]
        files.remove(published.path, MANIFEST)
        with pytest.raises(NotACheckpoint):
            checkpoints.load(published.path)
        assert [path for path, _, _ in checkpoints.scan(7)] == [good.path]
        assert checkpoints.load(good.path).state == 2

    def test_a_newer_format_is_neither_damage_nor_swept(self, checkpoints: Checkpoints) -> None:
        old, new = save(checkpoints, 1), save(checkpoints, 2, step=1)
        files = self.files(checkpoints)
        body = files.read(new.path, MANIFEST).partition(b'"manifest":')[2][:-2]
        body = body.replace(b'"format":%d' % FORMAT, b'"format":%d' % (FORMAT + 1))
        files.write(new.path, MANIFEST, b'{"checksum":"%s","manifest":%s}\n' % (digest_of(body).encode(), body))
        for call in (checkpoints.load, checkpoints.verify, checkpoints.read_manifest):
            with pytest.raises(NewerFormat, match="update holdfast"):
                call(new.path)
        with pytest.raises(NewerFormat, match="update holdfast"):
            checkpoints.scan(7)
        assert old.path in checkpoints.sweep(7, [])
        assert "state.json" in files.names(new.path)

    def test_any_damage_is_noticed(self, checkpoints: Checkpoints) -> None:
        published = save(checkpoints, {"w": np.arange(20_000.0), "b": b"bytes"})
        files = self.files(checkpoints)
        for name in files.names(published.path):
            data = files.read(published.path, name)
            flips = {*range(0, len(data) * 8, max(1, len(data) * 8 // self.flips)), len(data) * 8 - 1}
            damaged = [flip(data, bit) for bit in flips]
            damaged += [b"", data[:-1], data[1:], data + b"\0", data + data]
            for bad in damaged:
                files.write(published.path, name, bad)
                self.refused(checkpoints, published)
            files.remove(published.path, name)
            self.refused(checkpoints, published)
            files.write(published.path, name, data)
        checkpoints.verify(published.path, digest=published.digest)

    def refused(self, checkpoints: Checkpoints, published: Published) -> None:
        """Check that neither load nor verify takes the damaged checkpoint."""
        for call in (checkpoints.load, checkpoints.verify):
            with pytest.raises(Corrupt):
                call(published.path, digest=published.digest)

    def test_the_message_names_the_file_and_what_differs(self, checkpoints: Checkpoints) -> None:
        published = save(checkpoints, {"a": 1})
        files = self.files(checkpoints)
        data = files.read(published.path, "state.json")
        for bad, reason in ((data[:-1], "size"), (flip(data, 9), "digest")):
            files.write(published.path, "state.json", bad)
            with pytest.raises(CheckpointCorrupt, match=f"state.json.*{reason}"):
                checkpoints.load(published.path)
        files.remove(published.path, "state.json")
        with pytest.raises(CheckpointCorrupt, match=r"state\.json.*missing"):
            checkpoints.load(published.path)

    def test_a_damaged_folder_of_the_users(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "model").write_bytes(b"model")
        published = save(checkpoints, tmp_path / "in")
        self.files(checkpoints).write(published.path, "model", b"modem")
        self.refused(checkpoints, published)

    def test_an_extra_file_is_noticed_and_a_hidden_one_ignored(self, checkpoints: Checkpoints) -> None:
        published = save(checkpoints, 1)
        files = self.files(checkpoints)
        files.write(published.path, ".DS_Store", b"")
        assert checkpoints.load(published.path).state == 1
        files.write(published.path, "more/state.json", b"1")
        with pytest.raises(CheckpointCorrupt, match="not in the manifest"):
            checkpoints.load(published.path)

    def test_exchanged_files_are_noticed(self, checkpoints: Checkpoints) -> None:
        one, two = save(checkpoints, "one"), save(checkpoints, "two", step=1)
        files = self.files(checkpoints)
        kept = files.read(one.path, "state.json")
        files.write(one.path, "state.json", files.read(two.path, "state.json"))
        files.write(two.path, "state.json", kept)
        for published in (one, two):
            with pytest.raises(CheckpointCorrupt):
                checkpoints.load(published.path)

    @pytest.mark.parametrize("same", [False, True], ids=["steps", "writers"])
    def test_exchanged_checkpoints_are_noticed(self, checkpoints: Checkpoints, same: bool) -> None:
        one, two = save(checkpoints, "one", step=3), save(checkpoints, "two", step=3 if same else 4)
        self.files(checkpoints).swap(one.path, two.path)
        for published in (one, two):
            with pytest.raises(CheckpointCorrupt, match="another checkpoint"):
                checkpoints.load(published.path, digest=published.digest)

    def test_an_exchanged_step_is_noticed_by_its_path_alone(self, checkpoints: Checkpoints) -> None:
        one, two = save(checkpoints, "one", step=3), save(checkpoints, "two", step=4)
        self.files(checkpoints).swap(one.path, two.path)
        with pytest.raises(CheckpointCorrupt, match="another checkpoint"):
            checkpoints.load(one.path)
        assert checkpoints.scan(7) == []

    @pytest.mark.parametrize("wrong", [{"trial": 8}, {"attempt": 2}, {"step": 1}, {"digest": "0" * 32}])
    def test_what_the_row_says_is_compared(self, checkpoints: Checkpoints, wrong: dict[str, Any]) -> None:
        published = save(checkpoints, 1)
        with pytest.raises(CheckpointCorrupt, match="another checkpoint"):
            checkpoints.load(published.path, **wrong)

    def test_no_pickle_is_executed_unasked(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "state.pkl").write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "ran") + b"'\ntR.")
        published = save(checkpoints, tmp_path / "in")
        checkpoints.load(published.path)
        staged = checkpoints.stage(7, 1, 1)
        shutil.copy(tmp_path / "in" / "state.pkl", staged)
        claimed = checkpoints.publish(staged, manifest_of(hash_directory(staged), step=1, serializer="safe"))
        with pytest.raises(CheckpointCorrupt):
            checkpoints.load(claimed.path)
        assert not (tmp_path / "ran").exists()

    def test_deleting(self, checkpoints: Checkpoints) -> None:
        one, two = save(checkpoints, 1), save(checkpoints, 2, step=1)
        checkpoints.delete(one.path)
        checkpoints.delete(one.path)
        with pytest.raises(CheckpointNotFound):
            checkpoints.load(one.path)
        assert checkpoints.load(two.path).state == 2
        assert [path for path, _, _ in checkpoints.scan(7)] == [two.path]

    def test_sweeping_keeps_what_is_named_and_other_trials(self, checkpoints: Checkpoints) -> None:
        kept, lost, other = save(checkpoints, 1), save(checkpoints, 2, step=1), save(checkpoints, 3, trial=8)
        staged = checkpoints.stage(7, 1, 2)
        removed = checkpoints.sweep(7, [kept.path])
        assert lost.path in removed
        assert len(removed) == 2
        assert not staged.exists()
        assert checkpoints.sweep(7, [kept.path]) == []
        assert [checkpoints.load(published.path).state for published in (kept, other)] == [1, 3]

    def test_nothing_is_logged_when_nothing_is_wrong(self, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            checkpoints.delete(save(checkpoints, 1).path)
            checkpoints.sweep(7, [])
        assert not caplog.records
