"""What a store of its own holds, as its folder says: looked at again when it has changed, and kept in order meanwhile."""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from holdfast.core.checkpoint import Checkpoint
from holdfast.core.errors import CheckpointNotFound, Corrupt, HoldfastError
from holdfast.core.objective import Objective
from holdfast.core.retention import rank
from holdfast.core.values import dumps, loads
from holdfast.storage.checkpoints import writer
from holdfast.storage.checkpoints.manifest import MANIFEST, Manifest
from holdfast.storage.checkpoints.names import PIN, STEP
from holdfast.storage.root import Root

BAD = ".bad-"
_NAME = re.compile(STEP)
_SETTLED = 50_000_000  # nanoseconds: times of files are coarse, so a younger folder may change without a trace


class Manifests(Protocol):
    """Reads manifests by a checkpoint's path."""

    def read_manifest(self, path: str) -> tuple[Manifest, str]: ...


@dataclass(frozen=True, order=True)
class Name:
    """A published checkpoint's name, in the order of steps."""

    step: int
    attempt: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A checkpoint that is there."""

    name: Name
    manifest: Manifest
    digest: str

    @property
    def step(self) -> int:
        return self.name.step

    @property
    def path(self) -> str:
        return self.name.name


class Catalog:
    """The checkpoints of a store that count, oldest first. Not for several threads at once."""

    def __init__(self, root: Root, manifests: Manifests, local: Path | None) -> None:
        self._root = root
        self._manifests = manifests
        self._local = local
        self._entries: dict[str, Entry] = {}
        self._known: dict[str, Name] = {}
        self._torn: dict[str, str] = {}
        self._own: object = None
        self._names: list[Name] = []
        self._others: list[Name] = []
        self._pinned: set[str] = set()
        self._bad: set[str] = set()
        self._stamp: int | None = None
        self._best: tuple[Objective, Entry | None] | None = None
        self.record = writer.Record()

    def look(self, *, again: bool = False) -> None:
        """Take in what has changed; ``again`` also when nothing seems to have.

        The writer knows what it did itself, so that it looks again only once another process took over.
        """
        if self._own is not None and self._own != self._writer_stamp():
            self._own = None
        if not again and self._own is not None:
            return
        stamp = self._now()
        if not again and stamp is not None and stamp == self._stamp:
            return
        self._list()
        self._stamp = stamp

    def _list(self) -> None:
        found = set(self._root.names())
        self.record = writer.read(self._root)
        self._known = {name: known for name, known in self._known.items() if name in found}
        for name in found - self._known.keys():
            match = _NAME.fullmatch(name)
            if match and not (self._local and os.path.islink(self._local / name)):
                self._known[name] = Name(int(match["step"]), int(match["attempt"]), name)
        self._pinned = {name.removeprefix(PIN) for name in found if name.startswith(PIN)}
        bad = {name.removeprefix(BAD) for name in found if name.startswith(BAD)}
        if self._bad - bad:  # somebody took it back
            self._best = None
        self._bad = bad
        self._arrange()

    def _now(self) -> int | None:
        """Return a number that differs when the folder has changed, or None when nothing can tell."""
        if self._local is None:
            return None
        try:
            changed = os.stat(self._local).st_mtime_ns
        except OSError:
            return None
        return changed if time.time_ns() - changed > _SETTLED else None

    def _arrange(self) -> None:
        before = {name.name for name in self._names}
        names = sorted(self._known.values())
        self._refuse_a_stale_record(names)
        newest = {name.step: name for name in names if self.record.counts(name.attempt, name.step)}
        self._names = list(newest.values())  # without a record two writers may have one step: the later one's
        self._others = [name for name in names if newest.get(name.step) != name]
        self._entries = {name.name: self._entries[name.name] for name in self._names if name.name in self._entries}
        if self._best is not None and self._best[1] is not None and not self._counts(self._best[1].path):
            self._best = None
        if self._best is not None:
            for name in self._names:
                if name.name not in before and (entry := self._entry(name)) is not None:
                    self._compare(entry)

    def _refuse_a_stale_record(self, names: list[Name]) -> None:
        """Raise Corrupt when there is a checkpoint by a later writer than the record knows: it is an old copy."""
        later = [name for name in names if self._local and name.attempt > self.record.number > 0]
        for name in later:
            if self._root.read(f"{name.name}/{MANIFEST}") is not None:
                raise Corrupt(
                    f"{self._root.location}: {writer.FILE} is older than {name.name}, which a later writer saved; put the newer"
                    " one back, or delete it, and all checkpoints count"
                )

    def _counts(self, name: str) -> bool:
        return name in self._entries and name not in self._bad

    def own(self, record: writer.Record) -> None:
        """Look again, as the writer that this process now is."""
        self.look(again=True)
        if (self.record.number, self.record.token) == (record.number, record.token):
            self._own = self._writer_stamp()

    def _writer_stamp(self) -> object:
        """Return what differs once another process has become the writer."""
        if self._local is None:
            return writer.read(self._root)
        try:
            found = os.stat(self._local / writer.FILE)
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns)

    def changed(self) -> bool:
        """Look again; tell whether other checkpoints count now."""
        before = self._names
        self.look(again=True)
        return self._names != before

    @property
    def others(self) -> list[Name]:
        """What is published and does not count: of writers that were taken over from, or given up by going back."""
        return list(self._others)

    def all(self) -> list[Entry]:
        """Return every checkpoint that counts and is not known to be bad, oldest first."""
        return [entry for name in self._names if (entry := self._entry(name)) is not None]

    def newest_first(self) -> Iterator[Entry]:
        """Yield them newest first, reading no more manifests than are asked for."""
        for name in reversed(self._names):
            if (entry := self._entry(name)) is not None:
                yield entry

    def at(self, step: int) -> Entry | None:
        """Return the checkpoint of a step."""
        return next((entry for name in self._names if name.step == step and (entry := self._entry(name))), None)

    def best(self, goal: Objective) -> Entry | None:
        """Return the best by ``goal``, of equal ones the newest; None when none has a finite value."""
        if self._best is None or self._best[0] != goal:
            self._best = (goal, None)
            for entry in self.all():
                self._compare(entry)
        return self._best[1]

    def _compare(self, entry: Entry) -> None:
        if self._best is not None:
            goal, best = self._best
            if (found := rank(entry.manifest.metrics, goal)) < math.inf and (
                best is None or found <= rank(best.manifest.metrics, goal)
            ):
                self._best = (goal, entry)

    def _entry(self, name: Name, *, bad: bool = False) -> Entry | None:
        if name.name in self._bad and not bad:
            return None
        if name.name not in self._entries:
            self._torn.pop(name.name, None)
            try:
                manifest, digest = self._manifests.read_manifest(name.name)
            except CheckpointNotFound:
                return None
            except Corrupt as error:  # without a manifest it does not exist; with one that makes no sense it is damaged
                if self._root.read(f"{name.name}/{MANIFEST}") is not None:
                    self._torn[name.name] = str(error)
                return None
            self._entries[name.name] = Entry(name=name, manifest=manifest, digest=digest)
        return self._entries[name.name]

    def added(self, name: str, manifest: Manifest, digest: str) -> Entry:
        """Take in a checkpoint that was just published, without looking at the folder."""
        entry = Entry(name=Name(manifest.step, manifest.attempt, name), manifest=manifest, digest=digest)
        insort(self._names, entry.name)
        self._known[name] = entry.name
        self._entries[name] = entry
        self._compare(entry)
        return entry

    def removed(self, names: Iterable[str]) -> None:
        """Forget checkpoints that were just deleted."""
        gone = set(names)
        self._names = [name for name in self._names if name.name not in gone]
        self._others = [name for name in self._others if name.name not in gone]
        for name in gone:
            self._entries.pop(name, None)
            self._known.pop(name, None)
        if self._best is not None and self._best[1] is not None and self._best[1].path in gone:
            self._best = None

    def of_step(self, step: int) -> list[str]:
        """Return the names of all that is there of a step, whether it counts or not."""
        return [known.name for known in self._known.values() if known.step == step]

    def taken(self, step: int, attempt: int) -> bool:
        """Tell whether a writer has published something of a step that does not count: it is bad, or has no manifest."""
        entry = self.at(step)
        return any(
            (known.step, known.attempt) == (step, attempt) and (entry is None or entry.name != known)
            for known in self._known.values()
        )

    def exists(self, name: str) -> bool:
        """Tell whether a checkpoint is still there; forget what is known of it when it is not."""
        if self._local is not None:
            there = os.path.lexists(self._local / name)
        else:
            there = self._root.read(f"{name}/{MANIFEST}") is not None
        if not there:
            self._entries.pop(name, None)
        return there

    def is_pinned(self, name: str) -> bool:
        """Tell whether a checkpoint is pinned, as the folder says now."""
        if self._local is not None:
            return os.path.lexists(self._local / (PIN + name))
        return self._root.read(PIN + name) is not None

    def pin(self, name: str) -> None:
        self._root.write(PIN + name, b"")
        self._pinned.add(name)

    def unpin(self, name: str) -> None:
        self._root.delete(PIN + name)
        self._pinned.discard(name)

    def condemn(self, name: str, reason: str) -> None:
        """Note that a checkpoint is bad; where nothing can be written only this object knows."""
        self._bad.add(name)
        self._best = None
        with contextlib.suppress(HoldfastError):
            self._root.write(BAD + name, (dumps({"reason": reason}) + "\n").encode())

    def acquit(self, name: str) -> None:
        """Take back what :meth:`condemn` noted; where nothing can be written only this object knows."""
        self._bad.discard(name)
        self._best = None
        with contextlib.suppress(HoldfastError):
            self._root.delete(BAD + name)

    def condemned(self) -> dict[str, str]:
        """Return the reason for each checkpoint that counts and is bad, by name: it was found so, or its manifest is torn."""
        self.all()
        return self.known_bad()

    def known_bad(self) -> dict[str, str]:
        """Return what :meth:`condemned` does, of torn ones only those whose manifest has been read."""
        found = {name.name: self._reason(name.name) for name in self._names if name.name in self._bad}
        counting = {name.name for name in self._names}
        return {**found, **{name: reason for name, reason in self._torn.items() if name in counting}}

    def everything(self) -> list[Entry]:
        """Return every checkpoint that counts and has a manifest, also those that were found bad, oldest first."""
        return [entry for name in self._names if (entry := self._entry(name, bad=True)) is not None]

    def is_condemned(self, name: str) -> bool:
        """Tell whether a checkpoint was found bad."""
        return name in self._bad

    def _reason(self, name: str) -> str:
        data = self._root.read(BAD + name)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(loads(data or b"")["reason"])
        return "it was found bad before"

    def drop_markers(self, names: Iterable[str]) -> None:
        """Remove what was noted of checkpoints that are gone."""
        for name in names:
            for marker, known in ((PIN, self._pinned), (BAD, self._bad)):
                if name in known:
                    known.discard(name)
                    self._root.delete(marker + name)

    def checkpoints(self, entries: Iterable[Entry], verified: set[str]) -> list[Checkpoint]:
        """Return entries as retention sees them; the id is the place among them."""
        return [
            Checkpoint(
                id=place,
                trial=0,
                attempt=entry.name.attempt,
                step=entry.step,
                path=entry.path,
                digest=entry.digest,
                bytes=entry.manifest.size,
                pinned=entry.path in self._pinned,
                verified=entry.path in verified,
                metrics=entry.manifest.metrics,
            )
            for place, entry in enumerate(entries)
        ]
