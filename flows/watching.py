"""One watch over storages: what was cut off is restored, side by side. Nothing here imports Prefect before it is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from holdfast.core.errors import Contention, EngineError, HoldfastError, Infrastructure, SpecError
from holdfast.core.recovery import ENDED, STARTED, Verdict
from holdfast.core.values import Json
from holdfast.flows.abandoned import GONE, UNREADABLE, Claimed, Examined, Later, Places, Row, call_off, claim, gave_up, survey
from holdfast.flows.launching import Launcher, Restoring, alive, end_all
from holdfast.flows.naming import EXPERIMENT_EVENT
from holdfast.locate import open_path
from holdfast.storage.database import requests

RECOVERING_EVENT = f"{EXPERIMENT_EVENT}recovering"
GAVE_UP_EVENT = f"{EXPERIMENT_EVENT}gave-up"


def _nothing(event: str, row: Row) -> None:
    """Tell nobody."""


def _leave(examined: Examined) -> None:
    """Leave Prefect's runs as they are."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Whom a watch tells, and how it waits."""

    say: Callable[[str], None]
    warn: Callable[[str], None]
    emit: Callable[[str, Row], None] = _nothing
    close_runs: Callable[[Examined], None] = _leave
    pause: Callable[[float], object] = field(default_factory=lambda: threading.Event().wait)
    """seconds"""


@dataclass
class _Running:
    claimed: Claimed
    restoring: Restoring
    row: Row


class Watch:
    """Looks after the experiments of storages; at most ``at_once`` restores run here at any moment."""

    def __init__(
        self, places: Places, launcher: Launcher, around: Surroundings, *, at_once: int = 2, dry_run: bool = False
    ) -> None:
        if at_once < 1:
            raise SpecError(f"at_once is {at_once}; it must be a whole number from 1: restores that run side by side")
        self._places, self._launcher, self._around = places, launcher, around
        self._at_once, self._dry_run = at_once, dry_run
        self._running: list[_Running] = []
        self._due: list[tuple[Row, Examined]] = []
        self._said: set[tuple[str, int]] = set()
        """what was given up and said: experiment and epoch"""
        self._unreadable: dict[str, str] = {}
        """what cannot be looked at, and why: said once, however often it is looked at"""
        self.rows: list[Row] = []
        """what the last look found, and what became of it since"""
        self.later: list[Later] = []
        """when it is worth looking again, as far as the last look can tell"""

    @property
    def is_busy(self) -> bool:
        return bool(self._running or self._due)

    def look(self) -> list[Row]:
        """Look at every experiment, and start what can be started now."""
        mine = {one.row.path: one.row for one in self._running}
        self.rows, self._due, self.later = [], [], []
        for row, examined in survey(self._places, alive):
            if row.path in mine:
                self.rows.append(mine[row.path])
                continue
            self.rows.append(row)
            if examined is None:
                if row.verdict == UNREADABLE and self._unreadable.get(row.path) != row.why:
                    self._unreadable[row.path] = row.why
                    self._around.warn(f"{row.path} cannot be looked at: {row.why}")
            else:
                self._found(row, examined)
        self.go_on()
        return self.rows

    def _found(self, row: Row, examined: Examined) -> None:
        verdict = examined.decision.verdict
        if examined.later is not None:
            self.later.append(examined.later)
        if verdict is Verdict.GAVE_UP:
            self._give_up(row, examined)
        if self._dry_run:
            return
        if examined.called_off is not None:
            with suppress(HoldfastError, OSError):  # the next look notes it, or asks again
                call_off(examined, examined.called_off, self._places)
        if verdict is Verdict.RESTORE:
            self._due.append((row, examined))
        elif examined.drives:
            with suppress(HoldfastError):
                self._around.close_runs(examined)

    def _give_up(self, row: Row, examined: Examined) -> None:
        if (row.path, examined.epoch) not in self._said:
            self._said.add((row.path, examined.epoch))
            self._around.warn(f"{row.name}: gave up: {row.why}")
        if self._dry_run:
            return
        try:
            if gave_up(examined, self._places):
                self._around.emit(GAVE_UP_EVENT, row)
        except (HoldfastError, OSError) as error:
            self._around.warn(f"{row.path}: that it was given up cannot be noted: {error}")

    def go_on(self) -> None:
        """Take notice of restores that ended, and start the next ones that are due."""
        for one in list(self._running):
            ended = one.restoring.poll()
            self._pass_on(one)
            if ended is not None:
                self._end(one, ended)
        while self._due and len(self._running) < self._at_once:
            row, examined = self._due.pop(0)
            self._start(row, examined)

    def _start(self, row: Row, examined: Examined) -> None:
        try:
            self._launcher.check()
        except EngineError as error:
            self._replace(row, replace(row, result=f"not started: {error}"))
            self._around.warn(f"{row.name}: the restore was not started: {error}")
            return
        found = claim(examined, self._places, alive)
        if isinstance(found, Row):
            self._replace(row, found)
            if found.verdict == UNREADABLE:
                self._around.warn(f"{found.path} cannot be restored: {found.why}")
            return
        row = self._replace(row, replace(found.examined.row, result="begun"))
        self._around.say(f"{row.name}: restore {found.attempt} of epoch {found.examined.epoch} ({row.why}): {row.path}")
        self._around.emit(RECOVERING_EVENT, row)
        restoring = None
        try:
            restoring = self._launcher.start(found)
            if self._launcher.awaits:  # first of all: who ends this watch ends it, too
                self._running.append(_Running(found, restoring, row))
            self._note(found, STARTED, dict(restoring.detail))
        except (EngineError, OSError) as error:
            self._note(found, ENDED, {"error": str(error)})
            self._replace(row, replace(row, result=f"not started: {error}"))
            self._around.warn(f"{row.name}: the restore was not started: {error}")
        finally:
            found.opened.close()  # an idle connection to a file that another process writes to is in its way
        if restoring is not None and not self._launcher.awaits:
            self._replace(row, replace(row, result=f"handed over to flow run {restoring.detail.get('flow_run_id')}"))

    def _replace(self, row: Row, new: Row) -> Row:
        self.rows = [new if each is row else each for each in self.rows]
        for one in self._running:
            if one.row is row:
                one.row = new
        return new

    def _note(self, claimed: Claimed, action: str, detail: dict[str, Json]) -> None:
        """Add an audit row about a restore; where that is not possible, another watcher finds out by itself."""
        told: dict[str, Json] = {"epoch": claimed.examined.epoch, "attempt": claimed.attempt, **detail}
        with suppress(HoldfastError, OSError):
            requests.note(claimed.opened.database, claimed.opened.record.id, action, told)

    def _note_later(self, claimed: Claimed, action: str, detail: dict[str, Json]) -> None:
        with suppress(HoldfastError, OSError):
            path = claimed.examined.row.path
            opened = open_path(path, database=self._places.database, options=self._places.options_of(path))
            try:
                self._note(replace(claimed, opened=opened), action, detail)
            finally:
                opened.close()

    def _pass_on(self, one: _Running) -> None:
        while lines := one.restoring.lines():
            for line in lines:
                self._around.say(f"{one.row.name} | {line}")

    def _end(self, one: _Running, code: int, *, passed_on: bool = False) -> None:
        self._running.remove(one)
        detail: dict[str, Json] = {"code": code, "cause": one.row.cause}
        if passed_on:
            detail["passed_on"] = True
        self._note_later(one.claimed, ENDED, detail)
        words = "restored" if code in (0, 1) else f"cut off: exit code {code}"
        words = "somebody else drives it" if code == Contention.exit_code else words
        self._replace(one.row, replace(one.row, result=words, next=None))
        (self._around.say if code in (0, 1) else self._around.warn)(f"{one.row.name}: {words}")

    def finish(self) -> None:
        """Wait until everything that is due has been started, and has ended."""
        while self.is_busy:
            self.go_on()
            if self._running:
                self._around.pause(0.1)

    def end(self) -> None:
        """Let restores of ours save and end; what was due is left to the next watch."""
        self._due = []
        end_all([one.restoring for one in self._running], self._around.pause)
        for one in list(self._running):
            self._pass_on(one)
            code = one.restoring.poll()
            self._end(one, 128 + 9 if code is None else code, passed_on=True)

    def lines(self, width: int | None = None) -> list[str]:
        """Return the last look as a table of text; where it is wider than ``width``, without empty columns and paths."""
        if not self.rows:
            return ["no experiments"]
        header = ("name", "verdict", "restores", "next", "what", "path")
        cells = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
        columns = [*range(len(header))]
        filled = [any(line[column] for line in cells[1:]) for column in columns]
        for dispensable in [*(column for column in columns if not filled[column]), header.index("path")]:
            if width is not None and sum(widths[column] + 2 for column in columns) - 2 > width:
                columns.remove(dispensable)
        return ["  ".join(line[column].ljust(widths[column]) for column in columns).rstrip() for line in cells]

    def summary(self) -> dict[str, Any]:
        """Return what was found and done, as JSON values."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.verdict] = counts.get(row.verdict, 0) + 1
        return {
            "found": len(self.rows),
            "counts": counts,
            "dry_run": self._dry_run,
            "experiments": [{**asdict(row), "next": _moment(row.next)} for row in self.rows],
        }

    def troubles(self) -> list[Row]:
        """Return what could not be looked at, or not be started."""
        return [row for row in self.rows if row.verdict == UNREADABLE or (row.result or "").startswith("not started")]

    def exit_code(self) -> int:
        """Return 4 when something could not be looked at or started, 1 when something was given up or failed again, else 0."""
        troubles = self.troubles()
        failed = [row for row in self.rows if row.verdict == Verdict.GAVE_UP or (row.result or "").startswith("cut off")]
        return Infrastructure.exit_code if troubles else int(bool(failed))


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _cells(row: Row) -> Sequence[str]:
    waits = row.next is not None and row.result is None and row.verdict not in (GONE, UNREADABLE)
    when = (_moment(row.next) or "") if waits else ""
    why = " ".join(row.why.split())
    return row.name, row.verdict, str(row.restores or ""), when, f"{row.result}: {why}" if row.result else why, row.path
