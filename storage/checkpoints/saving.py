"""Saving to a store of its own: taken over from the writer before, published atomically, pruned by the rules."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from holdfast.core import retention
from holdfast.core.checkpoint_config import CheckpointConfig
from holdfast.core.errors import CheckpointConflict, Fenced, HoldfastError, InvalidInput, InvalidStep, NotStorable, StorageError
from holdfast.core.values import Json, Metrics
from holdfast.storage.atomic import make_folder
from holdfast.storage.checkpoints import writer
from holdfast.storage.checkpoints.catalog import Entry
from holdfast.storage.checkpoints.local import LocalCheckpoints, may_go
from holdfast.storage.checkpoints.manifest import FileEntry, Kind, Manifest
from holdfast.storage.checkpoints.names import FLAT, TRASH
from holdfast.storage.checkpoints.place import Place

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What is known of a checkpoint before it has files."""

    step: int
    metrics: Metrics
    info: dict[str, Json]
    run_config: dict[str, Json] | None


class Saver:
    """The writer of a place, once it has taken it over. One thread at a time."""

    def __init__(self, place: Place, config: CheckpointConfig) -> None:
        self._place = place
        self._config = config
        self._record: writer.Record | None = None
        self._checkpoints = place.checkpoints
        self._trash: set[str] = set()

    def take_over(self, *, rewind: int | None = None) -> None:
        """Become the writer; with ``rewind`` later checkpoints count no more. CheckpointNotFound when there is none of it."""
        place = self._place
        place.refuse_experiments()
        if place.folder is not None:
            make_folder(place.folder)
        record, there = writer.take_over(place.root, place.folder, self._listing, rewind=rewind)
        if place.folder is not None:
            self._checkpoints = LocalCheckpoints(place.folder, layout=FLAT, own=record.folder)
        else:
            place.sweep()
        place.catalog.own(record)
        self._record = record
        if rewind is not None and not there:
            raise place.missing(rewind)

    def _listing(self) -> list[tuple[int, int]]:
        found = []
        for name in self._place.root.names():
            with contextlib.suppress(InvalidInput):
                parts = FLAT.match(name)
                found.append((parts["attempt"], parts["step"]))
        return found

    def check_new(self, step: int) -> None:
        """Raise CheckpointConflict or InvalidStep unless ``step`` comes after the newest checkpoint; be the writer."""
        if self._record is None:
            self.take_over()
        catalog = self._place.catalog
        if self._record is not None and catalog.taken(step, self._record.number):
            self.take_over()  # what is there of this step is bad; a later writer's replaces it
        newest = self._place.newest()
        if newest is None or step > newest.step:
            return
        where = self._place.root.location
        back = "to train again from an earlier step, call rewind(step) with that one first"
        if catalog.at(step) is not None:
            raise CheckpointConflict(f"step {step} is in {where} already, and stays as it is; {back}")
        raise InvalidStep(
            f"step is {step}; it must be greater than that of the newest checkpoint in {where}, {newest.step}; {back}"
        )

    def stage(self, step: int) -> Path:
        """Return a new staging directory; Fenced when another process took over."""
        assert self._record is not None
        writer.check(self._place.root, self._record)
        try:
            return self._checkpoints.stage(0, self._record.number, step)
        except StorageError as error:
            raise self._refused(error) from error

    def discard(self, staged: Path) -> None:
        """Remove a staging directory, if it is there."""
        self._checkpoints.discard(staged)

    def manifest(self, staged: Path, draft: Draft, serializer: Kind, files: Sequence[FileEntry]) -> Manifest:
        """Return what the checkpoint will say of itself."""
        assert self._record is not None
        return Manifest(
            experiment="",
            trial=0,
            attempt=self._record.number,
            step=draft.step,
            writer=staged.name.rpartition("-")[2],
            created=datetime.now(UTC).isoformat(),
            serializer=serializer,
            metrics=draft.metrics,
            info=draft.info,
            run_config=draft.run_config,
            files=tuple(files),
        )

    def commit(self, staged: Path, draft: Draft, serializer: Kind, write: Callable[[Path], list[FileEntry]]) -> Entry:
        """Write the files, publish, and prune; after an error the staging directory is gone and nothing has changed."""
        assert self._record is not None
        root, catalog = self._place.root, self._place.catalog
        try:
            manifest = self.manifest(staged, draft, serializer, write(staged))
            writer.check(root, self._record)
            published = self._checkpoints.publish(staged, manifest)
        except BaseException as error:
            if not (isinstance(error, NotStorable) and serializer == "directory"):  # whose files can be mended
                self.discard(staged)
            if isinstance(error, StorageError | NotStorable):  # what is staged goes away with our folder
                raise self._refused(error) from error
            if not isinstance(error, Exception):  # it may have come right after the rename
                catalog.look(again=True)
            raise
        if self._place.folder is None:  # there nobody could take our folder away: what came too late counts for nobody
            try:
                writer.check(root, self._record)
            except HoldfastError:
                self._checkpoints.delete(published.path)
                raise
        entry = catalog.added(published.path, manifest, published.digest)
        try:
            self.prune()
        except HoldfastError as error:  # it is saved, whatever becomes of others
            log.warning("pruning %s failed, the next save tries again: %s", root.location, error)
        return entry

    def _refused(self, error: Exception) -> Exception:
        """Return Fenced for an error whose cause is that another process took over, or is about to, else the error."""
        assert self._record is not None
        try:
            writer.check(self._place.root, self._record)
        except HoldfastError as fenced:
            return fenced
        if self._place.folder is not None and not (self._place.folder / self._record.folder).is_dir():
            return Fenced(f"{self._place.folder}: another process takes over from this one; nothing was written")
        return error

    def check(self) -> None:
        """Raise Fenced when this was the writer once, and another process took over."""
        if self._record is not None:
            writer.check(self._place.root, self._record)

    def prune(self, *, latest: bool = True, corrupt: bool = False) -> list[int]:
        """Delete what no rule keeps, what counts no more, and with ``corrupt`` what is bad; return the steps that are gone.

        What cannot be deleted is logged, and tried again the next time.
        """
        catalog = self._place.catalog
        if self._record is None:
            self._place.refuse_experiments()
        surplus = self._surplus(latest=latest)
        if surplus:
            catalog.look(again=True)  # others may have pinned one, or found one bad, on which more depends then
            surplus = self._surplus(latest=latest)
        # Without a writer all that is there counts, so that nothing is given up.
        others = [other.name for other in catalog.others if catalog.record.number]
        bad = list(catalog.condemned()) if corrupt else []
        names = [*(name for name in (*others, *bad) if self._may_go(name)), *(entry.path for entry in surplus)]
        for name in {*names, *self._trash}:
            self._checkpoints.delete(name, spared=partial(catalog.is_pinned, name))
        gone = {name for name in names if not catalog.exists(name)}
        self._trash = self._left() if names or self._trash else set()
        catalog.removed(gone)
        catalog.drop_markers(gone)
        return sorted(FLAT.match(name)["step"] for name in gone if name not in others)

    def _may_go(self, name: str) -> bool:
        return not self._place.catalog.is_pinned(name) and may_go(self._checkpoints, name)

    def _surplus(self, *, latest: bool) -> list[Entry]:
        chosen = retention.policies(self._config, None, latest=latest)
        if any(isinstance(policy, retention.KeepAll) for policy in chosen):
            return []
        entries = self._place.catalog.all()
        surplus = retention.surplus(self._place.catalog.checkpoints(entries, self._place.verified), chosen)
        if len(surplus) == len(entries):  # no rule has anything to say: the newest is what there is
            surplus = surplus[:-1]
        return [entries[each.id] for each in surplus]

    def _left(self) -> set[str]:
        """Return the names of checkpoints whose files could not be removed from the trash."""
        if self._place.folder is None or self._record is None:
            return set()
        try:
            names = os.listdir(self._place.folder / self._record.folder)
        except OSError:
            return set()
        return {name.removeprefix(TRASH) for name in names if name.startswith(TRASH)}
