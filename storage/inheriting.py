"""What a fork takes over of another experiment: which of its rows, and its files."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from holdfast.core.checkpoint import Checkpoint, CheckpointStatus, eligible
from holdfast.core.trial import Attempt, Outcome, TrialStatus
from holdfast.storage.carrying import Carrier, File, below
from holdfast.storage.checkpoints import pins
from holdfast.storage.checkpoints.manifest import MANIFEST, Manifest, digest_of
from holdfast.storage.code import SHIPPED
from holdfast.storage.folder import CODE, OWN_CODE, OWN_IN_TRIAL, TRAINABLE, Folder
from holdfast.storage.journal import COLUMNS, Contents
from holdfast.storage.recovery import RECOVERED

_CLAIM = "forked"
"""The claim of an attempt that somebody made in the original: nobody can write under it here."""
_OF_PROCESSES = ("flow_run_id", "task_run_id", "host", "pid", "pid_started")
_NOT_OURS = frozenset({"driving", "rebuilt", "recovering"})
"""Audit rows about the original's processes and databases."""
_ENDS = frozenset({"prune", RECOVERED})
"""Decisions on a last report after which a trial may end without running again."""

Row = dict[str, Any]


def cut(contents: Contents, at_trial: int) -> list[str]:
    """Leave the trials from ``at_trial`` on out, with all that hangs on them; return what there is to say."""
    groups: dict[int, list[int]] = {}
    for (number,), row in contents.tables["trial"].items():
        if row["group_number"] is not None and number >= 0:
            groups.setdefault(row["group_number"], []).append(number)
    notes = []
    for first, members in sorted(groups.items()):
        lost = sum(number >= at_trial for number in members)
        if 0 < lost < len(members):
            queued = contents.tables["trial"][first,]["source"] == "queued"
            then = "the group stays smaller" if queued else "the fork proposes them first"
            notes.append(f"trial {at_trial} cuts the repeats of trial {first}: {lost} are left out, and {then}")
    for name, table in contents.tables.items():
        if name != "audit":
            for key in [key for key in table if key[0] >= at_trial]:
                del table[key]
    return notes


def let_go(contents: Contents, folder: Folder, seq: int, now: int, *, population: bool) -> None:
    """Leave out whose processes and requests the original's are; what ran there waits, and continues its newest checkpoint.

    Members of a population are left as they are: a restore lets them wait, and knows what they have borrowed.
    """
    tables = contents.tables
    for key in _ours(tables["audit"]):
        del tables["audit"][key]
    for row in tables["attempt"].values():
        row.update(dict.fromkeys(_OF_PROCESSES))
        row["claimed_by"] = None if row["claimed_by"] is None else _CLAIM
    for (number,), trial in tables["trial"].items():
        trial["cancel_requested"] = 0
        if trial["status"] == TrialStatus.RUNNING and number >= 0 and not population:
            _wait(contents, folder, number, trial, seq, now)


def _ours(audit: Mapping[tuple[Any, ...], Row]) -> list[tuple[Any, ...]]:
    """Return the keys of the audit rows that a fork does without; the first row of an epoch says who held it, and stays."""
    firsts: set[int] = set()
    found = []
    for key, row in sorted(audit.items(), key=lambda item: item[1]["seq"]):
        if row["epoch"] in firsts and row["action"] in _NOT_OURS:
            found.append(key)
        firsts.add(row["epoch"])
    return found


def _wait(contents: Contents, folder: Folder, number: int, trial: Row, seq: int, now: int) -> None:
    """Let a running trial wait, as if its process had died; one that was told to end, or whose result is there, is left to
    the restore, which ends it as was decided."""
    tables = contents.tables
    current = trial["current_attempt"]
    attempts = {attempt: row for (of, attempt), row in tables["attempt"].items() if of == number}
    told = [row for (of, attempt, _), row in tables["report"].items() if (of, attempt) == (number, current)]
    last = max(told, key=lambda row: row["seq"], default=None)
    if (last is not None and last["decision"] in _ENDS) or folder.result(number, current) is not None:
        return
    links = {
        attempt: Attempt(id=attempt, number=attempt, parent=row["parent"], parent_step=row["parent_step"])
        for attempt, row in attempts.items()
    }
    rows = [row for (of, _, _), row in tables["checkpoint"].items() if of == number]
    newest = next(iter(eligible(current, links, [_checkpoint(row) for row in rows])), None)
    note = "it ran in the original when that was forked"
    attempts[current] |= {"ended": now, "outcome": Outcome.LOST.value, "note": note}
    tables["attempt"][number, current + 1] = {
        **dict.fromkeys(COLUMNS["attempt"]),
        "trial": number,
        "number": current + 1,
        "config": attempts[current]["config"],
        "parent": None if newest is None else newest.attempt,
        "parent_step": None if newest is None else newest.step,
        "reason": "resume",
        "note": "",
        "created": now,
    }
    trial |= {"status": TrialStatus.PENDING.value, "current_attempt": current + 1, "seq": seq}


def _checkpoint(row: Row) -> Checkpoint:
    names = ("trial", "attempt", "step", "path", "digest", "bytes", "reason")
    return Checkpoint(id=0, status=CheckpointStatus(row["status"]), **{name: row[name] for name in names})


class Staged:
    """The files of a fork that is being made."""

    def __init__(self, original: Folder, target: Folder) -> None:
        self._original, self._target = original, target
        self._here: dict[str, Sequence[File]] = {}
        """the files of each checkpoint that has come"""
        self._others: set[str] = set()
        self.missing: set[str] = set()
        """paths of valid checkpoints that were not there"""
        self._faults: dict[str, str] = {}

    def take(self, contents: Contents) -> None:
        """Bring what is not here yet."""
        carrier = Carrier(self._original.root, self._target.root)
        tree = _Tree(self._original)
        rows = {row["path"]: row for row in contents.tables["checkpoint"].values() if row["status"] != "deleted"}
        self._forget(set(self._here) - rows.keys())
        files = {path: tree.checkpoint(path) for path in rows if path not in self._here}
        data = {path: [file for file in found if not _is_manifest(file)] for path, found in files.items()}
        gone = carrier.carry([file for found in data.values() for file in found])
        whole = [path for path, found in files.items() if found and not any(name in gone for name, _ in data[path])]
        self._check(carrier, [file for path in whole for file in data[path]])
        manifests = {path: [file for file in files[path] if _is_manifest(file)] for path in whole}
        gone |= carrier.carry([file for found in manifests.values() for file in found])
        for path, row in rows.items():
            if path in files:
                if path in whole and not any(name in gone for name, _ in manifests[path]):
                    self._here[path] = files[path]
                    if row["status"] == "valid":
                        self._judge(path, row, carrier)
                else:
                    self._target.root.delete_folder(path)
        self.missing = {path for path, row in rows.items() if row["status"] == "valid" and path not in self._here}
        self._beside(contents, carrier, tree)
        carrier.finish()

    def finish(self, contents: Contents, seq: int, *, said: list[str], pruned: Collection[str]) -> None:
        """Let the rows say what came; add what there is to say about it."""
        corrupt = 0
        for (number, *_), row in contents.tables["checkpoint"].items():
            path = row["path"]
            if row["status"] == "corrupt" and path not in self._here:
                change = {"status": "deleted"}
            elif path in pruned:
                change = {"status": "deleted", "reason": "pruned while it was forked"}
                said.append(f"the checkpoint {path} was pruned meanwhile: it is left out")
            elif path in self.missing:
                change = {"status": "corrupt", "reason": "its directory was missing when it was forked"}
                said.append(f"the checkpoint {path} is missing in the original: it is left out")
            elif row["status"] == "valid" and path in self._faults:
                change = {"status": "corrupt", "reason": self._faults[path]}
                said.append(f"the checkpoint {path} is damaged in the original ({self._faults[path]}): it comes along, marked")
            else:
                corrupt += row["status"] == "corrupt"
                if row["status"] != "deleted" and row["pinned"] & 1:
                    self._target.root.write(pins.marker(path), b"")
                continue
            row |= {**change, "seq": seq}
            contents.tables["trial"][number,]["seq"] = seq
        if corrupt:
            said.append(f"{corrupt} checkpoints that were found bad in the original come along, marked as such")

    def _forget(self, paths: Collection[str]) -> None:
        for path in paths:
            self._target.root.delete_folder(path)
            del self._here[path]
            self._faults.pop(path, None)

    def _check(self, carrier: Carrier, files: Sequence[File]) -> None:
        if files and not self._target.is_local:
            carrier.check(files, "trials")

    def _judge(self, path: str, row: Row, carrier: Carrier) -> None:
        """Note what is wrong with a checkpoint as far as that is seen without reading its files once more."""
        sizes = {name.removeprefix(f"{path}/"): size for name, size in self._here[path]}
        body = self._target.root.read(f"{path}/{MANIFEST}") if MANIFEST in sizes else None
        if body is None or digest_of(body) != row["digest"]:
            self._faults[path] = "it has no manifest" if body is None else "its manifest is another one"
            return
        for entry in Manifest.parse(body).files:
            digest = carrier.digests.get(f"{path}/{entry.name}", entry.digest)
            if sizes.get(entry.name) != entry.size or digest != entry.digest:
                self._faults[path] = f"{entry.name} is not what its manifest says"
                return

    def _beside(self, contents: Contents, carrier: Carrier, tree: _Tree) -> None:
        """Bring results, logs, shipped code and the pickled trainable; what is still written to is copied."""
        open_ones: set[tuple[int, int]] = set()
        shared: list[File] = []
        growing: list[File] = []
        for (number, attempt), row in contents.tables["attempt"].items():
            if row["claimed_by"] is not None and row["outcome"] is None:
                open_ones.add((number, attempt))
        known = set(contents.tables["attempt"])
        for number in sorted({number for number, _ in known if number >= 0}):
            for name, size in tree.beside(number):
                own = OWN_IN_TRIAL.fullmatch(name.rpartition("/")[2])
                if own is None or name in self._others:
                    continue
                attempt = int(own[1].rpartition("-a")[2].partition(".")[0])
                if (number, attempt) in known:
                    is_open = (number, attempt) in open_ones and own[1].startswith("log-")
                    (growing if is_open else shared).append((name, size))
                    self._others.add(name)
        pickled = self._original.root.read(TRAINABLE) if TRAINABLE not in self._others else None
        if pickled is not None:
            self._target.root.write(TRAINABLE, pickled)
            self._others.add(TRAINABLE)
        shared += self._code(contents)
        carrier.carry(shared)
        carrier.carry(growing, shared=False)

    def _code(self, contents: Contents) -> list[File]:
        """Return the archives that drives of the original shipped."""
        if all(row["action"] != SHIPPED for row in contents.tables["audit"].values()):
            return []
        found = {f"{CODE}/{name}": size for name, size in below(self._original.root, CODE).items() if OWN_CODE.fullmatch(name)}
        new = [file for file in found.items() if file[0] not in self._others]
        self._others.update(found)
        return new


class _Tree:
    """What lies in the original's folder; one listing of an object store, a look where it is needed into a local folder."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._checkpoints: dict[str, list[File]] = {}
        self._beside: dict[int, list[File]] = {}
        if not folder.is_local:
            for name, size in below(folder.root, "trials").items():
                parts = name.split("/")
                if len(parts) > 3 and parts[1] == "checkpoints":
                    self._checkpoints.setdefault(f"trials/{'/'.join(parts[:3])}", []).append((f"trials/{name}", size))
                elif len(parts) == 2 and parts[0].isdecimal():
                    self._beside.setdefault(int(parts[0]), []).append((f"trials/{name}", size))

    def checkpoint(self, path: str) -> list[File]:
        """Return the files of a checkpoint; none when it is gone."""
        if not self._folder.is_local:
            return self._checkpoints.get(path, [])
        return [(f"{path}/{name}", size) for name, size in below(self._folder.root, path).items()]

    def beside(self, number: int) -> list[File]:
        """Return the files of a trial beside its checkpoints."""
        if not self._folder.is_local:
            return self._beside.get(number, [])
        place = self._folder.trial_name(number)
        files = [(f"{place}/{name}", self._folder.path / place / name) for name in self._folder.root.names(place)]
        return [(name, os.lstat(file).st_size) for name, file in files if file.is_file() and not file.is_symlink()]


def _is_manifest(file: File) -> bool:
    return file[0].count("/") == 4 and file[0].endswith(f"/{MANIFEST}")
