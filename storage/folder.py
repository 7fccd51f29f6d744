"""The experiment's folder: ``experiment.json``, ``lease.json``, trials, results and logs. The path is enough."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.errors import Corrupt, ExperimentNotFound, StorageError
from holdfast.core.values import Json, dumps, loads
from holdfast.storage.atomic import make_folder, storage_error, write_file

FORMAT = 1
_TRIAL_FOLDER = re.compile(r"^\d{6,}$")


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

    def create(self, identity: Identity) -> None:
        """Write ``experiment.json``; the folder becomes an experiment by it."""
        make_folder(self.path)
        body = {"format": FORMAT, **vars(identity)}
        write_file(self.experiment_file, (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode())

    def identity(self) -> Identity:
        """Read ``experiment.json``; ExperimentNotFound when there is none, Corrupt when it is torn or newer."""
        try:
            text = self.experiment_file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ExperimentNotFound(
                f"{self.path} is no experiment: it holds no experiment.json; `holdfast list` shows the experiments of a storage"
            ) from None
        except OSError as error:
            raise storage_error(error, self.experiment_file) from error
        try:
            body = json.loads(text)
            if body["format"] > FORMAT:
                raise Corrupt(
                    f"{self.experiment_file} has format {body['format']}, this program reads {FORMAT}; update holdfast"
                )
            return Identity(**{name: body[name] for name in Identity.__dataclass_fields__})
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(
                f"{self.experiment_file} is damaged ({type(error).__name__}: {error}); put an intact copy back"
            ) from None

    def relocate(self, location: str) -> None:
        """Note the folder's new place in ``experiment.json``."""
        identity = self.identity()
        self.create(Identity(**{**vars(identity), "location": location}))

    def lease(self) -> PathLease | None:
        """Read ``lease.json``, or None when nobody ever drove the experiment; Corrupt when it is damaged."""
        try:
            body = json.loads(self.lease_file.read_bytes())
            return PathLease(**{name: body[name] for name in PathLease.__dataclass_fields__})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise Corrupt(
                f"{self.lease_file} is damaged; delete it if you are sure that nobody drives the experiment"
            ) from None

    def write_lease(self, lease: PathLease, *, durable: bool = True) -> None:
        """Replace ``lease.json``; call it under :meth:`locked`."""
        write_file(self.lease_file, (json.dumps(vars(lease)) + "\n").encode(), durable=durable)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock, for the moment of one read and write of ``lease.json``."""
        try:
            stream = (self.path / ".lock").open("a")
        except OSError as error:
            raise storage_error(error, self.path / ".lock") from error
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

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
        try:
            record = json.loads((self.path / self.result_name(number, attempt)).read_bytes())
            body = loads(record["result"])
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
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
            for name in ("experiment.json", "lease.json", ".lock"):
                (self.path / name).unlink(missing_ok=True)
            for name in ("journal", ".prefect"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            trials = self.path / "trials"
            for entry in sorted(trials.iterdir()) if trials.is_dir() else []:
                if _TRIAL_FOLDER.match(entry.name):
                    shutil.rmtree(entry)
            for folder in (trials, self.path):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror or error}; delete the rest by hand") from error
        return sorted(self.path.rglob("*")) if self.path.exists() else []
