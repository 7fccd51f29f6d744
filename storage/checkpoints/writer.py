"""Who may write to a store of its own, and which checkpoints of earlier writers count.

``writer.json`` says both. Whoever begins to write takes over from the writer before: it puts its own name there, renames that
one's folder away (on a local disk), through which it would have to publish and delete, and then notes up to which step its
checkpoints count.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.core.errors import Contention, Corrupt, Fenced, NewerFormat, StorageError
from holdfast.core.values import dumps, loads
from holdfast.storage.atomic import is_draft
from holdfast.storage.checkpoints.names import STEP, TRASH
from holdfast.storage.root import DAMAGE, Root, checked, join

FILE = "writer.json"
FORMAT = 1
_FOLDER = re.compile(r"\.writer-a(?P<number>[1-9][0-9]*)-[0-9a-f]{8}")
_GONE = re.compile(rf"\.gone-[0-9a-f]{{8}}|{re.escape(TRASH)}{STEP}")
_TRIES = 50
_OLD = 3600.0
"""Seconds after which a file that was being written when a crash came is nobody's any more."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What ``writer.json`` says: the writer's number and token, and of earlier writers the last step that counts.

    None instead of a step: it is being looked up, and until then everything of that writer counts. Who is not named counts not.
    """

    number: int = 0
    token: str = ""
    until: tuple[tuple[int, int | None], ...] = ()

    @property
    def folder(self) -> str:
        """The writer's own folder on a local disk."""
        return f".writer-a{self.number}-{self.token}"

    def counts(self, attempt: int, step: int) -> bool:
        """Tell whether a checkpoint of this writer and step counts; without a record all do."""
        if self.number == 0 or attempt == self.number:
            return True
        return any(attempt == earlier and (last is None or step <= last) for earlier, last in self.until)

    def to_bytes(self) -> bytes:
        values = {"format": FORMAT, "writer": self.number, "token": self.token, "until": [list(pair) for pair in self.until]}
        return (dumps(values) + "\n").encode()


def read(root: Root) -> Record:
    """Return the record; that of nobody when there is none. Corrupt when it is damaged, StorageError when it cannot be read."""
    return _parse(root, root.read(FILE))


def _parse(root: Root, data: bytes | None) -> Record:
    if data is None:
        return Record()
    try:
        values = checked(loads(data), {"format": int, "writer": int, "token": str, "until": list})
        if values["format"] > FORMAT:
            raise NewerFormat(f"{join(root.location, FILE)} has format {values['format']}; update holdfast to use it")
        until = tuple((int(number), None if last is None else int(last)) for number, last in values["until"])
        return Record(number=values["writer"], token=values["token"], until=until)
    except DAMAGE as error:
        where = join(root.location, FILE)
        raise Corrupt(f"{where} is damaged ({type(error).__name__}: {error}); delete it, and all checkpoints count") from error


def check(root: Root, mine: Record) -> None:
    """Raise Fenced unless ``mine`` is still the record's writer."""
    found = read(root)
    if found.number == 0:
        raise Fenced(f"{join(root.location, FILE)} is gone: the store was moved or deleted; nothing was written, open it anew")
    if (found.number, found.token) != (mine.number, mine.token):
        raise Fenced(
            f"{root.location}: writer {found.number} took over from this one, writer {mine.number}; nothing was written."
            " Only one process at a time can save there: end the other one, or open the store anew to take over from it"
        )


Listing = Callable[[], Iterable[tuple[int, int]]]
"""(writer, step) of every checkpoint in the store, whether it counts or not"""


def take_over(root: Root, local: Path | None, listing: Listing, *, rewind: int | None = None) -> tuple[Record, bool]:
    """Become the writer; return the record, and whether the step to ``rewind`` to was there; ``local`` is the store's folder.

    With ``rewind`` only checkpoints up to that step count from now on; when there is none of it, all go on to count.
    Contention when others take over all the time, Corrupt when the record is damaged, StorageError when the place refuses.
    """
    for _ in range(_TRIES):
        data = root.read(FILE)
        old = _parse(root, data)
        open_end = ((old.number, None),) if old.number else ()
        mine = replace(old, number=_next(root, old, listing), token=secrets.token_hex(4), until=(*old.until, *open_end))
        if not _replace(root, data, mine):  # from here on the writer before is refused, if it asks
            continue
        if local is not None:
            _make_own(local, mine)  # and from here on it can publish no more, if it has asked already
        found = [(number, step) for number, step in listing() if old.counts(number, step)]
        there = rewind is None or any(step == rewind for _, step in found)
        last: dict[int, int] = {}
        for number, step in found:
            if rewind is None or not there or step <= rewind:
                last[number] = max(step, last.get(number, step))
        final = replace(mine, until=tuple(sorted(last.items())))
        if _replace(root, mine.to_bytes(), final):
            return final, there
        if local is not None:
            shutil.rmtree(local / mine.folder, ignore_errors=True)
    raise Contention(f"{root.location}: other processes take over from each other all the time; end all but one")


def _replace(root: Root, old: bytes | None, new: Record) -> bool:
    """Replace the record; False when it is not what it was."""
    with root.exclusive():
        found, version = root.versioned(FILE)
        return found == old and root.replace(FILE, new.to_bytes(), version)


def _next(root: Root, old: Record, listing: Listing) -> int:
    """Return a number that no writer has had."""
    folders = [int(found["number"]) for name in root.names() if (found := _FOLDER.fullmatch(name))]
    return max([old.number, *folders, *(number for number, _ in listing())]) + 1


def _make_own(local: Path, mine: Record) -> None:
    """Make the writer's own folder, and take everybody else's away."""
    try:
        os.mkdir(local / mine.folder)
    except OSError as error:
        raise StorageError(error.errno, f"cannot take over {local}: {error.strerror or error}") from error
    try:
        for name in left_over(local, mine):
            gone = local / f".gone-{secrets.token_hex(4)}"
            if _FOLDER.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(local / name, gone)
                    shutil.rmtree(gone, ignore_errors=True)
            else:
                shutil.rmtree(local / name, ignore_errors=True)
        for name in os.listdir(local):
            if is_draft(name) and time.time() - os.stat(local / name).st_mtime > _OLD:
                os.unlink(local / name)
    except FileNotFoundError:
        pass  # somebody else was faster with the last of it
    except OSError as error:
        raise StorageError(error.errno, f"cannot take over {local}: {error.strerror or error}") from error


def left_over(local: Path, current: Record) -> list[str]:
    """Return the folders that writers before ``current`` left."""
    names = [name for name in os.listdir(local) if name != current.folder]
    return [name for name in names if _FOLDER.fullmatch(name) or _GONE.fullmatch(name)]
