"""Finding and loading checkpoints of a store of its own: by step or by word, verified, past what is bad."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from holdfast.core import retention
from holdfast.core.checkpoint import check_step
from holdfast.core.checkpoint_config import CheckpointConfig
from holdfast.core.errors import CheckpointCorrupt, CheckpointNotFound, Corrupt, HoldfastError, InvalidStep, NotACheckpoint
from holdfast.storage.checkpoints.catalog import Entry
from holdfast.storage.checkpoints.local import Loaded
from holdfast.storage.checkpoints.names import FLAT
from holdfast.storage.checkpoints.place import Place

log = logging.getLogger(__name__)

WORDS = ("latest", "last", "best", "first")
_TRIES = 100  # of a load: a checkpoint may be pruned while it is being read


def check_which(which: object) -> int | str:
    """Return ``which`` if it is a step or one of the words; InvalidStep otherwise."""
    if isinstance(which, str):
        if which not in WORDS:
            raise InvalidStep(f"which is {which!r}; allowed are a step and {', '.join(map(repr, WORDS))}")
        return which
    return check_step(which)


class Loader:
    """Reads what the catalog of a place lists, as it was when it was last looked at."""

    def __init__(self, place: Place, config: CheckpointConfig) -> None:
        self._place = place
        self._goal = retention.ranking(config, None)

    def candidates(self, which: int | str) -> Iterable[Entry]:
        """Return what may be taken as ``which``, in the order in which it is tried; of the newest no more than is asked for."""
        catalog = self._place.catalog
        if isinstance(which, int):
            entry = catalog.at(which)
            return [] if entry is None else [entry]
        if which == "first":
            return catalog.all()
        if which == "best" and self._goal is not None:
            entries = catalog.all()
            return [entries[each.id] for each in retention.best(catalog.checkpoints(entries, set()), self._goal)]
        return catalog.newest_first()

    def best(self) -> Entry | None:
        """Return the best checkpoint; without a metric, or a value of it, the newest."""
        catalog = self._place.catalog
        found = None if self._goal is None else catalog.best(self._goal)
        if found is not None and not catalog.exists(found.path) and self._goal is not None:
            catalog.look(again=True)
            found = catalog.best(self._goal)
        return found or self._place.newest()

    def find(self, which: int | str | os.PathLike[str] | None) -> Entry | None:
        """Return the checkpoint of a step, a word or a path; of None the newest, if there is any.

        Raises InvalidStep, CheckpointNotFound, and NotACheckpoint for a path that is there and is none.
        """
        if which is None:
            return self._place.newest()
        if isinstance(which, (os.PathLike, str)) and which not in WORDS:
            return self._at_path(os.fspath(which).rstrip("/"))
        wanted = check_which(which)
        found = self.best() if wanted == "best" else next(iter(self.candidates(wanted)), None)
        if found is None:
            raise self._place.missing(wanted)
        return found

    def _at_path(self, path: str) -> Entry:
        place = self._place
        for entry in place.catalog.all():
            here = str(place.where(entry.path))
            if path in (entry.path, here) or (place.folder is not None and os.path.realpath(path) == os.path.realpath(here)):
                return entry
        if place.folder is not None and os.path.lexists(path):
            raise NotACheckpoint(f"{path} is no checkpoint of {place.root.location}")
        raise place.missing(path)

    def load(self, which: int | str, *, strict: bool) -> Loaded:
        """Return a checkpoint with its state; what is bad is noted, and by a word the next one is taken unless ``strict``."""
        wanted = check_which(which)
        place = self._place
        for _ in range(_TRIES):
            bad: dict[str, str] = {}
            for entry in self.candidates(wanted):
                if wanted in ("latest", "last") and not bad:
                    self._mention_newer(entry.step, strict=strict)
                try:
                    loaded = place.checkpoints.load(entry.path, digest=entry.digest, step=entry.step)
                except (Corrupt, CheckpointNotFound) as error:
                    if not place.catalog.exists(entry.path):
                        break  # it was pruned meanwhile
                    bad[entry.path] = str(error)
                    place.catalog.condemn(entry.path, str(error))
                    if strict or isinstance(wanted, int):
                        raise
                    log.warning("the checkpoint of step %d is not used: %s", entry.step, error)
                else:
                    place.verified.add(entry.path)
                    return loaded
            else:
                if not place.catalog.changed():
                    raise self._nothing(wanted, bad)
                continue
            place.catalog.look(again=True)
        raise CheckpointNotFound(f"{place.root.location}: its checkpoints are deleted faster than they can be read")

    def _mention_newer(self, newest: int, *, strict: bool) -> None:
        """Say which newer checkpoints are not used because they are bad; CheckpointCorrupt when ``strict``."""
        for name, reason in self._place.catalog.known_bad().items():
            step = FLAT.match(name)["step"]
            if step > newest and strict:
                raise CheckpointCorrupt(f"the newest checkpoint, of step {step}, is bad: {reason}")
            if step > newest:
                log.warning("the checkpoint of step %d is not used: %s", step, reason)

    def _nothing(self, which: int | str, found: Mapping[str, str]) -> HoldfastError:
        bad = {FLAT.match(name)["step"]: reason for name, reason in {**self._place.catalog.condemned(), **found}.items()}
        if isinstance(which, int):
            bad = {step: reason for step, reason in bad.items() if step == which}
        if not bad:
            return self._place.missing(which)
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in sorted(bad.items()))
        return CheckpointCorrupt(f"{self._place.root.location} has no good checkpoint to take as {which!r}: {reasons}")

    def verify(self, step: int | None) -> dict[int, str]:
        """Read every file of a step, or of all, also of those that were found bad; return the reasons for the bad ones."""
        place = self._place
        entries = [entry for entry in place.catalog.everything() if step is None or entry.step == step]
        bad: dict[int, str] = {}
        for entry in entries:
            try:
                place.checkpoints.verify(entry.path, digest=entry.digest, step=entry.step)
            except (Corrupt, CheckpointNotFound) as error:
                if place.catalog.exists(entry.path):
                    bad[entry.step] = str(error)
                    place.catalog.condemn(entry.path, str(error))
            else:
                place.verified.add(entry.path)
                if place.catalog.is_condemned(entry.path):
                    place.catalog.acquit(entry.path)
        for name, reason in place.catalog.condemned().items():
            number = FLAT.match(name)["step"]
            if step is None or number == step:
                bad.setdefault(number, reason)
        if step is not None and not entries and not bad:
            raise place.missing(step)
        return dict(sorted(bad.items()))


def info_of(entry: Entry | None) -> dict[str, Any] | None:
    """Return what was noted with a checkpoint."""
    return None if entry is None else dict(entry.manifest.info)
