"""The crash laboratory for whole searches: kill one again and again, restore it until it is done, and judge it.

Everything that holdfast promises about crashes is judged from outside: from the log of what the trainable executed
(``holdfast.testing.executed``), from the rows and files that each kill leaves, and from a twin that was not interrupted.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.core.checkpoint import Checkpoint, CheckpointStatus
from holdfast.core.errors import CheckpointNotFound, Corrupt
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import UNFINISHED, Attempt, Trial
from holdfast.storage.checkpoints.ports import checkpoints_in
from holdfast.storage.database import experiments
from holdfast.storage.database.reads import Reader, ReportRow
from holdfast.storage.folder import Folder
from holdfast.testing.executed import ENDS, Entry, executed, read
from holdfast.testing.runs import DIED, PATIENCE, Ended, Running, Runs

CLOCKS = 0.01
"""Seconds by which a row's time may seem later than the log's."""


@dataclass(frozen=True)
class Seen:
    """What rows and files say of an experiment while nobody drives it."""

    spec: ExperimentSpec
    trials: Mapping[int, Trial]
    attempts: Mapping[int, Mapping[int, Attempt]]
    reports: Sequence[ReportRow]
    checkpoints: Sequence[Checkpoint]
    """that have a row, deleted ones, too"""
    intact: frozenset[str]
    """the paths of those that can be loaded"""
    newest: Mapping[int, int]
    """the step of the newest one that each trial can go on from"""
    held: Mapping[int, Sequence[str]]
    """the path of everything that holdfast made for each trial"""

    def outcome(self, *, exact: bool = True) -> dict[int, Any]:
        """Return what a crash must not change; without ``exact`` only what does not depend on who reports first."""
        steps: dict[int, list[int]] = {}
        for row in self.reports:
            if row.canonical and row.step >= 0:
                steps.setdefault(row.trial, []).append(row.step)
        return {
            number: (trial.status.value, dict(trial.config), repr(trial.metrics), steps.get(number, [])) if exact else None
            for number, trial in self.trials.items()
        }


@dataclass(frozen=True)
class Place:
    """Where an experiment is."""

    location: str
    """its folder, or its URL on an object store"""
    database: str
    options: Mapping[str, Any] | None = None
    """of the object store"""
    work: Path | None = None
    """an object store's: a folder for files that are read"""
    arguments: tuple[str, ...] = ()
    """of the command line, where the path does not say it all, such as --database"""

    def folder(self) -> Folder:
        return Folder.at(self.location, options=self.options, work=self.work)

    def exists(self) -> bool:
        return self.folder().exists()

    def look(self) -> Seen | None:
        """Return what there is, with every checkpoint read back; None when there is no experiment yet."""
        if not self.exists():
            return None
        with closing(experiments.open_database(self.database, readonly=True)) as database:
            record = next((one for one in experiments.every(database) if one.uuid == self.folder().identity().uuid), None)
            if record is None:
                return None
            reader = Reader(database, record.id)
            trials = {trial.number: trial for trial in reader.trials()}
            rows, store = reader.checkpoints(), checkpoints_in(self.folder())
            intact = frozenset(row.path for row in rows if row.status is CheckpointStatus.VALID and _is_intact(store, row))
            usable = {number: reader.candidates(number, trial.attempt.number) for number, trial in trials.items()}
            return Seen(
                spec=ExperimentSpec.parse(record.spec),
                trials=trials,
                attempts=reader.attempts(),
                reports=reader.history(),
                checkpoints=rows,
                intact=intact,
                newest={number: found[0].step for number, found in usable.items() if found},
                held={number: store.held(number) for number in trials},
            )


def _is_intact(store: Any, row: Checkpoint) -> bool:
    try:
        store.verify(row.path, digest=row.digest, trial=row.trial, attempt=row.attempt, step=row.step)
    except (Corrupt, CheckpointNotFound):
        return False
    return True


@dataclass
class Verdict:
    """What a search went through, and every broken promise."""

    kills: int = 0
    lives: int = 0
    trials: int = 0
    lost: int = 0
    """trials that were there before a crash and are not there any more, or that the twin has"""
    duplicated: int = 0
    """trials that the twin does not have, and numbers that are skipped or twice"""
    renumbered: int = 0
    """trials whose number means another config"""
    rerun: int = 0
    """finished trials that were executed again, or have another attempt"""
    different: int = 0
    """trials that ended otherwise than in the twin"""
    checkpoints: int = 0
    """acknowledged ones, at all kills"""
    checkpoints_lost: int = 0
    reports_lost: int = 0
    steps_wrong: int = 0
    """canonical steps that are missing, twice, or were never executed"""
    steps_lost: int = 0
    """that were executed again"""
    worst: int = 0
    """steps that one trial lost by one kill"""
    crowded: int = 0
    """starts of more trials at once than allowed"""
    left: int = 0
    """processes and files that nobody needs, at the end"""
    races: int = 0
    """in which not exactly one restore drove, and named itself and its lease's end to the others"""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def problem(self, count: str | None, words: str) -> None:
        """Note a broken promise."""
        if count is not None:
            setattr(self, count, getattr(self, count) + 1)
        self.problems.append(words)

    def add(self, other: Verdict) -> None:
        """Count another search's in."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "worst" else mine + value)


@dataclass
class Ordeal:
    """One search that is killed. ``runs.folder`` holds its spec and the log of what it executes."""

    runs: Runs
    spec: Path
    place: Place
    twin: Seen | None = None
    """what the uninterrupted search ended with"""
    exact: bool = True
    """whether a crash must not change what the search ends with: not so where several trials at once decide about each other"""
    verdict: Verdict = field(default_factory=Verdict)
    finished: bool = False
    _seen: Seen | None = None

    @property
    def seen(self) -> Seen | None:
        """What was there after the last crash, or at the end."""
        return self._seen

    def alone(self) -> float:
        """Run it uninterrupted, as a twin; return the seconds that it took."""
        before = time.monotonic()
        self.live(None)
        assert self.finished, self.verdict.problems
        return time.monotonic() - before

    def endure(self, kills: int, moments: random.Random, duration: float) -> Verdict:
        """Kill it up to ``kills`` times, each time within ``duration`` seconds of its start, restore it, and let it end.

        Each moment is drawn uniformly, starts and restores included. Fewer kills when it ends before one.
        """
        before = time.monotonic()
        while not self.finished:
            self.live(moments.uniform(0.0, duration) if self.verdict.kills < kills else None)
        self.verdict.seconds += time.monotonic() - before
        return self.verdict

    def live(self, seconds: float | None, *, fault: str | None = None) -> None:
        """Start or restore it, kill its group after ``seconds`` (None: not), or at a crash point, and judge what is left."""
        known = len(read(self.runs.folder))
        command = self._restore() if self.place.exists() else ["run", str(self.spec)]
        run = self.runs.start(*command, fault=fault)
        ended = run.within(seconds) if seconds is not None else run.wait(4 * PATIENCE)
        killed = ended is None or ended.code == DIED
        if ended is None:
            ended = run.kill()
        self._after(known, ended, killed=killed)

    def race(self, racers: int = 2) -> None:
        """Start several restores at once, kill the one that drives when a trial goes on, and judge; all others are refused."""
        known = len(read(self.runs.folder))
        runs = [self.runs.start(*self._restore()) for _ in range(racers)]
        winner = _last_running(runs)
        if winner is None:
            codes = [run.wait().code for run in runs]
            self.verdict.problem("races", f"of {racers} restores none drives: they ended with {codes}")
            return
        words = (f"process {winner.process.pid} on", "unless renewed")
        for run in runs:
            if run is not winner and (run.wait().code != 3 or any(word not in run.output for word in words)):
                self.verdict.problem("races", f"a restore ended with {run.wait().code}, and said: {run.output[-500:]}")
        deadline = time.monotonic() + PATIENCE
        while not any(entry.event == "start" for entry in read(self.runs.folder)[known:]):
            if time.monotonic() > deadline or winner.within(0.02) is not None:
                self.verdict.problem("races", f"the restore that was not refused drives nothing: {winner.output[-2000:]}")
                break
        ended = winner.within(0.0) or winner.kill()
        self._after(known, ended, killed=True)

    def _restore(self) -> list[str]:
        return ["restore", self.place.location, *self.place.arguments]

    def _after(self, known: int, ended: Ended, *, killed: bool) -> None:
        """Wait until what ran has ended, and judge what it did."""
        self.verdict.lives += 1
        self.verdict.kills += killed
        left = _await_end({entry.pid for entry in read(self.runs.folder)})
        if left:
            self.verdict.problem("left", f"processes {left} outlive the search by {PATIENCE:g} s")
        self._judge(known, ended, killed=killed)

    def _judge(self, known: int, ended: Ended, *, killed: bool) -> None:
        seen, log = self.place.look(), read(self.runs.folder)
        if not killed and ended.code not in (0, 1):
            self.verdict.problem(None, f"exit code {ended.code}: {ended.output[-2000:]}")
            self.finished = True
        if seen is None:
            return
        problems = [*broken(self._seen, seen, log, known, done=not killed)]
        if not killed:
            if self.twin is not None:
                problems += compared(self.twin.outcome(exact=self.exact), seen.outcome(exact=self.exact))
            self.finished = True
            self.verdict.trials = len(seen.trials)
        for count, words in problems:
            self.verdict.problem(count, words)
        self._losses(seen, log, known)
        self.verdict.checkpoints += len(seen.intact)
        self._seen = seen

    def _losses(self, seen: Seen, log: Sequence[Entry], known: int) -> None:
        """Count the steps that this life executed again."""
        for number in seen.trials:
            last = max(executed(log[:known], number), default=-1)
            for entry in (entry for entry in log[known:] if entry.trial == number):
                if entry.event == "start":
                    lost = last + 1 - entry.step
                    self.verdict.steps_lost += max(0, lost)
                    self.verdict.worst = max(self.verdict.worst, lost)
                    if lost > seen.spec.checkpoints.save_period:
                        self.verdict.problem(None, f"trial {number} lost {lost} steps at once")
                elif entry.event == "step":
                    last = entry.step


Problems = Iterator[tuple[str | None, str]]
"""Broken promises: which of :class:`Verdict`'s counts each belongs to, and what is wrong."""


def broken(before: Seen | None, now: Seen, log: Sequence[Entry], known: int, *, done: bool) -> Problems:
    """Return which promises one life broke: from ``before`` to ``now``, with ``log[known:]`` as what it executed.

    With ``done`` the search must be complete.
    """
    life = log[known:]
    yield from _history(before, now, life)
    yield from _kept(before, now, log)
    yield from _crowded(now, life)
    if done:
        yield from _complete(now, log)
        yield from _leftovers(now)


def _history(before: Seen | None, now: Seen, life: Sequence[Entry]) -> Problems:
    """Trials stay what and where they are, finished ones are left alone, and the others go on where they were."""
    if sorted(now.trials) != list(range(len(now.trials))):
        yield "duplicated", f"the numbers of the trials are {sorted(now.trials)}"
    for number, trial in (before.trials if before else {}).items():
        if number not in now.trials:
            yield "lost", f"trial {number} is gone"
            continue
        if now.trials[number].config != trial.config:
            yield "renumbered", f"trial {number} was {trial.config}, and is {now.trials[number].config}"
        again = any(entry.trial == number for entry in life)
        more = before is not None and now.attempts[number].keys() != before.attempts[number].keys()
        if trial.status not in UNFINISHED and (again or more or now.trials[number].status is not trial.status):
            yield "rerun", f"trial {number} was {trial.status}, and ran again"
    for number in {entry.trial for entry in life}:
        own = [entry for entry in life if entry.trial == number]
        newest = -1 if before is None else before.newest.get(number, -1)
        first = next((entry.step for entry in own if entry.event == "start"), None)
        if first != newest + 1:
            yield "checkpoints_lost", f"the newest checkpoint of trial {number} is of step {newest}; it went on at {first}"
        step = -1
        for entry in own:
            if entry.event == "start":
                step = entry.step - 1
            elif entry.event == "step":
                if entry.step != step + 1:
                    yield "steps_wrong", f"trial {number} executed step {entry.step} after {step}"
                step = entry.step


def _kept(before: Seen | None, now: Seen, log: Sequence[Entry]) -> Problems:
    """What was acknowledged is there: reports, and checkpoints unless newer ones took their place by rule."""
    valid = [row for row in now.checkpoints if row.path in now.intact]
    for row in now.checkpoints:
        if row.status is CheckpointStatus.VALID and row.path not in now.intact:
            yield "checkpoints_lost", f"{row.path} cannot be loaded"
    keep = now.spec.checkpoints.keep_last
    for row in before.checkpoints if before else ():
        newer = sum(other.trial == row.trial and other.step > row.step for other in valid)
        if row.path in before.intact and row.path not in now.intact and (keep is None or newer < keep):  # type: ignore[union-attr]
            yield "checkpoints_lost", f"{row.path} is gone, and {newer} newer ones are there"
    reports = {(row.trial, row.attempt, row.step) for row in now.reports}
    saved = {(row.trial, row.attempt, row.step) for row in now.checkpoints}
    for entry in log:
        if entry.event != "reported":
            continue
        key = (entry.trial, entry.attempt, entry.step)
        if key not in reports:
            yield "reports_lost", f"the report of step {entry.step} by attempt {entry.attempt} of trial {entry.trial} is gone"
        if entry.step % now.spec.checkpoints.save_period == 0 and key not in saved and not now.spec.checkpoints.asynchronous:
            yield "checkpoints_lost", f"that of step {entry.step} by attempt {entry.attempt} of trial {entry.trial} is gone"


def _crowded(now: Seen, life: Sequence[Entry]) -> Problems:
    """One process never runs more trials at once than allowed."""
    active: dict[int, Entry] = {}
    for entry in life:
        if entry.event in ENDS:
            active.pop(entry.trial, None)
        if entry.event != "start":
            continue
        for number, other in list(active.items()):  # one that crashed says no word: its row does, or its process is reused
            row = now.attempts.get(number, {}).get(other.attempt)
            closed = row is not None and row.ended is not None and row.ended.timestamp() <= entry.time + CLOCKS
            if number == entry.trial or other.pid == entry.pid or closed:
                del active[number]
        active[entry.trial] = entry
        if len(active) > now.spec.search.max_concurrent:
            yield "crowded", f"trials {sorted(active)} ran at once"


def _complete(now: Seen, log: Sequence[Entry]) -> Problems:
    """Every trial has ended, and its canonical steps are those that it executed, each once."""
    for number, trial in now.trials.items():
        if trial.status in UNFINISHED:
            yield "lost", f"trial {number} is {trial.status} at the end"
        steps = [row.step for row in now.reports if row.trial == number and row.canonical and row.step >= 0]
        if sorted(steps) != sorted(set(executed(log, number))):
            yield "steps_wrong", f"trial {number} has the steps {steps}, and executed {executed(log, number)}"


def _leftovers(now: Seen) -> Problems:
    valid = {row.path for row in now.checkpoints if row.status is CheckpointStatus.VALID}
    for paths in now.held.values():
        for path in sorted(set(paths) - valid):
            yield "left", f"{path} is left"


def compared(twin: Mapping[int, Any], outcome: Mapping[int, Any]) -> Problems:
    """Return in what an outcome differs from that of the uninterrupted search."""
    for number in twin.keys() - outcome.keys():
        yield "lost", f"the uninterrupted search has a trial {number}"
    for number in outcome.keys() - twin.keys():
        yield "duplicated", f"the uninterrupted search has no trial {number}"
    for number in twin.keys() & outcome.keys():
        if twin[number] != outcome[number]:
            yield "different", f"trial {number} ended as {outcome[number]}; uninterrupted: {twin[number]}"


def _last_running(runs: Sequence[Running]) -> Running | None:
    """Wait until one of several processes is left, and return it; None when none is left in the end."""
    deadline = time.monotonic() + PATIENCE
    while len(left := [run for run in runs if run.process.poll() is None]) > 1 and time.monotonic() < deadline:
        time.sleep(0.005)
    return left[0] if left else None


def _await_end(pids: Iterable[int]) -> list[int]:
    """Wait until processes have ended; return those that do not."""
    deadline = time.monotonic() + PATIENCE
    left = [*pids]
    while left := [pid for pid in left if _runs(pid)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.01)
    return []


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        pass
    if os.path.isdir("/proc/self"):
        return False
    import psutil

    return bool(psutil.pid_exists(pid))
