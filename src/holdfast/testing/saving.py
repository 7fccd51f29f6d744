"""What a test of checkpoints needs: the port of a store, saving as a trial does, and damage."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from holdfast.storage.checkpoints.local import Published
from holdfast.storage.checkpoints.manifest import Manifest
from holdfast.storage.checkpoints.ports import DirectCheckpoints
from holdfast.storage.checkpoints.serializers import ingest_directory, write_state

Checkpoints = DirectCheckpoints


class Files:
    """The raw files of a published checkpoint, for a test that damages them. This one is for stores with a local root."""

    def __init__(self, store: Any) -> None:
        self.root = Path(store.root)

    def names(self, path: str) -> list[str]:
        folder = self.root / path
        return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())

    def read(self, path: str, name: str) -> bytes:
        return (self.root / path / name).read_bytes()

    def write(self, path: str, name: str, data: bytes) -> None:
        (self.root / path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path / name).write_bytes(data)

    def remove(self, path: str, name: str) -> None:
        (self.root / path / name).unlink()

    def swap(self, one: str, other: str) -> None:
        """Exchange two checkpoints whole."""
        aside = self.root / "aside"
        (self.root / one).rename(aside)
        (self.root / other).rename(self.root / one)
        aside.rename(self.root / other)


def save(
    store: Checkpoints,
    state: object,
    *,
    trial: int = 7,
    attempt: int = 1,
    step: int = 0,
    serializer: Any = "safe",
) -> Published:
    """Save as a trial does: stage, write, publish; discard when that fails. A Path as ``state`` is the user's own folder."""
    staged = store.stage(trial, attempt, step)
    try:
        if isinstance(state, Path):
            serializer, entries = "directory", ingest_directory(state, staged)
        else:
            entries = write_state(state, staged, serializer=serializer)
        return store.publish(staged, manifest_of(entries, trial=trial, attempt=attempt, step=step, serializer=serializer))
    except Exception:
        store.discard(staged)
        raise


def manifest_of(
    entries: Collection[Any], *, trial: int = 7, attempt: int = 1, step: int = 0, serializer: Any = "safe"
) -> Manifest:
    """Return a manifest with metrics that are hard to keep."""
    return Manifest(
        experiment="6e3ff0a2-0c51-4f57-a8fd-4d4bb1a9ab1c",
        trial=trial,
        attempt=attempt,
        step=step,
        writer="host:1",
        created="2026-01-01T00:00:00+00:00",
        serializer=serializer,
        metrics={"loss": float("inf"), "name": "ü", "step": step},
        files=tuple(entries),
    )


def flip(data: bytes, bit: int) -> bytes:
    """Return ``data`` with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
