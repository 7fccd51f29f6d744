"""The supervisor of an attempt over a real database and a real folder: what counts, what is deleted, what manifests say."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from holdfast.core import retention
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.checkpoint_config import CheckpointConfig
from holdfast.core.errors import CheckpointConflict, Fenced
from holdfast.core.objective import Direction, Objective
from holdfast.core.trial import Outcome
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.checkpoints.serializers import write_state
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.engine import Database, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.storage.folder import Folder
from holdfast.tasks.runtime import Runtime
from holdfast.tasks.supervisor import Supervisor, candidate_of
from holdfast.tasks.workers.messages import Report, Staged
from holdfast.testing.lab import Lab
from holdfast.testing.samples import sample_spec


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True)) as database:
        yield database


@dataclass
class Bench:
    """A trial whose attempts are supervised by hand."""

    lab: Lab
    root: Path
    config: CheckpointConfig
    attempt: int = 0
    reports: int = 0
    supervisor: Supervisor = field(init=False)

    def __post_init__(self) -> None:
        self.store = LocalCheckpoints(self.root)
        self.number = self.lab.driver.propose({"x": 0.5})

    def begin(self, resumed: Checkpoint | None = None) -> None:
        """Begin the trial's next attempt."""
        if self.attempt:
            self.lab.end(self.supervisor.writer, Outcome.LOST)
            self.lab.driver.rerun(self.lab.row(self.number), restart=resumed is None)
        self.attempt += 1
        runtime = Runtime(
            uuid="uuid",
            experiment=self.lab.id,
            epoch=1,
            spec=sample_spec(checkpoints=self.config.model_dump(mode="json")),
            workdir="/",
            database=self.lab.database,
            reader=self.lab.reader,
            folder=Folder(self.root),
            checkpoints=self.store,
            pool=None,
        )

        def claim(**_: Any) -> AttemptWriter:
            return self.lab.claim(self.number)

        candidates = [resumed] if resumed is not None else []
        log = logging.getLogger(__name__)
        self.supervisor = Supervisor(runtime, claim, self.number, self.attempt, {"x": 0.5}, candidates, log)
        self.supervisor.started(None, None if resumed is None else candidate_of(resumed), ())

    def staged(self, step: int, loss: float) -> Report:
        folder = self.store.stage(self.number, self.attempt, step)
        files = write_state({"step": step}, folder, serializer="safe")
        return Report(step=step, metrics={"loss": loss}, staged=Staged(path=str(folder), serializer="safe", files=tuple(files)))

    def save(self, step: int, loss: float = 1.0, *, later: bool = True) -> None:
        """Save a step after its report, or together with it."""
        report = self.staged(step, loss)
        if not later:
            self.supervisor.report(report)
            return
        self.supervisor.report(Report(step=step, metrics=report.metrics))
        self.supervisor.saved(report, self.supervisor.publication(report)())

    def valid(self) -> list[Checkpoint]:
        """Return the valid checkpoints of the trial by attempt and step, of which each has its files, and no other one has."""
        found = [one for one in self.lab.reader.checkpoints() if one.trial == self.number and one.status == "valid"]
        assert {one.path for one in found} == {path for path, _, _ in self.store.scan(self.number)}
        return sorted(found, key=lambda one: (one.attempt, one.step))

    def steps(self) -> list[tuple[int, int]]:
        return [(one.attempt, one.step) for one in self.valid()]

    def pin(self, checkpoint: Checkpoint, pinned: bool = True) -> None:
        with self.lab.database.engine.begin() as connection:
            connection.execute(text("UPDATE checkpoint SET pinned = :p WHERE id = :id"), {"p": pinned, "id": checkpoint.id})


@pytest.fixture
def bench(database: Database, tmp_path: Path) -> Any:
    def make(**config: Any) -> Bench:
        made = Bench(Lab.new(database, "sample"), tmp_path / "exp", CheckpointConfig(**config))
        made.begin()
        return made

    return make


class TestSaves:
    def test_a_save_after_its_report(self, bench: Any) -> None:
        made: Bench = bench(keep_last=2)
        first = made.staged(0, 3.0)
        made.supervisor.report(Report(step=0, metrics={"loss": 3.0}))
        publish = made.supervisor.publication(first)
        for step in (1, 2):
            made.supervisor.report(Report(step=step, metrics={"loss": float(step)}))
        made.supervisor.saved(first, publish())
        ((path, manifest, _),) = made.store.scan(made.number)
        assert (manifest.step, manifest.metrics) == (0, {"loss": 3.0})
        assert [(told[0], told[3]) for told in manifest.beside["reports"]] == [(0, {"loss": 3.0})]  # known when it was made
        late = made.staged(2, 2.0)
        made.supervisor.saved(late, made.supervisor.publication(late)())
        manifest = made.store.scan(made.number)[1][1]
        assert [told[0] for told in manifest.beside["reports"]] == [0, 1, 2]
        assert manifest.metrics == {"loss": 2.0}
        assert made.steps() == [(1, 0), (1, 2)]
        assert made.supervisor.metrics == {"loss": 2.0}
        assert made.valid()[0].path == path

    def test_a_fenced_one_publishes_nothing(self, bench: Any) -> None:
        made: Bench = bench()
        report = made.staged(0, 1.0)
        made.supervisor.report(Report(step=0, metrics={"loss": 1.0}))
        made.lab.take_over()
        with pytest.raises(Fenced):
            made.supervisor.publication(report)
        assert made.store.scan(made.number) == []

    def test_taken_over_while_it_publishes(self, bench: Any) -> None:
        """Its files are there, and no row names them: the next sweep takes them."""
        made: Bench = bench(keep_last=1)
        made.save(0)
        report = made.staged(1, 1.0)
        made.supervisor.report(Report(step=1, metrics={"loss": 1.0}))
        published = made.supervisor.publication(report)()
        made.lab.take_over()
        with pytest.raises(Fenced):
            made.supervisor.saved(report, published)
        assert [one.step for one in made.lab.reader.checkpoints() if one.status == "valid"] == [0]
        assert [manifest.step for _, manifest, _ in made.store.scan(made.number)] == [0, 1]

    def test_a_step_twice(self, bench: Any) -> None:
        made: Bench = bench()
        made.save(0)
        again = made.staged(0, 5.0)
        with pytest.raises(CheckpointConflict):
            made.supervisor.saved(again, made.supervisor.publication(again)())
        assert made.steps() == [(1, 0)]


class TestPruning:
    def test_the_one_that_was_continued_from_stays_until_a_newer_one_is_verified(self, bench: Any) -> None:
        made: Bench = bench(keep_last=1)
        for step in range(3):
            made.save(step)
        (newest,) = made.valid()
        made.begin(newest)
        for step in range(3, 6):
            made.save(step)
        assert made.steps() == [(1, 2), (2, 5)]
        made.begin(made.valid()[1])
        made.save(6)
        assert made.steps() == [(2, 5), (3, 6)]

    @pytest.mark.parametrize("config", [{"mode": "gap"}, {"keep_last": 1, "keep_every": 1}])
    def test_what_is_off_the_chain_goes_with_the_first_save_unless_it_is_pinned(self, bench: Any, config: Any) -> None:
        made: Bench = bench(**config)
        for step in range(3):
            made.save(step)
        made.pin(made.valid()[1])
        made.begin()
        assert len(made.steps()) == 3
        for step in range(3):
            made.save(step)
            assert made.steps() == [(1, 1), *((2, each) for each in range(step + 1))]

    def test_pins_are_heeded_at_any_time(self, bench: Any) -> None:
        made: Bench = bench(keep_last=2)
        made.save(0)
        made.save(1)
        made.pin(made.valid()[0])
        made.save(2)
        made.save(3)
        assert made.steps() == [(1, 0), (1, 2), (1, 3)]
        made.pin(made.valid()[0], False)
        made.save(4)
        assert made.steps() == [(1, 3), (1, 4)]

    def test_one_that_somebody_found_bad_does_not_count(self, bench: Any) -> None:
        made: Bench = bench(keep_top_k=1, keep_last=1)
        for step, loss in enumerate((0.1, 0.2, 0.3)):
            made.save(step, loss)
        assert made.steps() == [(1, 0), (1, 2)]
        bad = made.valid()[0]
        made.lab.driver.reject({bad.id: "a flipped bit"})
        made.store.delete(bad.path)
        made.save(3, 0.4)
        assert made.steps() == [(1, 2), (1, 3)]

    @pytest.mark.parametrize("seed", range(3))
    def test_what_is_remembered_gives_what_all_rows_give(self, bench: Any, seed: int) -> None:
        chance = random.Random(seed)
        config = {"keep_top_k": chance.randint(1, 3), "keep_last": chance.randint(1, 3), "keep_every": chance.randint(2, 5)}
        made: Bench = bench(**config)
        chosen = retention.policies(made.config, Objective(name="loss", direction=Direction.MIN))
        expected: list[Checkpoint] = []
        resumed: Checkpoint | None = None
        for step in range(25):
            loss = chance.choice([chance.random(), float("nan"), float("inf")])
            made.save(step, loss, later=chance.random() < 0.5)
            rows = {one.step: one for one in made.valid()}
            assert step in rows
            expected = [*expected, Checkpoint(**{**vars(rows[step]), "metrics": {"loss": loss}})]
            gone = {one.id for one in retention.surplus(expected, chosen)}
            expected = [one for one in expected if one.id not in gone]
            assert sorted(rows) == [one.step for one in expected]
            if chance.random() < 0.2:
                place = chance.randrange(len(expected))
                pinned = not expected[place].pinned
                made.pin(expected[place], pinned)
                expected[place] = Checkpoint(**{**vars(expected[place]), "pinned": pinned})
            if chance.random() < 0.1:
                resumed = expected[-1]
                made.begin(resumed)
                expected = [Checkpoint(**{**vars(one), "verified": one.id == resumed.id}) for one in expected]

    @pytest.mark.parametrize(("config", "most"), [({}, 0), ({"keep_every": 1}, 1)])
    def test_a_save_reads_no_more_than_what_is_new(
        self, bench: Any, config: Any, most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: Bench = bench(mode="gap", **config)
        made.save(0)
        read: list[int] = []
        kept = AttemptWriter.kept

        def counting(writer: AttemptWriter, after: int = 0) -> Any:
            found = kept(writer, after)
            read.append(len(found[0]) + len(found[1]))
            return found

        monkeypatch.setattr(AttemptWriter, "kept", counting)
        for step in range(1, 20):
            made.save(step)
        assert max(read, default=0) == most
        assert len(made.steps()) == 20
