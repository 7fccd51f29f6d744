"""The experiment's folder: ``experiment.json``, ``lease.json``, trials, results and logs. The path is enough."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from holdfast.core.errors import Corrupt, ExperimentNotFound, StorageError
from holdfast.core.values import Json, dumps, loads
from holdfast.storage.atomic import is_draft, make_folder, storage_error, write_file

FORMAT = 1
_BY_THE_WAY = (".lock", ".probe", "trainable.pkl")
_OWN_IN_TRIAL = re.compile(r"(result-a\d+\.json|log-a\d+\.txt)(\.\d+)?")
_OWN_CHECKPOINT = re.compile(r"(\.staging-|\.trash-)?step_\d{8,}-a\d+-[0-9a-f]{4,32}")
_TRIAL_FOLDER = re.compile(r"\d{6,}")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What ``experiment.json`` says."""

    uuid: str
    name: str
    location: str
    spec: dict[str, Any]
    workdir: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class PathLease:
    """What ``lease.json`` says."""

    epoch: int
    holder: dict[str, Any] | None
    expires: float
    """seconds since 1970 by the clock of the holder's host"""
    renewed: float
    database: str


class Folder:
    """One experiment's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def experiment_file(self) -> Path:
        return self.path / "experiment.json"

    @property
    def lease_file(self) -> Path:
        return self.path / "lease.json"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    def leftovers(self) -> list[Path]:
        """Return what a creation that was cut off leaves without ``experiment.json``: the lock, the trainable, drafts."""
        return sorted(entry for entry in self.path.iterdir() if entry.name in _BY_THE_WAY or is_draft(entry.name))

    def create(self, identity: Identity) -> None:
        """Write ``experiment.json``; the folder becomes an experiment by it."""
        make_folder(self.path)
        body = {"format": FORMAT, **vars(identity)}
        write_file(self.experiment_file, (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode())

    def identity(self) -> Identity:
        """Read ``experiment.json``; ExperimentNotFound when there is none, Corrupt when it is torn or newer."""
        body = _read(self.experiment_file)
        if body is None:
            raise ExperimentNotFound(
                f"{self.path} is no experiment: it holds no experiment.json; `holdfast list` shows the experiments of a storage"
            )
        try:
            found = _checked(json.loads(body), {"format": int, **_IDENTITY})
        except _DAMAGE as error:
            raise Corrupt(
                f"{self.experiment_file} is damaged ({type(error).__name__}: {error}); put an intact copy back"
            ) from None
        if found["format"] > FORMAT:
            raise Corrupt(f"{self.experiment_file} has format {found['format']}, this program reads {FORMAT}; update holdfast")
        return Identity(**{name: found[name] for name in _IDENTITY})

    def relocate(self, location: str) -> None:
        """Note the folder's new place in ``experiment.json``."""
        identity = self.identity()
        self.create(Identity(**{**vars(identity), "location": location}))

    def lease(self) -> PathLease | None:
        """Read ``lease.json``, or None when nobody ever drove the experiment; Corrupt when it is damaged."""
        body = _read(self.lease_file)
        if body is None:
            return None
        try:
            return PathLease(**_checked(json.loads(body), _LEASE))
        except _DAMAGE:
            raise Corrupt(
                f"{self.lease_file} is damaged; delete it if you are sure that nobody drives the experiment"
            ) from None

    def write_lease(self, lease: PathLease) -> None:
        """Replace ``lease.json``, durably: after a power failure it must not be empty. Call it under :meth:`locked`."""
        write_file(self.lease_file, (json.dumps(vars(lease)) + "\n").encode())

    @contextmanager
    def locked(self, *, patience: float = 30.0) -> Iterator[None]:
        """Hold the folder's lock, for the moment of one read and write; a process that dies lets it go.

        StorageError when another process, suspended perhaps, holds it for ``patience`` seconds.
        """
        try:
            stream = self._lock(time.monotonic() + patience)
        except StorageError:
            raise
        except OSError as error:
            raise storage_error(error, self.lock_file) from error
        with stream:
            yield

    def _lock(self, deadline: float) -> IO[str]:
        while True:
            stream = self.lock_file.open("a")
            try:
                with suppress(BlockingIOError, FileNotFoundError):
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(stream.fileno()), os.stat(self.lock_file)):
                        return stream  # not one that was deleted while we waited for it
            except BaseException:
                stream.close()
                raise
            stream.close()
            if time.monotonic() > deadline:
                raise StorageError(f"{self.lock_file} is held by another process, suspended perhaps; end that process")
            time.sleep(0.005)

    @staticmethod
    def trial_name(number: int) -> str:
        return f"trials/{number:06d}"

    @classmethod
    def result_name(cls, number: int, attempt: int) -> str:
        """Where Prefect persists an attempt's result, relative to the folder."""
        return f"{cls.trial_name(number)}/result-a{attempt}.json"

    def log_file(self, number: int, attempt: int) -> Path:
        return self.path / self.trial_name(number) / f"log-a{attempt}.txt"

    def result(self, number: int, attempt: int) -> Mapping[str, Json] | None:
        """Return the persisted result of an attempt, or None when there is none or it is torn."""
        text = _read(self.path / self.result_name(number, attempt))
        if text is None:
            return None
        try:
            body = loads(json.loads(text)["result"])
        except _DAMAGE:
            return None
        matches = isinstance(body, dict) and body.get("trial") == number and body.get("attempt") == attempt
        return body if matches else None

    def write_probe(self) -> None:
        """Raise StorageError unless the folder can be written."""
        write_file(self.path / ".probe", dumps({}).encode(), durable=False)
        (self.path / ".probe").unlink()

    def delete(self) -> list[Path]:
        """Delete what holdfast wrote, ``experiment.json`` first; return what is left because it is foreign."""
        self.identity()
        try:
            self.experiment_file.unlink()
            for trial in _entries(self.path / "trials", _TRIAL_FOLDER):
                _delete_trial(trial)
            for name in ("journal", ".prefect"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for file in (self.lease_file, *self.leftovers()):
                file.unlink(missing_ok=True)
            for folder in (self.path / "trials", self.path):
                _remove_empty(folder)
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror or error}; delete the rest by hand") from error
        return sorted(self.path.rglob("*")) if self.path.exists() else []


_IDENTITY: dict[str, type | tuple[type, ...]] = {
    "uuid": str,
    "name": str,
    "location": str,
    "spec": dict,
    "workdir": str,
    "seed": int,
}
_LEASE: dict[str, type | tuple[type, ...]] = {
    "epoch": int,
    "holder": (dict, type(None)),
    "expires": (int, float),
    "renewed": (int, float),
    "database": str,
}
_DAMAGE = (ValueError, KeyError, TypeError, RecursionError)
"""What reading a torn or altered JSON file raises."""


def _read(file: Path) -> bytes | None:
    """Return the content of ``file``, or None when there is none; StorageError when it cannot be read."""
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(error, file) from error


def _checked(body: Any, kinds: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Return the named values of ``body``; TypeError for one of another type."""
    for name, kind in kinds.items():
        if not isinstance(body[name], kind) or isinstance(body[name], bool):
            raise TypeError(f"{name} is {body[name]!r}")
    return {name: body[name] for name in kinds}


def _entries(folder: Path, own: re.Pattern[str]) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if own.fullmatch(entry.name)) if folder.is_dir() else []


def _delete_trial(trial: Path) -> None:
    """Delete a trial's checkpoints, results and logs, and its folder when nothing else is in it."""
    for checkpoint in _entries(trial / "checkpoints", _OWN_CHECKPOINT):
        shutil.rmtree(checkpoint)
    for file in _entries(trial, _OWN_IN_TRIAL):
        file.unlink()
    for entry in [*trial.iterdir()] if trial.is_dir() else []:
        if is_draft(entry.name):
            entry.unlink()
    _remove_empty(trial / "checkpoints")
    _remove_empty(trial)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
