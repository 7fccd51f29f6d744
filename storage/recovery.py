"""What an experiment's files say beyond its journal: manifests and results are durable before the journal follows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from holdfast.core.checkpoint import Checkpoint, eligible
from holdfast.core.space import config_digest
from holdfast.core.trial import ACTIVE, Attempt, TrialStatus
from holdfast.core.values import Json, Metrics, loads
from holdfast.storage.checkpoints import pins
from holdfast.storage.checkpoints.manifest import Manifest
from holdfast.storage.checkpoints.ports import Checkpoints
from holdfast.storage.database.rows import typed
from holdfast.storage.folder import Folder, Identity
from holdfast.storage.journal import Contents

TOKEN = "recovered"
"""The claim of an attempt that ran, as its files show, and whose claim the journal does not have."""

RECOVERED = "recovered"
"""The decision on a report that only its own checkpoint's manifest tells of, which was made before the decision."""

AT_ONCE = 16
"""Requests to an object store: of each finished trial with checkpoints the pins are looked for."""

Told = Sequence[Json]
"""A report that the journal may lack: step, microseconds since 1970 UTC, decision, metrics."""


def complete(contents: Contents, identity: Identity, folder: Folder, checkpoints: Checkpoints) -> int:
    """Add to ``contents`` what the files of unfinished trials hold beyond it; return how many rows were added.

    Only attempts that the journal knows are looked at: it is written before a trial is submitted. What is added gets the next
    seq, so that it is new to whoever drives next.
    """
    recovery = _Recovery(contents, folder)
    uuids = {identity.uuid, *identity.ancestors}
    over: list[int] = []
    for (number,), trial in list(contents.tables["trial"].items()):
        if trial["status"] in ACTIVE and number >= 0:
            found = [item for item in checkpoints.scan(number) if item[1].experiment in uuids]
            recovery.published(number, found)
            recovery.result(number, trial)
            recovery.pinned([number])
            recovery.pruned(number, {path for path, _, _ in found}, checkpoints.present(number))
        else:
            over.append(number)
    recovery.pinned(over)
    if recovery.added:
        contents.end += 1
    return recovery.added


class _Recovery:
    def __init__(self, contents: Contents, folder: Folder) -> None:
        self._tables = contents.tables
        self._folder = folder
        self._seq = contents.end + 1
        self._epoch = contents.epoch
        self._checkpoints: dict[int, list[dict[str, Any]]] = {}
        for (number, _, _), row in self._tables["checkpoint"].items():
            self._checkpoints.setdefault(number, []).append(row)
        self.added = 0

    def published(self, number: int, found: Iterable[tuple[str, Manifest, str]]) -> None:
        """Take in the published checkpoints of a trial's known attempts."""
        for path, manifest, digest in found:
            attempt = self._tables["attempt"].get((number, manifest.attempt))
            key = (number, manifest.attempt, manifest.step)
            if attempt is None or key in self._tables["checkpoint"]:
                continue
            parent = manifest.beside.get("parent")
            if attempt["claimed_by"] is None and parent is not None:
                attempt["parent"], attempt["parent_step"] = parent
            created = int(manifest.beside.get("reported", attempt["created"]))
            self._ran(number, attempt, created)
            row: dict[str, Any] = {
                "trial": number,
                "attempt": manifest.attempt,
                "step": manifest.step,
                "seq": self._seq,
                "path": path,
                "digest": digest,
                "bytes": manifest.size + len(manifest.to_bytes()),
                "created": created,
                "status": "valid",
                "reason": "",
                "pinned": 0,
            }
            self._tables["checkpoint"][key] = row
            self._checkpoints.setdefault(number, []).append(row)
            self.added += 1
            self._reports(number, manifest.attempt, manifest.beside.get("reports", []))
            self._report(number, manifest.attempt, (manifest.step, created, RECOVERED, manifest.metrics))

    def pinned(self, numbers: Sequence[int]) -> None:
        """Take in the pins of trials that are in the path: who pins while nobody drives cannot write the journal."""
        rows = {number: self._unpinned(number) for number in numbers}
        asked = [number for number in numbers if rows[number]]
        for number, marked in zip(asked, self._marked(asked), strict=True):
            for row in rows[number]:
                if row["path"] in marked:
                    self._change(number, row, pinned=row["pinned"] | 1)

    def _unpinned(self, number: int) -> list[dict[str, Any]]:
        return [row for row in self._checkpoints.get(number, []) if row["status"] != "deleted" and not row["pinned"] & 1]

    def _marked(self, numbers: Sequence[int]) -> list[set[str]]:
        def marked(number: int) -> set[str]:
            return pins.pinned(self._folder.root, number)

        if self._folder.is_local or len(numbers) < 2:
            return [marked(number) for number in numbers]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(marked, numbers))

    def pruned(self, number: int, good: Collection[str], present: Collection[str]) -> None:
        """Mark those as deleted that are not ``present``, and that a newer one of the chain, which is there, had outdated.

        Their files go before the journal tells of it. Pinned ones, and one without a newer one, are not pruned: they are lost.
        """
        rows = {row["path"]: row for row in self._checkpoints.get(number, []) if row["status"] == "valid"}
        if all(path in present for path in rows):
            return
        attempts = {
            attempt: Attempt(id=attempt, number=attempt, parent=_own_parent(row), parent_step=row["parent_step"])
            for (trial, attempt), row in self._tables["attempt"].items()
            if trial == number
        }
        of_trial = [
            Checkpoint(id=place, trial=number, **{name: row[name] for name in ("attempt", "step", "path", "digest", "bytes")})
            for place, row in enumerate(rows.values())
        ]
        on_chain = [item.path for item in eligible(self._tables["trial"][number,]["current_attempt"], attempts, of_trial)]
        newer, known = False, set(on_chain)
        for path in [*on_chain, *(path for path in rows if path not in known)]:  # what is off the chain goes, too
            if newer and path not in present and not rows[path]["pinned"]:
                self._change(number, rows[path], status="deleted", reason="pruned before the journal told")
            newer = newer or (path in good and path in known)

    def _change(self, number: int, row: dict[str, Any], **values: object) -> None:
        row |= {**values, "seq": self._seq}
        self._tables["trial"][number,]["seq"] = self._seq
        self.added += 1

    def result(self, number: int, trial: Mapping[str, Any]) -> None:
        """Take in what the persisted result of a trial's current attempt says beside the result, if it is this config's."""
        attempt = self._tables["attempt"][number, trial["current_attempt"]]
        result = self._folder.result(number, attempt["number"])
        if result is None or result.get("config", "") not in ("", config_digest(loads(attempt["config"]))):
            return
        self._ran(number, attempt, attempt["created"])
        self._reports(number, attempt["number"], result.get("reports", []))

    def _ran(self, number: int, attempt: dict[str, Any], started: int) -> None:
        """Note that an attempt was claimed; its trial runs if it is the current one."""
        trial = self._tables["trial"][number,]
        if attempt["claimed_by"] is None:
            attempt |= {"claimed_by": TOKEN, "epoch": self._epoch, "started": started}
            self.added += 1
        if attempt["number"] == trial["current_attempt"] and trial["status"] == TrialStatus.PENDING:
            trial["status"] = TrialStatus.RUNNING.value
        trial["seq"] = self._seq

    def _reports(self, number: int, attempt: int, reports: Sequence[Told]) -> None:
        for told in reports:
            self._report(number, attempt, told)

    def _report(self, number: int, attempt: int, told: Told) -> None:
        step, reported, decision, metrics = told
        key = (number, attempt, step)
        if key not in self._tables["report"]:
            self._tables["report"][key] = {
                "trial": number,
                "attempt": attempt,
                "step": step,
                "seq": self._seq,
                "reported": reported,
                "decision": decision,
                "metrics": _rows(metrics),
            }
            self.added += 1


def _own_parent(row: Mapping[str, Any]) -> int | None:
    """Return the attempt of its own trial that an attempt follows; a parent that is a pair is another trial's."""
    parent = row["parent"]
    return int(row["number"]) - 1 if isinstance(parent, list) else None if parent is None else int(parent)


def _rows(metrics: Metrics) -> list[list[Any]]:
    rows = [typed(name, value) for name, value in metrics.items()]
    return [[row["name"], row["kind"], row["number"], row["text"]] for row in rows]
