"""Pins in an experiment's path: an empty file beside each pinned checkpoint, so that they outlive any database."""

from __future__ import annotations

from holdfast.storage.checkpoints.names import PIN, TRIALS, is_name
from holdfast.storage.root import Root


def marker(path: str) -> str:
    """Return the path of the file that pins the checkpoint at ``path``."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{PIN}{name}"


def pinned(root: Root, trial: int) -> set[str]:
    """Return the paths of the trial's checkpoints that have a marker, whether they are there or not."""
    folder = TRIALS.folder(trial)
    names = (name.removeprefix(PIN) for name in root.names(folder.rstrip("/")) if name.startswith(PIN))
    return {folder + name for name in names if is_name(name)}
