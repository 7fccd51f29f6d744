"""``holdfast.CheckpointStore``: durable, verified, fenced checkpoints for any training loop, without a search or a database."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from holdfast.core.checkpoint import Checkpoint, CheckpointStatus, check_step
from holdfast.core.checkpoint_config import CheckpointConfig
from holdfast.core.deadline import Deadline
from holdfast.core.errors import HoldfastError, InvalidInput, NotStorable, SpecError
from holdfast.core.spec import explain
from holdfast.core.values import Json, Metrics, plain_metrics
from holdfast.storage.checkpoints import leaving, writer
from holdfast.storage.checkpoints.background import Background
from holdfast.storage.checkpoints.catalog import Entry
from holdfast.storage.checkpoints.loading import Loader, info_of
from holdfast.storage.checkpoints.manifest import FileEntry, Kind, Manifest
from holdfast.storage.checkpoints.names import FLAT, STAGING
from holdfast.storage.checkpoints.place import Place
from holdfast.storage.checkpoints.saving import Draft, Saver
from holdfast.storage.checkpoints.serializers import called, hash_directory, prepare
from holdfast.storage.checkpoints.staged import StagedPath

log = logging.getLogger(__name__)

Which = int | str | os.PathLike[str]
"""A step, one of ``latest``, ``last``, ``best`` and ``first``, or a checkpoint's path."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint of a store: ``path`` is its folder, or its URL on an object store."""

    step: int
    path: Path | str
    metrics: Metrics
    info: dict[str, Json]
    run_config: dict[str, Json] | None
    created: str
    """ISO 8601, UTC"""
    bytes: int | None
    """those of its files; None while it is being saved in the background"""
    _load: Callable[[], Any] = dataclasses.field(repr=False, compare=False)

    def load(self) -> Any:
        """Return the state, or the folder of files; CheckpointCorrupt when it is damaged, CheckpointNotFound when gone."""
        return self._load()


class CheckpointStore:
    """Checkpoints of one training run, in a folder or below an object store's URL.

    Any number of processes may read; they write nothing but notes of what they find bad. The first save takes the store over
    from whoever wrote before: that one's next save raises Fenced. Steps rise; :meth:`rewind` goes back.

    With ``asynchronous`` in its config, ``save`` copies the state, ``finalize`` takes the directory, and both return; one save
    is under way at most. The next one that is due, and whatever reads, waits for it and raises its error in place of its own
    work. The end of the process and SIGTERM wait for it, too.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        config: CheckpointConfig | Mapping[str, Any] | None = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: Any = None,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        """Open the store at ``path``, or at the config's ``directory``; nothing is read or made yet.

        ``storage_options`` are fsspec's, ``filesystem`` is a file system of one's own, fsspec's or pyarrow's. ``cache`` is the
        folder for local copies of an object store's checkpoints, a temporary one by default; ``cache_bytes`` is what they may
        take there (10 GiB). Raises SpecError for a config or a URL that makes no sense.
        """
        self.config = _config(config)
        where = _location(path, self.config)
        self._place = Place.at(where, options=storage_options, filesystem=filesystem, cache=cache, cache_bytes=cache_bytes)
        self._loader = Loader(self._place, self.config)
        self._saver = Saver(self._place, self.config)
        self._drafts: dict[Path, Draft] = {}
        self._lock = threading.RLock()
        self._background = Background("holdfast-checkpoint")
        self._pid = os.getpid()
        limit = self.config.save_before
        if self.config.asynchronous:
            leaving.watch_sigterm()
        self._deadline = Deadline(None if limit is None else time.monotonic() + limit, time.monotonic)

    def __repr__(self) -> str:
        return f"CheckpointStore({self._place.root.location!r})"

    @property
    def path(self) -> Path | str:
        """The folder, or the URL."""
        return self._place.folder or self._place.root.location

    def should_save(self, step: int) -> bool:
        """Tell whether :meth:`save` keeps this step: it is due, or expected to be the last one before ``save_before``."""
        return self.config.is_due(check_step(step)) or (self.config.saves and self._deadline.due(step))

    def save(
        self, step: int, state: Any, metrics: Mapping[str, Any] | None = None, *, run_config: Any = None
    ) -> StoredCheckpoint | None:
        """Save ``state`` (a value, or a function that returns it) if the step is due; return the checkpoint, or None.

        It is durable when this returns, unless saves are asynchronous. Raises InvalidStep for a step before the newest,
        CheckpointConflict when the step is there already, NotStorable naming the place inside the state, Fenced when another
        process took over, StorageError; then nothing has changed.
        """
        due = self.should_save(step)
        last_in_time = self._deadline.reported(step)
        if not due:
            return None
        with self._quiet():
            draft = _draft(step, metrics, "metrics", run_config)
            self._saver.check_new(step)
            prepared = prepare(called(state), serializer=self.config.serializer, copy=self.config.asynchronous)
            staged = self._saver.stage(step)
            return self._commit(staged, draft, prepared.serializer, prepared.write, last_in_time=last_in_time)

    def stage(self, step: int, training_info: Mapping[str, Any] | None = None, run_config: Any = None) -> StagedPath:
        """Return a new directory to write the checkpoint's files into, on the store's own file system.

        :meth:`finalize` publishes it; as a context manager it does that at the end of the block, and discards it after an
        error. ``training_info`` is what :meth:`training_info` returns, and its numbers are the metrics; ``run_config`` is a
        mapping, a pydantic model or a dataclass. Raises as :meth:`save`.
        """
        with self._quiet():
            draft = _draft(check_step(step), training_info, "training_info", run_config)
            self._saver.check_new(step)
            staged = self._saver.stage(step)
            self._drafts[staged] = draft
            return StagedPath.of(staged, self.finalize, self.discard)

    def finalize(self, path: str | os.PathLike[str]) -> StoredCheckpoint:
        """Make a staged directory a checkpoint, atomically and durably, and prune by the rules. Raises as :meth:`save`."""
        with self._quiet():
            staged = Path(os.path.abspath(path))
            draft = self._drafts.get(staged)
            if draft is None:
                raise InvalidInput(f"{path} was not staged by this store, or is finalized or discarded already")
            self._saver.check_new(draft.step)
            del self._drafts[staged]
            try:
                return self._commit(staged, draft, "directory", hash_directory)
            except NotStorable:
                self._drafts[staged] = draft  # its files can be mended
                raise

    def discard(self, path: str | os.PathLike[str]) -> None:
        """Remove a staged directory; nothing happens to any other one."""
        with self._lock:
            staged = Path(os.path.abspath(path))
            if self._drafts.pop(staged, None) is not None and os.getpid() == self._pid:
                self._saver.discard(staged)

    def rewind(self, step: int) -> None:
        """Go back to a step: later checkpoints count no more, and are deleted once the next one is saved.

        What is staged is given up. Raises CheckpointNotFound when there is no checkpoint of that step, Fenced when another
        process took over.
        """
        with self._looking(again=True):
            self._saver.check()
            if self._place.catalog.at(check_step(step)) is None:
                raise self._place.missing(step)
            for staged in list(self._drafts):
                self.discard(staged)
            self._saver.take_over(rewind=step)

    def flush(self) -> None:
        """Wait until nothing is being saved in the background; raises its error, once."""
        with self._quiet():
            pass

    def close(self) -> None:
        """Flush, and remove what is staged; the store can be used again."""
        try:
            self.flush()
        finally:
            for staged in list(self._drafts):
                self.discard(staged)  # in a fork, nothing: they are its parent's

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except HoldfastError:
            if error is None:
                raise
            log.exception("a save in the background failed, too")  # it must not hide the first error

    def steps(self) -> list[int]:
        """Return the steps that there is a checkpoint of, ascending."""
        with self._looking(again=True):
            return [entry.step for entry in self._place.catalog.all()]

    def checkpoints(self) -> list[StoredCheckpoint]:
        """Return the checkpoints, oldest first."""
        with self._looking(again=True):
            return [self._stored(entry.path, entry.manifest) for entry in self._place.catalog.all()]

    def rows(self) -> list[Checkpoint]:
        """Return every checkpoint that counts or was found bad, oldest first, with its status, as experiments list theirs."""
        with self._looking(again=True):
            catalog = self._place.catalog
            entries = catalog.all()
            good = catalog.checkpoints(entries, self._place.verified)
            bad = [
                Checkpoint(
                    id=len(entries) + place,
                    trial=0,
                    attempt=FLAT.match(name)["attempt"],
                    step=FLAT.match(name)["step"],
                    path=name,
                    digest="",
                    bytes=0,
                    status=CheckpointStatus.CORRUPT,
                    reason=reason,
                )
                for place, (name, reason) in enumerate(catalog.condemned().items())
            ]
            return sorted([*good, *bad], key=lambda each: each.step)

    def is_there(self) -> bool:
        """Tell whether anybody has saved here yet."""
        return writer.read(self._place.root).number > 0

    def history(self) -> list[tuple[int, Path | str, dict[str, Json]]]:
        """Return (step, path, training info) of each checkpoint, oldest first."""
        return [(each.step, each.path, each.info) for each in self.checkpoints()]

    def latest_path(self) -> Path | str | None:
        """Return where the newest checkpoint is, or None when there is none."""
        with self._looking():
            newest = self._place.newest()
            return None if newest is None else self._place.where(newest.path)

    def best_path(self) -> Path | str | None:
        """Return where the best checkpoint by ``metric_name`` is; without a metric, or a value of it, the newest."""
        with self._looking():
            best = self._loader.best()
            return None if best is None else self._place.where(best.path)

    def load(self, which: int | str = "latest", *, strict: bool = False) -> Any:
        """Return the state of a step, or of the ``latest`` (``last``), ``best`` or ``first``; of staged files their folder.

        A damaged checkpoint is noted as bad and, where ``which`` is a word and not ``strict``, the next one in that order is
        taken, with a warning. Raises InvalidStep, CheckpointNotFound, and CheckpointCorrupt when there is nothing good.
        """
        with self._looking():
            return self._loader.load(which, strict=strict).state

    def training_info(self, which: Which | None = None) -> dict[str, Json] | None:
        """Return what was noted with a checkpoint, the newest by default; None when there is none at all."""
        with self._looking():
            return info_of(self._loader.find(which))

    def run_config(self, which: Which | None = None) -> dict[str, Json] | None:
        """Return the run's config that was stored with a checkpoint, the newest by default; None without any."""
        with self._looking():
            entry = self._loader.find(which)
            return None if entry is None else entry.manifest.run_config

    def verify(self, step: int | None = None) -> dict[int, str]:
        """Read every file of a checkpoint, or of all; return the reason for each bad step, nothing when all are good.

        What is bad is noted and counts no more; what was noted and turns out to be good counts again.
        """
        with self._looking(again=True):
            return self._loader.verify(None if step is None else check_step(step))

    def prune(self, exclude_latest: bool = True, *, corrupt: bool = False) -> list[int]:
        """Delete what no rule of the config keeps, and return the steps; False lets even the newest go for a better one.

        What was found bad stays, as evidence, unless ``corrupt``. Pinned ones stay. A failing delete is logged, and tried again
        by the next prune. Raises Fenced when another process took over.
        """
        with self._looking(again=True):
            self._saver.check()
            return self._saver.prune(latest=exclude_latest, corrupt=corrupt)

    def pin(self, step: int) -> None:
        """Keep a checkpoint whatever the rules say, until :meth:`unpin`. CheckpointNotFound when there is none."""
        with self._looking(again=True):
            self._place.refuse_experiments()
            catalog = self._place.catalog
            entry = catalog.at(check_step(step))
            if entry is not None:
                catalog.pin(entry.path)
                if catalog.exists(entry.path):  # nobody pruned it at the same moment
                    return
                catalog.unpin(entry.path)
            raise self._place.missing(step)

    def unpin(self, step: int) -> None:
        """Take a pin away, also from a checkpoint that was given up by going back. CheckpointNotFound when there is none."""
        with self._looking(again=True):
            self._place.refuse_experiments()
            names = self._place.catalog.of_step(check_step(step))
            if not names:
                raise self._place.missing(step)
            for name in names:
                self._place.catalog.unpin(name)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Have the store for this thread alone, with nothing under way in the background."""
        if os.getpid() != self._pid:
            raise InvalidInput(f"{self!r} was opened by process {self._pid}; open it anew in this fork of it")
        leaving.make_way()
        with self._lock:
            try:
                self._background.wait()
            finally:
                leaving.done(self)
            yield

    @contextlib.contextmanager
    def _looking(self, *, again: bool = False) -> Iterator[None]:
        with self._quiet():
            self._place.catalog.look(again=again)
            yield

    def _commit(
        self,
        staged: Path,
        draft: Draft,
        serializer: Kind,
        write: Callable[[Path], list[FileEntry]],
        *,
        last_in_time: bool = False,
    ) -> StoredCheckpoint:
        """Write, publish and prune, now or in the background."""
        if last_in_time:
            self._deadline.met()

        def commit() -> Entry:
            try:
                return self._saver.commit(staged, draft, serializer, write)
            except BaseException:
                if last_in_time:
                    self._deadline.missed()
                raise

        if not self.config.asynchronous:
            entry = commit()
            return self._stored(entry.path, entry.manifest)

        leaving.begin(self)
        self._background.start(commit)
        stored = self._stored(staged.name.removeprefix(STAGING), self._saver.manifest(staged, draft, serializer, ()))
        return dataclasses.replace(stored, bytes=None)

    def _stored(self, name: str, manifest: Manifest) -> StoredCheckpoint:
        return StoredCheckpoint(
            step=manifest.step,
            path=self._place.where(name),
            metrics=manifest.metrics,
            info=manifest.info,
            run_config=manifest.run_config,
            created=manifest.created,
            bytes=manifest.size,
            _load=lambda: self.load(manifest.step),
        )


def _config(given: CheckpointConfig | Mapping[str, Any] | None) -> CheckpointConfig:
    if isinstance(given, CheckpointConfig):
        return given
    try:
        return CheckpointConfig.model_validate({} if given is None else given)
    except ValidationError as error:
        raise SpecError(explain(error, CheckpointConfig, source="config")) from None


def _location(path: str | os.PathLike[str] | None, config: CheckpointConfig) -> str | os.PathLike[str]:
    if path is None and config.directory is None:
        raise SpecError("there is no path; give CheckpointStore one, or its config a directory")
    if path is not None and config.directory is not None and os.fspath(path) != config.directory:
        raise SpecError(f"path is {os.fspath(path)!r}, and the config's directory is {config.directory!r}; give one of them")
    return path if path is not None else config.directory or ""


def _draft(step: int, info: Mapping[str, Any] | None, what: str, run_config: Any) -> Draft:
    noted = plain_metrics({} if info is None else info, what)
    scalars = {name: value for name, value in noted.items() if not isinstance(value, (dict, list))}
    return Draft(step=step, metrics=scalars, info=noted, run_config=_plain_config(run_config))


def _plain_config(given: Any) -> dict[str, Json] | None:
    if isinstance(given, BaseModel):
        given = given.model_dump(mode="json")
    elif dataclasses.is_dataclass(given) and not isinstance(given, type):
        given = dataclasses.asdict(given)
    if given is None or isinstance(given, Mapping):
        return None if given is None else plain_metrics(given, "run_config")
    raise NotStorable(f"run_config is a {type(given).__name__}; give a mapping, a pydantic model or a dataclass")
