"""The trials as one reader follows them, against a fresh look at all of them, after everything that can happen to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import Conflict, Contention, InvalidInput
from holdfast.core.trial import Outcome, Trial, TrialStatus
from holdfast.storage.database import merging, requests
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.engine import Database, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.storage.database.following import Followed
from holdfast.storage.database.populations import Change
from holdfast.storage.database.reads import ALL
from holdfast.testing.lab import ERROR, Lab
from holdfast.testing.samples import sample_spec


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    with (
        TemporaryDirectory() as folder,
        closing(open_database(sqlite_url(Path(folder) / "a.db"), create_missing=True)) as found,
    ):
        yield found


class Life:
    """An experiment to which things happen; ``pick`` chooses a trial, ``step`` and ``odd`` how."""

    def __init__(self, database: Database, name: str) -> None:
        self.lab, self.other = Lab.new(database, name), Lab.new(database, f"{name}-other")
        self.writers: dict[int, AttemptWriter] = {}
        self.step = 0
        self.generation = 0

    def trial(self, pick: int, *statuses: TrialStatus) -> Trial:
        found = [trial for trial in self.lab.reader.trials() if not statuses or trial.status in statuses]
        if not found:
            raise Conflict("there is none")
        return found[pick % len(found)]

    def writer(self, pick: int) -> AttemptWriter:
        if not self.writers:
            raise Conflict("nobody writes")
        return self.writers[sorted(self.writers)[pick % len(self.writers)]]

    def propose(self, pick: int, odd: bool) -> None:
        self.lab.driver.propose({"x": pick / 100})

    def enqueue(self, pick: int, odd: bool) -> None:
        self.lab.queue(None)

    def claim(self, pick: int, odd: bool) -> None:
        number = self.trial(pick, TrialStatus.PENDING).number
        self.writers[number] = self.lab.claim(number)

    def report(self, pick: int, odd: bool) -> None:
        self.step += 1
        self.writer(pick).report(self.step, {"loss": float(pick), "note": "x" * pick}, note="a rule" if odd else "")

    def save(self, pick: int, odd: bool) -> None:
        self.step += 1
        self.lab.save(self.writer(pick), self.step)

    def complete(self, pick: int, odd: bool) -> None:
        trial = self.trial(pick, TrialStatus.RUNNING)
        self.lab.driver.end(
            trial.attempt.id, Ending(outcome=Outcome.PRUNED if odd else Outcome.COMPLETED, metrics={"loss": 1.0})
        )

    def fail(self, pick: int, odd: bool) -> None:
        self.writer(pick).fail(Ending(outcome=Outcome.FAILED, error=ERROR), max_failures=2 if odd else 0)

    def lose(self, pick: int, odd: bool) -> None:
        self.lab.driver.end(
            self.trial(pick, TrialStatus.RUNNING).attempt.id, Ending(outcome=Outcome.LOST, note="its driver died")
        )

    def rerun(self, pick: int, odd: bool) -> None:
        trial = self.trial(pick)
        if trial.status is TrialStatus.RUNNING:
            raise Conflict("it runs")
        self.lab.driver.rerun(self.lab.row(trial.number), restart=odd, note="again" if pick % 2 else "")

    def skip(self, pick: int, odd: bool) -> None:
        self.lab.driver.skip([self.lab.row(self.trial(pick, TrialStatus.PENDING).number)])

    def cancel(self, pick: int, odd: bool) -> None:
        requests.request_cancel(self.lab.database, self.lab.id, self.trial(pick).number)
        if odd:
            self.lab.driver.cancel(self.lab.row(self.trial(pick, TrialStatus.PENDING).number))

    def pin(self, pick: int, odd: bool) -> None:
        kept = self.lab.reader.checkpoints()
        if kept:
            chosen = kept[pick % len(kept)]
            if odd:
                self.lab.driver.reject({chosen.id: "it is bad"})
            else:
                self.lab.driver.forget({chosen.id: "pruned"})

    def take_over(self, pick: int, odd: bool) -> None:
        self.lab.take_over()
        self.lab.epoch += odd  # else our own driver is fenced from now on, until the next one
        if not odd:
            with suppress(Contention):
                self.lab.driver.propose({"x": 0.1})
            self.lab.epoch += 1

    def merge(self, pick: int, odd: bool) -> None:
        self.other.end(self.other.started(pick / 100), loss=float(pick))
        spec, record = sample_spec(name=self.lab.record.name), self.lab.record
        merging.merge(self.lab.database, record.id, spec, record.uuid, [self.other.record.name])

    def evolve(self, pick: int, odd: bool) -> None:
        waiting = [t for t in self.lab.reader.trials() if t.status is TrialStatus.PENDING and t.attempt.parent_step is not None]
        if len(waiting) < 2:
            raise Conflict("no population")
        donor, member = waiting[pick % len(waiting)], waiting[(pick + 1) % len(waiting)]
        assert donor.attempt.parent_step is not None
        change = Change(
            trial=member.number,
            donor=donor.number,
            step=donor.attempt.parent_step,
            config={"x": pick / 100 + 0.001},
            changes={"x": (0.0, 1.0)},
        )
        self.lab.driver.evolve(self.generation, [change])
        self.generation += 1


NAMES = count()
DEEDS: dict[str, Callable[[Life, int, bool], None]] = {
    name: deed
    for name, deed in vars(Life).items()
    if callable(deed) and not name.startswith("_") and name not in ("trial", "writer")
}


@settings(max_examples=60, deadline=None)
@given(story=st.lists(st.tuples(st.sampled_from(sorted(DEEDS)), st.integers(0, 90), st.booleans(), st.booleans()), max_size=40))
def test_who_follows_sees_what_a_fresh_look_sees(database: Database, story: list[tuple[str, int, bool, bool]]) -> None:
    life = Life(database, f"life-{next(NAMES)}")
    followed = Followed(life.lab.reader)
    for name in ("propose", "propose", "claim", "claim", "save", "propose"):  # most can happen from the first moment
        DEEDS[name](life, 0, False)
    for name, pick, odd, looked_at in story:
        with suppress(Conflict, Contention, InvalidInput):
            DEEDS[name](life, pick, odd)
        if looked_at or name == "report":
            assert followed.look() == life.lab.reader.trials(first=-ALL)
    assert followed.look() == life.lab.reader.trials(first=-ALL)
    assert followed.own() == life.lab.reader.trials()
