"""The experiment's folder, or its prefix on an object store: identity, lease, trials, results and logs. The path is enough."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.core.errors import Corrupt, ExperimentExists, ExperimentNotFound, LeaseHeld, StorageError
from holdfast.core.values import Json, dumps, loads
from holdfast.storage.atomic import is_draft, make_folder, write_file
from holdfast.storage.checkpoints.names import PIN
from holdfast.storage.root import DAMAGE, LOCK, LocalRoot, Root, checked, damaged, join, open_root

FORMAT = 1
IDENTITY = "experiment.json"
LEASE = "lease.json"
JOURNAL = "journal"
CODE = "code"
"""Where shipped code is: an archive by its digest."""
TRAINABLE = "trainable.pkl"
LONGEST_LOG = 4 << 20
"""Bytes of an attempt's log that are kept on an object store: its end."""
_PROBE = ".probe"
FORKING = ".fork.json"
"""Who makes a folder that is to be a fork; gone when it is one."""
_BY_THE_WAY = (LOCK, _PROBE, TRAINABLE, FORKING)
OWN_IN_TRIAL = re.compile(r"(result-a\d+\.json|log-a\d+\.txt)(\.\d+)?")
OWN_CODE = re.compile(r"([0-9a-f]{32})\.zip")
_OWN_CHECKPOINT = re.compile(r"(\.staging-|\.trash-|\.pin-)?step_\d{8,}-a\d+-[0-9a-f]{4,32}")
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
    spec_source: str | None = None
    git_commit: str | None = None
    ancestors: list[str] = field(default_factory=list)
    """UUIDs of the experiments that this one was copied from, the first one last"""
    forked_from: str | None = None
    """UUID of the original when it was forked: unlike a copy's, the original's rows in a database are never its own"""


@dataclass(frozen=True, kw_only=True)
class PathLease:
    """What ``lease.json`` says."""

    epoch: int
    holder: dict[str, Any] | None
    expires: float
    """seconds since 1970 by the clock of the holder's host"""
    renewed: float
    database: str
    uuid: str = ""
    """the experiment's: the lease of an original means nothing in its copy"""
    token: str = ""
    """of the epoch: two databases may count alike, but never draw alike"""


@dataclass
class LeaseFile:
    """``lease.json`` while it is being changed."""

    root: Root
    found: PathLease | None
    _version: str | None

    def write(self, lease: PathLease) -> None:
        """Replace it durably; LeaseHeld when another host was faster."""
        if not self.root.replace(LEASE, (json.dumps(vars(lease)) + "\n").encode(), self._version):
            raise LeaseHeld(f"another host changed {join(self.root.location, LEASE)} at the same moment; nothing was changed")


class Folder:
    """One experiment's files. ``path`` is where processes of this host work: the folder itself, or a remote one's stand-in."""

    def __init__(self, root: Root | Path, work: Path | None = None, cache_bytes: int | None = None) -> None:
        self.root: Root = LocalRoot(root) if isinstance(root, Path) else root
        self.location = self.root.location
        self.path = work if work is not None else Path(self.location)
        self.cache_bytes = cache_bytes

    @classmethod
    def at(
        cls,
        location: str,
        *,
        options: Mapping[str, Any] | None = None,
        work: Path | None = None,
        cache_bytes: int | None = None,
    ) -> Folder:
        """Return the folder at a location; an object store's needs ``work``, a local folder to work in.

        ``cache_bytes`` is what copies of checkpoints may take there (None: what :mod:`checkpoints.cache` says).
        """
        root = open_root(location, options)
        return cls(root, None if isinstance(root, LocalRoot) else work, cache_bytes)

    @property
    def is_local(self) -> bool:
        return isinstance(self.root, LocalRoot)

    @property
    def place(self) -> Path | str:
        """The location as people name it: a path, or an object store's URL."""
        return self.path if self.is_local else self.location

    def bring(self, name: str) -> None:
        """Have a file of the experiment under ``path``, where processes of this host read it; Corrupt when it is missing."""
        if self.is_local:
            return
        content = self.root.read(name)
        if content is None:
            raise Corrupt(f"{join(self.location, name)} is missing; put it back")
        make_folder(self.path)
        write_file(self.path / name, content, durable=False)

    def keep_log(self, number: int, attempt: int) -> None:
        """Keep the end of an attempt's log on the object store, and not here any more; StorageError when it refuses."""
        if self.is_local:
            return
        log = self.log_file(number, attempt)
        with suppress(FileNotFoundError):
            with log.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(size - LONGEST_LOG, 0))
                text = stream.read(LONGEST_LOG)
            left_out = f"[{size - len(text)} bytes left out]\n".encode() if size > len(text) else b""
            if text:
                self.root.write(f"{self.trial_name(number)}/{log.name}", left_out + text)
            log.unlink()

    def tidy(self) -> None:
        """Remove what a remote experiment's work left on this host; what is in use, or unknown, stays."""
        if self.is_local or not self.path.is_dir():
            return
        with suppress(OSError):
            (self.path / TRAINABLE).unlink(missing_ok=True)
        for folder in sorted((entry for entry in self.path.rglob("*") if entry.is_dir()), reverse=True):
            with suppress(OSError):
                folder.rmdir()
        with suppress(OSError):
            self.path.rmdir()

    def leftovers(self) -> list[str]:
        """Return what a creation that was cut off leaves without ``experiment.json``: the lock, the trainable, drafts."""
        return [name for name in self.root.names() if name in _BY_THE_WAY or is_draft(name)]

    def exists(self) -> bool:
        """Tell whether there is an experiment."""
        return self.root.read(IDENTITY) is not None

    def create(self, identity: Identity) -> None:
        """Write ``experiment.json``, by which the folder becomes an experiment; ExperimentExists when it is one already."""
        _, version = self.root.versioned(IDENTITY)
        if self.exists() or not self.root.replace(IDENTITY, _body(identity), version):
            raise ExperimentExists(f"{self.location} holds an experiment already; choose another name")

    def rewrite(self, identity: Identity) -> None:
        """Replace ``experiment.json``."""
        self.root.write(IDENTITY, _body(identity))

    def identity(self) -> Identity:
        """Read ``experiment.json``; ExperimentNotFound when there is none, Corrupt when it is torn or newer."""
        body = self.root.read(IDENTITY)
        if body is None:
            raise ExperimentNotFound(
                f"{self.location} is no experiment: it holds no {IDENTITY}; `holdfast list` shows the experiments of a storage"
            )
        try:
            found = json.loads(body)
            if checked(found, {"format": int})["format"] > FORMAT:
                file = join(self.location, IDENTITY)
                raise Corrupt(f"{file} has format {found['format']}, this program reads {FORMAT}; update holdfast")
            known = {name: found[name] for name in _OPTIONAL if name in found}
            return Identity(**checked(found, _IDENTITY), **checked(known, {name: _OPTIONAL[name] for name in known}))
        except DAMAGE as error:
            raise damaged(self.location, IDENTITY, error) from None

    def relocate(self, location: str) -> None:
        """Note the folder's new place in ``experiment.json``."""
        self.rewrite(Identity(**{**vars(self.identity()), "location": location}))

    def lease(self) -> PathLease | None:
        """Read ``lease.json``, or None when nobody ever drove the experiment; Corrupt when it is damaged."""
        return self._lease(self.root.read(LEASE))

    def _lease(self, body: bytes | None) -> PathLease | None:
        if body is None:
            return None
        try:
            found = json.loads(body)
            known = {name: found[name] for name in ("uuid", "token") if name in found}
            return PathLease(**checked(found, _LEASE), **checked(known, dict.fromkeys(known, str)))
        except DAMAGE:
            raise Corrupt(
                f"{join(self.location, LEASE)} is damaged; delete it if you are sure that nobody drives the experiment"
            ) from None

    @contextmanager
    def changing_lease(self) -> Iterator[LeaseFile]:
        """Read ``lease.json`` to change it; of several hosts at once one succeeds."""
        with self.root.exclusive():
            body, version = self.root.versioned(LEASE)
            yield LeaseFile(self.root, self._lease(body), version)

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
        text = self.root.read(self.result_name(number, attempt))
        if text is None:
            return None
        try:
            body = loads(json.loads(text)["result"])
        except DAMAGE:
            return None
        matches = isinstance(body, dict) and body.get("trial") == number and body.get("attempt") == attempt
        return body if matches else None

    def write_probe(self) -> None:
        """Raise StorageError unless the folder can be written."""
        self.root.write(_PROBE, dumps({}).encode(), durable=False)
        self.root.delete(_PROBE)

    def delete(self) -> list[str]:
        """Delete what holdfast wrote, ``experiment.json`` first; return what is left because it is foreign."""
        self.identity()
        self.root.delete(IDENTITY)
        return self.clear()

    def clear(self, but: Sequence[str] = ()) -> list[str]:
        """Delete what holdfast wrote into a folder that is no experiment, except the files in ``but``; return what is left."""
        if self.exists():
            raise ExperimentExists(f"{self.location} holds an experiment; delete that")
        if not self.is_local:
            return self._delete_remote(but)
        try:
            for trial in _entries(self.path / "trials", _TRIAL_FOLDER):
                _delete_trial(trial)
            self._delete_code()
            for name in (JOURNAL, ".prefect"):
                self.root.delete_folder(name)
            for name in (LEASE, *self.leftovers()):
                if name not in but:
                    self.root.delete(name)
            for folder in (self.path / "trials", self.path / CODE, self.path):
                _remove_empty(folder)
        except OSError as error:
            raise StorageError(f"{self.location}: {error.strerror or error}; delete the rest by hand") from error
        return sorted(map(str, self.path.rglob("*"))) if self.path.exists() else []

    def _delete_remote(self, but: Sequence[str]) -> list[str]:
        for number in self.root.names("trials"):
            if _TRIAL_FOLDER.fullmatch(number):
                for name in self.root.names(f"trials/{number}"):
                    if OWN_IN_TRIAL.fullmatch(name):
                        self.root.delete(f"trials/{number}/{name}")
                for name in self.root.names(f"trials/{number}/checkpoints"):
                    if name.startswith(PIN) and _OWN_CHECKPOINT.fullmatch(name):
                        self.root.delete(f"trials/{number}/checkpoints/{name}")
                    elif _OWN_CHECKPOINT.fullmatch(name):
                        self.root.delete_folder(f"trials/{number}/checkpoints/{name}")
        self._delete_code()
        self.root.delete_folder(JOURNAL)
        for name in (LEASE, *self.leftovers()):
            if name not in but:
                self.root.delete(name)
        if self.path != Path(self.location):
            shutil.rmtree(self.path, ignore_errors=True)  # where this host worked on it
        return [join(self.location, name) for name in self.root.names()]

    def _delete_code(self) -> None:
        for name in self.root.names(CODE):
            if OWN_CODE.fullmatch(name) or is_draft(name):
                self.root.delete(f"{CODE}/{name}")


def _body(identity: Identity) -> bytes:
    return (json.dumps({"format": FORMAT, **vars(identity)}, indent=2, ensure_ascii=False) + "\n").encode()


_OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "spec_source": (str, type(None)),
    "git_commit": (str, type(None)),
    "ancestors": list,
    "forked_from": (str, type(None)),
}
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


def _entries(folder: Path, own: re.Pattern[str]) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if own.fullmatch(entry.name)) if folder.is_dir() else []


def _delete_trial(trial: Path) -> None:
    """Delete a trial's checkpoints, results and logs, and its folder when nothing else is in it."""
    for checkpoint in _entries(trial / "checkpoints", _OWN_CHECKPOINT):
        if checkpoint.is_dir() and not checkpoint.is_symlink():
            shutil.rmtree(checkpoint)
        elif checkpoint.name.startswith(PIN):
            checkpoint.unlink()
    for file in _entries(trial, OWN_IN_TRIAL):
        file.unlink()
    for entry in [*trial.iterdir()] if trial.is_dir() else []:
        if is_draft(entry.name):
            entry.unlink()
    _remove_empty(trial / "checkpoints")
    _remove_empty(trial)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
