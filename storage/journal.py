"""The journal: what the database holds of an experiment, written beside its other files, so that the path alone is enough.

journal/00000003-000000000097.jsonl        a segment: written in epoch 3, from seq 97 on
journal/00000003-000000000412-full.jsonl   a segment that begins with everything up to seq 412; what is older is not needed

Each line is one batch, ``CHECKSUM FROM TO {rows}``: every row that changed after seq FROM, as it stood at seq TO; FROM is -1
for everything. Batches are states, not events: reading one twice changes nothing. A new epoch begins at the end that it read,
and what an earlier epoch's holder still wrote behind that point does not count.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from holdfast.core import faults
from holdfast.core.errors import Corrupt, StorageError
from holdfast.storage.folder import JOURNAL
from holdfast.storage.root import Root, join

log = logging.getLogger(__name__)

FORMAT = 1
_SEGMENT = re.compile(r"(?P<epoch>\d{8})-(?P<seq>\d{12})(?P<full>-full)?\.jsonl")
_LINE = re.compile(rb"(?P<checksum>[0-9a-f]{16}) (?P<start>-1|\d+) (?P<end>\d+) (?P<body>\{.*\})", re.DOTALL)
_MANY_FILES = 64
"""Segments, or on an object store objects, after which they are written anew as one."""

Row = list[Any]
Rows = dict[str, list[Row]]

COLUMNS: dict[str, tuple[str, ...]] = {
    "trial": (
        *("number", "status", "config", "seq", "ended_seq", "current_attempt", "seed", "group_number", "repeat"),
        *("created", "ts_start", "source", "origin", "metadata", "cancel_requested"),
    ),
    "attempt": (
        *("trial", "number", "config", "parent", "parent_step", "reason", "note", "created", "epoch", "claimed_by", "started"),
        *("ended", "outcome", "error_kind", "error", "traceback", "result", "flow_run_id", "task_run_id", "host", "pid"),
        "pid_started",
    ),
    "report": ("trial", "attempt", "step", "seq", "reported", "decision", "metrics"),
    "telemetry": ("trial", "attempt", "ts", "name", "kind", "number", "text", "seq"),
    "checkpoint": (*("trial", "attempt", "step", "seq", "path", "digest", "bytes", "created", "status", "reason", "pinned"),),
    "proposer_state": ("number", "body", "seq"),
    "audit": ("seq", "epoch", "happened", "action", "detail"),
}
"""What a batch holds of each table, by natural keys: row ids mean nothing in another database."""

_KEYS = {"trial": 1, "attempt": 2, "report": 3, "telemetry": 4, "checkpoint": 3, "proposer_state": 1, "audit": 5}
"""How many of the first columns tell a row from the others of its table."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows that changed after seq ``start``, as they stood at seq ``end``."""

    start: int
    end: int
    rows: Rows
    experiment: dict[str, Any]
    """values of the experiment's own row; those that did not change may be missing"""

    @property
    def is_empty(self) -> bool:
        return self.start == self.end


@dataclass
class Contents:
    """The experiment as its journal tells it."""

    end: int = -1
    epoch: int = 0
    experiment: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = field(default_factory=lambda: {name: {} for name in COLUMNS})

    def apply(self, batch: Batch) -> None:
        """Take in a batch that begins where these contents end, or holds everything."""
        if batch.start == -1:
            self.experiment = {}
            self.tables = {name: {} for name in COLUMNS}
        self.experiment |= batch.experiment
        for name, rows in batch.rows.items():
            columns, count, table = COLUMNS[name], _KEYS[name], self.tables[name]
            for row in rows:
                table[tuple(row[:count])] = dict(zip(columns, row, strict=True))
        self.end = batch.end


@dataclass(frozen=True)
class _Segment:
    name: str
    epoch: int
    seq: int
    full: bool


@dataclass(frozen=True)
class _Line:
    epoch: int
    start: int
    end: int
    body: bytes
    place: str


def _segments(root: Root) -> list[_Segment]:
    """Return the segments that count, in order: the last full one and what follows it."""
    found = []
    for name in root.names(JOURNAL):
        match = _SEGMENT.fullmatch(name)
        if match:
            found.append(_Segment(name, int(match["epoch"]), int(match["seq"]), match["full"] is not None))
    found.sort(key=lambda segment: (segment.epoch, segment.seq, not segment.full))
    full = [place for place, segment in enumerate(found) if segment.full]
    return found[full[-1] :] if full else found


def _lines(root: Root, segment: _Segment) -> list[_Line]:
    """Return the intact lines of a segment; a torn last one was never acknowledged, any other is damage."""
    data = root.read(f"{JOURNAL}/{segment.name}")
    if data is None:
        return []  # compacted away between the listing and now: the full segment comes with the next listing
    place = join(root.location, f"{JOURNAL}/{segment.name}")
    complete = data.split(b"\n")[:-1]  # what follows the last line break was cut off while it was written
    lines = []
    for number, text in enumerate(complete, 1):
        match = _LINE.fullmatch(text)
        if match is None or _checksum(text[17:]) != match["checksum"]:
            if number == len(complete) and b"\0" in text:
                break  # a power failure kept the length of what was never acknowledged, and not its content
            raise Corrupt(f"{place} is damaged in line {number}; put an intact copy back, or name the database that holds it")
        lines.append(_Line(segment.epoch, int(match["start"]), int(match["end"]), match["body"], f"{place}, line {number}"))
    return lines


def _checksum(text: bytes) -> bytes:
    return xxhash.xxh3_64(text).hexdigest().encode()


def from_line(text: bytes, place: str) -> Batch:
    """Read one line that :func:`to_line` wrote; Corrupt, naming ``place``, when it is damaged."""
    match = _LINE.fullmatch(text.removesuffix(b"\n"))
    if match is None or _checksum(text.removesuffix(b"\n")[17:]) != match["checksum"]:
        raise Corrupt(f"{place} is damaged; put an intact copy back")
    return _parse(_Line(0, int(match["start"]), int(match["end"]), match["body"], place))


def to_line(batch: Batch) -> bytes:
    """Write a batch as one line with its checksum."""
    body = {"format": FORMAT, "experiment": batch.experiment, **{name: rows for name, rows in batch.rows.items() if rows}}
    text = b"%d %d " % (batch.start, batch.end) + json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    return _checksum(text) + b" " + text + b"\n"


def _parse(line: _Line) -> Batch:
    try:
        body = json.loads(line.body)
        version, experiment = int(body.pop("format")), dict(body.pop("experiment"))
        if version > FORMAT:
            raise Corrupt(f"{line.place} has format {version}, this program reads {FORMAT}; update holdfast")
        return Batch(start=line.start, end=line.end, rows={name: body[name] for name in body}, experiment=experiment)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{line.place} makes no sense ({error}); put an intact copy back") from error


def _chain(lines: Iterable[_Line]) -> list[_Line]:
    """Return the lines that count: an epoch begins where it read its predecessors' end, and cuts what they wrote later."""
    kept: list[_Line] = []
    for line in lines:
        if line.start == -1:
            kept = []
        elif kept and line.epoch > kept[-1].epoch:
            while len(kept) > 1 and kept[-1].end > line.start:
                kept.pop()
        reached = kept[-1].end if kept else -1
        if line.start != reached:
            raise Corrupt(
                f"{line.place} goes on at seq {line.start}, what comes before it ends at {reached}: a segment is missing; "
                "put it back, or name the database that holds the experiment"
            )
        kept.append(line)
    return kept


def read(root: Root) -> Contents | None:
    """Return what the journal tells, or None when there is none. Corrupt when it is damaged, newer, or has a gap."""
    segments = _segments(root)
    lines = _chain(line for segment in segments for line in _lines(root, segment))
    if not lines:
        return None
    contents = Contents()
    for line in lines:
        contents.apply(_parse(line))
    contents.epoch = lines[-1].epoch
    return contents


def end(root: Root) -> int:
    """Return the seq that the journal reaches, -1 when there is none; reads its last segments only."""
    for segment in reversed(_segments(root)):
        lines = _lines(root, segment)
        if lines:
            return lines[-1].end
    return -1


class JournalWriter:
    """Carries an experiment's rows from the database into its path; used by the holder of the lease alone."""

    def __init__(
        self, root: Root, epoch: int, outbox: Callable[[int], Batch], check: Callable[[], None] = lambda: None
    ) -> None:
        self._root = root
        self._epoch = epoch
        self._outbox = outbox
        self._check = check
        """raises when the lease was lost: who is woken up after a takeover writes nothing"""
        self._lock = threading.Lock()
        self._segment: str | None = None
        self._files = 0
        self._most_files = _MANY_FILES
        self._troubled = False
        self.end = -1
        """the seq that the journal reaches"""

    def start(self) -> None:
        """Begin this epoch's first segment with everything that the journal lacks; compacts a journal of many files."""
        with self._lock:
            segments = _segments(self._root)
            self._files = len(self._root.names(JOURNAL))
            try:
                self.end = end(self._root) if segments else -1
            except Corrupt as error:
                log.warning("%s: the journal is written anew from the database", error)
                self.end = -1
            if self._files >= self._most_files or self.end == -1:
                self._compact()
            else:
                self._write(self._outbox(self.end))

    def flush(self) -> None:
        """Write every row that changed since the last call, durably; StorageError when the path refuses.

        Fenced when somebody else drives the experiment by now; nothing is written then.
        """
        with self._lock:
            self._check()
            batch = self._outbox(self.end)
            if not batch.is_empty:
                faults.point("journal.behind")
                self._write(batch)
                faults.point("journal.written")
            if self._files >= self._most_files:
                self._compact()

    def try_flush(self) -> None:
        """Flush, if the path lets us; the next call tries again."""
        try:
            self.flush()
        except StorageError as error:
            if not self._troubled:
                log.warning("the journal could not be written, trying again: %s", error)
            self._troubled = True
        else:
            self._troubled = False

    def _write(self, batch: Batch) -> None:
        """Append a batch to this epoch's segment; where nothing can be appended, each batch is a segment."""
        content = to_line(batch)
        if self._segment is None or not self._root.append(f"{JOURNAL}/{self._segment}", content):
            self._segment = f"{self._epoch:08d}-{max(batch.start, 0):012d}.jsonl"
            self._root.write(f"{JOURNAL}/{self._segment}", content)
            self._files += 1
        self.end = batch.end

    def _compact(self) -> None:
        """Write everything as one segment, then delete those before it."""
        batch = self._outbox(-1)
        name = f"{self._epoch:08d}-{batch.end:012d}-full.jsonl"
        content = to_line(batch)
        self._root.write(f"{JOURNAL}/{name}", content)
        self._most_files = _MANY_FILES + len(content) // 100_000  # what is large is not written anew for every few trials
        faults.point("journal.compacted")
        self._segment, self.end, self._files = name, batch.end, 1
        for old in self._root.names(JOURNAL):
            if _SEGMENT.fullmatch(old) and old != name:
                self._root.delete(f"{JOURNAL}/{old}")


def lineage(audit: Sequence[tuple[int, int, str]]) -> list[Epoch]:
    """Return who held the experiment, from the first audit row of each epoch: (epoch, seq, detail)."""
    found: dict[int, Epoch] = {}
    for epoch, seq, detail in audit:
        if epoch > 0 and epoch not in found:
            found[epoch] = Epoch(epoch, str(json.loads(detail).get("token", "")), seq)
    return [found[epoch] for epoch in sorted(found)]


@dataclass(frozen=True)
class Epoch:
    """One holder's time: the token tells it from another one of the same number, drawn with another database."""

    number: int
    token: str
    seq: int = field(compare=False)
    """where it began"""


def superseded(root: Root) -> list[str]:
    """Return the names of the segments that a later full one made superfluous and a crash left there."""
    counting = {segment.name for segment in _segments(root)}
    return [f"{JOURNAL}/{name}" for name in root.names(JOURNAL) if _SEGMENT.fullmatch(name) and name not in counting]
