"""The contract of populations in the experiment store: part of ``holdfast.testing.database.DatabaseContract``."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.core.checkpoint import CheckpointStatus
from holdfast.core.errors import Conflict
from holdfast.core.population import Change
from holdfast.core.trial import Outcome, TrialStatus
from holdfast.storage.database import requests
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.driver import Ending
from holdfast.testing.lab import FAILED, Lab, dump

STEP = 1
"""The last one of the first generation."""


def change(trial: int, donor: int, x: float, **values: Any) -> Change:
    return Change(trial=trial, donor=donor, step=STEP, config={"x": x}, changes={"x": (0.5, x)}, **values)


def save(writer: AttemptWriter, trial: int, step: int, loss: float) -> None:
    path = f"trials/{trial:06d}/checkpoints/step_{step:08d}-a{writer.number}-0000"
    writer.report(step, {"loss": loss}, saved=Saved(path=path, digest="d", bytes=1))


class PopulationContract:
    """Two members that wait at the end of a generation; trial 1 does worse."""

    def gathered(self, lab: Lab, count: int = 2) -> None:
        for number in range(count):
            writer = lab.started(0.1 * (number + 1))
            for step in range(STEP + 1):
                save(writer, number, step, loss=float(number + 1))
            lab.end(writer, Outcome.PREEMPTED)

    def exploited(self, lab: Lab) -> None:
        self.gathered(lab)
        lab.driver.evolve(0, [change(1, 0, 0.8)])

    def lent(self, lab: Lab) -> list[tuple[int, int]]:
        return [(one.trial, one.step) for one in lab.reader.checkpoints() if one.lent]

    def test_a_member_goes_on_from_another_one(self, lab: Lab) -> None:
        self.exploited(lab)
        trial, attempt = lab.trial(1), lab.trial(1).attempt
        assert (trial.status, trial.config, trial.first) == (TrialStatus.PENDING, {"x": 0.8}, {"x": 0.2})
        assert lab.reader.config(trial.config_id) == {"x": 0.8}
        assert (attempt.number, attempt.parent, attempt.parent_step, attempt.donor) == (2, 1, STEP, (0, 1))
        assert (attempt.reason, attempt.note) == ("exploit", "goes on from trial 0 at step 1: x 0.5 -> 0.8")
        assert lab.attempts(1)[2] == attempt
        assert (trial.step, trial.metrics) == (STEP, {"loss": 2.0})  # its own
        assert [(one.trial, one.attempt, one.step) for one in lab.reader.candidates(1, 2)] == [(0, 1, 1), (1, 1, 1), (1, 1, 0)]
        assert (lab.trial(0).first, lab.trial(0).attempt.donor, lab.trial(0).config) == (None, None, {"x": 0.1})
        assert lab.reader.generations() == 1
        told = lab.reader.audit()[-1]
        assert (told.action, told.detail["generation"]) == ("evolved", 0)
        member = {"trial": 1, "attempt": 2, "from_trial": 0, "from_attempt": 1, "from_step": 1, "changes": {"x": [0.5, 0.8]}}
        assert told.detail["members"] == [member]

    def test_a_generation_is_evolved_once(self, lab: Lab) -> None:
        self.exploited(lab)
        before = dump(lab.database)
        for generation in (0, 2):
            with pytest.raises(Conflict, match="1 generations were"):
                lab.driver.evolve(generation, [change(1, 0, 0.9)])
        assert dump(lab.database) == before
        lab.driver.evolve(1, [])
        assert lab.reader.generations() == 2

    def test_who_does_not_wait_is_refused_and_nothing_is_written(self, lab: Lab) -> None:
        self.gathered(lab, 3)
        running = lab.claim(2)
        before = dump(lab.database)
        for refused in (
            [change(1, 0, 0.8), change(2, 0, 0.8)],
            [change(1, 2, 0.8)],
            [change(1, 7, 0.8)],
            [Change(trial=1, donor=0, step=0, config={"x": 0.8})],
        ):
            with pytest.raises(Conflict):
                lab.driver.evolve(0, refused)
            assert dump(lab.database) == before
        running.check()

    def test_history_is_the_members_own(self, lab: Lab) -> None:
        self.exploited(lab)
        writer = lab.claim(1)
        save(writer, 1, 2, loss=0.5)
        rows = [(row.step, row.attempt, row.metrics) for row in lab.reader.history() if row.trial == 1 and row.canonical]
        assert rows == [(0, 1, {"loss": 2.0}), (1, 1, {"loss": 2.0}), (2, 2, {"loss": 0.5})]

    @pytest.mark.parametrize("end", ["lost", "retry"])
    def test_who_is_interrupted_before_its_first_checkpoint_begins_there_again(self, lab: Lab, end: str) -> None:
        self.exploited(lab)
        writer = lab.claim(1)
        writer.report(2, {"loss": 0.5})
        if end == "lost":
            lab.end(writer, Outcome.LOST)
            lab.driver.rerun(lab.row(1), restart=False)  # as a restore does
        else:
            assert writer.fail(FAILED, max_failures=1) is TrialStatus.PENDING
        again = lab.trial(1)
        assert (again.config, again.attempt.number, again.attempt.donor) == ({"x": 0.8}, 3, (0, 1))
        assert (again.step, again.metrics) == (STEP, {"loss": 2.0})
        candidates = [(one.trial, one.attempt, one.step) for one in lab.reader.candidates(1, 3)]
        assert candidates == [(0, 1, 1), (1, 1, 1), (1, 1, 0)]
        assert self.lent(lab) == [(0, STEP)]

    def test_with_a_checkpoint_of_its_own_it_goes_on_from_that(self, lab: Lab) -> None:
        self.exploited(lab)
        writer = lab.claim(1)
        save(writer, 1, 2, loss=0.5)
        lab.end(writer, Outcome.LOST)
        attempt = lab.trial(1).attempt
        assert (attempt.parent, attempt.parent_step, attempt.donor) == (2, 2, None)
        assert lab.trial(1).config == {"x": 0.8}
        candidates = [(one.trial, one.attempt, one.step) for one in lab.reader.candidates(1, 3)]
        assert candidates == [(1, 2, 2), (0, 1, 1), (1, 1, 1), (1, 1, 0)]

    def test_what_is_lent_is_not_pruned(self, lab: Lab) -> None:
        self.exploited(lab)
        assert self.lent(lab) == [(0, STEP)]
        donor, writer = lab.claim(0), lab.claim(1)
        save(donor, 0, 2, loss=0.1)
        checkpoints = {one.step: one.id for one in lab.reader.checkpoints(first=0, last=0)}
        requests.pin(lab.database, lab.id, 0, STEP)
        requests.pin(lab.database, lab.id, 0, STEP, pinned=False)  # what a person does is another matter
        assert donor.forget([checkpoints[STEP]]) == set()
        writer.report(2, {"loss": 0.5})
        writer.give_back()
        assert self.lent(lab) == [(0, STEP)]  # it has saved nothing yet
        save(writer, 1, 3, loss=0.5)
        writer.give_back()
        assert self.lent(lab) == []
        assert donor.forget([checkpoints[STEP]]) == {checkpoints[STEP]}

    @pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "next generation"])
    def test_what_was_lent_is_given_back(self, lab: Lab, end: str) -> None:
        self.exploited(lab)
        requests.pin(lab.database, lab.id, 0, STEP)
        match end:
            case "completed":
                lab.end(lab.claim(1), loss=1.0)
            case "failed":
                lab.claim(1).fail(FAILED, max_failures=0)
            case "cancelled":
                lab.driver.cancel(lab.row(1))
            case _:
                save(lab.claim(1), 1, 2, loss=0.5)
                lab.driver.evolve(1, [])
        assert self.lent(lab) == []
        assert [one.step for one in lab.reader.checkpoints() if one.pinned] == [STEP]  # as a person asked

    def test_a_bad_one_is_not_gone_on_from(self, lab: Lab) -> None:
        self.exploited(lab)
        first = lab.reader.candidates(1, 2)
        attempt = lab.trial(1).attempt.id
        AttemptWriter.claim(
            lab.database, lab.id, 1, attempt, token="t", resumed=first[1], rejected={first[0].id: "torn"}, note="torn"
        )
        trial = lab.trial(1)
        assert (trial.config, trial.attempt.parent, trial.attempt.donor) == ({"x": 0.8}, 1, None)
        assert (trial.attempt.note, trial.attempt.parent_step) == ("torn", STEP)
        bad = next(one for one in lab.reader.checkpoints() if (one.trial, one.step) == (0, STEP))
        assert (bad.status, bad.reason) == (CheckpointStatus.CORRUPT, "torn")

    def test_a_restarted_member_has_its_first_config(self, lab: Lab) -> None:
        self.exploited(lab)
        lab.claim(1).fail(FAILED, max_failures=0)
        lab.driver.rerun(lab.row(1), restart=True)
        trial = lab.trial(1)
        assert (trial.config, trial.first, trial.attempt.parent) == ({"x": 0.2}, None, None)
        assert lab.reader.candidates(1, trial.attempt.number) == []

    def test_a_waiting_member_that_is_restarted_has_its_first_config(self, lab: Lab) -> None:
        self.exploited(lab)
        lab.driver.rerun(lab.row(1), restart=True)
        trial = lab.trial(1)
        assert (trial.attempt.number, trial.config, trial.attempt.donor) == (2, {"x": 0.2}, None)

    def test_an_ended_member_is_listed_with_what_it_ran_last(self, lab: Lab) -> None:
        from holdfast.storage.database.loading import load

        self.exploited(lab)
        writer = lab.claim(1)
        save(writer, 1, 2, loss=0.5)
        lab.driver.end(writer.attempt, Ending(outcome=Outcome.COMPLETED))
        assert load(lab.reader)[:3] == ([1], [{"x": 0.8}], [{"loss": 0.5}])
