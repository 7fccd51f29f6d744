"""The short form of the soak: searches of every kind, killed at random moments and restored until they are done."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support import warm_of

from holdfast.core.trial import TrialStatus
from holdfast.testing.crashes import Ordeal, Seen, broken, compared
from holdfast.testing.executed import Entry, note, read
from holdfast.testing.ordeals import KINDS

KILLS = {"random": 2, "tpe": 2, "retries": 2, "stopping": 2, "crashing": 2}
MakeOrdeal = Callable[..., Ordeal]


@pytest.fixture
def make(tmp_path: Path, server_environment: dict[str, str]) -> Iterator[MakeOrdeal]:
    """A function that makes a search of a kind in a folder of its own."""
    made: list[Ordeal] = []

    def ordeal(kind: str, name: str, **settings: Any) -> Ordeal:
        settings = {"trials": 5, "pause": 0.03, **settings}
        made.append(KINDS[kind].ordeal(tmp_path / name, server_environment, warm_of(server_environment), **settings))
        return made[-1]

    yield ordeal
    for one in made:
        one.runs.close()


@pytest.mark.parametrize("kind", KILLS)
def test_killed_at_random_moments_until_done(kind: str, make: MakeOrdeal) -> None:
    calm = make(kind, "calm")
    duration = calm.alone()
    assert not calm.verdict.problems
    rough = make(kind, "rough", twin=calm.seen)
    verdict = rough.endure(KILLS[kind], random.Random(f"7-{kind}"), duration)
    assert not verdict.problems
    assert verdict.trials == 5


def test_of_two_restores_at_once_one_drives(make: MakeOrdeal) -> None:
    """Three rounds; the other one exits with 3 and says who holds the lease, and for how long."""
    ordeal = make("waiting", "races", trials=2)
    wait = ordeal.runs.folder / "wait"
    wait.touch()
    ordeal.live(None, fault="checkpoint.committed:1")
    for _ in range(3):
        ordeal.race()
    wait.unlink()
    ordeal.live(None)
    assert not ordeal.verdict.problems
    assert ordeal.verdict.kills == 4
    assert len(read(ordeal.runs.folder)) > 0


# The laboratory itself


@dataclass
class Case:
    """What a search left, before a crash and after a restore, for tests to spoil."""

    before: Seen
    now: Seen
    log: list[Entry]
    known: int

    def counts(
        self, before: Seen | None = None, now: Seen | None = None, log: Iterable[Entry] | None = None
    ) -> set[str | None]:
        """Return which counts the promises belong to that a changed story breaks."""
        entries = [*(self.log if log is None else log)]
        found = broken(before or self.before, now or self.now, entries, self.known, done=True)
        return {count for count, _ in found}


def test_every_broken_promise_is_seen(make: MakeOrdeal) -> None:
    """One real crash and its restore, told otherwise than it was."""
    ordeal = make("random", "search", trials=4, checkpoints={"keep_last": 2})
    ordeal.live(None, fault="checkpoint.committed:15")
    before, known = ordeal.seen, len(read(ordeal.runs.folder))
    ordeal.live(None)
    assert before is not None
    assert ordeal.seen is not None
    case = Case(before, ordeal.seen, read(ordeal.runs.folder), known)
    assert not ordeal.verdict.problems
    assert case.counts() == set()
    trials, rows, log = case.now.trials, case.now.checkpoints, case.log
    finished = next(number for number, trial in before.trials.items() if trial.status is TrialStatus.COMPLETED)
    resumed = next(entry for entry in log[known:] if entry.event == "start" and entry.step > 0)

    def spoiled(**changes: Any) -> Seen:
        return replace(case.now, **changes)

    assert "lost" in case.counts(now=spoiled(trials={n: t for n, t in trials.items() if n != finished}))
    assert "lost" in case.counts(now=spoiled(trials={**trials, 3: replace(trials[3], status=TrialStatus.RUNNING)}))
    assert "duplicated" in case.counts(now=spoiled(trials={**trials, 9: trials[3]}, attempts={**case.now.attempts, 9: {}}))
    assert "renumbered" in case.counts(now=spoiled(trials={**trials, 0: replace(trials[0], config={"x": 9.0})}))
    again = replace(resumed, trial=finished, step=0)
    assert "rerun" in case.counts(log=[*log, again])
    assert "rerun" in case.counts(
        now=spoiled(trials={**trials, finished: replace(trials[finished], status=TrialStatus.FAILED)})
    )
    more = {**case.now.attempts, finished: {**case.now.attempts[finished], 2: case.now.attempts[finished][1]}}
    assert "rerun" in case.counts(now=spoiled(attempts=more))
    earlier = [replace(entry, step=entry.step - 1) if entry is resumed else entry for entry in log]
    assert "checkpoints_lost" in case.counts(log=earlier)
    newest = max((row for row in rows if row.trial == finished), key=lambda row: row.step)
    assert "checkpoints_lost" in case.counts(now=spoiled(intact=case.now.intact - {newest.path}))
    assert "checkpoints_lost" in case.counts(now=spoiled(checkpoints=[row for row in rows if row is not newest]))
    assert "reports_lost" in case.counts(now=spoiled(reports=case.now.reports[1:]))
    assert "steps_wrong" in case.counts(now=spoiled(reports=[*case.now.reports, case.now.reports[0]]))
    assert "steps_wrong" in case.counts(log=[entry for entry in log if entry.event != "step" or entry.step != 5])
    first = next(entry for entry in log[known:] if entry.event == "start")
    crowd = [replace(first, trial=number, attempt=7, pid=-number) for number in trials]
    assert "crowded" in case.counts(log=[*log[:known], *crowd, *log[known:]])
    assert "left" in case.counts(
        now=spoiled(held={**case.now.held, 0: [*case.now.held[0], "trials/000000/checkpoints/.staging-x"]})
    )

    outcome = case.now.outcome()
    assert [*compared(outcome, outcome)] == []
    assert [count for count, _ in compared(outcome, {n: o for n, o in outcome.items() if n})] == ["lost"]
    assert [count for count, _ in compared({n: o for n, o in outcome.items() if n}, outcome)] == ["duplicated"]
    assert [count for count, _ in compared({**outcome, 0: outcome[1]}, outcome)] == ["different"]


def test_a_process_that_outlives_the_search_is_seen(make: MakeOrdeal, monkeypatch: pytest.MonkeyPatch) -> None:
    ordeal = make("random", "search", trials=1)
    monkeypatch.setattr("holdfast.testing.crashes.PATIENCE", 30.0)
    ordeal.live(None)
    assert not ordeal.verdict.problems
    note(ordeal.runs.folder, "step", 0, 1, 99)
    monkeypatch.setattr("holdfast.testing.crashes.PATIENCE", 0.0)
    ordeal._after(len(read(ordeal.runs.folder)), ordeal.runs.all[-1].wait(), killed=True)
    assert ordeal.verdict.left == 1
    assert str(os.getpid()) in ordeal.verdict.problems[0]
