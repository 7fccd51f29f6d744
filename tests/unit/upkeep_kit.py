"""An experiment with real checkpoints, driven by hand, and what crashes leave of them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.core.trial import Outcome
from holdfast.locate import Opened
from holdfast.storage.checkpoints.local import LocalCheckpoints, Published
from holdfast.storage.checkpoints.ports import checkpoints_in
from holdfast.storage.checkpoints.serializers import write_state
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.leases import Leases
from holdfast.testing.lab import Lab
from holdfast.testing.saving import manifest_of

FOREIGN = [
    "step_[1]",
    "notes *.txt",
    "weights ü.bin",
    "step_00000001",
    ".staging-mine",
    " ",
    "manifest.json",
    ".holdfast-draft-x",
]


@dataclass
class Shop:
    """One experiment, its rows and its files."""

    opened: Opened
    lab: Lab

    @classmethod
    def of(cls, opened: Opened, epoch: int = 1) -> Shop:
        Leases(opened.database, opened.record.id).take(
            seen=epoch - 1, epoch=epoch, holder={"pid": 1, "host": "gone"}, action="started", detail={}
        )
        return cls(opened, Lab(opened.database, opened.record, epoch))

    @property
    def store(self) -> Any:
        return checkpoints_in(self.opened.folder)

    @property
    def path(self) -> Path:
        return self.opened.folder.path

    def publish(self, writer: AttemptWriter, step: int, *, trial: int = 0) -> Published:
        """Publish a checkpoint that no row names."""
        staged = self.store.stage(trial, writer.number, step)
        files = write_state({"step": step, "w": np.full(3000, float(step))}, staged, serializer="safe")
        manifest = manifest_of(files, trial=trial, attempt=writer.number, step=step)
        return self.store.publish(staged, replace(manifest, experiment=self.opened.record.uuid))

    def save(self, writer: AttemptWriter, step: int, *, trial: int = 0) -> str:
        """Publish a checkpoint with its row and report; return its path."""
        published = self.publish(writer, step, trial=trial)
        saved = Saved(path=published.path, digest=published.digest, bytes=published.bytes)
        writer.report(step, {"loss": float(step)}, saved=saved)
        return published.path

    def leave(self, ended: str = "stopped on request") -> None:
        """Let the driver go."""
        Leases(self.opened.database, self.opened.record.id).release(epoch=self.lab.epoch, active=5.0, ended=ended)

    def row(self, path: str) -> Any:
        return next(item for item in self.lab.reader.checkpoints() if item.path == path)

    def foreign(self) -> list[Path]:
        """Put files and folders that are not holdfast's everywhere; return them."""
        files = []
        for place in ("", "journal", "trials", "trials/000000", "trials/000000/checkpoints"):
            for name in FOREIGN:
                file = self.path / place / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("mine")
                files.append(file)
        (self.path / "trials/000000/checkpoints" / "step_00000001-a1-zz").mkdir()
        link = self.path / "trials/000000/checkpoints" / "step_00000001-a1-00ff"
        link.symlink_to(self.path)
        return [*files, link]


def reachable(place: Path) -> None:
    """Let everybody come to a place below the folder for temporary files."""
    for parent in place.parents:
        if parent.is_relative_to(tempfile.gettempdir()) and str(parent) != tempfile.gettempdir():
            parent.chmod(0o755)


def staged_and_trash(store: LocalCheckpoints, kept: str) -> list[str]:
    """Leave a staged and a half deleted checkpoint; return their paths."""
    staged = store.stage(0, 1, 9)
    write_state([1, 2, 3], staged, serializer="safe")
    folder = Path(kept).parent
    trash = store.root / folder / ".trash-step_00000009-a1-00aa"
    trash.mkdir()
    (trash / "state.json").write_text("1")
    return [staged.relative_to(store.root).as_posix(), trash.relative_to(store.root).as_posix()]


def end(shop: Shop, writer: AttemptWriter, outcome: Outcome = Outcome.LOST) -> None:
    shop.lab.driver.end(writer.attempt, Ending(outcome=outcome))
