"""The part of the store's contract that is about looking after checkpoints: pins, quarantine, what may be deleted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from holdfast.core.errors import CheckpointNotFound, ExperimentNotFound, InvalidInput, InvalidStep
from holdfast.core.trial import Outcome
from holdfast.storage.database import requests
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.engine import Database
from holdfast.testing import racing
from holdfast.testing.lab import Lab, dump
from holdfast.testing.racing import Racers, url_of


def fields_of(writer: AttemptWriter) -> dict[str, Any]:
    """Return what another process needs to write as this attempt."""
    return {name: value for name, value in vars(writer).items() if name != "database"}


def pinned(lab: Lab) -> list[tuple[int, int]]:
    return [(item.attempt, item.step) for item in lab.reader.checkpoints() if item.pinned]


def restarted(lab: Lab) -> AttemptWriter:
    """Return the third attempt of trial 0: it goes on from step 1 of the second, which had begun anew; each saved 0 to 2."""
    writer = lab.started()
    for begin_anew in (True, False):
        for step in range(3):
            lab.save(writer, step)
        lab.driver.end(writer.attempt, Ending(outcome=Outcome.FAILED))
        if not begin_anew:
            lab.driver.reject({lab.reader.checkpoints()[-1].id: "torn"})
        lab.driver.rerun(lab.row(0), restart=begin_anew)
        writer = lab.claim(0)
    return writer


class UpkeepContract:
    """What every database keeps of pins and of bad checkpoints; part of ``DatabaseContract``."""

    @pytest.fixture
    def database(self) -> Iterator[Database]:
        raise NotImplementedError("the subclass gives it")

    @pytest.fixture
    def lab(self, database: Database) -> Lab:
        return Lab.new(database, "sample")

    def test_a_pin_outlives_pruning_and_can_be_taken_away(self, lab: Lab) -> None:
        writer = lab.started()
        for step in range(3):
            lab.save(writer, step)
        ids = [item.id for item in lab.reader.checkpoints()]
        assert requests.pin(lab.database, lab.id, 0, 1) == 1
        assert pinned(lab) == [(1, 1)]
        assert [item.pinned for item in writer.kept()[0]] == [False, True, False]
        assert writer.forget(ids) == {ids[0], ids[2]}
        assert lab.driver.forget(dict.fromkeys(ids, "superseded")) == set()
        requests.pin(lab.database, lab.id, 0, 1, pinned=False)
        assert writer.forget(ids) == {ids[1]}

    def test_a_pin_is_for_the_one_that_counts(self, lab: Lab) -> None:
        writer = restarted(lab)
        assert requests.pin(lab.database, lab.id, 0, 0) == 2
        with pytest.raises(CheckpointNotFound, match="steps 0, 1"):
            requests.pin(lab.database, lab.id, 0, 2)  # torn, and the first attempt's is history
        requests.pin(lab.database, lab.id, 0, 2, attempt=1)
        assert pinned(lab) == [(1, 2), (2, 0)]
        assert [(item.attempt, item.step) for item in writer.kept()[1]] == [(1, 0), (1, 1)]
        lab.save(writer, 0)
        assert requests.pin(lab.database, lab.id, 0, 0) == 3
        for _ in range(2):
            requests.pin(lab.database, lab.id, 0, 0, pinned=False)
        assert pinned(lab) == [(1, 2)]
        requests.pin(lab.database, lab.id, 0, 2, pinned=False)
        assert pinned(lab) == []

    def test_what_cannot_be_pinned_is_said_and_nothing_is_written(self, lab: Lab) -> None:
        restarted(lab)
        before = dump(lab.database)
        wrong: list[tuple[type[Exception], tuple[int, Any], dict[str, Any]]] = [
            (InvalidInput, (1, 0), {}),
            (InvalidInput, (-1, 0), {}),
            (CheckpointNotFound, (0, 7), {}),
            (CheckpointNotFound, (0, 0), {"attempt": 3}),
            (CheckpointNotFound, (0, 2), {"attempt": 2}),  # torn
            (CheckpointNotFound, (0, 0), {"attempt": 99}),
            (InvalidStep, (0, -1), {}),
            (InvalidStep, (0, True), {}),
            (InvalidStep, (0, 1.0), {}),
        ]
        for error, given, options in wrong:
            for is_pinned in (True, False):
                with pytest.raises(error):
                    requests.pin(lab.database, lab.id, *given, pinned=is_pinned, **options)
        with pytest.raises(ExperimentNotFound):
            requests.pin(lab.database, 10**6, 0, 0)
        assert dump(lab.database) == before

    def test_a_pin_needs_no_lease_and_disturbs_no_driver(self, lab: Lab) -> None:
        writer = lab.started()
        lab.save(writer, 0)
        seq = lab.reader.seq()
        requests.pin(lab.database, lab.id, 0, 0)
        writer.check()
        lab.save(writer, 1)
        assert [trial.number for trial in lab.reader.trials(since=seq)] == [0]  # so that the journal looks at it
        assert [row.action for row in lab.reader.audit()][-1] == "pinned"

    def test_of_a_pin_and_a_pruning_at_once_one_wins(self, lab: Lab, racers: Racers) -> None:
        writer, steps = lab.started(), list(range(30))
        for step in steps:
            lab.save(writer, step)
        rows = {item.step: item.id for item in lab.reader.checkpoints()}
        url = url_of(lab.database)
        job = {"url": url, "experiment": lab.id, "trial": 0}
        prune = {"url": url, "checkpoints": [rows[step] for step in reversed(steps)], **fields_of(writer)}
        kept, pruned = racers.race(either, [{"pin": {**job, "steps": steps}}, {"forget": prune}])
        assert sorted([*kept, *(step for step in steps if rows[step] in pruned)]) == steps
        assert {item.step for item in lab.reader.checkpoints() if item.status == "valid"} == set(kept)
        assert [step for _, step in pinned(lab)] == kept

    def test_of_two_writers_of_a_step_one_row_wins(self, lab: Lab, racers: Racers) -> None:
        writer, steps = lab.started(), list(range(20))
        job = {"url": url_of(lab.database), "steps": steps, **fields_of(writer)}
        one, other = racers.race(racing.save, [{**job, "path": "one"}, {**job, "path": "other"}])
        assert sorted([*one, *other]) == steps
        found = {item.step: item.path for item in lab.reader.checkpoints()}
        assert found == {step: f"{'one' if step in one else 'other'}-{step}" for step in steps}

    def test_what_is_bad_is_set_aside(self, lab: Lab) -> None:
        writer = lab.started()
        for step in range(4):
            lab.save(writer, step)
        items = lab.reader.checkpoints()
        writer.forget([items[0].id])
        requests.pin(lab.database, lab.id, 0, 3)
        assert requests.quarantine(lab.database, lab.id, [(items[0], "gone"), (items[1], "a bit"), (items[3], "\0\udce9")]) == 2
        after = {item.step: (item.status.value, item.reason) for item in lab.reader.checkpoints()}
        assert after[0] == ("deleted", "pruned")
        assert after[1] == ("corrupt", "a bit")
        assert after[2][0] == "valid"
        assert after[3][0] == "corrupt"
        assert [item.step for item in writer.kept()[0]] == [2]
        assert writer.forget([item.id for item in items]) == {items[2].id}  # what is bad is evidence
        before = dump(lab.database)["checkpoint"]
        assert requests.quarantine(lab.database, lab.id, [(items[1], "again")]) == 0
        assert dump(lab.database)["checkpoint"] == before
        assert lab.driver.forget({items[1].id: "r", items[3].id: "r"}, status="corrupt") == {items[1].id}

    def test_what_is_good_again_counts_again(self, lab: Lab) -> None:
        writer = lab.started()
        for step in range(4):
            lab.save(writer, step)
        items = lab.reader.checkpoints()
        writer.forget([items[0].id])
        requests.quarantine(lab.database, lab.id, [(items[1], "a bit"), (items[3], "a bit")])
        seq = lab.reader.seq()
        assert requests.acquit(lab.database, lab.id, [items[0], items[1], items[2]]) == 1
        after = [(item.status.value, item.reason) for item in lab.reader.checkpoints()]
        assert after == [("deleted", "pruned"), ("valid", ""), ("valid", ""), ("corrupt", "a bit")]
        assert [item.step for item in writer.kept()[0]] == [1, 2]
        assert [trial.number for trial in lab.reader.trials(since=seq)] == [0]  # so that the journal looks at it
        assert lab.reader.audit()[-1].action == "acquitted"
        before = dump(lab.database)["checkpoint"]
        other = Lab.new(lab.database, "other")
        assert requests.acquit(other.database, other.id, items) == 0
        assert requests.acquit(lab.database, lab.id, [replace(items[3], path="elsewhere")]) == 0
        assert requests.acquit(lab.database, lab.id, [replace(items[3], attempt=2)]) == 0
        assert dump(lab.database)["checkpoint"] == before
        writer.check()

    def test_only_this_experiments_are_set_aside(self, lab: Lab) -> None:
        other = Lab.new(lab.database, "other")
        for each in (lab, other):
            each.save(each.started(), 0)
        assert requests.quarantine(lab.database, lab.id, [(other.reader.checkpoints()[0], "bad")]) == 1  # by what it is
        assert [item.status.value for item in other.reader.checkpoints()] == ["valid"]
        assert [item.status.value for item in lab.reader.checkpoints()] == ["corrupt"]


def either(**job: Any) -> racing.Run:
    """Run the one action that the job names: racers all run the same."""
    ((name, options),) = job.items()
    run: racing.Run = getattr(racing, name)(**options)
    return run
